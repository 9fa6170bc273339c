"""The report page without a browser: its numbers by hand, its text escaped, written whole or not at all."""

import base64
import hashlib
import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from helpers import CONTEXT, HOOK, VOCABULARY, make_sae
from report_examples import EVIL, SECTIONS, everything, evil_report
from sae_lens import SAE, TopKSAE, TopKSAEConfig

from saelens_cosine.metrics.dictionary.features import Context, TokenValue, feature_dashboards, top_activations
from saelens_cosine.report.html import ReportData, features_for_report, norm_charts, render, write_report
from saelens_cosine.report.html import charts as chart_module
from saelens_cosine.report.html.data import (
    SCHEMA,
    Arm,
    Curve,
    Difference,
    Estimate,
    Feature,
    MatchedFeatures,
    MatchedPair,
    NormQuartiles,
    PrecisionCurve,
    Probing,
    ScaleResponse,
    ZFPoints,
)
from saelens_cosine.report.html.svg import Axis, Chart, axis, short


class Outline(HTMLParser):
    """Tags with their attributes in order, and all text outside scripts and styles."""

    def __init__(self, page: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text, self._hidden = "", False
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self._hidden = tag in ("script", "style")

    def handle_endtag(self, tag):
        self._hidden = False

    def handle_data(self, data):
        self.text += "" if self._hidden else data

    def named(self, tag, class_name=None):
        return [
            a for t, a in self.tags if t == tag and (class_name is None or class_name in (a.get("class") or "").split())
        ]


def browser_data(page: str):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1])


# --- the data


def test_data_survives_json_and_nan_becomes_null():
    data = replace(everything(), quartiles=(NormQuartiles("one", "out", (Estimate(math.nan, None, math.inf),)),))
    plain = json.loads(json.dumps(data.to_dict(), allow_nan=False))
    assert plain["schema"] == SCHEMA == "saelens-cosine/report/2"
    assert plain["quartiles"][0]["fve"] == [[None, None, None]]
    back = ReportData.from_dict(plain)
    assert math.isnan(back.quartiles[0].fve[0].value)
    assert back.quartiles[0].fve[0][1:] == (None, None)
    assert replace(back, quartiles=data.quartiles) == data


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": "other/2"}, "'other/2'"),
        ({"colour": 1}, r"report has \['colour'\]"),
        ({"title": 5}, "report.title is 5"),
        ({"arms": [{"metrics": {}}]}, r"report.arms\[0\]: .*name"),
        ({"arms": [{"name": "a", "metrics": {"FVE": [1, 2]}}]}, r"metrics\['FVE'\] has 2 items; Estimate is"),
        ({"quartiles": [{"arm": "a", "sinks": "maybe", "fve": []}]}, r"quartiles\[0\].sinks is 'maybe'"),
        ({"features": "none"}, "report.features is 'none'"),
    ],
)
def test_other_data_is_refused_with_its_place(change, message):
    with pytest.raises(ValueError, match=message):
        ReportData.from_dict({**ReportData("t").to_dict(), **change})


def test_arms_are_ordered_by_the_comparison_then_by_mention():
    data = ReportData(
        "t",
        arms=(Arm("b"), Arm("a")),
        probing=(Probing("task", "c", "1", Estimate(0.5)),),
        matches=(MatchedFeatures("a", "d", (), 0, 0, 0),),
    )
    assert data.arm_names() == ("b", "a", "c", "d")


# --- scales and marks


def test_places_on_axes():
    assert Axis("", 2.0, 6.0).place(3.0) == 0.25
    assert Axis("", 1.0, 10_000.0, log=True).place(100.0) == pytest.approx(0.5)
    assert [text for _, text in Axis("", 0.0, 1.0).marks()] == ["0", "0.2", "0.4", "0.6", "0.8", "1"]
    assert [text for _, text in Axis("", -0.3, 0.7).marks()] == ["-0.2", "0", "0.2", "0.4", "0.6"]
    assert [text for _, text in Axis("", 0.002, 3.0, log=True).marks()] == ["0.01", "0.1", "1"]
    assert [text for _, text in Axis("", 0.9, 55.0, log=True).marks()] == ["1", "3", "10", "30"]
    assert (short(1_500_000), short(25_000), short(0.25), short(math.nan)) == ("1.5M", "25k", "0.25", "-")


def test_an_axis_holds_its_values_and_ignores_what_is_not_finite():
    found = axis("", [1.0, None, math.nan, 3.0, math.inf], margin=0.1)
    assert (found.low, found.high) == pytest.approx((0.8, 3.2))  # a tenth of the range at both ends
    logarithmic = axis("", [0.0, -5.0, 1.0, 100.0], log=True, margin=0.5)
    assert (logarithmic.low, logarithmic.high) == pytest.approx((0.1, 1000.0))
    for values in ([], [5.0], [0.0]):
        same = axis("", values)
        assert same.low < same.high


def test_marks_lie_where_their_values_are():
    # 172 wide with 58 left and 14 right leaves 100; 160 high with 10 above and 50 below leaves 100
    chart = Chart("name", Axis("x", 0, 10), Axis("y", 0, 1), width=172, height=160)
    assert chart.at(2.5, 0.75) == (25, 25)
    chart.line([(0, 0), (5, 0.5), (6, math.nan), (10, 1), (10, 0)], arm=1)
    chart.whisker((2, 2), (0.25, 0.5), arm=0)
    chart.mark(10, 1, 0, "a & b")
    chart.mark(math.nan, 1, 0, "nowhere")
    drawing = chart.svg()
    assert 'd="M0,100L50,50M100,0L100,100"' in drawing
    assert 'class="whisker s0" d="M20,75L20,50"' in drawing
    assert 'transform="translate(100,0)" data-t="a &amp; b"' in drawing
    assert "nowhere" not in drawing


def test_histogram_counts_by_hand():
    shares = chart_module._histogram([0.0, 0.1, 0.9, 1.0, math.nan], [0.0, 0.5, 1.0])
    assert shares == [0.5, 0.5]  # the last bin holds its upper edge; NaN is in none


def test_zf_bands_have_the_papers_slopes():
    # linear, since 4 / 1 < 20: from (0, 0) to (4.2, 4.2 slope)
    page = norm_charts.zf_plots(ReportData("t", zf=(zf((1.0, 4.0), (1.0, 3.0)),)))[0]
    bands = re.findall(r'class="band" d="M[^L]*L([\d.-]+),([\d.-]+)L([\d.-]+),([\d.-]+)L', page)
    side = 420 - 58 - 14  # the plot is square
    slopes = [((side - float(b)) / side, (side - float(d)) / side) for _, b, _, d in bands]
    expected = [(0.70711, None), (0.81650, 1.41421), (0.89443, 1.15470)]
    assert len(slopes) == 3
    for (under, over), (low, high) in zip(slopes, expected, strict=True):
        assert under == pytest.approx(low, abs=1e-3)
        assert over > 100 if high is None else over == pytest.approx(high, abs=1e-3)


def zf(inputs, codes, sinks="in"):
    """Points of 5,000 tokens, of which more is known than the points say."""
    return ZFPoints("one", inputs, codes, sinks, 5000, 0.812, 0.934, 7)


def test_zf_captions_are_of_all_tokens_and_axes_say_what_is_drawn():
    drawn = norm_charts.zf_plots(ReportData("t", zf=(zf((1.0, 4.0), (1.0, 3.0)),)))[0]
    note = "Median ‖f‖/‖x - b_dec‖ 0.812, 93.4% below the line, of 5,000 tokens, 7 of them without codes; 2 drawn."
    assert note in drawn
    assert "norm of the codes ‖f‖<" in drawn
    assert "norm of the input less b_dec, ‖x - b_dec‖<" in drawn
    assert "‖z‖" not in drawn


def test_zf_axes_are_logarithmic_where_sinks_are_among_the_tokens_and_only_there():
    points = zf((1.0, 2.0), (0.01, 1.0), "out"), zf((10.0, 12.0, 3000.0), (10.0, 9.0, 2000.0))
    without, with_sinks = norm_charts.zf_plots(ReportData("t", zf=points))
    assert re.findall(r">(\d+k?)</t", with_sinks) == ["10", "100", "1k"] * 2
    assert re.findall(r">([\d.]+)</t", without) == ["0", "0.5", "1", "1.5", "2"] * 2  # sinks do not crush them
    assert "one, high-norm tokens out" in without.replace("<wbr>", "")
    assert "one, high-norm tokens in" in with_sinks


def test_scale_responses_are_a_chart_for_each_point_that_stays():
    lines = tuple(
        ScaleResponse("one", about, (0.5, 2.0), (Estimate(value), Estimate(0.5)), 0.75)
        for about, value in (("0", 0.21), ("b_dec", 0.86))
    )
    about_b_dec, about_0 = norm_charts.scale_responses(ReportData("t", scaling=lines))
    for drawn, value in ((about_b_dec, "0.86"), (about_0, "0.21")):
        assert re.findall("<td>(.*?)</td>", drawn) == ["0.750", value, "0.5"]
        assert "‖b_dec‖ / median ‖x‖: one 0.75." in drawn
    assert "what is scored keeps its direction" in about_b_dec
    assert "what is scored turns" in about_0


def test_learning_curves_show_what_follows_the_first_tenth():
    curve = Curve((0.0, 10.0, 50.0, 100.0), (-300.0, 0.5, 0.8, 0.9))
    drawn = chart_module.learning_curves(ReportData("t", arms=(Arm("one", curves={"FVE": (curve, curve)}),)))[0]
    texts = [float(text) for text in re.findall(r'text-anchor="end">([\d.-]+)<', drawn)]
    assert min(texts) == 0.5  # not -300
    assert max(texts) == 0.9
    assert "One line per seed." in drawn
    assert drawn.count('class="line s0"') == 2


def test_exponents_in_numbers():
    arms = (Arm("per feature", exponents=(0.0, 0.2, 0.6, 1.0, math.nan)), Arm("shared", exponents=(0.25,)), Arm("none"))
    drawn = chart_module.exponents(ReportData("t", arms=arms))[0]
    rows = re.findall(r'<th scope="row">(.*?)</th>(.*?)</tr>', drawn)
    assert [name for name, _ in rows] == ["per feature", "shared"]
    assert re.findall("<td>(.*?)</td>", rows[0][1]) == ["4", "0.450", "0.000", "0.400", "1.000", "50.0%"]
    assert re.findall("<td>(.*?)</td>", rows[1][1])[:2] == ["shared", "0.250"]


def test_scatters_are_thinned_at_even_steps_and_say_so(monkeypatch):
    monkeypatch.setattr(chart_module, "MAX_DOTS", 4)
    pairs = tuple(MatchedPair(i, i, i / 10, 0.5, math.nan) for i in range(10))
    drawn = chart_module.matched(ReportData("t", matches=(MatchedFeatures("a", "b", pairs, 30, 20, 3),)))[0]
    assert re.findall(r'data-t="a (\d+) and', drawn) == ["0", "2", "5", "7"]
    assert "20 have a counterpart, 4 of these are drawn." in drawn
    assert "unknown of its firings" in drawn


def test_a_match_has_both_numbers_above_seven_tenths():
    pairs = (MatchedPair(0, 0, 0.7, 0.71, 0), MatchedPair(1, 0, 0.69, 0.9, 0), MatchedPair(2, 0, 0.9, 0.7, 0))
    drawn = chart_module.matched(ReportData("t", matches=(MatchedFeatures("a", "b", pairs, 8, 3, 1),)))[0]
    # of those alive, not of those that have a counterpart
    assert "1 of 8 alive features (12.5%) have both above 0.7. 3 have a counterpart, 3 of these are drawn." in drawn
    assert re.findall('fill="(#......)"', drawn) == ["#00346e"] * 3  # nothing in the top quartile: the ramp's low end


# --- the page


@pytest.mark.parametrize("section", SECTIONS)
def test_a_section_is_there_exactly_if_its_data_are(section):
    there = [a["id"] for a in Outline(render(ReportData("t", **SECTIONS[section]))).named("section")]
    assert there == [section]
    links = [a["href"] for a in Outline(render(ReportData("t", **SECTIONS[section]))).named("a")]
    assert links == [f"#{section}"]


def test_an_empty_report_is_a_page():
    outline = Outline(render(ReportData("Nothing")))
    assert outline.named("section") == outline.named("fieldset") == []
    assert "Nothing" in outline.text


def test_comparison_and_differences_by_hand():
    data = ReportData(
        "t",
        arms=(
            Arm("one", metrics={"FVE": Estimate(0.9, 0.8, 0.95), "seconds": Estimate(67)}),
            Arm("two", metrics={"FVE": Estimate(math.nan)}),
        ),
        differences=tuple(
            Difference("two", "one", f"m{i}", Estimate(0.1, low, high))
            for i, (low, high) in enumerate([(-0.1, 0.3), (0.05, 0.15), (-0.3, -0.1), (None, None), (0.0, 0.2)])
        ),
    )
    page = render(data)
    comparison, differences = re.findall(r"<tbody>(.*?)</tbody>", page)
    cells = [re.sub("<svg.*?</svg>", "", cell) for cell in re.findall("<td>(.*?)</td>", comparison)]
    assert cells == ["0.9000<small>0.8000 to 0.9500</small>", "67", "-", "-"]
    unseen = '<span class="unseen">no difference seen</span>'
    assert re.findall("<td>(.*?)</td>", differences) == [
        f"{unseen}<small>-0.1000 to +0.3000</small>",
        "<b>+0.1000</b><small>+0.0500 to +0.1500</small>",
        "<b>+0.1000</b><small>-0.3000 to -0.1000</small>",
        "+0.1000<small>no interval</small>",
        f"{unseen}<small>+0.0000 to +0.2000</small>",
    ]
    assert "minus one</th>" in page
    assert comparison.count('<svg class="strip') == 1  # of the one value that has an interval


def test_ce_recovered_is_not_shown_without_a_word_on_what_it_misses():
    pages = [
        render(ReportData("t", arms=(Arm("one", metrics={name: Estimate(0.98)}),)))
        for name in ("CE recovered, sinks in", "FVE")
    ]
    assert ["KL is from the model&#x27;s own predictions" in page for page in pages] == [True, False]


def test_differences_are_a_row_per_measure_and_a_column_per_arm():
    """Arms in the report's order, a dash where one was not measured, a table for each baseline."""
    found = tuple(
        Difference(arm, baseline, metric, Estimate(value, value - 0.05, value + 0.05))
        for arm, baseline, metric, value in (
            ("c", "a", "FVE", 0.3),
            ("b", "a", "FVE", 0.2),
            ("b", "a", "L0", 0.1),
            ("c", "b", "FVE", 0.4),
        )
    )
    page = render(ReportData("t", arms=(Arm("a"), Arm("b"), Arm("c")), differences=found))
    tables = re.findall(r'<table class="differences">(.*?)</table>', page)
    heads = [re.sub("<svg.*?</svg>", "", table.split("</thead>")[0]) for table in tables]
    assert [re.findall('<th scope="col">(.*?)</th>', head) for head in heads] == [
        ["minus a", "b", "c"],
        ["minus b", "c"],
    ]
    first, second = (re.findall(r"<td>(?:<b>)?([-+.\d]+)", table) for table in tables)
    assert (first, second) == (["+0.2000", "+0.3000", "+0.1000", "-"], ["+0.4000"])


def test_what_is_not_finite_is_drawn_nowhere():
    bad = Estimate(0.5, -math.inf, math.nan)
    values = (math.nan, math.inf, -math.inf, 0.0)
    data = ReportData(
        "t",
        arms=(
            Arm("one", metrics={"FVE": bad}, curves={"FVE": (Curve((0.0, 1.0, 2.0, 3.0), values),)}, exponents=values),
        ),
        differences=(Difference("one", "two", "FVE", bad),),
        quartiles=(NormQuartiles("one", "in", (bad, Estimate(math.nan))),),
        zf=(ZFPoints("one", values, values, "in", 4, math.nan, math.nan), ZFPoints("two", (), (), "out", 0, 1.0, 0.0)),
        scaling=(ScaleResponse("one", "0", (0.5, 2.0), (bad, Estimate(math.inf)), math.nan),),
        probing=(Probing("task", "one", "1", bad), Probing("task", "two", "1", Estimate(math.nan))),
        precision=(PrecisionCurve("one", (1, 10), (bad, Estimate(math.inf)), (0.0, math.inf), (math.nan, 1.0)),),
        matches=(
            MatchedFeatures(
                "one", "two", (MatchedPair(0, 0, *[math.nan] * 3), MatchedPair(1, 1, *[math.inf] * 3)), 2, 2, 0
            ),
        ),
        features=(
            Feature(
                "one", 0, math.nan, math.inf, (Context(("a", "b"), (math.nan, math.inf)),), (TokenValue("x", math.nan),)
            ),
        ),
    )
    for drawing in re.findall("<svg.*</svg>", render(data)):
        assert not re.search(r'(?:d|transform|cx|cy|x|y|viewBox|height|width)="[^"]*(?:nan|inf)', drawing)
    assert "no interval" in render(data)


def test_all_text_is_escaped(tmp_path):
    path = write_report(evil_report(), tmp_path / "report.html")
    page = path.read_bytes().decode("utf-8")
    outline = Outline(page)
    assert [a.get("type") for a in outline.named("script")] == ["application/json", None]
    assert outline.named("img") == []
    assert all("style" in attributes for attributes in outline.named("i"))  # the colour ramp's, not the arm's name
    assert not any(name.startswith("on") for _, attributes in outline.tags for name in attributes)
    assert outline.text.count(EVIL) > 5
    assert EVIL in browser_data(page)["tokens"]


def test_only_the_pages_own_script_may_run_and_nothing_may_be_fetched():
    page = render(everything())
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)[1].replace("&#x27;", "'")
    script = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy == f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{digest}'"
    assert not re.search(r'(?:src|href)="(?!#|data:)', page)
    assert "http" not in page.replace('http-equiv="', "")


def test_features_are_packed_without_loss_beyond_three_digits():
    contexts = (Context((" a", "b", " a"), (0.0, 12.3456, -0.5)), Context(("b",), (3.0,)))
    data = ReportData("t", arms=(Arm("x"), Arm("y")), features=(Feature("y", 9, 0.123456, 0.123456, contexts),))
    packed = browser_data(render(data))
    assert packed == {
        "arms": ["x", "y"],
        "tokens": [" a", "b"],
        "features": [[1, 9, 0.123, 0.1235, [[[0, 1, 0], [1, 2], [12.3, -0.5]], [[1], [0], [3]]], [], []]],
    }


def test_a_failed_write_leaves_the_old_report(tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    write_report(ReportData("old"), path)
    assert [item.name for item in tmp_path.iterdir()] == ["report.html"]

    def half(self, content):
        with open(self, "wb") as file:
            file.write(content[:100])
        raise OSError("disk full")

    monkeypatch.setattr(Path, "write_bytes", half)
    with pytest.raises(OSError, match="disk full"):
        write_report(ReportData("new"), path)
    assert "<title>old</title>" in path.read_text()


# --- the browser's data from an SAE


def saved_sae(tmp_path, kind):
    if kind == "saelens_topk":
        sae = TopKSAE(TopKSAEConfig(d_in=16, d_sae=13, k=3))
        torch.nn.init.normal_(sae.W_enc)
        torch.nn.init.normal_(sae.W_dec)
        sae.save_model(tmp_path)
    else:
        make_sae(kind, d_in=16, d_sae=13).save_inference_model(tmp_path)
    sae = SAE.load_from_disk(tmp_path)
    sae.cfg.metadata.hook_name = HOOK
    return sae


@pytest.mark.parametrize("kind", ["cosine_batchtopk", "per_feature_cosine_batchtopk", "saelens_topk"])
def test_features_for_report(tmp_path, model, kind):
    sae = saved_sae(tmp_path, kind)
    batches = [torch.randint(1, len(VOCABULARY), (6, CONTEXT)) for _ in range(3)]
    found = features_for_report(sae, model, batches, "arm", n_contexts=3, before=2, after=1, n_logits=2)
    activations = top_activations(sae, model, batches, n_contexts=3)
    alive = activations.active.nonzero().squeeze(1).tolist()
    assert [feature.index for feature in found] == alive
    for feature, whole in zip(found, feature_dashboards(sae, model, activations, alive, 2), strict=True):
        assert feature.arm == "arm"
        assert (feature.density, feature.promotes) == (whole.density, whole.top_logits)
        assert feature.suppresses == whole.bottom_logits
        if kind == "saelens_topk":
            assert feature.exponent is None
        else:
            assert feature.exponent == pytest.approx(sae.norm_exponent.expand(13)[feature.index].item())
        for cut, full in zip(feature.contexts, whole.contexts, strict=True):
            peak = full.values.index(max(full.values))
            assert cut.tokens == full.tokens[max(0, peak - 2) : peak + 2]
            assert cut.values == full.values[max(0, peak - 2) : peak + 2]


def test_features_are_taken_at_even_steps_or_as_asked(tmp_path, model):
    sae = saved_sae(tmp_path, "cosine_batchtopk")
    batches = [torch.randint(1, len(VOCABULARY), (16, CONTEXT)) for _ in range(3)]
    alive = top_activations(sae, model, batches).active.nonzero().squeeze(1).tolist()
    n = len(alive)
    assert n > 3
    three = [feature.index for feature in features_for_report(sae, model, batches, "arm", max_features=3)]
    assert three == [alive[0], alive[round((n - 1) / 2)], alive[-1]]
    asked = [feature.index for feature in features_for_report(sae, model, batches, "arm", features=[5, 2])]
    assert asked == [5, 2]

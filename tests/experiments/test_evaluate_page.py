"""What an evaluation found is in its JSON, in the terminal and on the page, whatever the eval."""

import dataclasses
import functools
import html
import io
import json
import math
from datetime import datetime
from pathlib import Path

import pytest
import torch
from page_parts import charts, content, table
from rich.console import Console
from sae_lens import SAE
from saved_evaluations import TASKS, with_evals

from saelens_cosine.cli import main
from saelens_cosine.experiments.evaluate.command import as_tables
from saelens_cosine.experiments.evaluate.evals import EVALS, BySinks, Eval, NotMeasured
from saelens_cosine.experiments.evaluate.evals.of_sae import afa
from saelens_cosine.experiments.evaluate.evals.of_text import patching
from saelens_cosine.experiments.evaluate.page import evaluation_page
from saelens_cosine.experiments.evaluate.results.evaluation import Measured, mean_figures
from saelens_cosine.experiments.evaluate.results.listing import tokens_measured
from saelens_cosine.experiments.evaluate.run import evaluate
from saelens_cosine.experiments.evaluate.subject import Subject
from saelens_cosine.files.secrets import published
from saelens_cosine.metrics.intervals import Difference
from saelens_cosine.metrics.norm_ranges import ByNorm, WithAndWithoutTop
from saelens_cosine.metrics.probing.decomposition import Decomposition
from saelens_cosine.metrics.reconstruction.loss_recovered import LossRecovered, PredictionLoss
from saelens_cosine.plain import plain
from saelens_cosine.report.page import render, write_page
from saelens_cosine.saebench.results import EvalResult

pytestmark = pytest.mark.usefixtures("short_text")


def test_the_zf_plot_draws_codes_without_b_dec_and_tells_of_all_tokens(run, tmp_path, monkeypatch):
    sae = SAE.load_from_disk(run[1][0])
    sae.b_dec.data.fill_(1.0)  # of norm 192 ** 0.5
    sae.save_model(tmp_path / "sae")
    monkeypatch.setattr(afa, "POINTS", 50)
    seen: list[Subject] = []
    monkeypatch.setitem(EVALS, "remember", Eval("remember", "sae", "", lambda subject: seen.append(subject) or {}))
    found = evaluate([str(tmp_path / "sae")], with_evals("afa", "remember"), tmp_path / "out")
    document = found.document()
    sample = seen[0].text.sample
    x = sample.activations[sample.ordinary].double()
    with torch.no_grad():
        codes = sae.encode(x.float()).to_dense().double()
    f = (codes * sae.W_dec.double().norm(dim=-1)).norm(dim=-1).detach()  # rows of the decoder are no unit vectors
    z = (x - sae.b_dec.double()).norm(dim=-1).detach()
    plots = charts(evaluation_page(found), "afa")
    assert list(plots) == ["sae, sinks out", "sae, sinks in"]
    plot = plots["sae, sinks out"]
    dots = plot.figure.data[-1]
    assert len(dots.y) == 50
    drawn, pairs = torch.tensor([dots.x, dots.y], dtype=torch.float64).T, torch.stack([z, f], dim=1)
    nearest = torch.cdist(drawn, pairs).min(dim=1).values
    assert (nearest / drawn.norm(dim=1)).max() < 1e-3
    ((_, tokens, _, ratio, below),) = plot.table.rows
    assert tokens == f"{len(x):,}"
    assert ratio.value == pytest.approx((f / z).quantile(0.5).item(), rel=1e-4)
    assert below.value == pytest.approx((f < z).double().mean().item(), abs=2 / len(x))
    assert f"{below.value:.1%} below the line, of {tokens} tokens" in plot.note
    papers = document["saes"][0]["results"]["afa"]["zf_points"]
    assert (papers["bias"], min(papers["feature_norm"]) >= 192**0.5 - 1e-3) == ("augment", True)


def test_the_zf_plot_survives_an_sae_whose_codes_are_not_finite(run, tmp_path):
    sae = SAE.load_from_disk(run[1][0])
    sae.W_dec.data.fill_(3e38)  # finite, as what is loaded must be, and its norm is not
    sae.save_model(tmp_path / "sae")
    found = evaluate([str(tmp_path / "sae")], with_evals("afa"), tmp_path / "out")
    plots = charts(evaluation_page(found), "afa")
    assert list(plots) == ["sae, sinks out", "sae, sinks in"]
    for plot in plots.values():
        assert set(plot.figure.data[-1].y) == {None}
        assert not math.isfinite(plot.table.rows[0][3].value)
    write_page(evaluation_page(found), tmp_path / "report.html")


def test_page_has_both_saes_and_both_treatments(run):
    page = evaluation_page(run[2])
    assert page.arms.names == ("one", "two")
    quartiles = charts(page, "reconstruction")
    assert list(quartiles) == ["FVE by norm, sinks in", "FVE by norm, sinks out"]
    for chart in quartiles.values():
        assert [row[0] for row in chart.table.rows] == ["one", "two"]
    assert quartiles["FVE by norm, sinks in"].note == f"{19 * 32} tokens."
    exponents = charts(page, "dictionary")["Norm exponents"].table.rows
    assert [(row[1], row[2].value) for row in exponents] == [("shared", pytest.approx(0.7))] * 2  # `randomize`
    assert list(charts(page, "matching")) == ["two → one"]
    n = len(run[2].saes[0].results["reconstruction"].fve_by_document.documents)
    assert n >= 10
    assert list(table(page, "differences")) == [f"FVE, sinks {sinks} ({n} documents)" for sinks in ("in", "out")]


def test_the_page_says_whether_there_are_intervals_over_seeds(run):
    page = evaluation_page(run[2])
    assert page.sections[0].about.startswith("Means over an arm's seeds, of which each has one.")
    seeds = tuple(dataclasses.replace(entry, arm="one", seed=i) for i, entry in enumerate(run[2].saes))
    found = dataclasses.replace(run[2], saes=seeds)
    assert "with their 95 % intervals" in evaluation_page(found).sections[0].about
    assert table(evaluation_page(found), "comparison")["FVE, sinks in"]["one"].bounds


DIAGNOSTICS = tuple(name for name in EVALS if not EVALS[name].about.startswith("SAEBench"))


@pytest.fixture(scope="module")
def everything(run, tmp_path_factory):
    """All diagnostics of two random SAEs, from one run, with few pairs of tokens to patch."""
    settings = with_evals(
        *DIAGNOSTICS,
        task_texts=24,
        causal_contexts=12,
        causal_features=3,
        concept_texts=4,
        loss_tokens=512,
        tasks=TASKS,
    )
    few = functools.partial(patching.direction_norm_patching, pairs=20, control_pairs=10, rescaled_tokens=10)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(patching, "direction_norm_patching", few)
        return evaluate(run[1], settings, tmp_path_factory.mktemp("everything"))


def test_every_diagnostic_runs_and_shows_on_the_page(everything, tmp_path):
    page, document = evaluation_page(everything), everything.document()
    drawn = ["reconstruction", "norm_response", "dictionary", "afa", "probing", "causal", "matching"]
    tables = ["comparison", "differences", "saes"]
    there = [section.id for section in page.sections if section.content]
    assert there == [*tables, *drawn, "figures", "features"]  # the browser, which is long, is the last
    assert all(charts(page, section) for section in drawn)
    for entry in document["saes"]:
        left_out = {name for name, result in entry["results"].items() if "not_applicable" in result}
        assert left_out <= {"decomposition"}  # random dictionaries have no feature in common
        assert set(entry["seconds"]) == set(entry["results"])
    assert set(document["texts"][0]["results"]) == {"tokens", "patching", "probing_baseline"}
    assert write_page(page, tmp_path / "report.html").stat().st_size < 8_000_000


def test_each_eval_says_its_tokens_and_matches_are_of_alive_features(everything):
    page = evaluation_page(everything)
    for measured, entry in zip(everything.saes, everything.document()["saes"], strict=True):
        ordinary = entry["results"]["reconstruction"]["without_sinks"]["by_norm"]["all_norms"]["overall"]["tokens"]
        sample = f"608 ({ordinary:,} without sinks)"
        counts = tokens_measured([measured])
        assert {
            name: counts.pop(name) for name in ("reconstruction", "norm_response", "dictionary", "afa")
        } == dict.fromkeys(("reconstruction", "norm_response", "dictionary", "afa"), sample)
        assert counts["loss"] == "512"  # one batch of 16 contexts; sinks are passed through
        assert counts["causal"].startswith(f"{12 * 32} (")
        assert counts["probing"] == f"{sum(entry['results']['probing']['texts'])} texts"
        assert "loss 512" in page.facts["tokens"]
        found = measured.compared
        assert found["active-set overlap at half scale, about b_dec, sinks in"].number == pytest.approx(
            entry["results"]["norm_response"]["with_sinks"]["response_about_b_dec"]["at_scales"][0]["overlap"]
        )
    scaled = charts(page, "norm_response")
    assert [title.split(":")[0] for title in scaled] == ["About b_dec", "About 0"]
    assert all([row[0] for row in chart.table.rows] == ["one", "two"] for chart in scaled.values())
    found = everything.saes[1].results["matching"].without_sinks
    chart = charts(page, "matching")["two → one"]
    counted = found.features
    assert chart.table.rows[0][1:4] == tuple(f"{n:,}" for n in (counted.alive, counted.paired, counted.matched))
    assert counted.alive >= counted.paired == len(found.pairs.features)  # all of them are listed, being few
    assert sum(len(trace.x) for trace in chart.figure.data) == counted.paired
    assert chart.figure.data[0].customdata[0].startswith("1/")  # features of the second arm


@pytest.mark.parametrize("name", DIAGNOSTICS)
def test_a_result_is_what_it_was_when_it_is_read_again(name, everything):
    for entry in (*everything.texts, *everything.saes):
        if name in entry.results:
            result = entry.results[name]
            again = EVALS[name].read(json.loads(json.dumps(plain(result))))
            assert type(again) is type(result)
            assert plain(again) == plain(result)
            if not isinstance(result, NotMeasured):
                figures = [list(EVALS[name].figures(of)) for of in (result, again)]
                assert str(figures[0]) == str(figures[1])


GAP = Difference(0.0625, None, None, False, (5,))
PART = Decomposition(2, GAP, dataclasses.replace(GAP, mean=0.03125), 0.5, None, ((0.5,),), (1, 1))
CORE = {
    "metrics": {"part.score": 0.125},
    **dict.fromkeys(("metrics_without_high_norm", "high_norm_share", "max_norm_multiple", "variance_explained")),
    **{
        "config": {},
        "versions": {},
        "seconds": 1.0,
        "silence_padding": False,
        "file": None,
        "file_without_high_norm": None,
    },
}


def by_hand(name):
    """Results of evals that random dictionaries have none of, or that take long."""
    return BySinks(with_sinks=(PART,)) if name == "decomposition" else EvalResult(eval=name, sae="one", **CORE)


VALUES = {"decomposition": ("probing gap to the first arm k=2, sinks in", "0.0625")}


@pytest.mark.parametrize("name", EVALS)
def test_what_an_eval_found_is_in_the_json_in_the_terminal_and_on_the_page(name, everything):
    found = everything
    if name not in DIAGNOSTICS or name == "decomposition":
        saes = tuple(dataclasses.replace(entry, results={name: by_hand(name)}) for entry in found.saes)
        settings = dataclasses.replace(found.settings, evals=(name,))
        found = dataclasses.replace(found, settings=settings, saes=saes)
    document = found.document()
    named = [name_of for entry in document["texts"] + document["saes"] for name_of in entry["figures"].get(name, {})]
    assert named
    console = Console(width=400, file=io.StringIO())
    for printed in as_tables(found):
        assert printed.row_count
        console.print(printed)
    page = html.unescape(render(evaluation_page(found)).replace("<wbr>", ""))
    for figure in named:
        assert figure in page
        assert figure.removesuffix(", sinks in").removesuffix(", sinks out") in console.file.getvalue()
    figure, value = VALUES.get(name, (named[0], None if name in DIAGNOSTICS else "0.125"))
    if value:
        (line,) = (line for line in console.file.getvalue().splitlines() if figure in line)
        assert line.split()[-2:] == [value] * 2  # of both arms
        assert f'{figure}</td><td class="number">{value}0</td><td class="number">{value}0</td>' in page


def test_no_table_is_empty_and_the_reason_is_told_where_an_eval_does_not_apply(run, tmp_path):
    found = evaluate(run[1], with_evals("decomposition", tasks=TASKS[:1], task_texts=20), tmp_path)
    tables = as_tables(found)
    assert [table.title for table in tables] == ["Left out"]
    reason = "No feature has a mutual match in the SAE that it is compared with."
    assert [list(column.cells) for column in tables[0].columns] == [["two"], ["decomposition"], [reason]]
    assert (("decomposition", "two", reason),) == tuple(content(evaluation_page(found), "figures")[-1].rows)
    assert reason in render(evaluation_page(found))


def test_means_over_seeds_are_by_hand_and_what_is_not_finite_stays_so():
    def seed(kl, ce):
        loss = PredictionLoss(10, 0, 1.0, 1.0, 2.0, ce, kl, None, None)
        result = BySinks(with_sinks=LossRecovered(WithAndWithoutTop(*[ByNorm(loss, ())] * 2, 1.0, 0), 1.0, None))
        return Measured(results={"loss": result}, seconds={})

    entries = [seed(1.0, 0.5), seed(2.0, math.nan), Measured(results={}, seconds={})]
    means = mean_figures(entries)["loss"]
    assert means["KL, nats, sinks in"] == 1.5
    assert math.isnan(means["CE recovered, sinks in"])


def test_the_page_says_what_each_sae_is(run, tmp_path):
    sae = SAE.load_from_disk(run[1][0])
    metadata = sae.cfg.metadata
    metadata.training_tokens, metadata.lr, metadata.recipe = 300_000, 5e-3, "paper"
    metadata.max_norm_multiple, metadata.high_norm_share_dropped = 10.0, 0.0123
    sae.save_model(tmp_path / "told")
    del sae.cfg.metadata.training_tokens, metadata.lr, metadata.recipe, metadata.max_norm_multiple
    sae.save_model(tmp_path / "untold")
    found = evaluate([str(tmp_path / "told"), str(tmp_path / "untold")], with_evals("tokens"), tmp_path / "out")
    document = found.document()
    same, told = content(evaluation_page(found), "saes")
    known = {
        "arm": "told",
        "seed": "0",
        "architecture": "cosine_topk",
        "trained as": "cosine_topk",
        "features": "64",
        "selector": "k = 3",
        "training tokens": "300,000",
        "learning rate": "0.005",
        "recipe": "paper",
        "norm filter in training": "above 10 times the median: 1.23% of the tokens dropped",
        "text": "maybe trained on",
        "place": "told",
        "sha256": document["saes"][0]["sha256"][:12],
    }
    of_both = ("architecture", "trained as", "features", "selector", "text")
    assert same == f"The same of all: {'; '.join(f'{name} {known.pop(name)}' for name in of_both)}."
    unknown = dict.fromkeys(("training tokens", "learning rate", "recipe", "norm filter in training"), "-")
    names = {"arm": "untold", "place": "untold", "sha256": document["saes"][1]["sha256"][:12]}
    rows = [dict(zip(told.headings, row, strict=True)) for row in told.rows]
    # places on this machine are cut when the page is written
    assert [row | {"place": Path(row["place"]).name} for row in rows] == [known, known | unknown | names]
    page = render(evaluation_page(found)).replace("<wbr>", "")
    assert all(f">{value}<" in page for value in known.values())
    assert datetime.fromisoformat(document["date"]).tzinfo is not None
    assert document["date"] in page


def test_the_command_is_told_without_secrets(run, tmp_path):
    flags = ["--tokens", "600", "--context-size", "32", "--evals", "tokens", "--output", str(tmp_path), "--quiet"]
    url = "https://me:pass@word@judge:8000/v1?key=secret#part"
    assert main(["evaluate", f"an arm={run[1][0]}", *flags, "--judge-url", url]) == 0
    document = json.loads((tmp_path / "evaluation.json").read_text())
    told = f"saelens-cosine evaluate 'an arm={run[1][0]}' {' '.join(flags)} --judge-url https://judge:8000/v1"
    assert document["command"] == told
    assert published(told) in html.unescape((tmp_path / "report.html").read_text())
    for secret in ("pass", "word@", "secret"):
        assert not [path for path in tmp_path.rglob("*.*") if path.is_file() and secret in path.read_text()], secret

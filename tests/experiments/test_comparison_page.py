"""The page and the picture of a comparison, of every shape of grid."""

import math
from dataclasses import replace

import pytest
from made_comparisons import ARMS, failed, made_comparison
from page_parts import charts, content, table
from PIL import Image

from saelens_cosine.experiments.compare.summary.page import comparison_page, write_page
from saelens_cosine.experiments.compare.summary.picture import draw
from saelens_cosine.metrics.matched import OUTSIDE
from saelens_cosine.metrics.reconstruction.by_norm import Reconstruction
from saelens_cosine.report.chart import Chart
from saelens_cosine.report.table import Table

INNER, COSINE, PER_FEATURE = ARMS
HOOK = "blocks.3.hook_resid_post"


def shown(page):
    """Sections that the page shows."""
    return [section.id for section in page.sections if section.content]


def tables(page, section):
    return [item for item in content(page, section) if isinstance(item, Table)]


def test_one_k_and_one_seed_make_a_page_without_empty_parts():
    page = comparison_page(made_comparison(ks=(32,), seeds=1))
    assert shown(page) == ["results", "activations", "training", "norms"]
    assert list(table(page, "results")) == ["FVE", "L0", "dead", "CE recov.", "training seconds"]
    assert table(page, "results")["FVE"][COSINE].bounds is None
    assert page.sections[0].about.startswith("One seed, so no intervals.")
    for section in page.sections:
        for item in section.content:
            if isinstance(item, Chart):
                assert any(y is not None for trace in item.figure.data for y in trace.y), item.title
    assert page.facts["learning rate"] == "the recipe's"


def test_several_seeds_have_intervals_and_paired_differences():
    page = comparison_page(made_comparison(ks=(32,)))
    assert shown(page) == ["results", "differences", "activations", "training", "norms"]
    assert table(page, "results")["FVE"][COSINE].bounds
    row = table(page, "differences")[COSINE]
    assert row["FVE"].value == pytest.approx(-0.01, abs=0.004)
    assert row["FVE"].bounds
    assert "would by chance" in content(page, "differences")[-1]


def test_several_ks_are_drawn_against_l0_in_bands_and_matched():
    page = comparison_page(made_comparison())
    assert shown(page) == ["results", "curves", "matched", "differences", "activations", "training", "norms"]
    drawn = charts(page, "curves")
    assert list(drawn) == ["FVE against L0", "CE loss recovered against L0", "Share of dead features against L0"]
    traces = [trace for trace in drawn["FVE against L0"].figure.data if trace.meta["arm"] == 1]
    band, line = traces
    assert (band.fill, len(band.x), band.fillcolor) == ("toself", 6, "#d55e0021")
    assert list(line.x) == pytest.approx([16.16, 32.32, 64.64], rel=0.01)
    assert list(line.y) == pytest.approx([0.59, 0.64, 0.69], abs=0.004)
    at_fve, at_l0 = tables(page, "matched")
    rows = {(row[0], row[1].split()[1][:5]): dict(zip(at_fve.headings, row, strict=True)) for row in at_fve.rows}
    assert rows[COSINE, "(k=32"]["CE recov."].value == pytest.approx(0.005, abs=0.006)
    outside = rows[COSINE, "(k=64"]
    assert {outside[title] for title in ("CE recov.", "dead", "L0", "FVE, Q1")} == {OUTSIDE}
    assert "above what the arm reaches; 0 of 3 seeds inside" in outside[f"FVE of {INNER}"]
    assert at_l0.headings[1] == f"L0 of {INNER}"
    assert "Intervals hold the interpolation's error" in content(page, "matched")[-1]


def test_several_hooks_each_have_their_own_tables_and_charts():
    page = comparison_page(made_comparison(layers=(1, 3), rates=(1e-3, 3e-3)))
    assert len(tables(page, "results")) == len(tables(page, "differences")) == 2
    assert len(tables(page, "matched")) == 4
    assert f"At {HOOK}:" in content(page, "results")
    for section, each in (("curves", 3), ("rates", 1), ("training", 2), ("norms", 1)):
        assert len(charts(page, section)) == 2 * each, section
    assert page.facts["learning rate"] == "each arm's best of 0.001, 0.003"
    rates = charts(page, "rates")[f"FVE by learning rate at {HOOK}"]
    assert [row[0] for row in rates.table.rows] == list(ARMS)
    assert [row[-1] for row in rates.table.rows] == ["0.003"] * 3


def test_what_activations_are_like_stands_beside_each_other_by_hook():
    comparison = made_comparison(layers=(1, 3))
    rows = table(comparison_page(comparison), "activations")
    one, three = "blocks.1.hook_resid_post", HOOK
    assert rows["gamma without sinks"][three].value == 0.75
    assert [rows["sinks: above 10 times the median"][hook] for hook in (one, three)] == ["0.00%", "0.81%"]
    assert [rows["their positions"][hook] for hook in (one, three)] == ["-", "0 (98%), 1 (2%)"]
    assert rows["their largest norm"][three].value == 4321
    assert rows["dropped in training"][one] == "0.78%"
    old = replace(comparison, hooks=tuple(replace(hook, site=None) for hook in comparison.hooks))
    assert list(table(comparison_page(old), "activations")) == ["size", "dropped in training", "dropped in evaluation"]


def test_exponents_have_a_band_where_features_have_their_own():
    drawn = charts(comparison_page(made_comparison(ks=(32,), seeds=1)), "training")["Norm exponents"]
    assert [trace.meta["arm"] for trace in drawn.figure.data] == [1, 2, 2]
    assert [bool(trace.fill) for trace in drawn.figure.data] == [False, True, False]
    cells = {row[0]: [cell.value for cell in row[2:]] for row in drawn.table.rows}
    assert cells == {COSINE: pytest.approx([0.3, 0.3, 0.3]), PER_FEATURE: pytest.approx([0.6, 0.4, 0.8])}
    alone = comparison_page(made_comparison(ks=(32,), seeds=1, arms=(INNER,)))
    assert list(charts(alone, "training")) == ["FVE in training"]
    assert shown(alone) == ["results", "activations", "training", "norms"]


def test_what_failed_or_is_not_finite_stands_above_everything():
    comparison = failed(made_comparison(), COSINE, 64, seed=1)
    page = comparison_page(comparison)
    assert page.warnings == (f"{COSINE}, k=64, seed 1: stopped after 5,000 tokens and not measured: the loss is NaN",)
    nothing = Reconstruction(10_000, math.nan, math.nan, math.nan, comparison.arms[0].reconstruction.by_norm, 7)
    arms = (replace(comparison.arms[0], reconstruction=nothing), *comparison.arms[1:])
    bad = comparison_page(replace(comparison, arms=arms))
    assert f"{INNER}, k=16, seed 0: 7 of 10,000 tokens not finite, its figures are missing" in bad.warnings


SHAPES = {
    "one k, one seed": {"ks": (32,), "seeds": 1},
    "a grid": {"layers": (1, 3), "rates": (1e-3, 3e-3), "seeds": 2},
    "one arm": {"arms": (COSINE,), "seeds": 1},
    "sinks kept": {"ks": (32,), "max_norm_multiple": None, "plant_sinks": True},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_is_written_and_drawn(shape, tmp_path):
    comparison = made_comparison(**SHAPES[shape])
    write_page(comparison, tmp_path / "comparison.html")
    html = (tmp_path / "comparison.html").read_text()
    assert html.startswith("<!doctype html>")
    assert "nan" not in html.split("</header>")[0]
    draw(comparison, tmp_path / "comparison.png")
    width, height = Image.open(tmp_path / "comparison.png").size
    assert width / height > (2.5 if len(comparison.hooks) == 1 else 1)


def test_a_grid_that_has_only_begun_is_written_and_drawn(tmp_path):
    whole = made_comparison(layers=(1, 3))
    begun = replace(whole, arms=whole.arms[:3])  # the first hook's first k and seed
    page = comparison_page(begun)
    assert [row[0] for row in tables(page, "results")[0].rows][:2] == ["FVE", "L0"]
    draw(begun, tmp_path / "comparison.png")
    only_last = replace(whole, arms=whole.arms[-9:-8])  # not the middle k, and one arm
    assert charts(comparison_page(only_last), "norms")
    draw(only_last, tmp_path / "comparison.png")

"""Arms of a comparison at the control's FVE and L0, from figures that are known by formula (`made_comparisons`)."""

import io
import json
import math
from dataclasses import replace

import pytest
from made_comparisons import ARMS, ce, failed, fve, made_comparison
from rich.console import Console

from saelens_cosine.experiments.compare.summary.matched import as_json, as_tables, matched
from saelens_cosine.experiments.compare.summary.page import write_page
from saelens_cosine.metrics.matched import OUTSIDE
from saelens_cosine.plain import plain

INNER, COSINE, PER_FEATURE = ARMS


def one(comparison, at, arm, measure, k):
    return next(
        item.found
        for item in matched(comparison)
        if (item.at.name, item.architecture, item.measure.name, item.found.k) == (at, arm, measure, k)
    )


def text(tables):
    console = Console(file=io.StringIO(), width=140)
    for table in tables:
        console.print(table)
    return console.file.getvalue()


def test_an_arm_that_is_worse_at_each_k_is_better_at_the_same_fve():
    # cosine: FVE .01 below, so at the control's FVE of k = 32 it reads .9 * .65 + .005, the control has .9 * .65
    comparison = made_comparison(noise=0)
    assert ce(1, 32) - ce(0, 32) == pytest.approx(-0.004)
    found = one(comparison, "fve", COSINE, "ce_loss_recovered", 32)
    assert found.x == pytest.approx(fve(0, 32)) == pytest.approx(0.65)
    assert found.difference.mean == pytest.approx(0.005)
    assert found.difference.seen
    assert one(comparison, "fve", PER_FEATURE, "ce_loss_recovered", 32).difference.mean == pytest.approx(0.010)


def test_every_measure_is_matched_at_fve_and_at_l0_and_at_every_hook():
    found = matched(made_comparison(layers=(1, 3), seeds=2))
    quartiles = [f"fve_norm_quartile_{q}" for q in (1, 2, 3, 4)]
    assert [item.found.k for item in found[:3]] == [16, 32, 64]
    for at, measures in (
        ("fve", ["ce_loss_recovered", "dead_fraction", "l0", *quartiles]),
        ("l0", ["fve", "ce_loss_recovered", "dead_fraction", *quartiles]),
    ):
        for hook in ("blocks.1.hook_resid_post", "blocks.3.hook_resid_post"):
            items = [i for i in found if (i.at.name, i.hook_name, i.architecture) == (at, hook, COSINE)]
            assert list(dict.fromkeys(item.measure.name for item in items)) == measures
    assert {item.architecture for item in found} == {COSINE, PER_FEATURE}


def test_the_largest_k_of_a_better_control_is_outside_the_range():
    found = one(made_comparison(noise=0), "fve", COSINE, "l0", 64)
    assert found.difference is None
    assert [outside.by for outside in found.outside] == pytest.approx([0.01] * 3)
    assert OUTSIDE in text(as_tables(made_comparison())).lower()


def test_with_one_k_nothing_is_matched():
    comparison = made_comparison(ks=(32,))
    assert matched(comparison) == ()
    assert as_json(comparison) == []
    assert as_tables(comparison) == []


def test_an_sae_that_could_not_be_trained_shortens_its_curve():
    comparison = failed(made_comparison(noise=0), COSINE, 64, seed=1)
    found = one(comparison, "fve", COSINE, "dead_fraction", 32)
    assert (found.inside, [outside.seed for outside in found.outside]) == (
        2,
        [1],
    )  # .65 is above cosine's .64 at k = 32
    gone = [arm for arm in comparison.arms if arm.architecture != INNER]
    assert matched(replace(comparison, arms=tuple(gone))) == ()  # nothing to compare with
    gone = [arm for arm in comparison.arms if arm.architecture != COSINE]
    assert {item.architecture for item in matched(replace(comparison, arms=tuple(gone)))} == {PER_FEATURE}


def test_figures_that_are_not_finite_are_refused_by_name():
    comparison = made_comparison(seeds=2)
    broken = [replace(a, ce_loss_recovered=math.nan) if (a.k, a.seed) == (32, 1) else a for a in comparison.arms]
    found = one(replace(comparison, arms=tuple(broken)), "fve", COSINE, "ce_loss_recovered", 16)
    assert found.refused == "seed 1: the arm's figures at k=32 are not finite"
    assert f"Not matched: {COSINE}: seed 1" in " ".join(
        text(as_tables(replace(comparison, arms=tuple(broken)))).split()
    )


def test_what_no_control_has_is_left_out(tmp_path):
    comparison = made_comparison()
    arms = [replace(a, ce_loss_recovered=math.nan) if a.architecture == INNER else a for a in comparison.arms]
    comparison = replace(comparison, arms=tuple(arms))
    assert "ce_loss_recovered" not in {item.measure.name for item in matched(comparison)}
    assert {cell for table in as_tables(comparison) for cell in table.columns[3].cells} >= {"-"}
    write_page(comparison, tmp_path / "comparison.html")


def test_json_holds_differences_and_why_there_are_none():
    found = json.loads(json.dumps(plain(as_json(made_comparison(noise=0)))))
    entry, outside = (
        next(e for e in found if (e["at"], e["measure"], e["architecture"], e["k"]) == ("fve", "l0", COSINE, k))
        for k in (32, 64)
    )
    assert set(entry) == {
        "hook_name", "at", "architecture", "minus", "measure", "k", "x", "seeds", "inside", "difference", "interpolation",
        "outside", "refused",
    }  # fmt: skip
    assert (entry["minus"], entry["seeds"], entry["inside"], entry["outside"]) == (INNER, [0, 1, 2], 3, [])
    assert set(entry["difference"]) == {"mean", "low", "high", "seen", "shape", "no_interval"}
    assert outside["difference"] is None
    assert outside["outside"][0] == {
        "seed": 0,
        "x": pytest.approx(0.7),
        "low": pytest.approx(0.59),
        "high": pytest.approx(0.69),
        "by": pytest.approx(0.01),
    }


def test_the_terminal_says_what_was_seen_and_what_an_interval_is_over():
    shown = text(as_tables(made_comparison(noise=0)))
    lines = [line.split() for line in shown.splitlines() if line.startswith(f" {COSINE}")]
    assert [line[1:5] for line in lines[:2]] == [
        ["16", "0.6000", "+0.0050", "±0.0000"],
        ["32", "0.6500", "+0.0050", "±0.0000"],
    ]
    assert " ".join(lines[2][1:]) == "64 0.7000" + 3 * " outside (0/3 in)"
    assert "none seen ±" in text(as_tables(made_comparison()))
    assert "Intervals hold the interpolation's error" in shown
    assert shown.count("would by chance") == 1
    assert [bool(table.caption) for table in as_tables(made_comparison(layers=(1, 3)))] == [False, False, False, True]
    single = text(as_tables(made_comparison(seeds=1)))
    assert "No intervals: one seed." in single
    assert "±" not in single
    two = text(as_tables(made_comparison(ks=(16, 64))))
    assert "No intervals: two ks do not tell how far the interpolation is off." in two

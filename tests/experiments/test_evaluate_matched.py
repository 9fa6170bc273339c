"""An evaluation of arms with several ks: every figure at the control's FVE and at its L0."""

import io
import json
import math

import numpy as np
import pytest
from page_parts import charts, content
from rich.console import Console

from saelens_cosine.experiments.evaluate.command import as_tables
from saelens_cosine.experiments.evaluate.evals import EVALS, Eval, Figure
from saelens_cosine.experiments.evaluate.page import evaluation_page
from saelens_cosine.experiments.evaluate.results.evaluation import Evaluation, MeasuredSAE, MeasuredText
from saelens_cosine.experiments.evaluate.settings import EvaluationSettings
from saelens_cosine.report.page import render
from saelens_cosine.report.table import Table

KS = (16, 32, 64)
TASKS = ("loop", "method", "try")


def figures(told):
    """`told` is FVE, L0 and accuracy; accuracies of tasks and splits vary about it by what cancels out."""
    fve, l0, accuracy = told
    spread = np.array([[0.01, -0.01], [0.02, -0.02], [0.0, 0.0]])
    for sinks, loss in (("with_sinks", 0.5), ("without_sinks", 0.0)):
        yield Figure("FVE", fve - loss, sinks, "{:.4f}")
        yield Figure("L0", l0, sinks, "{:.1f}")
        values = accuracy + spread
        over = {"over": ("tasks", "splits"), "units": TASKS, "values": values}
        yield Figure("accuracy", float(values.mean()), sinks, "{:.4f}", **over)
        yield Figure("unlisted", accuracy**2, sinks)


@pytest.fixture(autouse=True)
def planted(monkeypatch):
    monkeypatch.setitem(EVALS, "planted", Eval("planted", "sae", "", lambda subject: {}, figures=figures))


def of_fve(fve):
    return 0.5 + 0.4 * fve  # a control's accuracy


def sae(arm, seed, k, text, fve, accuracy, condition):
    told = (fve, float(k) * (1 + seed / 100), accuracy)
    entry = {"arm": arm, "seed": seed, "k": k, "text": text, "condition": condition, "metadata": {}, "held_out": True}
    names = ("d_sae", "training_architecture", "tokens", "lr", "recipe", "max_norm_multiple", "high_norm_share_dropped")
    trained = dict.fromkeys(names, None) | {"d_sae": 8, "selector": {"k": k}, "filtered": False}
    return MeasuredSAE(results={"planted": told}, seconds={}, trained=trained, **entry)


def text(layer):
    return MeasuredText(
        results={},
        seconds={},
        model="m",
        hook=f"blocks.{layer}.hook_resid_post",
        head=None,
        dataset="d",
        planted_sinks=False,
        form={},
    )


def grid(hooks=1, seeds=3, ks=KS, better=-0.02, more_fve=0.03):
    """`cosine` reaches more FVE at each k and so more accuracy, and has less than the control at the same FVE."""
    saes = []
    for arm in ("inner", "cosine"):
        for layer in range(hooks):
            for k in ks:
                for seed in range(seeds):
                    fve = 0.6 + 0.05 * math.log2(k / 16) + 0.001 * seed + (more_fve if arm == "cosine" else 0)
                    accuracy = of_fve(fve) + (better + 0.0001 * seed if arm == "cosine" else 0)
                    condition = " ".join([f"layer{layer}"] * (hooks > 1) + [f"k{k}"] * (len(ks) > 1))
                    saes.append(sae(arm, seed, k, layer, fve, accuracy, condition))
    settings = EvaluationSettings(evals=("planted",))
    return Evaluation(settings, "", None, {}, tuple(text(layer) for layer in range(hooks)), tuple(saes))


def at(found, at, measure):
    return {item.found.k: item for item in found.matched if (item.at, item.measure) == (at, measure)}


def test_the_sign_of_a_difference_at_the_same_fve():
    found = grid()
    (unmatched,) = (i for i in found.differences if (i.measure, i.condition) == ("accuracy, sinks out", "k32"))
    assert unmatched.difference.mean == pytest.approx(0.03 * 0.4 - 0.0199)  # at the same k
    matched = at(found, "FVE, sinks out", "accuracy, sinks out")
    assert list(matched) == list(KS)
    for k in (32, 64):  # the planted difference; accuracy is linear in FVE, so that the interpolation has no error
        one = matched[k]
        assert (one.arm, one.baseline, one.over) == ("cosine", "inner", ("seeds", "tasks", "splits"))
        assert one.found.difference.mean == pytest.approx(-0.0199)
        assert one.found.difference.seen
        assert one.found.difference.shape == (3, 3, 2)
    assert "outside the range" in str(matched[16].found)  # cosine begins at .63
    assert matched[16].found.inside == 0
    at_l0 = at(found, "L0, sinks out", "accuracy, sinks out")
    assert at_l0[32].found.difference.mean == pytest.approx(0.03 * 0.4 - 0.0199)
    assert at_l0[16].found.interpolation == 0  # a point of its own
    assert at(found, "L0, sinks out", "FVE, sinks in")[64].found.difference.mean == pytest.approx(0.03)
    assert not at(found, "L0, sinks out", "L0, sinks out")
    assert at(found, "FVE, sinks out", "unlisted, sinks in")


def test_arms_are_matched_hook_by_hook_and_in_the_json():
    found = grid(hooks=2)
    document = json.loads(json.dumps(found.document()))["matched"]
    (one,) = (
        item
        for item in document
        if (item["hook"], item["at"], item["measure"], item["k"])
        == ("blocks.1.hook_resid_post", "FVE, sinks out", "accuracy, sinks out", 32)
    )
    assert (one["arm"], one["minus"], one["seeds"], one["inside"]) == ("cosine", "inner", [0, 1, 2], 3)
    assert one["difference"]["mean"] == pytest.approx(-0.0199)
    outside = next(item for item in document if item["outside"])
    assert outside["outside"][0]["by"] == pytest.approx(-0.03)
    assert outside["difference"] is None


def test_without_several_ks_nothing_is_matched():
    found = grid(ks=(32,))
    assert found.matched == ()
    assert found.document()["matched"] == []
    assert not content(evaluation_page(found), "matched")
    assert not any("matched" in table.title for table in as_tables(found))


def test_one_seed_and_two_ks():
    one = at(grid(seeds=1), "FVE, sinks out", "accuracy, sinks out")[32]
    assert (one.over, one.found.difference.shape) == (("tasks", "splits"), (3, 2))
    assert one.found.difference.low is not None
    alone = at(grid(seeds=1), "FVE, sinks out", "unlisted, sinks out")[32]
    assert alone.found.difference.no_interval == "one seed"
    two = at(grid(ks=(16, 32)), "FVE, sinks out", "accuracy, sinks out")[32]
    assert "two ks" in two.found.difference.no_interval


def test_the_terminal_s_tables():
    console = Console(width=140, file=io.StringIO())
    for table in as_tables(grid(hooks=2)):
        console.print(table)
    lines = console.file.getvalue().splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("At matched FVE, sinks out: minus inner"))
    assert "blocks.0.hook_resid_post" in lines[first]
    assert [k in lines[first + 2] for k in ("k=16, FVE 0.601", "k=32, FVE 0.651", "k=64, FVE 0.701")] == [True] * 3
    row = next(line for line in lines[first:] if "accuracy, sinks out" in line)
    assert "outside (0/3 in)" in row
    assert "-0.0199 ±0.0" in row
    assert "unlisted" not in "".join(lines[first : first + 12])
    assert sum(line.startswith("At matched ") for line in lines) == 4


def test_the_page_s_section():
    page = evaluation_page(grid(hooks=2))
    drawn = charts(page, "matched")
    assert list(drawn)[:3] == [
        "accuracy, sinks out against FVE, blocks.0.hook_resid_post",
        "FVE, sinks out against L0, blocks.0.hook_resid_post",
        "accuracy, sinks out against L0, blocks.0.hook_resid_post",
    ]
    assert len(drawn) == 6
    lines = [trace for trace in next(iter(drawn.values())).figure.data if trace.mode == "lines+markers"]
    assert [len(line.x) for line in lines] == [3, 3]
    tables = [item for item in content(page, "matched") if isinstance(item, Table)]
    assert [table.label for table in tables] == [
        f"At matched {x}, sinks out, blocks.{i}.hook_resid_post" for i in (0, 1) for x in ("FVE", "L0")
    ]
    rows = {row[:2]: row[2] for row in map(tuple, tables[0].rows)}
    assert rows["accuracy, sinks out", "0.601 (k=16)"] == "outside the range"
    assert rows["accuracy, sinks out", "0.651 (k=32)"].value == pytest.approx(-0.0199)
    assert "outside the range" in render(page)

"""`saelens-cosine compare` on several ranks: each training is one rank's, and the results are those of one process."""

import shutil

import pytest
from small_runs import assert_bit_identical, compare_flags, comparison_without_times, small_batches
from test_train import told_once

from saelens_cosine.cli import main
from saelens_cosine.training.recipe import RECIPES

GRID = ("--k", "3", "6", "--lr", "0.001", "0.003")


def command(text, output, *more):
    return ["compare", *compare_flags(text, output), *GRID, *more]


@pytest.fixture(scope="module")
def alone(text, tmp_path_factory):
    before, RECIPES["paper"] = RECIPES["paper"], small_batches
    output = tmp_path_factory.mktemp("alone") / "compared"
    try:
        assert main(command(text, output)) == 0
    finally:
        RECIPES["paper"] = before
    return output


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def assert_same(one, other):
    assert comparison_without_times(one) == comparison_without_times(other)
    assert files(one) == files(other)
    saes = {path.parent for path in other.rglob("sae_weights.safetensors")}
    assert len(saes) == 2 * 2 * 2
    for sae in saes:
        assert_bit_identical(one / sae.relative_to(other), sae)


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_share_the_trainings(size, ranks, text, alone, tmp_path):
    output = tmp_path / "compared"
    found = ranks(*[command(text, output)] * size)
    assert found["statuses"] == [0] * size, found["told"]
    assert_same(output, alone)


def test_a_rank_that_dies_leaves_what_the_others_go_on_with(ranks, text, alone, tmp_path):
    output = tmp_path / "compared"
    found = ranks(*[command(text, output)] * 2, fault="die_at_step_3", on=1)
    assert found["statuses"][1] == -9, found["told"]
    assert all(found["statuses"])
    found = ranks(*[command(text, output, "--resume")] * 3)
    assert found["statuses"] == [0] * 3, found["told"]
    assert_same(output, alone)


def test_ranks_of_a_comparison_with_other_flags_stop(ranks, text, tmp_path):
    output = tmp_path / "compared"
    found = ranks(command(text, output), command(text, output, "--eval-tokens", "64"))
    assert "eval_tokens is 320 on rank 0 and 64 on rank 1" in told_once(found, "need the same flags")
    assert not output.exists()


def handed_over(alone, folder, point="k6-seed1"):
    """A finished comparison in which a point is as another rank has left it, when the first was stopped before it took it over."""
    shutil.copytree(alone, folder)
    state = folder / ".comparison-run"
    done = state / f"{point}-done"
    for arm in ("cosine_batchtopk", "inner_product_topk"):
        sae = f"{arm}/{point.replace('-', '/')}"
        (done / "made" / sae).parent.mkdir(parents=True)
        (folder / sae).rename(done / "made" / sae)
    (state / f"{point}.json").rename(done / "record.json")
    return done


def test_what_was_handed_over_is_taken_over_before_anything_is_trained(ranks, text, alone, tmp_path):
    output = tmp_path / "compared"
    done = handed_over(alone, output)
    before = {path.name: path.stat().st_mtime_ns for path in done.rglob("sae_weights.safetensors")}
    found = ranks(*[command(text, output, "--resume")] * 2)
    assert found["statuses"] == [0, 0], found["told"]
    assert not done.exists()
    assert_same(output, alone)
    after = {path.name: path.stat().st_mtime_ns for path in output.glob("*/k6/seed1/sae_weights.safetensors")}
    assert after == before  # not trained again


@pytest.mark.parametrize("end", ["-done", "-lr0.001-saes"])
def test_finished_trainings_are_not_lost_for_want_of_a_flag(end, text, alone, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(RECIPES, "paper", small_batches)
    output = tmp_path / "compared"
    done = handed_over(alone, output)
    for name in ("comparison.json", "comparison.html", "comparison.png", ".saelens-cosine.json"):
        (output / name).unlink()
    for arm in ("cosine_batchtopk", "inner_product_topk"):
        shutil.rmtree(output / arm)
    kept = done.rename(done.with_name(done.name.removesuffix("-done") + end))
    files = sorted(kept.rglob("*"))
    assert main(command(text, output)) == 2
    assert "Pass --resume to go on with it" in capsys.readouterr().err
    assert sorted(kept.rglob("*")) == files

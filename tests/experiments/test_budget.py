"""`compare --budget`: what is multiplied by what is measured, and that nothing is written."""

import pytest
from small_runs import compare_flags, small_batches, write_text

from saelens_cosine.cli import main
from saelens_cosine.experiments.compare import budget as module
from saelens_cosine.experiments.compare.budget import Budget, BudgetPart, as_table, budget
from saelens_cosine.experiments.compare.settings import ComparisonSettings
from saelens_cosine.training.recipe import RECIPES


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "text.jsonl")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(module, "SECONDS", 0.01)
    monkeypatch.setitem(RECIPES, "paper", small_batches)  # 128 tokens a step


def settings(text, **changes):
    chosen = {"arms": ("cosine_batchtopk", "inner_product_topk"), "dataset": str(text), "layer": 0, "k": 4, "d_sae": 24}
    sizes = {"tokens": 1024, "context_size": 32, "eval_tokens": 320, "eval_prompts": 4, "seeds": 2}
    return ComparisonSettings(**{**chosen, **sizes, **changes})


def amounts(found):
    return [(part.name, part.times, part.tokens) for part in found.parts]


def test_a_grid_runs_the_model_once_and_tries_each_rate_at_each_hook(text, tmp_path):
    grid = settings(text, layer=(0, 2), k=(2, 4, 8), lr=(1e-3, 2e-3))
    found = budget(grid, tmp_path / "out")
    # 1.02 * 1024 tokens of text, a mixing buffer of all 1024 tokens, and 320 held-out ones
    needed = 1044 + 1024 + 320
    hooks = "blocks.0.hook_resid_post, blocks.2.hook_resid_post"
    saes = 2 * 3 * 2
    assert amounts(found) == [
        (f"language model, {hooks}", 1, needed),
        ("training cosine_batchtopk", saes + 2, 1024),
        ("training inner_product_topk", saes + 2, 1024),
        ("reconstruction of held-out text", 2 * saes, 320),
        ("cross-entropy of held-out text", 2 * saes, 4 * 32),
    ]
    assert all(part.tokens_per_second > 0 for part in found.parts)
    assert found.activation_bytes == needed * 2 * (192 + 192)
    # W_enc, W_dec, b_enc and b_dec in float32; exponent and scale of the cosine arm
    assert found.sae_bytes == saes * 4 * (2 * (2 * 192 * 24 + 24 + 192) + 2)
    assert list(tmp_path.iterdir()) == []


def test_one_point_reads_text_for_each_seed_and_keeps_nothing(text, tmp_path):
    found = budget(settings(text), tmp_path / "out")
    hook = "blocks.0.hook_resid_post"
    assert amounts(found)[:2] == [
        (f"language model, {hook}, training text", 2, 1024),
        (f"language model, {hook}, held-out text", 1, 320),
    ]
    assert found.activation_bytes == 0


def test_what_is_kept_already_is_not_run_again(text, tmp_path):
    kept = ["--activations", str(tmp_path / "kept")]
    assert main(["compare", *compare_flags(text, tmp_path / "out", seeds=1), *kept]) == 0
    found = budget(settings(text, activations=tmp_path / "kept"), tmp_path / "out")
    assert found.parts[0].tokens < 32  # what contexts of 32 tokens round away


def test_times_are_those_of_all_and_add_up():
    parts = (BudgetPart("a", 3, 1000, 100.0), BudgetPart("b", 2, 90_000, 25.0))
    found = Budget(parts, 2_500_000_000, 10**10, 12_000_000, 48_000_000)
    assert [part.seconds for part in parts] == [30, 7200]
    table = as_table(found)
    assert list(table.columns[-1].cells) == ["30 s", "2 h 0 min", "2 h 0 min"]
    assert "Activations take 2.5 GB of the disk, which has 10.0 GB. SAEs take 12 MB, and 48 MB" in table.caption


def test_the_command_says_it_and_stops(text, tmp_path, capsys):
    assert main(["compare", *compare_flags(text, tmp_path / "out"), "--budget"]) == 0
    assert "What it will cost" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()

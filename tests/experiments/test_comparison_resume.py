"""`compare` that is stopped and resumed ends with the same comparison.json, times aside."""

import shutil
import signal
from pathlib import Path

import pytest
from small_runs import compare_flags, small_batches, stop_after, write_text
from small_runs import comparison_without_times as result

from saelens_cosine.cli import main
from saelens_cosine.experiments.compare.training import Setting
from saelens_cosine.training.recipe import RECIPES


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.jsonl")


@pytest.fixture(autouse=True)
def small_steps(monkeypatch):
    monkeypatch.setitem(RECIPES, "paper", small_batches)


def command(text, output, **changes) -> list[str]:
    return ["compare", *compare_flags(text, output, **changes)]


def weights(folder: Path):
    return {path.parent.parent.name: path.read_bytes() for path in sorted(folder.rglob("sae_weights.safetensors"))}


@pytest.fixture(scope="module")
def whole(text, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(RECIPES, "paper", small_batches)
        assert main(command(text, folder)) == 0
    return folder


def stopped(text, folder, monkeypatch, steps, **options):
    with monkeypatch.context() as patched:
        stop_after(patched, steps)
        assert main([*command(text, folder, **options), "--resume"]) == 143


def test_stopped_in_each_seed_and_resumed(whole, text, tmp_path, monkeypatch, capsys):
    stopped(text, tmp_path, monkeypatch, 3)
    assert "--resume" in capsys.readouterr().err
    assert main(command(text, tmp_path)) == 2
    assert "not finished" in capsys.readouterr().err
    stopped(text, tmp_path, monkeypatch, 5)  # goes on at 3
    assert main([*command(text, tmp_path), "--resume"]) == 0
    assert result(tmp_path) == result(whole)
    assert weights(tmp_path) == weights(whole)
    assert sorted(path.name for path in (tmp_path / ".comparison-run").iterdir()) == ["seed0.json", "seed1.json"]


def test_finished_seeds_are_not_trained_again(whole, text, tmp_path, monkeypatch):
    assert main(command(text, tmp_path, seeds=1)) == 0
    trained = []
    train = Setting.train
    monkeypatch.setattr(Setting, "train", lambda *args: (trained.append(args[1].point.seed), train(*args))[1])
    assert main([*command(text, tmp_path), "--resume"]) == 0  # one seed more
    assert main([*command(text, tmp_path), "--resume"]) == 0  # nothing left
    assert trained == [1]
    assert result(tmp_path) == result(whole)


@pytest.mark.parametrize(
    ("option", "value", "said"), [("k", 5, "k is 4 there and 5 here"), ("tokens", 1280, "tokens is 1024")]
)
def test_other_settings_are_refused(option, value, said, text, tmp_path, monkeypatch, capsys):
    stopped(text, tmp_path, monkeypatch, 3)
    assert main([*command(text, tmp_path, **{option: value}), "--resume"]) == 2
    assert said in capsys.readouterr().err


def test_an_overwriting_run_is_gone_on_with_and_the_old_result_stays_until_it_is_whole(
    whole, text, tmp_path, monkeypatch
):
    assert main(command(text, tmp_path, k=5)) == 0
    old = weights(tmp_path)
    with monkeypatch.context() as patched:
        stop_after(patched, 3, signal.SIGINT)
        assert main([*command(text, tmp_path), "--overwrite"]) == 130
    assert {**old, **weights(tmp_path)} == weights(tmp_path)
    assert main([*command(text, tmp_path), "--resume"]) == 0
    assert result(tmp_path) == result(whole)
    assert weights(tmp_path) == weights(whole)
    left = [path.name for path in tmp_path.iterdir() if path.name.startswith(".comparison-")]
    assert left == [".comparison-run"]


@pytest.mark.parametrize("damaged", ['{"settings": {"k": 4}, "ar', "[" * 100_000, "[]"])
def test_a_broken_record_of_a_seed_costs_its_training_and_a_word(damaged, whole, text, tmp_path, capsys):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    (tmp_path / ".comparison-run" / "seed0.json").write_text(damaged)
    assert main([*command(text, tmp_path), "--resume"]) == 0
    assert "seed0.json is broken" in capsys.readouterr().err
    assert result(tmp_path) == result(whole)
    assert weights(tmp_path) == weights(whole)

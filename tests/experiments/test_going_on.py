"""What a run that goes on refuses, replaces and says; nobody else's files, and no finished result, are taken for its own."""

import json
import os
import shutil
import signal
from contextlib import suppress
from pathlib import Path

import pytest
from small_runs import compare_flags, flags, small_batches, stop_after, weights, write_text

from saelens_cosine.cli import main
from saelens_cosine.training.recipe import RECIPES
from saelens_cosine.training.resuming.checkpoints import Checkpoints

SECRET = "Zx9Qp77LmWv31kTTab"


@pytest.fixture
def text(tmp_path):
    return write_text(tmp_path / "text.jsonl")


def stop(arguments, steps, number=signal.SIGTERM):
    with pytest.MonkeyPatch.context() as patched:
        stop_after(patched, steps)
        assert main(arguments) == 128 + number


def write_checkpoint(folder):
    (folder / "weights").write_text(folder.name)


def test_a_broken_checkpoint_is_not_kept_in_place_of_one_that_is_whole(tmp_path):
    """keep=1; gone back from 3840, which is broken, to 3072, and saved at 3328."""
    for tokens in (3072, 3840):
        Checkpoints(tmp_path).add(tokens, write_checkpoint)
    (tmp_path / "3840" / "weights").write_text("flipped")
    kept = Checkpoints(tmp_path, keep=1)
    assert kept.newest(print) == tmp_path / "3072"
    kept.add(3328, write_checkpoint)
    assert kept.all() == [tmp_path / "3328"]
    assert kept.newest(print) == tmp_path / "3328"


def test_a_checkpoint_without_any_checksum_is_broken(tmp_path):
    for tokens in (1, 2):
        Checkpoints(tmp_path).add(tokens, write_checkpoint)
    (tmp_path / "2" / "saelens_cosine" / "checksums.json").write_text("{}")
    assert Checkpoints(tmp_path).newest(print) == tmp_path / "1"


def test_a_checkpoint_whose_removal_was_stopped_anywhere_is_not_taken_for_somebody_else_s(tmp_path, monkeypatch):
    def write(folder):
        for name in ("a/weights", "weights", "z/weights"):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(folder.name)

    class Killed(BaseException):
        pass

    for left in range(10):
        checkpoints = Checkpoints(tmp_path / str(left), keep=1)
        checkpoints.add(1, write)
        steps = iter(range(left))
        with monkeypatch.context() as patched:
            for name in ("unlink", "rmdir"):
                call = getattr(Path, name)

                def counted(path, *args, call=call, steps=steps, **kwargs):
                    if next(steps, None) is None:
                        raise Killed
                    return call(path, *args, **kwargs)

                patched.setattr(Path, name, counted)
            with suppress(Killed):
                checkpoints.add(2, write)
        checkpoints.check_places()
        assert checkpoints.newest(print) == tmp_path / str(left) / "2"
        checkpoints.add(3, write)
    assert next(steps, None) is not None  # the last one was removed to its end


@pytest.mark.parametrize(
    "make",
    [lambda p: (p / "mine").mkdir(parents=True), lambda p: p.write_text("mine"), lambda p: p.symlink_to("nowhere")],
)
@pytest.mark.parametrize("name", ["512", "final_4096"])
def test_what_has_a_checkpoint_s_name_and_is_none_is_refused_before_training(name, make, text, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    make(tmp_path / "mine" / name)
    for option in ([], ["--resume"], ["--overwrite"]):
        arguments = flags(text, tmp_path / "sae", checkpoint_path=tmp_path / "mine" / "x")
        arguments[arguments.index("--checkpoint_path") + 1] = str(tmp_path / "mine")
        assert main(["train", *arguments, *option]) == 2
        assert f"{tmp_path / 'mine' / name} is no checkpoint" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "mine").iterdir()] == [name]


def test_one_folder_for_both_is_refused(text, tmp_path, capsys):
    assert main(["train", *flags(text, tmp_path / "sae", checkpoint_path=tmp_path / "sae")]) == 2
    assert "cannot hold both the SAE and the checkpoints" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["train", "compare"])
def test_text_that_was_edited_in_place_is_another_text(command, text, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(RECIPES, "paper", small_batches)
    makes = {"train": flags, "compare": compare_flags}[command]
    stop([command, *makes(text, tmp_path / "out")], 3)
    rows = text.read_text().splitlines(keepends=True)
    for row in range(len(rows)):  # one of them is trained on; as many rows as before
        edited = [*rows[:row], json.dumps({"text": "other words"}) + "\n", *rows[row + 1 :]]
        text.write_text("".join(edited))
        assert main([command, *makes(text, tmp_path / "out"), "--resume"]) == 2
        said = capsys.readouterr().err
        assert "text is '114 rows, sha256" in said or "heldout_rule is '6 of 120 rows" in said
        if "text is" in said:
            break
    text.write_text("".join(rows))
    assert main([command, *makes(text, tmp_path / "out"), "--resume"]) == 0


def test_evaluations_for_wandb_take_text_and_must_be_the_same(text, tmp_path, capsys):
    stop(["train", *flags(text, tmp_path / "sae")], 3)
    logged = {"log_to_wandb": "true", "wandb_log_frequency": 2, "eval_every_n_wandb_logs": 3, "n_eval_batches": 2}
    assert main(["train", *flags(text, tmp_path / "sae", **logged, eval_batch_size_prompts=4), "--resume"]) == 2
    assert "wandb_evaluation is None there and [6, 2, 4] here" in capsys.readouterr().err
    assert (
        main(["train", *flags(text, tmp_path / "sae", n_eval_batches=3), "--resume"]) == 0
    )  # without W&B there is none


def test_a_comparison_without_its_records_is_not_begun_again_over_its_results(text, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(RECIPES, "paper", small_batches)
    assert main(["compare", *compare_flags(text, tmp_path / "out")]) == 0
    before = (tmp_path / "out" / "comparison.json").read_bytes()
    assert main(["compare", *compare_flags(text, tmp_path / "out", seeds=1), "--resume"]) == 2
    assert "seeds is 2 there and 1 here; they can grow, not shrink" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "out" / ".comparison-run")
    assert main(["compare", *compare_flags(text, tmp_path / "out", k=5), "--resume"]) == 2
    assert "Pass --overwrite" in capsys.readouterr().err
    assert (tmp_path / "out" / "comparison.json").read_bytes() == before


def test_a_budget_that_grows_twice_names_the_first_one(text, tmp_path, capsys):
    schedule = {"lr_decay_steps": 4, "lr_warm_up_steps": 2}
    assert main(["train", *flags(text, tmp_path / "sae", training_tokens=2048, **schedule)]) == 0
    said = "The budget is {} tokens, 2,048 when this run began. The learning rate keeps the schedule of 2,048 tokens, which ends"
    stop(["train", *flags(text, tmp_path / "sae", training_tokens=3072, **schedule), "--resume"], 10)
    assert said.format("3,072") in capsys.readouterr().err
    assert main(["train", *flags(text, tmp_path / "sae", training_tokens=3072, **schedule), "--resume"]) == 0
    assert said.format("3,072") in capsys.readouterr().err
    assert main(["train", *flags(text, tmp_path / "sae", **schedule), "--resume"]) == 0
    assert said.format("4,096") in capsys.readouterr().err


def test_an_output_is_gone_on_with_by_any_of_its_names(text, tmp_path, monkeypatch):
    (tmp_path / "sae").mkdir()
    stop(["train", *flags(text, tmp_path / "sae")], 3)
    (tmp_path / "link").symlink_to("sae")
    stop(["train", *flags(text, tmp_path / "link"), "--resume"], 5)
    monkeypatch.chdir(tmp_path / "sae")
    assert main(["train", *flags(text, "."), "--resume"]) == 0
    assert main(["train", *flags(text, tmp_path / "whole")]) == 0
    ones, others = weights(tmp_path / "sae"), weights(tmp_path / "whole")
    assert all((ones[name] == others[name]).all() for name in others)


def test_a_signal_while_the_sae_is_saved_says_how_to_go_on(text, tmp_path, monkeypatch, capsys):
    arguments = ["train", *flags(text, tmp_path / "sae", training_tokens=1024)]
    with monkeypatch.context() as patched:
        signalled = lambda *_: os.kill(os.getpid(), signal.SIGTERM)  # noqa: E731
        patched.setattr("saelens_cosine.files.output.Output.add", signalled)
        assert main(arguments) == 143
    assert "--resume to go on" in capsys.readouterr().err
    assert main([*arguments, "--resume"]) == 0
    assert weights(tmp_path / "sae")


class Broken:
    """The writing end of a pipe whose reader has gone."""

    encoding = "utf-8"

    def write(self, *_):
        raise BrokenPipeError(32, "Broken pipe")

    flush = write

    def isatty(self):
        return False

    def fileno(self):
        raise OSError("none")


@pytest.mark.parametrize("command", ["train", "compare"])
def test_nobody_has_to_read_what_a_run_says(command, text, tmp_path, monkeypatch):
    monkeypatch.setitem(RECIPES, "paper", small_batches)
    makes = {"train": flags, "compare": compare_flags}[command]
    given = [part for part in makes(text, tmp_path / "out") if part != "--quiet"]
    with monkeypatch.context() as patched:
        patched.setattr("sys.stderr", Broken())
        patched.setattr("sys.stdout", Broken())
        assert main([command, *given]) == 0
    assert list((tmp_path / "out").rglob("sae_weights.safetensors"))


@pytest.mark.parametrize(
    "changes", [{"hf_token": SECRET}, {"model_from_pretrained_kwargs": json.dumps({"hf_auth": SECRET}), "d_in": 192}]
)
def test_what_train_refuses_is_named_without_what_may_be_a_secret(changes, text, tmp_path, capsys):
    assert main(["train", *flags(text, tmp_path / "sae", **changes)]) == 2
    said = capsys.readouterr().err
    assert next(iter(changes)) in said
    assert SECRET not in said

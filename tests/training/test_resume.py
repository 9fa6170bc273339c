"""A run that is stopped anywhere and resumed ends with the weights of one that never stopped, bit for bit."""

import json
import os
import signal
import time
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from datasets import Array2D, Dataset, Features, IterableDataset
from foreign import write
from sae_lens.training._interruption import interrupt_callback
from sae_lens.training.prefetch import PrefetchingIterator
from small_runs import HOOK, assert_bit_identical, compare_flags, flags, small_batches, stop_after, weights, write_text

from saelens_cosine.activations import text as data
from saelens_cosine.cli import main
from saelens_cosine.training.recipe import RECIPES
from saelens_cosine.training.resuming.run import ResumableRun
from saelens_cosine.training.resuming.stop import StopError, exit_status, handled
from saelens_cosine.training.train import train


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.jsonl")


def run(arguments, **options):
    return train(arguments, **options)


def shards(numbers):
    for number in numbers:
        for row in np.random.default_rng(number).integers(0, 300, size=(200, 12)):
            yield {"text": " ".join(f"w{word}" for word in row)}


HUB = IterableDataset.from_generator(shards, gen_kwargs={"numbers": list(range(8))})
"""1600 rows in 8 files, whose order is shuffled as rows are."""


CASES = {
    "batchtopk": {},
    "scaled": {"normalize_activations": "expected_average_only_in", "n_batches_for_norm_estimate": 3},
    "jumprelu": {"architecture": "per_feature_cosine_jumprelu", "k": None, "target_l0": 6},
    "gated": {"architecture": "cosine_gated", "k": None, "lr_warm_up_steps": 5, "lr_decay_steps": 5},
    "saelens": {"architecture": "topk"},
    "no mixing": {"activations_mixing_fraction": 0},
    "all mixed": {"activations_mixing_fraction": 1},
    "single documents": {"disable_concat_sequences": "true", "store_batch_size_prompts": 2},
    "prefetched": {"prefetch_llm_batches": 3},
    "a stream of the Hub": {"dataset_path": "someone/text"},
}


def test_a_prefetcher_that_is_ahead_skips_nothing(text, tmp_path, monkeypatch):
    """SAELens notes the rows that the prefetcher has read, not those that were trained on."""
    take = PrefetchingIterator.__next__

    def when_full(batches):
        while not batches._queue.full() and batches._thread.is_alive():
            time.sleep(0.001)
        return take(batches)

    monkeypatch.setattr(PrefetchingIterator, "__next__", when_full)
    arguments = {"prefetch_llm_batches": 6, "n_batches_in_buffer": 20, "training_tokens": 2048}
    run(flags(text, tmp_path / "whole", **arguments))
    with monkeypatch.context() as patched:
        stop_after(patched, 3)
        with pytest.raises(StopError):
            run(flags(text, tmp_path / "stopped", **arguments))
    torch.manual_seed(0)
    run(flags(text, tmp_path / "stopped", **arguments), resume=True)
    assert_bit_identical(tmp_path / "whole", tmp_path / "stopped")


@pytest.mark.parametrize("case", CASES)
def test_stopped_and_resumed_ends_with_the_same_bits(case, text, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "SHUFFLED_AT_ONCE", 50)
    load = datasets.load_dataset
    monkeypatch.setattr(
        datasets, "load_dataset", lambda name, **options: HUB if name == "someone/text" else load(name, **options)
    )

    def arguments(name: str) -> list[str]:
        return flags(text, tmp_path / name, **CASES[case])

    run(arguments("whole"))
    for steps in (4, 9):
        with monkeypatch.context() as patched:
            stop_after(patched, steps)
            with pytest.raises(StopError) as stopped:
                run(arguments("stopped"), resume=True)
        assert exit_status(stopped.value) == 143
        torch.manual_seed(0)  # another process has other numbers
        np.random.seed(0)
    run(arguments("stopped"), resume=True)
    assert_bit_identical(tmp_path / "whole", tmp_path / "stopped")


def test_stopped_again_within_the_row_that_it_went_on_in(tmp_path, monkeypatch):
    row = json.dumps({"text": " ".join(f"w{i % 300}" for i in range(4000))})
    text = tmp_path / "long.jsonl"
    text.write_text(f"{row}\n" * 2 + "".join(json.dumps({"text": f"a {i} " * 3000}) + "\n" for i in range(3)))
    run(flags(text, tmp_path / "whole"))
    for steps in (4, 5, 6, 11, 12):
        with monkeypatch.context() as patched:
            stop_after(patched, steps)
            with pytest.raises(StopError):
                run(flags(text, tmp_path / "stopped"), resume=True)
    run(flags(text, tmp_path / "stopped"), resume=True)
    assert_bit_identical(tmp_path / "whole", tmp_path / "stopped")


def test_two_runs_of_one_command_are_bit_identical_and_another_seed_is_not(text, tmp_path):
    for name, seed in (("one", 5), ("two", 5), ("other", 6)):
        torch.manual_seed(len(name))
        run(flags(text, tmp_path / name, seed=seed, checkpoint_path="none"))
    assert_bit_identical(tmp_path / "one", tmp_path / "two")
    assert not torch.equal(weights(tmp_path / "one")["W_enc"], weights(tmp_path / "other")["W_enc"])


def test_cached_activations_are_gone_on_with(text, tmp_path, monkeypatch):
    rows = np.random.default_rng(1).normal(size=(70, 32, 192)).astype(np.float32)
    Dataset.from_dict({HOOK: list(rows)}, features=Features({HOOK: Array2D((32, 192), "float32")})).save_to_disk(
        tmp_path / "cache"
    )
    cached = {"use_cached_activations": "true", "cached_activations_path": tmp_path / "cache"}
    run(flags(text, tmp_path / "whole", **cached))
    with monkeypatch.context() as patched:
        stop_after(patched, 7)
        with pytest.raises(StopError):
            run(flags(text, tmp_path / "stopped", **cached))
    run(flags(text, tmp_path / "stopped", **cached), resume=True)
    assert_bit_identical(tmp_path / "whole", tmp_path / "stopped")


def test_the_command_says_where_things_are_and_exits_as_shells_expect(text, tmp_path, monkeypatch, capsys):
    arguments = ["train", *flags(text, tmp_path / "sae")]
    for number, status in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        with monkeypatch.context() as patched:
            stop_after(patched, 3 if number == signal.SIGINT else 5, number)
            assert main([*arguments, "--resume"]) == status
        said = capsys.readouterr().err
        assert "--resume" in said
        assert str(tmp_path / "sae-checkpoints") in said
    assert main(arguments) == 2
    assert "--overwrite" in capsys.readouterr().err


def test_without_checkpoints_nothing_is_written_and_a_stop_says_so(text, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    stop_after(monkeypatch, 3)
    assert main(["train", *flags(text, tmp_path / "sae", checkpoint_path="none")]) == 143
    assert "nothing of it is saved" in capsys.readouterr().err
    assert list(tmp_path.rglob("*")) == []


@pytest.mark.parametrize(
    ("name", "other", "said"),
    [
        ("k", 7, "sae.k is 6 there and 7 here"),
        ("hook_name", "blocks.1.hook_resid_post", f"hook_name is '{HOOK}' there and 'blocks.1.hook_resid_post' here"),
        ("seed", 6, "seed is 5 there and 6 here"),
        ("context_size", 16, "context_size is 32 there and 16 here"),
        ("lr", 0.001, "lr is 0.0003 there and 0.001 here"),
        ("architecture", "inner_product_batchtopk", "sae.architecture is 'cosine_batchtopk' there"),
        ("d_sae", 64, "sae.d_sae is 48 there and 64 here"),
        ("training_tokens", 2048, "training_tokens is 4096 there and 2048 here"),
        ("max-norm-multiple", "none", "max_norm_multiple is 10 there and None here"),
    ],
)
def test_another_run_is_refused_with_both_values(name, other, said, stopped, text, capsys):
    before = sorted(stopped.rglob("*"))
    assert main(["train", *flags(text, stopped / "sae", **{name: other}), "--resume"]) == 2
    assert said in capsys.readouterr().err
    assert sorted(stopped.rglob("*")) == before


def test_another_text_is_refused(stopped, text, tmp_path, capsys):
    (tmp_path / "text.jsonl").write_text(text.read_text().replace("w1 ", "w2 "))
    for output in (text.with_name("copy.jsonl"), tmp_path / "text.jsonl"):
        if output.parent == text.parent:
            output.write_text(text.read_text())
        assert main(["train", *flags(output, stopped / "sae"), "--resume"]) == 2
        assert "dataset_path is" in capsys.readouterr().err


@pytest.fixture(scope="module")
def stopped(text, tmp_path_factory) -> Path:
    """A run with the flags of `flags`, stopped after 6 steps."""
    folder = tmp_path_factory.mktemp("stopped")
    with pytest.MonkeyPatch.context() as patched:
        stop_after(patched, 6)
        with pytest.raises(StopError):
            run(flags(text, folder / "sae"))
    return folder


def test_a_larger_budget_goes_on_and_says_what_becomes_of_the_schedule(text, tmp_path, capsys):
    run(flags(text, tmp_path / "small", training_tokens=2048))
    run(flags(text, tmp_path / "small"), resume=True)
    assert "budget is 4,096 tokens, 2,048 when this run began" in capsys.readouterr().err
    run(flags(text, tmp_path / "large"))
    ones, others = weights(tmp_path / "small"), weights(tmp_path / "large")
    assert all(torch.equal(ones[name], others[name]) for name in ones)  # a constant rate has no end


def test_a_run_that_has_trained_to_its_end_writes_the_same_sae_again(text, tmp_path):
    run(flags(text, tmp_path / "whole"))
    run(flags(text, tmp_path / "again"))
    for file in (tmp_path / "again").iterdir():
        file.unlink()
    run(flags(text, tmp_path / "again"), resume=True)
    assert_bit_identical(tmp_path / "whole", tmp_path / "again")


def test_saelens_alone_goes_on_from_a_checkpoint_at_the_right_step(stopped):
    (checkpoint,) = sorted((stopped / "sae-checkpoints").iterdir(), key=lambda path: int(path.name))[-1:]
    assert checkpoint.name == str(6 * 256)
    state = torch.load(checkpoint / "trainer_state.pt")
    assert (state["n_training_steps"], state["n_training_samples"]) == (6, 6 * 256)
    assert state["lr_scheduler"]["last_epoch"] == 6


@pytest.mark.parametrize("command", ["train", "compare"])
def test_other_signals_stop_it_where_asked_for_before_training_too(command, text, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(RECIPES, "paper", small_batches)
    given = {"train": flags(text, tmp_path / "out"), "compare": compare_flags(text, tmp_path / "out")}[command]
    with monkeypatch.context() as patched:
        stop_after(patched, 3, signal.SIGUSR1)
        assert main([command, *given, "--stop-on", "USR1"]) == 128 + signal.SIGUSR1
    assert "--resume to go on" in capsys.readouterr().err
    module = "training.train" if command == "train" else "experiments.compare.run"
    monkeypatch.setattr(f"saelens_cosine.{module}.load_text", lambda *_: os.kill(os.getpid(), signal.SIGUSR1))
    assert main([command, *given, "--stop-on", "usr1", "--resume"]) == 128 + signal.SIGUSR1
    assert "Interrupted" in capsys.readouterr().err
    for name in ("HUPP", "KILL", "stop", "9"):
        with pytest.raises(SystemExit, match="2"):
            main([command, *given, "--stop-on", name])
        assert f"{name!r} is no signal that a run can be told of" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["train", "compare"])
def test_a_signal_while_the_first_mixing_buffer_is_filled_is_not_waited_for(
    command, text, tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(RECIPES, "paper", small_batches)
    makes = {"train": flags, "compare": compare_flags}[command]

    def filling(**_):
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("the signal did not end it")
        yield

    monkeypatch.setattr("saelens_cosine.training.resuming.stream.mixing_buffer", filling)
    assert main([command, *makes(text, tmp_path / "out")]) == 143
    assert "--resume" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["train", "compare"])
def test_deterministic_algorithms_are_used_where_asked_for_and_not_afterwards(command, text, tmp_path, monkeypatch):
    monkeypatch.setitem(RECIPES, "paper", small_batches)
    changes = {"train": {"checkpoint_path": "none"}, "compare": {"seeds": 1}}[command]
    makes = {"train": flags, "compare": compare_flags}[command]
    used = []
    step = ResumableRun._after_step
    monkeypatch.setattr(
        ResumableRun, "_after_step", lambda run: (used.append(torch.are_deterministic_algorithms_enabled()), step(run))
    )
    assert main([command, *makes(text, tmp_path / "one", **changes)]) == 0
    assert set(used) == {False}
    used.clear()
    assert main([command, *makes(text, tmp_path / "two", **changes), "--deterministic"]) == 0
    assert set(used) == {True}
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("command", ["train", "compare", "evaluate", "benchmark", "convert", "ground-truth", "share"])
def test_a_signal_before_there_is_anything_to_save_ends_the_command_as_shells_expect(
    command, number, status, text, tmp_path, monkeypatch, capsys
):
    def signalled(*_, **__):
        os.kill(os.getpid(), number)
        raise AssertionError("the signal did not end it")

    for module in ("training.train", "experiments.compare.run"):
        monkeypatch.setattr(f"saelens_cosine.{module}.load_text", signalled)
    monkeypatch.setattr("saelens_cosine.experiments.evaluate.loader.Loader.subject", signalled)
    monkeypatch.setattr("saelens_cosine.experiments.benchmark.command.benchmark", signalled)
    monkeypatch.setattr("saelens_cosine.loading.command.load", signalled)
    monkeypatch.setattr("saelens_cosine.experiments.ground_truth.command.ground_truth", signalled)
    monkeypatch.setattr("saelens_cosine.sharing.command.gather", signalled)
    arguments = {
        "train": flags(text, tmp_path / "out"),
        "compare": ["--dataset", str(text), "--output", str(tmp_path / "out"), "--quiet"],
        "evaluate": [str(tmp_path), "--output", str(tmp_path / "out"), "--quiet"],
        "benchmark": ["--quiet"],
        "convert": [str(write("global-a", tmp_path / "source")), str(tmp_path / "out")],
        "ground-truth": ["--output", str(tmp_path / "out"), "--quiet"],
        "share": [str(tmp_path), "--repo", "some/one", "--dry-run", "--output", str(tmp_path / "out")],
    }
    left_by_saelens = dict.fromkeys((signal.SIGINT, signal.SIGTERM), interrupt_callback)  # by an earlier training
    with handled(left_by_saelens):
        assert main([command, *arguments[command]]) == status
        assert {each: signal.getsignal(each) for each in left_by_saelens} == left_by_saelens
    assert "Interrupted" in capsys.readouterr().err
    assert not [path for path in tmp_path.rglob("*") if path.name.endswith(".lock") or ".unfinished" in path.name]


def test_a_final_checkpoint_is_written_again_where_it_is_ours(text, tmp_path):
    final = {"save_final_checkpoint": "true"}
    run(flags(text, tmp_path / "sae", **final))
    place = tmp_path / "sae-checkpoints" / "final_4096"
    first = (place / "sae_weights.safetensors").read_bytes()
    (place / "mine").write_text("notes")
    run(flags(text, tmp_path / "sae", **final), resume=True)  # killed before the SAE was saved it would come here too
    assert (place / "sae_weights.safetensors").read_bytes() == first
    assert (tmp_path / "sae-checkpoints" / "broken-final_4096" / "mine").read_text() == "notes"
    run(flags(text, tmp_path / "sae", seed=6, training_tokens=2048, **final), overwrite=True)
    assert sorted(path.name for path in (tmp_path / "sae-checkpoints").glob("final*")) == ["final_2048"]


def test_an_sae_whose_checkpoints_are_gone_is_not_replaced_by_going_on(text, tmp_path, capsys):
    run(flags(text, tmp_path / "sae", training_tokens=1024))
    before = weights(tmp_path / "sae")
    arguments = ["train", *flags(text, tmp_path / "sae", training_tokens=1024, k=7)]
    elsewhere = [*arguments, "--resume", "--checkpoint_path", str(tmp_path / "others" / "x")]
    assert main(elsewhere) == 2
    assert "holds an earlier training (cfg.json" in capsys.readouterr().err
    with pytest.MonkeyPatch.context() as patched:
        stop_after(patched, 2)
        given = flags(text, tmp_path / "other", training_tokens=1024, k=7, checkpoint_path=tmp_path / "others" / "x")
        assert main(["train", *given]) == 143
    assert main(elsewhere) == 2  # there is a checkpoint now, of another run than the SAE's
    assert "sae.k is 6 there and 7 here" in capsys.readouterr().err
    assert all(torch.equal(before[name], tensor) for name, tensor in weights(tmp_path / "sae").items())


@pytest.mark.parametrize("option", ["--resume", "--overwrite"])
def test_an_sae_that_this_package_has_not_written_stays(option, text, tmp_path, capsys):
    (tmp_path / "sae").mkdir()
    for name in ("cfg.json", "sae_weights.safetensors"):
        (tmp_path / "sae" / name).write_text('{"metadata": {}}')
    assert main(["train", *flags(text, tmp_path / "sae", training_tokens=1024), option]) == 2
    assert "is never replaced" in capsys.readouterr().err
    assert (tmp_path / "sae" / "cfg.json").read_text() == '{"metadata": {}}'

"""What fails beside a run never stops it; what must stop it is one line that says the way out."""

import json
import os
import time
import warnings

import pytest
import torch
import wandb
from huggingface_hub.errors import HTTPError
from sae_lens import TrainingSAE
from safetensors import SafetensorError
from small_runs import flags, write_text

from saelens_cosine.cli import main
from saelens_cosine.experiments.benchmark.run import benchmark
from saelens_cosine.experiments.benchmark.settings import BenchmarkSettings
from saelens_cosine.experiments.compare.run import compare
from saelens_cosine.experiments.compare.settings import ComparisonSettings
from saelens_cosine.faults import line_of
from saelens_cosine.progress import shown
from saelens_cosine.training.recipe import RECIPES, paper


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "text.jsonl")


@pytest.fixture(autouse=True)
def small_steps(monkeypatch):
    monkeypatch.setitem(RECIPES, "paper", lambda tokens, batch=128: paper(tokens, batch))


SMALL = {"layer": 0, "tokens": 1024, "k": 4, "d_sae": 24, "context_size": 32, "eval_tokens": 320}
ARMS = ("cosine_batchtopk", "inner_product_topk")


def command(text, output, **changes):
    options = [
        part for name, value in {**SMALL, **changes}.items() for part in (f"--{name.replace('_', '-')}", str(value))
    ]
    return ["compare", "--quiet", "--dataset", str(text), "--output", str(output), *options, "--arms", *ARMS]


def test_a_display_that_breaks_is_told_of_once_and_asked_no_more():
    seen = []

    def display(*step):
        seen.append(step)
        if len(seen) == 2:
            raise BrokenPipeError("the terminal is gone")

    progress = shown(display)
    progress("Training", 0, 3)
    with pytest.warns(UserWarning, match="display of progress has failed .BrokenPipeError: the terminal is gone"):
        progress("Training", 1, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        progress("Training", 2, 3)
        shown(None)("Training", 2, 3)
    assert len(seen) == 2

    def stopped(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        shown(stopped)("Training", 1, 3)


def broken_display(*_):
    raise RuntimeError("no display")


def test_compare_and_benchmark_end_without_it_while_the_clock_goes_backwards(text, tmp_path, monkeypatch):
    ticks = iter(range(10**9, 0, -1))
    monkeypatch.setattr(time, "time", lambda: float(next(ticks)))
    settings = ComparisonSettings(arms=ARMS, dataset=str(text), eval_prompts=4, **SMALL)
    with pytest.warns(UserWarning, match="no display"):
        result = compare(settings, tmp_path / "out", on_progress=broken_display)
    assert all(arm.seconds > 0 for arm in result.arms)
    with pytest.warns(UserWarning, match="no display"):
        rows = benchmark(BenchmarkSettings(("cosine_topk/reference",), 8, 16, 8, 2, repeats=1), broken_display).rows
    assert rows[0].step_ms > 0


def test_a_terminal_that_is_gone_costs_no_comparison(text, tmp_path, monkeypatch):
    with open(os.devnull) as closed:  # writing to it fails
        monkeypatch.setattr("sys.stderr", closed)
        arguments = [part for part in command(text, tmp_path / "out") if part != "--quiet"]
        assert main(arguments) == 0
    assert json.loads((tmp_path / "out" / "comparison.json").read_text())["arms"]


LOGGED = {"log_to_wandb": "true", "wandb_log_frequency": 1, "eval_every_n_wandb_logs": 2, "n_eval_batches": 1}


@pytest.mark.parametrize("call", ["init", "log", "log_artifact", "finish"])
def test_wandb_fails_and_the_sae_is_that_of_a_run_without_it(call, text, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise wandb.errors.CommError(f"{call} has failed")

    small = {"training_tokens": 1024, "n_checkpoints": 1}
    for name in ("init", "log", "log_artifact", "finish"):
        monkeypatch.setattr(wandb, name, lambda *_, **__: None)
    monkeypatch.setattr(wandb, call, fail)
    with pytest.warns(UserWarning, match=f"W&B has failed .CommError: {call} has failed"):
        assert main(["train", *flags(text, tmp_path / "sae", **small, **LOGGED)]) == 0
    assert (tmp_path / "sae" / "sae_weights.safetensors").exists()
    if call == "init":  # evaluations read from the text, so only a run without any is the same
        assert main(["train", *flags(text, tmp_path / "without", **small)]) == 0
        assert (tmp_path / "sae" / "sae_weights.safetensors").read_bytes() == (
            tmp_path / "without" / "sae_weights.safetensors"
        ).read_bytes()


def test_a_histogram_that_numpy_has_no_bins_for_is_left_out(text, tmp_path, monkeypatch):
    logged = []
    for name in ("init", "log_artifact", "finish"):
        monkeypatch.setattr(wandb, name, lambda *_, **__: None)
    monkeypatch.setattr(wandb, "log", lambda figures, **_: logged.append(figures))
    monkeypatch.setattr(TrainingSAE, "log_histograms", lambda _: {"nan": [float("nan")], "fine": [1.0, 2.0]})
    small = {"training_tokens": 1024, "n_checkpoints": 1}
    with pytest.warns(UserWarning, match="A histogram for W&B is left out: "):
        assert main(["train", *flags(text, tmp_path / "sae", **small, **LOGGED)]) == 0
    drawn = [figures for figures in logged if "nan" in figures]
    assert len(drawn) == 2  # after two of four steps, and after four
    assert all(figures["nan"] is None and figures["fine"] is not None for figures in drawn)


HUGE = 10**13
"""Features: more bytes than a process has addresses."""


@pytest.mark.parametrize("name", ["train", "compare", "ground-truth", "benchmark"])
def test_out_of_memory_says_what_takes_less(name, text, tmp_path, capsys):
    arguments = {
        "train": ["train", *flags(text, tmp_path / "out", d_sae=HUGE)],
        "compare": command(text, tmp_path / "out", d_sae=HUGE),
        "ground-truth": ["ground-truth", "--quiet", "--d-sae", str(HUGE), "--output", str(tmp_path / "out")],
        "benchmark": ["benchmark", "--quiet", "--d-sae", str(HUGE), "--arms", "cosine_topk/reference"],
    }[name]
    assert main(arguments) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith(f"saelens-cosine {name}: Out of memory: ")
    assert "A smaller batch, fewer features (d_sae), a smaller mixing buffer" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB"),
        RuntimeError("std::bad_alloc"),
    ],
)
def test_every_kind_of_memory_that_is_out(error):
    assert "A smaller batch" in line_of(error)


def test_an_error_of_ours_keeps_its_traceback():
    assert line_of(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None
    assert "Free some space" in line_of(SafetensorError("I/O error: No space left on device (os error 28)"))
    assert "Free some space" in line_of(
        RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")
    )
    assert line_of(ValueError("k=0\n  is no number.")) == "k=0 is no number."


def test_a_network_that_is_gone_is_one_line():
    assert "Check the network, HF_HUB_OFFLINE and HF_ENDPOINT" in line_of(HTTPError("Name or service not known"))

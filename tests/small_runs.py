"""A training of 16 steps of 256 tokens, in three fillings of its mixing buffer, and how two of them are compared."""

import json
import os
import signal
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from saelens_cosine.training.recipe import paper
from saelens_cosine.training.resuming.run import ResumableRun

HOOK = "blocks.0.hook_resid_post"


def write_text(path: Path) -> Path:
    """120 documents of uneven length: some shorter than a context, some that give dozens."""
    rng = np.random.default_rng(0)
    words = [f"w{i}" for i in range(300)]
    rows = [{"text": " ".join(rng.choice(words, size=int(rng.integers(3, 400))))} for _ in range(120)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def flags(text, output, **changes) -> list[str]:
    """Of `saelens-cosine train`; a checkpoint every 1024 tokens, 4 in all. A value of None leaves a flag out."""
    chosen = {
        "architecture": "cosine_batchtopk",
        "model_name": "bundled",
        "dataset_path": str(text),
        "hook_name": HOOK,
        "d_in": 192,
        "d_sae": 48,
        "k": 6,
        "training_tokens": 4096,
        "train_batch_size_tokens": 256,
        "context_size": 32,
        "n_batches_in_buffer": 40,
        "store_batch_size_prompts": 3,
        "n_checkpoints": 3,
        "log_to_wandb": "false",
        "seed": 5,
        "output_path": str(output),
        **changes,
    }
    return [part for name, value in chosen.items() if value is not None for part in (f"--{name}", str(value))]


def stop_after(monkeypatch, steps: int, number: int = signal.SIGTERM) -> None:
    """The signal comes in the middle of a step."""
    before = ResumableRun._after_step

    def after_step(run: ResumableRun) -> None:
        if run._trainer.n_training_steps + 1 == steps:
            os.kill(os.getpid(), number)
        before(run)

    monkeypatch.setattr(ResumableRun, "_after_step", after_step)


def compare_flags(text, output, **changes) -> list[str]:
    """Of `saelens-cosine compare`: two arms, two seeds, 1024 tokens each, with the batches of `small_batches` 8 steps."""
    chosen = {
        "model": "bundled",
        "dataset": text,
        "layer": 0,
        "tokens": 1024,
        "k": 4,
        "d-sae": 24,
        "seeds": 2,
        "context-size": 32,
        "eval-tokens": 320,
        "output": output,
        **changes,
    }
    options = [part for name, value in chosen.items() for part in (f"--{name}", str(value))]
    return ["--arms", "cosine_batchtopk", "inner_product_topk", *options, "--quiet"]


def comparison_without_times(folder: Path) -> dict:
    """What `comparison.json` holds, but for the seconds that trainings took."""
    found = json.loads((folder / "comparison.json").read_text())
    for arm in found["arms"]:
        assert arm.pop("seconds") > 0
    return found


def small_batches(tokens, batch=128):
    """The paper's recipe, for `RECIPES`."""
    return paper(tokens, batch)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "sae_weights.safetensors")


def assert_bit_identical(one: Path, other: Path) -> None:
    ones, others = weights(one), weights(other)
    assert ones.keys() == others.keys()
    for name in ones:
        assert torch.equal(ones[name], others[name]), name
    sparsities = [folder / "sparsity.safetensors" for folder in (one, other)]
    assert sparsities[0].exists() == sparsities[1].exists()  # `compare` keeps none
    if sparsities[0].exists():
        assert sparsities[0].read_bytes() == sparsities[1].read_bytes()
    assert json.loads((one / "cfg.json").read_text()) == json.loads((other / "cfg.json").read_text())

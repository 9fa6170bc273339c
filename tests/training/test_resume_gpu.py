"""On one GPU, with PyTorch's deterministic algorithms, a run that is stopped and resumed ends with the same bits."""

import numpy as np
import pytest
import torch
from small_runs import assert_bit_identical, flags, stop_after, write_text

from saelens_cosine.training.stop import StopError
from saelens_cosine.training.train import train

CASES = {
    "batchtopk by the kernels": {"kernels": "fast"},
    "batchtopk in bfloat16": {"kernels": "fast", "autocast": "true"},
    "batchtopk by the formula": {"kernels": "reference"},
    "jumprelu": {"architecture": "per_feature_cosine_jumprelu", "k": None, "target_l0": 6},
    "gated": {"architecture": "cosine_gated", "k": None, "lr_warm_up_steps": 5, "lr_decay_steps": 5},
    "saelens": {"architecture": "topk"},
}


@pytest.fixture(params=[pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, monkeypatch):
    """With what PyTorch needs for equal bits; the variable counts for whatever starts cuBLAS after it."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield request.param
    torch.use_deterministic_algorithms(before)


@pytest.mark.parametrize("case", CASES)
def test_stopped_twice_and_resumed_ends_with_the_same_bits(case, device, tmp_path, monkeypatch):
    text = write_text(tmp_path / "text.jsonl")

    def run(name: str, resume: bool = False) -> None:
        train(flags(text, tmp_path / name, device=device, **CASES[case]), resume=resume)

    run("whole")
    for steps in (4, 9):
        with monkeypatch.context() as patched:
            stop_after(patched, steps)
            with pytest.raises(StopError):
                run("stopped", resume=True)
        torch.manual_seed(0)  # another process has other numbers
        np.random.seed(0)
    run("stopped", resume=True)
    assert_bit_identical(tmp_path / "whole", tmp_path / "stopped")

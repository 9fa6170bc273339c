"""A training step by Triton's kernels: gradients, no waiting, and code for CUDA without a device."""

import contextlib
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from gpu_cases import (
    KINDS,
    SIZES,
    assert_no_worse,
    device,  # noqa: F401
    make_entries,
    make_terms,
)
from helpers import make_sae
from sae_lens.saes.sae import TrainStepInput
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton", reason="Triton is not installed")

from saelens_cosine.kernels import gpu, operations
from saelens_cosine.kernels.autograd import EntryDecode, EntryScores, ScoredBatch
from saelens_cosine.kernels.entries import Entries
from saelens_cosine.kernels.terms import ScoreTerms


def dense_step(x, b_dec, W_enc, b_enc, a, c, W_dec, mask, weight):
    """The loss of a step by its formula, with dense codes."""
    x_c = x - b_dec
    norm = x_c.square().sum(-1, keepdim=True).sqrt()
    cosine = (x_c / norm) @ (W_enc / W_enc.square().sum(0).sqrt())
    codes = (norm**a * c.exp() * cosine + b_enc).relu() * mask
    return ((codes @ W_dec) * weight).sum()


def entry_step(x, b_dec, W_enc, b_enc, a, c, W_dec, mask, weight):
    """The same by the active entries."""
    token, feature = mask.nonzero(as_tuple=True)
    entries = Entries(token, feature, *mask.shape)
    with torch.no_grad():
        norm = (x - b_dec).norm(dim=-1)
        unit, log_norm = (x - b_dec) / norm.unsqueeze(-1), norm.log()
        gain = W_enc.norm(dim=0).reciprocal()
        product = operations.sampled_product(entries, unit, W_enc.T)
        factor = ScoreTerms(a, c, gain, b_enc).factor(log_norm[token], feature)
        batch = ScoredBatch(entries, product, factor, unit, log_norm, gain**2, signed=False)
    values = EntryScores.apply(x, b_dec, W_enc, b_enc, a, c, batch)
    return (EntryDecode.apply(values, W_dec, entries) * weight).sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n_tokens", "d_sae", "width", "n"), SIZES[1:])
def test_all_gradients(n_tokens, d_sae, width, n, kind, dtype, device, monkeypatch):
    for name in ("segment_sum", "sampled_product"):
        monkeypatch.setattr(operations, name, getattr(gpu, name))
    terms = make_terms(d_sae, kind)
    shapes = [(n_tokens, width), (width,), (width, d_sae), (d_sae,), (d_sae, width)]
    x, b_dec, W_enc, b_enc, W_dec = (torch.randn(shape) for shape in shapes)
    mask = make_entries(n_tokens, d_sae, n).to_dense(torch.ones(n)).to(device)
    weight = torch.randn(n_tokens, width).to(device)

    def gradients(step, dtype):
        leaves = [x, b_dec, W_enc, b_enc, terms.norm_exponent, terms.log_scale, W_dec]
        leaves = [leaf.to(device, dtype, copy=True).requires_grad_() for leaf in leaves]
        return torch.autograd.grad(step(*leaves, mask.to(dtype), weight.to(dtype)), leaves)

    exact = gradients(dense_step, torch.float64)
    for got, plain, true in zip(gradients(entry_step, dtype), gradients(dense_step, dtype), exact, strict=True):
        assert got.dtype == dtype
        assert_no_worse(got, plain, true, 8 * true.abs().amax())


class NoWaiting(TorchDispatchMode):
    """Refuses what makes the host wait for the device: values read by the host, and sizes that depend on values."""

    refused = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal", "repeat_interleave", "bincount")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        masks = args[1] if func is torch.ops.aten.index.Tensor else ()
        if func.overloadpacket.__name__ in self.refused or any(m is not None and m.dtype == torch.bool for m in masks):
            raise RuntimeError(f"{func} makes the host wait")
        return func(*args, **(kwargs or {}))


STEPS = [
    "inner_product_topk",
    "cosine_abstopk",
    "per_feature_cosine_batchtopk",
    "cosine_matryoshka_batchtopk",
    "magnitude_bypass_batchtopk",
]
"""Every selector and every score."""


@pytest.mark.parametrize("dead", [False, True])
@pytest.mark.parametrize("name", STEPS)
def test_a_training_step_by_these_kernels(name, dead, device, monkeypatch):
    """Losses, gradients and buffers equal the reference path's, and after the first step the host never waits."""
    options = {"dead_feature_window_tokens": 5, "aux_loss_coefficient": 1.0} if dead else {}
    saes = {
        kernels: make_sae(name, d_in=6, d_sae=70, k=2, kernels=kernels, b_dec_init="zeros", **options)
        .to(device)
        .train()
        for kernels in ("reference", "fast")
    }
    if device == "cpu":  # from here on: a start of random weights takes the interpreter seconds
        monkeypatch.setattr(operations, "kernels_for", lambda _tensor: gpu)
    for step in range(2):
        x = torch.randn(9, 6, generator=torch.Generator().manual_seed(step)).to(device)
        outputs = {}
        for kernels, sae in saes.items():
            with NoWaiting() if step and kernels == "fast" and device == "cpu" else contextlib.nullcontext():
                outputs[kernels] = sae.training_forward_pass(TrainStepInput(x, {}, None, step, False))
                sae.zero_grad()
                outputs[kernels].loss.backward()
    assert type(outputs["fast"].feature_acts).__name__ == "EntryCodes"
    for loss, value in outputs["reference"].losses.items():
        torch.testing.assert_close(outputs["fast"].losses[loss], value, rtol=1e-5, atol=1e-6)
    assert (outputs["fast"].losses["auxiliary_reconstruction_loss"] > 0) == dead
    torch.testing.assert_close(outputs["fast"].feature_acts.dense(), outputs["reference"].feature_acts)
    for (key, parameter), other in zip(saes["fast"].named_parameters(), saes["reference"].parameters(), strict=True):
        if not other.requires_grad:
            assert parameter.grad is other.grad is None
            continue
        scale = other.grad.abs().max()
        assert (parameter.grad - other.grad).abs().max() <= 1e-5 * scale, key
    for (key, buffer), other in zip(saes["fast"].named_buffers(), saes["reference"].buffers(), strict=True):
        torch.testing.assert_close(buffer, other, msg=key)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("per_token", [False, True])
def test_best_places_never_makes_the_host_wait(per_token, kind, device):
    terms = make_terms(33, kind, device)
    case = (torch.randn(3, 33, device=device), torch.randn(3, device=device), terms)
    expected = gpu.best_places(*case, 5, per_token)
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        with NoWaiting():
            got = gpu.best_places(*case, 5, per_token)
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(got, expected)


@pytest.mark.parametrize("wait", [torch.Tensor.item, bool, torch.nonzero, lambda t: t[t > 0], int])
def test_waiting_would_be_noticed(wait):
    with pytest.raises(RuntimeError, match="makes the host wait"), NoWaiting():
        wait(torch.ones(1))


def test_kernels_compile_for_cuda_without_a_device(tmp_path):
    """All of them, to machine code, in a fresh interpreter: nothing works in Triton's interpreter alone."""
    script = """
        import torch
        from triton.backends.compiler import GPUTarget
        from triton.runtime import driver
        from triton.runtime.jit import JITFunction

        class Hopper:
            get_current_device = get_current_stream = lambda *_: 0
            get_current_target = lambda self: GPUTarget("cuda", 90, 32)

        driver.set_active(Hopper())
        compiled, run = set(), JITFunction.run

        def compile_only(self, *args, **kwargs):
            kernel = run(self, *args, **{**kwargs, "warmup": True})
            assert kernel.asm["cubin"]
            compiled.add(self.fn.__name__)

        JITFunction.run = compile_only
        torch.empty = torch.ones  # nothing runs: counts that let the selection go on

        from saelens_cosine.kernels import gpu
        from saelens_cosine.kernels.entries import Entries
        from saelens_cosine.kernels.terms import ScoreTerms

        for n_features in (1, 13, 64):  # a constant, any number, one that lets loads be vectors
            vector, one = torch.ones(n_features), torch.tensor(1.0)
            entries = Entries(torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64), 2, n_features)
            for dtype in (torch.float32, torch.bfloat16, torch.float64):
                table = torch.ones(n_features, n_features, dtype=dtype)
                gpu.segment_sum(entries.features, entries.token_offsets, vector, table)
                gpu.sampled_product(entries, table[:1], table)
            for dtype, exponent in ((torch.float32, vector), (torch.bfloat16, one)):
                batch = (torch.ones(2, n_features, dtype=dtype), torch.zeros(2), ScoreTerms(exponent, one, vector, vector))
                gpu.best_places(*batch, 1, per_token=exponent is one)
                gpu.places_above(*batch, exponent)
        print(*sorted(compiled))
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        env={**environment, "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.split() == [
        "_count_chosen", "_count_digits", "_count_maxima", "_group_maxima", "_list_members",
        "_places_above", "_sampled_product", "_segment_sum", "_write_best",
    ]  # fmt: skip

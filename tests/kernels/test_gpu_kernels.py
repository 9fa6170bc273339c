"""The Triton kernels against float64 formulas and against their readable forms; by Triton's interpreter without CUDA."""

import contextlib
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from helpers import make_sae
from sae_lens.saes.sae import TrainStepInput
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton", reason="Triton is not installed")

from saelens_cosine.kernels import gpu, operations, reference
from saelens_cosine.kernels.autograd import EntryDecode, EntryScores, ScoredBatch
from saelens_cosine.kernels.entries import Entries
from saelens_cosine.kernels.terms import ScoreTerms

SIZES = [(1, 1, 1, 1), (1, 5, 3, 2), (3, 13, 7, 20), (4, 9, 600, 11), (3, 4, 5, 0)]
"""Tokens, features, inputs, entries: odd sizes, one block of width and more, no entries."""

DTYPES = [torch.float32, torch.float64, torch.bfloat16]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    if request.param == "cpu" and torch.cuda.is_available():
        pytest.skip("kernels are compiled for CUDA here, not interpreted")
    return request.param


def make_entries(n_tokens, d_sae, n, device="cpu"):
    places = torch.randperm(n_tokens * d_sae)[:n].sort().values.to(device)
    return Entries(places // d_sae, places % d_sae, n_tokens, d_sae)


def make_terms(n_features, kind, device="cpu"):
    """Exponents from -0.5 to 1.5 and scales, by feature or one for all; "signed" ranks by size."""
    a, c = torch.linspace(-0.5, 1.5, n_features), 0.3 * torch.randn(n_features)
    if kind in ("scalar", "scalar exponent"):
        a = torch.tensor(0.7)
    if kind in ("scalar", "scalar scale"):
        c = torch.tensor(-0.4)
    gain, bias = 0.5 + torch.rand(n_features), 0.1 * torch.randn(n_features)
    return ScoreTerms(*(t.to(device) for t in (a, c, gain, bias)), signed=kind == "signed")


def plain_terms(n_features, device="cpu", signed=False):
    """Scores that are the products themselves."""
    zero, one = torch.zeros((), device=device), torch.ones(n_features, device=device)
    return ScoreTerms(zero, zero, one, 0 * one, signed)


def double(*tensors):
    return [t.double() for t in tensors]


def assert_no_worse(got, plain, exact, size):
    """`got` is as near to float64 as twice plain torch in the same dtype, but for a few roundings of what is summed."""
    loss = 2 * (plain.double() - exact).abs().amax() if exact.numel() else 0
    assert got.shape == exact.shape
    assert ((got.double() - exact).abs() <= loss + 4 * torch.finfo(got.dtype).eps * size).all()


def test_segment_sum_by_hand(device):
    # segments {0, 1}, {}, {2}: 2 [1, 0] - [5, 5] = [-3, -5], nothing, 3 [0, 1]
    rows, offsets = torch.tensor([0, 2, 1], device=device), torch.tensor([0, 2, 2, 3], device=device)
    table = torch.tensor([[1.0, 0.0], [0.0, 1.0], [5.0, 5.0]], device=device)
    out = gpu.segment_sum(rows, offsets, torch.tensor([2.0, -1.0, 3.0], device=device), table)
    assert out.tolist() == [[-3, -5], [0, 0], [0, 3]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n_tokens", "d_sae", "width", "n"), SIZES)
def test_segment_sum_against_float64(n_tokens, d_sae, width, n, dtype, device):
    entries = make_entries(n_tokens, d_sae, n, device)
    values = torch.randn(n, device=device).to(dtype)
    by_token = (entries.features, entries.token_offsets, values, torch.randn(d_sae, width, device=device).to(dtype))
    by_feature = (entries.tokens_by_feature, entries.feature_offsets, values[entries.by_feature])
    for case in (by_token, (*by_feature, torch.randn(n_tokens, width, device=device).to(dtype))):
        rows, offsets, weights, table = case
        got = gpu.segment_sum(*case)
        exact = reference.segment_sum(rows, offsets, *double(weights, table))
        size = reference.segment_sum(rows, offsets, *double(weights.abs(), table.abs()))
        assert got.dtype == dtype
        assert_no_worse(got, reference.segment_sum(*case), exact, size)
        assert torch.equal(got, gpu.segment_sum(*case))


def test_segment_sum_of_a_feature_active_in_every_token(device):
    rows, offsets = torch.arange(300, device=device), torch.tensor([0, 0, 300], device=device)
    case = (rows, offsets, torch.randn(300, device=device), torch.randn(300, 5, device=device))
    exact = case[2].double() @ case[3].double()
    got = gpu.segment_sum(*case)
    assert got[0].tolist() == [0.0] * 5
    assert_no_worse(got[1], reference.segment_sum(*case)[1], exact, case[2].double().abs() @ case[3].double().abs())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n_tokens", "d_sae", "width", "n"), SIZES)
def test_sampled_product_against_float64(n_tokens, d_sae, width, n, dtype, device):
    entries = make_entries(n_tokens, d_sae, n, device)
    left, right = (torch.randn(size, width, device=device).to(dtype) for size in (n_tokens, d_sae))
    got = gpu.sampled_product(entries, left, right)
    exact = reference.sampled_product(entries, *double(left, right))
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    size = reference.sampled_product(entries, *double(left.abs(), right.abs()))
    assert_no_worse(got, reference.sampled_product(entries, left.to(got.dtype), right.to(got.dtype)), exact, size)


def test_strided_inputs(device):
    """Transposed matrices, every second value, and a row that repeats."""
    entries = make_entries(3, 13, 20, device)
    left, right, values = (torch.randn(size, device=device) for size in ((7, 3), (7, 13), (40,)))
    case = (entries.features, entries.token_offsets, values[::2], right.T)
    torch.testing.assert_close(gpu.segment_sum(*case), reference.segment_sum(*case))
    torch.testing.assert_close(
        gpu.sampled_product(entries, left.T, right.T), reference.sampled_product(entries, left.T, right.T)
    )
    terms = make_terms(13, "by feature", device)
    product, log_norm = torch.randn(13, 3, device=device).T, torch.tensor([0.5], device=device).expand(3)
    case = (product, log_norm, terms)
    assert torch.equal(gpu.best_places(*case, 9, False), reference.best_places(*case, 9, False))
    assert torch.equal(gpu.places_above(*case, terms.gain[0]), reference.places_above(*case, terms.gain[0]))


SELECTIONS = [
    (1, 1, 1),
    (1, 7, 0),
    (3, 1, 2),
    (3, 13, 5),
    (5, 33, 200),  # more than there are, and more of each token than it has
    (2, 4099, 50),  # more than one block of scores
]
KINDS = ["scalar", "by feature", "scalar exponent", "scalar scale", "signed"]


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n_tokens", "n_features", "n_wanted"), SELECTIONS)
def test_best_places_are_the_references(n_tokens, n_features, n_wanted, kind, per_token, device):
    terms = make_terms(n_features, kind, device)
    case = (torch.randn(n_tokens, n_features, device=device), torch.randn(n_tokens, device=device), terms)
    got = gpu.best_places(*case, n_wanted, per_token)
    assert got.dtype == torch.int64
    assert torch.equal(got, reference.best_places(*case, n_wanted, per_token))


@pytest.mark.parametrize("places", [gpu.best_places, reference.best_places])
@pytest.mark.parametrize("kind", KINDS)
def test_best_places_against_sorted_float64_scores(kind, places, device):
    n_tokens, n_features = 4, 37
    terms = make_terms(n_features, kind, device)
    product, log_norm = torch.randn(n_tokens, n_features, device=device), torch.randn(n_tokens, device=device)
    a, c, gain, bias = double(terms.norm_exponent, terms.log_scale, terms.gain, terms.bias)
    score = torch.exp(a * log_norm.double().unsqueeze(1) + c) * gain * product.double() + bias  # no two alike
    score = score.abs() if kind == "signed" else score
    best = score.flatten().topk(30).indices.sort().values
    assert torch.equal(places(product, log_norm, terms, 30, False), best)
    of_each = [(token * n_features + score[token].topk(6).indices).sort().values for token in range(n_tokens)]
    assert torch.equal(places(product, log_norm, terms, 6, True), torch.cat(of_each))


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_best_places_of_other_dtypes(dtype, per_token, device):
    product, log_norm = torch.randn(3, 50, device=device).to(dtype), torch.randn(3, device=device)
    case = (product, log_norm, make_terms(50, "by feature", device))
    assert torch.equal(gpu.best_places(*case, 11, per_token), reference.best_places(*case, 11, per_token))


@pytest.mark.parametrize("places", [gpu.best_places, reference.best_places])
def test_best_places_by_hand(places, device):
    def best(product, n_wanted, per_token):
        product = torch.tensor(product, device=device)
        log_norm, terms = torch.zeros(len(product), device=device), plain_terms(product.shape[1], device)
        return places(product, log_norm, terms, n_wanted, per_token).tolist()

    tied = [[1.0, 2.0, 2.0], [2.0, 0.5, 2.0]]  # 2 at the flat places 1, 2, 3, 5; 1 at 0
    assert best(tied, 3, False) == [1, 2, 3]
    assert best(tied, 5, False) == [0, 1, 2, 3, 5]
    assert best(tied, 1, True) == [1, 3]
    assert best(tied, 2, True) == [1, 2, 3, 5]
    negative = [[-1.0, 3.0, -2.0], [float("nan"), -5.0, 1.0]]  # rectified: 0 3 0, 0 0 1
    assert best(negative, 2, False) == [1, 5]
    assert best(negative, 4, False) == [0, 1, 2, 5]
    assert best(negative, 2, True) == [0, 1, 3, 5]
    zeros = [[0.0, -0.0], [-1.0, 0.0]]
    assert best(zeros, 3, False) == [0, 1, 2]
    assert best(zeros, 1, True) == [0, 2]
    assert best([[1.0, float("inf"), 2.0]], 1, False) == [1]
    assert best([[7.0] * 5000], 2100, True) == list(range(2100))  # ties that end in the second block


@pytest.mark.parametrize("places", [gpu.best_places, reference.best_places])
def test_the_largest_places_by_size(places, device):
    def largest(product, n_wanted, per_token):
        product = torch.tensor(product, device=device)
        terms = plain_terms(product.shape[1], device, signed=True)
        return places(product, torch.zeros(len(product), device=device), terms, n_wanted, per_token).tolist()

    product = [[-3.0, 2.0, 0.0, -2.0], [1.0, -1.0, -0.0, float("nan")]]  # sizes 3 2 0 2, 1 1 0 and a NaN as 0
    assert largest(product, 1, True) == [0, 4]
    assert largest(product, 2, True) == [0, 1, 4, 5]
    assert largest(product, 3, True) == [0, 1, 3, 4, 5, 6]
    assert largest(product, 4, False) == [0, 1, 3, 4]
    assert largest([[1.0, float("-inf"), 2.0]], 1, True) == [1]
    assert largest([[-7.0, 7.0] * 1500], 2100, True) == list(range(2100))


def test_best_places_tells_neighbouring_floats_apart(device):
    # 1 + j 2^-23 for j in 0 .. 599, in any order: all but the last ten bits are the same
    order = torch.randperm(600)
    product = (order.to(torch.int32) + 0x3F800000).view(torch.float32).view(2, 300).to(device)
    best = gpu.best_places(product, torch.zeros(2, device=device), plain_terms(300, device), 77, False)
    assert best.tolist() == (order >= 600 - 77).nonzero().squeeze(1).tolist()


def test_best_places_over_all_magnitudes(device):
    order = torch.randperm(121)
    product = (10.0 ** (order / 2 - 30)).view(1, -1).to(device)  # 1e-30 .. 1e30
    for n_wanted in (1, 40, 120):
        best = gpu.best_places(product, torch.zeros(1, device=device), plain_terms(121, device), n_wanted, True)
        assert best.tolist() == (order >= 121 - n_wanted).nonzero().squeeze(1).tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("threshold", [-1.0, 0.2, 1e6, "by feature"])
@pytest.mark.parametrize(("n_tokens", "n_features"), [(1, 1), (3, 13), (2, 2051)])
def test_places_above_are_the_references(n_tokens, n_features, threshold, dtype, device):
    terms = make_terms(n_features, "by feature", device)
    product, log_norm = torch.randn(n_tokens, n_features, device=device).to(dtype), torch.randn(n_tokens, device=device)
    limit = torch.randn(n_features) if threshold == "by feature" else torch.tensor(threshold)
    case = (product, log_norm, terms, limit.to(device))
    assert torch.equal(gpu.places_above(*case), reference.places_above(*case))


@pytest.mark.parametrize("places", [gpu.places_above, reference.places_above])
def test_places_above_by_hand(places, device):
    product = torch.tensor([[1.0, 2.0, -3.0], [0.0, 2.5, float("nan")]], device=device)
    case = (product, torch.zeros(2, device=device), plain_terms(3, device))
    assert places(*case, torch.tensor(1.0, device=device)).tolist() == [1, 4]  # above, not at
    assert places(*case, torch.tensor(-5.0, device=device)).tolist() == [0, 1, 4]  # positive ones only
    assert places(*case, torch.tensor([0.5, 2.0, 0.0], device=device)).tolist() == [0, 4]
    assert places(*case, torch.tensor(9.0, device=device)).tolist() == []
    assert places(product[:0], case[1][:0], case[2], torch.tensor(0.0, device=device)).tolist() == []


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
    if device == "cpu":
        monkeypatch.setattr(operations, "kernels_for", lambda _tensor: gpu)
    options = {"dead_feature_window_tokens": 10, "aux_loss_coefficient": 1.0} if dead else {}
    saes = {
        kernels: make_sae(name, d_in=6, d_sae=70, k=2, kernels=kernels, b_dec_init="zeros", **options)
        .to(device)
        .train()
        for kernels in ("reference", "fast")
    }
    for step in range(3):
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

"""What test_gpu_kernels and its neighbours share."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from saelens_cosine.kernels.entries import Entries
from saelens_cosine.kernels.terms import ScoreTerms

SIZES = [(1, 1, 1, 1), (1, 5, 3, 2), (3, 13, 7, 20), (4, 9, 600, 11), (3, 4, 5, 0)]
"""Tokens, features, inputs, entries: odd sizes, one block of width and more, no entries."""


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


def assert_no_worse(got, plain, exact, size):
    """`got` is as near to float64 as twice plain torch in the same dtype, but for a few roundings of what is summed."""
    loss = 2 * (plain.double() - exact).abs().amax() if exact.numel() else 0
    assert got.shape == exact.shape
    assert ((got.double() - exact).abs() <= loss + 4 * torch.finfo(got.dtype).eps * size).all()


KINDS = ["scalar", "by feature", "scalar exponent", "scalar scale", "signed"]

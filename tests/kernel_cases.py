"""What test_kernels and its neighbours share."""

import math

import pytest
import torch

from saelens_cosine.kernels import filter
from saelens_cosine.kernels.entries import Entries
from saelens_cosine.kernels.optimizer import fuse_adam_of
from saelens_cosine.kernels.selection import Encoder, UnitInputs
from saelens_cosine.kernels.terms import ScoreTerms
from saelens_cosine.score import NORM_FLOOR

SIZES = [(1, 1, 1, 1), (1, 5, 3, 2), (3, 13, 7, 20), (5, 33, 17, 40), (4, 9, 300, 11), (3, 4, 5, 0)]
"""Tokens, features, inputs, entries: odd sizes, no multiples of 8, no entries."""
BF16, F32, F64 = torch.bfloat16, torch.float32, torch.float64
FILTERS = [(F32, BF16), (F64, BF16), (F32, F32), (F64, F64)]
"""Precisions of the scores and of the filter's product, every pair that `filter_dtype` can make."""


@pytest.fixture(params=FILTERS, ids=lambda pair: "{}-{}".format(*pair).replace("torch.", ""))
def dtype(request, monkeypatch):
    """The precision of the scores, while the filter's product is made in the other of the pair."""
    monkeypatch.setattr(filter, "filter_dtype", lambda _: request.param[1])
    return request.param[0]


def t(*values, dtype=F32):
    return torch.tensor(values, dtype=dtype)


def make_entries(n_tokens, d_sae, n):
    places = torch.randperm(n_tokens * d_sae)[:n].sort().values
    return Entries(places // d_sae, places % d_sae, n_tokens, d_sae)


def assert_no_worse(got, plain, exact, size):
    """`got` is as near to float64 as twice plain torch in the same dtype, but for a few roundings of what is summed."""
    loss = 2 * (plain.double() - exact).abs().amax() if exact.numel() else 0
    assert got.shape == exact.shape
    assert got.dtype == plain.dtype
    assert ((got.double() - exact).abs() <= loss + 4 * torch.finfo(got.dtype).eps * size).all()


def random_scores(seed, kind, per_feature, dtype, size=None):
    """Inputs and encoder: exponents from -1 to 2, norms from 1e-3 to 1e3, biases of either sign."""
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=rng, dtype=F64)

    n_tokens, d_sae, d_in = size or [(1, 1, 1), (1, 13, 2), (9, 13, 7), (6, 23, 33), (9, 22, 1), (13, 7, 3)][seed % 6]
    unit = torch.nn.functional.normalize(normal(n_tokens, d_in))
    log_norm = (2 * torch.rand(n_tokens, generator=rng, dtype=F64) - 1) * math.log(1e3)
    weight = normal(d_sae, d_in)
    if kind == "equal":
        unit = unit[:1].repeat(n_tokens, 1)
    if kind in ("equal", "parallel"):
        weight = unit[torch.randint(n_tokens, (d_sae,), generator=rng)] + 10.0 ** -(seed % 8) * weight
    if kind == "zero column":
        weight[0] = 0
    weight = weight * normal(d_sae, 1).exp()
    a, c, bias = 3 * torch.rand(d_sae, generator=rng, dtype=F64) - 1, 0.5 * normal(d_sae), normal(d_sae)
    if not per_feature:
        a, c = a[0], c[0]
    gain = weight.norm(dim=1).clamp_min(NORM_FLOOR).reciprocal()
    unit, log_norm, weight, *terms = (p.to(dtype) for p in (unit, log_norm, weight, a, c, gain, bias))
    encoder = Encoder(weight, ScoreTerms(*terms), filter.Rounded.of(weight))
    return UnitInputs(unit, log_norm), encoder.by_size() if kind == "signed" else encoder


def exact_scores(inputs, encoder):
    """`[B, F]` of the formula in float64, and the sizes of what is summed."""
    terms, unit, weight = encoder.terms, inputs.unit.double(), encoder.weight.double()
    a, c, gain, bias = (p.double() for p in (terms.norm_exponent, terms.log_scale, terms.gain, terms.bias))
    factor = inputs.log_norm.double().exp().unsqueeze(1) ** a * c.exp() * gain
    return factor * (unit @ weight.T) + bias, factor * (unit.abs() @ weight.abs().T) + bias.abs()


@pytest.fixture
def watch():
    """`fuse_adam_of`, ended after the test."""
    handles = []
    yield lambda parameter: handles.append(fuse_adam_of(parameter))
    for handle in handles:
        handle.remove()

"""Triton's kernels against the reference and float64, in its interpreter where there is no GPU."""

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

pytest.importorskip("triton", reason="Triton is not installed")

from saelens_cosine.kernels import gpu, reference
from saelens_cosine.kernels.terms import ScoreTerms

DTYPES = [torch.float32, torch.float64, torch.bfloat16]


def plain_terms(n_features, device="cpu", signed=False):
    """Scores that are the products themselves."""
    zero, one = torch.zeros((), device=device), torch.ones(n_features, device=device)
    return ScoreTerms(zero, zero, one, 0 * one, signed)


def double(*tensors):
    return [t.double() for t in tensors]


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

"""Entries, the filter of scores and the operations, by hand and against float64."""

import itertools
import math

import pytest
import torch
from kernel_cases import (
    BF16,
    F32,
    F64,
    SIZES,
    assert_no_worse,
    dtype,  # noqa: F401
    exact_scores,
    make_entries,
    random_scores,
    t,
)

from saelens_cosine.kernels import cpu, filter, operations, reference
from saelens_cosine.kernels.entries import Entries, counts, offsets, stable_order
from saelens_cosine.kernels.filter import Rounded
from saelens_cosine.kernels.terms import ScoreTerms


def test_entries_by_hand():
    # 1 at (0, 1), 2 at (0, 3), 3 at (2, 0), 4 at (2, 1), 5 at (2, 3); none in token 1, none of feature 2
    entries = Entries(torch.tensor([0, 0, 2, 2, 2]), torch.tensor([1, 3, 0, 1, 3]), 3, 4)
    values = t(1, 2, 3, 4, 5).requires_grad_()
    assert len(entries) == 5
    assert entries.token_offsets.tolist() == [0, 2, 2, 5]
    assert entries.by_feature.tolist() == [2, 0, 3, 1, 4]
    assert entries.tokens_by_feature.tolist() == [2, 0, 2, 0, 2]
    assert entries.feature_counts.tolist() == [1, 2, 0, 2]
    assert entries.feature_offsets.tolist() == [0, 1, 3, 3, 5]
    assert entries.sum_by_feature(values).tolist() == [3, 1 + 4, 0, 2 + 5]
    assert entries.sum_by_token(values).tolist() == [1 + 2, 0, 3 + 4 + 5]
    dense = entries.to_dense(values)
    assert dense.tolist() == [[0, 1, 0, 2], [0, 0, 0, 0], [3, 4, 0, 5]]
    dense.backward(torch.arange(12.0).view(3, 4))  # 4 token + feature at each place
    assert values.grad.tolist() == [1, 3, 8, 9, 11]


@pytest.mark.parametrize("n", [32766, 32767, 32768, 32769, 40001, 65537])
def test_keys_at_the_limits_of_narrow_integers(n):
    keys = torch.tensor([n - 1, 0, n - 1, n // 2, 0])
    assert stable_order(keys, n).tolist() == [1, 4, 3, 0, 2]
    many = torch.randint(n - 9, n, (3000,))
    assert stable_order(many, n).tolist() == sorted(range(3000), key=many.tolist().__getitem__)  # sorted is stable
    found = counts(keys, n)
    assert found.dtype == torch.int64
    assert found.nonzero().squeeze(1).tolist() == [0, n // 2, n - 1]
    assert found[[0, n // 2, n - 1]].tolist() == [2, 1, 2]
    starts = offsets(keys.sort().values, n)
    assert starts.shape == (n + 1,)
    assert starts[[0, 1, n // 2, n // 2 + 1, n - 1, n]].tolist() == [0, 2, 2, 3, 3, 5]


def test_operations_by_hand():
    # segments {0, 1}, {}, {2}: 2 [1, 0] - [5, 5] = [-3, -5], nothing, 3 [0, 1]
    rows, table = torch.tensor([0, 2, 1]), t([1, 0], [0, 1], [5, 5])
    out = operations.segment_sum(rows, torch.tensor([0, 2, 2, 3]), t(2, -1, 3), table)
    assert out.tolist() == [[-3, -5], [0, 0], [0, 3]]
    # <(1, 2), (0, 1)> = 2 at (0, 1), <(3, 4), (1, 0)> = 3 at (1, 0), <(3, 4), (5, 5)> = 35 at (1, 2)
    entries = Entries(torch.tensor([0, 1, 1]), torch.tensor([1, 0, 2]), 2, 3)
    assert operations.sampled_product(entries, t([1, 2], [3, 4]), table).tolist() == [2, 3, 35]
    assert operations.kernels_for(table) is cpu


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize(("n_tokens", "d_sae", "width", "n"), SIZES)
def test_operations_against_float64(n_tokens, d_sae, width, n, strided, dtype):
    def matrix(rows):
        return torch.randn(width, rows, dtype=dtype).T if strided else torch.randn(rows, width, dtype=dtype)

    entries, left, right = make_entries(n_tokens, d_sae, n), matrix(n_tokens), matrix(d_sae)
    values = torch.randn(2 * n, dtype=dtype)[::2] if strided else torch.randn(n, dtype=dtype)
    by_feature = (entries.tokens_by_feature, entries.feature_offsets), (values[entries.by_feature], left)
    for name, places, floats in (
        ("segment_sum", (entries.features, entries.token_offsets), (values, right)),
        ("segment_sum", *by_feature),
        ("sampled_product", (entries,), (left, right)),
    ):
        fast, readable = getattr(cpu, name), getattr(reference, name)
        exact, size = (readable(*places, *(f(v.double()) for v in floats)) for f in (torch.clone, torch.abs))
        assert_no_worse(fast(*places, *floats), readable(*places, *floats), exact, size)


def test_true_places_are_nonzero():
    shapes = [(size,) for size in range(41)] + [(7, 13), (1, 8), (5, 1)]
    for mask in (torch.rand(shape) < density for shape in shapes for density in (0.0, 0.05, 0.5, 1.0)):
        assert torch.equal(filter.true_places(mask), mask.view(-1).nonzero().squeeze(1))


@pytest.mark.parametrize("dtype", [BF16, F32, F64])
def test_ordered_bounds_compare_as_floats(dtype):
    info = torch.finfo(dtype)
    edges = t(0, 1, info.tiny, info.smallest_normal / 4, info.max, math.inf, dtype=dtype)
    edges = torch.cat([edges, -edges])
    values = torch.cat([edges, torch.randn(200).to(dtype), (torch.randn(200) * 1e-30).to(dtype)])
    bounds = torch.cat([values[values > 0], torch.rand(50).to(dtype)])
    near = torch.cat([values, bounds, torch.nextafter(bounds, -bounds), torch.nextafter(bounds, 2 * bounds)])
    ordered = filter.as_ordered(bounds, dtype)
    assert ordered.element_size() == dtype.itemsize
    assert torch.equal(near.unsqueeze(1).view(ordered.dtype) >= ordered, near.unsqueeze(1) >= bounds)
    never = filter.as_ordered(-bounds, dtype)
    assert (near.unsqueeze(1).view(ordered.dtype) >= never).all()
    assert (near.view(ordered.dtype) >= filter.as_ordered(torch.zeros((), dtype=dtype), dtype)).all()


BF16_PRODUCTS = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")


@pytest.mark.parametrize("has", [*BF16_PRODUCTS, None])
def test_precision_of_the_filter(has, monkeypatch):
    for name in BF16_PRODUCTS:
        monkeypatch.setattr(torch.cpu, name, lambda name=name: name == has, raising=False)
    assert filter.filter_dtype(F32) == (BF16 if has else F32)
    assert filter.filter_dtype(F64) == (BF16 if has else F64)
    for name in BF16_PRODUCTS:  # of torch's own, and not in every version of it
        monkeypatch.delattr(torch.cpu, name)
    assert filter.filter_dtype(F32) == F32


@pytest.mark.parametrize("shape", [(1, 1), (13, 7), (3, 40)])
def test_rounded(shape, dtype, monkeypatch):
    monkeypatch.setattr(filter, "ROUNDING_BLOCK", 30)  # blocks of 30, 4 and 1 rows
    exact, product = torch.randn(shape, dtype=dtype), filter.filter_dtype(dtype)
    rounded = Rounded.of(exact)
    assert torch.equal(rounded.rows, exact.to(product))
    torch.testing.assert_close(rounded.norm, exact.square().sum(1).sqrt())
    torch.testing.assert_close(rounded.loss, (exact - exact.to(product)).square().sum(1).sqrt())
    assert (rounded.loss > 0).any() == (product == BF16)


KINDS = ["random", "parallel", "equal", "zero column", "signed"]


def n_missed(inputs, encoder, floor_kind, seed):
    """How many entries are above a floor, set a little below one score or one of each feature, and no candidates.

    A little is what the score itself is rounded by where its exponent a log n is of size 16.
    """
    score, size = exact_scores(inputs, encoder)
    score = score.abs() if encoder.terms.signed else score
    dtype, exponent, reach = inputs.unit.dtype, None, torch.ones(len(score), 1, dtype=F64)
    if floor_kind == "with the norm":
        exponent = encoder.terms.norm_exponent.mean()
        reach = (exponent.double() * inputs.log_norm.double()).exp().unsqueeze(1)
    slack = 16 * torch.finfo(dtype).eps * (size + score.abs())
    below = (score - 2 * slack) / reach
    pick = torch.randint(below.numel(), (), generator=torch.Generator().manual_seed(seed))
    floor = (below[pick // below.shape[1]] if floor_kind == "by feature" else below.flatten()[pick]).to(dtype)
    found = filter.candidates(inputs.unit, inputs.log_norm, encoder.rounded, encoder.terms, floor, exponent)
    passed = torch.zeros(score.shape, dtype=torch.bool)
    passed[found] = True
    assert passed.sum() == len(found[0])  # none twice
    return int(((score > floor.double() * reach + slack) & ~passed).sum())


@pytest.mark.parametrize("floor_kind", ["scalar", "by feature", "with the norm"])
@pytest.mark.parametrize("per_feature", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_candidates_miss_nothing(kind, per_feature, floor_kind, dtype, monkeypatch):
    monkeypatch.setattr(filter, "TILE_TOKENS", 4)
    monkeypatch.setattr(filter, "TILE_BYTES", 80)  # of 2 to 10 features at 4 tokens
    for seed in range(48):
        assert n_missed(*random_scores(seed, kind, per_feature, dtype), floor_kind, seed) == 0, f"seed {seed}"


def test_without_the_loss_of_rounding_candidates_would_be_missed(monkeypatch):
    monkeypatch.setattr(filter, "filter_dtype", lambda _: BF16)

    class Lossless(Rounded):
        @classmethod
        def of(cls, exact, dtype=None):
            rounded = Rounded.of(exact, dtype)
            return cls(rounded.rows, rounded.norm, torch.zeros_like(rounded.loss))

    def missed():
        cases = (random_scores(seed, "parallel", False, F32, (1, 501, 3)) for seed in range(20))
        return sum(n_missed(*case, "by feature", 0) for case in cases)

    assert missed() == 0
    monkeypatch.setattr(filter, "Rounded", Lossless)
    assert missed() > 0


def test_candidates_allow_for_the_rounding_of_sums(dtype):
    # 0.5 (4096 - 4096 + h) = h / 2 for h = 4096 u, of which float32 or float64 keeps nothing where h is added to 4096
    h = 2048 * torch.finfo(torch.promote_types(filter.filter_dtype(dtype), F32)).eps
    weight = torch.tensor(list(itertools.permutations((4096, -4096, h, 0))), dtype=dtype)
    zero, one = torch.zeros(len(weight), dtype=dtype), torch.ones(len(weight), dtype=dtype)
    terms, unit = ScoreTerms(zero[0], zero[0], one, zero), torch.full((1, 4), 0.5, dtype=dtype)
    found = filter.candidates(unit, zero[:1], Rounded.of(weight), terms, zero[0] + h / 4)
    assert found[1].tolist() == list(range(24))

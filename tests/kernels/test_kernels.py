"""The CPU kernels against float64 formulas and small cases by hand; `test_gpu_kernels` is their twin for Triton."""

import copy
import itertools
import math
import pickle
import sys

import pytest
import torch
from helpers import make_activations, make_sae, train_step

from saelens_cosine.kernels import cpu, filter, operations, reference, selection
from saelens_cosine.kernels.autograd import EntryDecode, EntryScores, ScoredBatch
from saelens_cosine.kernels.codes import EntryCodes, ScoresOnDemand
from saelens_cosine.kernels.entries import Entries, counts, offsets, stable_order
from saelens_cosine.kernels.filter import Rounded
from saelens_cosine.kernels.optimizer import fuse_adam_of
from saelens_cosine.kernels.selection import Encoder, UnitInputs
from saelens_cosine.kernels.terms import ScoreTerms
from saelens_cosine.saes.encoding import encode_sparse
from saelens_cosine.saes.recipe.lagged_count import LaggedCount
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


@pytest.mark.parametrize("amx", [True, False])
def test_precision_of_the_filter(amx, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx, raising=False)
    assert filter.filter_dtype(F32) == (BF16 if amx else F32)
    assert filter.filter_dtype(F64) == (BF16 if amx else F64)


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


@pytest.mark.parametrize("per_feature", [False, True])
def test_few_are_candidates(per_feature, dtype, monkeypatch):
    monkeypatch.setattr(filter, "TILE_TOKENS", 16)
    inputs, encoder = random_scores(0, "random", per_feature, dtype, (256, 501, 64))
    score = exact_scores(inputs, encoder)[0]
    wanted = score.numel() // 100
    floor = score.flatten().topk(wanted).values[-1].to(dtype)
    found = filter.candidates(inputs.unit, inputs.log_norm, encoder.rounded, encoder.terms, floor)
    assert wanted - 1 <= len(found[0]) <= 2 * wanted


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("d_in", [1, 3, 40])
def test_a_score_a_rounding_above_its_threshold_is_kept(d_in, dtype, monkeypatch):
    # the threshold of each feature is the float below its score, as the kernel itself computes it
    monkeypatch.setattr(filter, "filter_dtype", lambda _: dtype)
    for seed in range(10):
        inputs, encoder = random_scores(seed, "random", True, dtype, (1, 201, d_in))
        score = selection.score_entries(torch.zeros(201, dtype=torch.int64), torch.arange(201), inputs, encoder).score
        kept = selection.above(inputs, encoder, torch.nextafter(score, score - 1)).entries.features
        assert kept.tolist() == (score > 0).nonzero().squeeze(1).tolist(), f"seed {seed}"


SHAPES = [(1, 1, 1), (1, 13, 7), (5, 33, 3), (70, 21, 17), (200, 9, 4)]
"""Tokens, features, inputs."""


@pytest.fixture(params=[(shape, per_feature) for shape in SHAPES for per_feature in (False, True)], ids=str)
def problem(request, dtype):
    """Inputs and encoder, and their rectified float64 scores, of which at least one is positive."""
    shape, per_feature = request.param
    inputs, encoder = random_scores(5, "random", per_feature, dtype, shape)
    encoder.terms.bias[0] = 5.0
    return inputs, encoder, exact_scores(inputs, encoder)[0].relu()


HINTS = [-1.0, 0.0, 1e-3, 0.99, 1.05, 1.2, 1e6]
"""Multiples of the score at the cut: all from below, a little above, and far too high."""


@pytest.fixture
def dense_calls(monkeypatch):
    """How many tokens each call of `Encoder.dense` was for."""
    calls, dense = [], Encoder.dense
    monkeypatch.setattr(Encoder, "dense", lambda self, inputs: calls.append(len(inputs.unit)) or dense(self, inputs))
    return calls


def places_of(scored):
    """Flat places of scored entries; they ascend."""
    places = scored.entries.tokens * scored.entries.d_sae + scored.entries.features
    assert torch.equal(places, places.unique())
    return places.tolist()


def check_scored(scored, inputs, encoder, expected):
    """The expected places, with scores, products and factors of the formula."""
    assert places_of(scored) == expected.sort().values.tolist()
    score, size = (s.flatten()[places_of(scored)] for s in exact_scores(inputs, encoder))
    assert ((scored.score.double() - score).abs() <= 16 * torch.finfo(scored.score.dtype).eps * size).all()
    bias = encoder.terms.bias.index_select(0, scored.entries.features)
    assert torch.equal(scored.score, scored.factor * scored.product + bias)


def test_best_of_batch(problem, dtype, dense_calls):
    inputs, encoder, scores = problem
    n_tokens, scores = len(scores), scores.flatten()
    n_positive = int((scores > 0).sum())
    for n_wanted in {1, max(1, n_positive // 7), n_positive, n_positive + 1, len(scores) + 3}:
        best, enough, results = scores.topk(min(n_wanted, n_positive)), n_wanted <= n_positive, []
        for hint in (None, *HINTS):
            dense_calls.clear()
            given = None if hint is None else (hint * best.values[-1]).to(dtype)
            scored, next_hint = selection.best_of_batch(inputs, encoder, n_wanted, given)
            check_scored(scored, inputs, encoder, best.indices)
            results.append(scored.score)
            if enough and hint is not None:
                assert dense_calls == ([n_tokens] if hint == 1e6 else [])
            dense_calls.clear()
            again = selection.best_of_batch(inputs, encoder, n_wanted, next_hint)[0]
            assert torch.equal(again.score, scored.score)
            assert dense_calls == [] or not enough
        assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("signed", [False, True])
def test_best_of_each(problem, signed, dtype, dense_calls):
    inputs, encoder, scores = problem
    if signed:
        encoder, scores = encoder.by_size(), exact_scores(inputs, encoder)[0].abs()
    n_tokens, d_sae = scores.shape
    reach = (encoder.terms.norm_exponent.mean() * inputs.log_norm).exp()
    for k in {1, (d_sae + 3) // 4, d_sae}:
        best, results = scores.topk(k, dim=-1), []
        expected = (torch.arange(n_tokens).unsqueeze(1) * d_sae + best.indices)[best.values > 0]
        relative = best.values[:, -1] / reach.double()  # what a hint is compared with
        some_short = 1.001 * relative.quantile(torch.tensor([0.1, 0.9], dtype=F64))
        for hint in (None, *(h * relative.median() for h in HINTS), *some_short):
            dense_calls.clear()
            given = None if hint is None else hint.to(dtype)
            scored, next_hint = selection.best_of_each(inputs, encoder, k, given)
            check_scored(scored, inputs, encoder, expected)
            results.append(scored.score)
            if hint is not None:
                assert sum(dense_calls) == (int((relative < hint).sum()) if hint > 0 else 0)
            assert next_hint <= relative.sort().values[max(1, n_tokens // 100) - 1]
        assert all(torch.equal(result, results[0]) for result in results)


def test_above(problem):
    inputs, encoder, scores = problem
    for threshold in (torch.randn(scores.shape[1]), torch.tensor(-0.3), torch.tensor(0.8), torch.tensor(1e9)):
        expected = (scores > threshold.double().clamp_min(0)).flatten().nonzero().squeeze(1)
        check_scored(selection.above(inputs, encoder, threshold), inputs, encoder, expected)


def by_hand(*columns, gain=1.0, bias=0.0):
    """Two inputs (1, 0), and columns whose products with them are the given numbers, which bfloat16 has."""
    weight = torch.zeros(len(columns), 2)
    weight[:, 0] = t(*columns)
    zero, one = torch.zeros(()), torch.ones(len(columns))
    return UnitInputs(t([1, 0], [1, 0]), torch.zeros(2)), Encoder(
        weight, ScoreTerms(zero, zero, gain * one, bias * one), Rounded.of(weight)
    )


@pytest.fixture(params=[None, -3.0, 0.0, 0.4, 1.5, 2.1, 100.0])
def hint(request):
    return None if request.param is None else torch.tensor(request.param)


def test_ties_of_the_batch_go_to_the_lowest_place(hint):
    case = by_hand(1.0, 2.0, 2.0, 0.5, 2.0, -1.0)  # 2 at the places 1, 2, 4, 7, 8, 10; 1 at 0, 6; 0.5 at 3, 9
    for n_wanted, expected in ((1, [1]), (4, [1, 2, 4, 7]), (7, [0, 1, 2, 4, 7, 8, 10])):
        assert places_of(selection.best_of_batch(*case, n_wanted, hint)[0]) == expected
    assert places_of(selection.best_of_batch(*by_hand(*[2.0] * 300), 305, hint)[0]) == list(range(305))


def test_ties_of_each_token_go_to_the_lowest_place(hint):
    case = by_hand(1.0, 2.0, 2.0, 0.5, 2.0, -1.0)
    for k, expected in ((1, [1]), (2, [1, 2]), (4, [0, 1, 2, 4]), (6, [0, 1, 2, 3, 4])):
        assert places_of(selection.best_of_each(*case, k, hint)[0]) == expected + [6 + place for place in expected]
    best = selection.best_of_each(*by_hand(*[2.0] * 300), 5, hint)[0]
    assert places_of(best) == [*range(5), *range(300, 305)]


def test_the_largest_of_each_token_by_size(hint):
    inputs, encoder = by_hand(1.0, -2.0, 2.0, 0.5, -2.0, -1.0, 0.0)  # sizes 1 2 2 0.5 2 1 0
    for k, expected in ((1, [1]), (2, [1, 2]), (4, [0, 1, 2, 4]), (5, [0, 1, 2, 4, 5]), (7, [0, 1, 2, 3, 4, 5])):
        scored = selection.best_of_each(inputs, encoder.by_size(), k, hint)[0]
        assert places_of(scored) == expected + [7 + place for place in expected]
        assert scored.score[: len(expected)].tolist() == [[1, -2, 2, 0.5, -2, -1][i] for i in expected]


def test_a_bias_counts_with_its_sign_before_the_size_is_taken(hint):
    inputs, encoder = by_hand(3.0, -3.0, 1.0, bias=-2.0)  # 1, -5, -1
    assert places_of(selection.best_of_each(inputs, encoder.by_size(), 1, hint)[0]) == [1, 4]
    assert places_of(selection.best_of_each(inputs, encoder.by_size(), 2, hint)[0]) == [0, 1, 3, 4]


@pytest.mark.parametrize("select", [selection.best_of_batch, selection.best_of_each])
def test_no_positive_scores(select, hint):
    assert places_of(select(*by_hand(-1.0, 0.0, -2.0), 2, hint)[0]) == []


def test_none_wanted_of_the_batch(hint):
    assert places_of(selection.best_of_batch(*by_hand(1.0, 2.0, 3.0), 0, hint)[0]) == []


@pytest.mark.parametrize("select", [selection.best_of_batch, selection.best_of_each, selection.above])
def test_no_tokens(select):
    inputs, encoder = by_hand(1.0, 2.0, 3.0)
    empty, limit = UnitInputs(inputs.unit[:0], inputs.log_norm[:0]), torch.tensor(0.5)
    scored = select(empty, encoder, limit) if select is selection.above else select(empty, encoder, 1, limit)[0]
    assert places_of(scored) == []


def test_above_by_hand():
    case = by_hand(1.0, 2.0, -3.0, 0.0, gain=2.0, bias=-1.0)  # scores 1, 3, -7, -1
    assert places_of(selection.above(*case, torch.tensor(1.0))) == [1, 5]  # above, not at
    assert places_of(selection.above(*case, torch.tensor(-50.0))) == [0, 1, 4, 5]  # positive ones only
    assert places_of(selection.above(*case, t(0.5, 3.0, -9.0, -9.0))) == [0, 4]
    assert places_of(selection.above(*case, torch.tensor(3.0))) == []


def test_parts_of_the_selection_by_hand():
    assert [v.item() for v in selection._ranked(t(3, 1, 4, 1, 5), 1, 2, 3, 4, 5)] == [5, 4, 3, 1, 1]
    assert [selection._largest(t(3, 1, 4), rank).item() for rank in (1, 2, 3, 9)] == [4, 3, 1, 1]

    def at_least(score, group, quota, n_groups):
        return selection._at_least(score, torch.full((n_groups,), 3.0), torch.tensor(group), quota).int().tolist()

    # cut 3, two of each: 5 is sure and leaves a place for the first 3; 4 is sure and leaves one for the 3 before it
    score, group = t(5, 3, 3, 2, 3, 4), [0, 0, 0, 0, 1, 1]
    assert at_least(score, group, 2, 2) == [1, 1, 0, 0, 1, 1]
    assert at_least(score, group, 1, 2) == [1, 0, 0, 0, 0, 1]
    assert at_least(t(3, 3, 3), [0, 0, 2], 1, 4) == [1, 0, 1]  # groups 1 and 3 are empty


def entry_values(x, b_dec, W_enc, b_enc, a, c, entries, unit_columns, signed):
    """`EntryScores` of a batch prepared as `encode` prepares it."""
    with torch.no_grad():
        x_c = x if b_dec is None else x - b_dec
        norm = x_c.norm(dim=-1).clamp_min(NORM_FLOOR)
        unit, log_norm = x_c / norm.unsqueeze(-1), norm.log()
        gain = W_enc.norm(dim=0).reciprocal() if unit_columns else torch.ones_like(b_enc)
        product = operations.sampled_product(entries, unit, W_enc.T.contiguous())
        factor = ScoreTerms(a, c, gain, b_enc).factor(log_norm[entries.tokens], entries.features)
        batch = ScoredBatch(entries, product, factor, unit, log_norm, gain.square() if unit_columns else None, signed)
    return EntryScores.apply(x, b_dec, W_enc, b_enc, a, c, batch)


def formula_values(x, b_dec, W_enc, b_enc, a, c, entries, unit_columns, signed):
    """The same from the dense definition."""
    x_c = x if b_dec is None else x - b_dec
    norm = x_c.norm(dim=-1, keepdim=True).clamp_min(NORM_FLOOR)
    cosine = (x_c / norm) @ (W_enc / W_enc.norm(dim=0) if unit_columns else W_enc)
    scores = (a * norm.log() + c).exp() * cosine + b_enc
    return (scores if signed else scores.relu())[entries.tokens, entries.features]


PARAMETERS = ["scalar", "by feature", "inner product", "signed"]


def make_leaves(n_tokens, d_sae, width, parameters):
    """x, b_dec, W_enc, b_enc, norm_exponent, log_scale, W_dec in float64; whether columns count by direction, and codes have signs."""
    a, c = torch.linspace(-0.5, 1.5, d_sae), 0.3 * torch.randn(d_sae)
    if parameters in ("scalar", "inner product"):
        a, c = (torch.tensor(v) for v in ((0.7, -0.4) if parameters == "scalar" else (1.0, 0.0)))
    shapes = [(n_tokens, width), (width,), (width, d_sae), (d_sae,), (d_sae, width)]
    x, b_dec, W_enc, b_enc, W_dec = (torch.randn(shape) for shape in shapes)
    return [leaf.double() for leaf in (x, b_dec, W_enc, b_enc, a, c, W_dec)], (
        parameters != "inner product",
        parameters == "signed",
    )


def decoded(values_of, leaves, wanted, entries, kind, weight, dtype):
    """A decoded batch, and the gradients of the wanted leaves."""
    leaves = [None if leaf is None else leaf.detach().to(dtype, copy=True) for leaf in leaves]
    inputs = [leaf.requires_grad_() for leaf, w in zip(leaves, wanted, strict=True) if leaf is not None and w]
    values, W_dec = values_of(*leaves[:6], entries, *kind), leaves[6]
    fast = values_of is entry_values
    out = EntryDecode.apply(values, W_dec, entries) if fast else entries.to_dense(values) @ W_dec
    return out, *torch.autograd.grad((out * weight.to(dtype)).sum(), inputs)


WANTED = {"all": [1] * 7, "all but x": [0] + [1] * 6, "x": [1] + [0] * 6, "b_enc": [0, 0, 0, 1, 0, 0, 0]}


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("wanted", [*WANTED, "no b_dec"])
@pytest.mark.parametrize("parameters", PARAMETERS)
@pytest.mark.parametrize(("n_tokens", "d_sae", "width", "n"), SIZES[1:])
def test_all_gradients(n_tokens, d_sae, width, n, parameters, wanted, dtype):
    leaves, kind = make_leaves(n_tokens, d_sae, width, parameters)
    if wanted == "no b_dec":
        leaves[1] = None
    weight = torch.randn(n_tokens, width, dtype=F64)
    case = (leaves, WANTED.get(wanted, [1] * 7), make_entries(n_tokens, d_sae, n), kind, weight)
    exact, plain = decoded(formula_values, *case, F64), decoded(formula_values, *case, dtype)
    for one, other, true in zip(decoded(entry_values, *case, dtype), plain, exact, strict=True):
        assert_no_worse(one, other, true, 8 * true.abs().amax())


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("share", [0.0, 0.1])
@pytest.mark.parametrize("parameters", PARAMETERS)
@pytest.mark.parametrize("n_tokens", [1, 9])
def test_gradients_where_the_norm_is_floored(n_tokens, parameters, share, dtype):
    # x = b_dec, or at a tenth of the floor from it: the norm is a constant there, and x_c enters by its product alone
    (x, b_dec, W_enc, b_enc, *rest), kind = make_leaves(n_tokens, 13, 7, parameters)
    x = torch.nn.functional.normalize(x) * NORM_FLOOR * share
    if n_tokens > 1:
        x[n_tokens // 2] = 1.0  # an ordinary one
    leaves, entries = [x, 0 * b_dec, W_enc, b_enc.abs() + 1, *rest], make_entries(n_tokens, 13, 5 * n_tokens)
    case = ([1] * 7, entries, kind, torch.randn(n_tokens, 7, dtype=F64))
    exact = decoded(formula_values, leaves, *case, F64)
    for one, true in zip(decoded(entry_values, leaves, *case, dtype), exact, strict=True):
        size = true.abs().amax(dim=-1, keepdim=True) if true.ndim else true.abs()  # rows of x differ by 1e8 and more
        assert ((one.double() - true).abs() <= 200 * torch.finfo(dtype).eps * size.clamp_min(1e-6)).all()


def test_values_that_are_not_positive_have_no_gradient():
    # scores (1, 0) . w + b_enc: 2, -1, and 1 - 1 = 0; only the first is above 0
    W_enc, b_enc = t([2, -1, 1], [0, 0, 0]).requires_grad_(), t(0, 0, -1).requires_grad_()
    entries, one = Entries(torch.zeros(3, dtype=torch.int64), torch.arange(3), 1, 3), torch.tensor(1.0)
    values = entry_values(t([1, 0]), None, W_enc, b_enc, one, 0 * one, entries, False, False)
    assert values.tolist() == [2, 0, 0]
    values.sum().backward()
    assert b_enc.grad.tolist() == [1, 0, 0]
    assert W_enc.grad.tolist() == [[1, 0, 0], [0, 0, 0]]


@pytest.mark.parametrize("parameters", PARAMETERS)
def test_gradients_equal_finite_differences(parameters):
    (*leaves, W_dec), kind = make_leaves(3, 5, 4, parameters)
    leaves[3] = 9 * leaves[3].sign()  # no score is near 0
    entries = make_entries(3, 5, 8)
    assert 0 < (formula_values(*leaves, entries, *kind) > 0).sum() < 8
    leaves = [leaf.requires_grad_() for leaf in leaves]
    assert torch.autograd.gradcheck(lambda *p: entry_values(*p, entries, *kind), leaves)
    values = torch.randn(8, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v, w: EntryDecode.apply(v, w, entries), (values, W_dec.requires_grad_()))


def make_codes(n=7, requires_grad=False):
    """Codes [3, 5] and the ordinary tensor that they stand for; one value is 0."""
    values = torch.randn(n)
    values[n // 2 : n // 2 + 1] = 0
    codes = EntryCodes(make_entries(3, 5, n), values.requires_grad_(requires_grad))
    return codes, codes.entries.to_dense(values)


def same_of_both(operation, codes, dense):
    """The result for codes and for the dense tensor, as tensors; f: [5], w: [5, 4]."""
    names = {"torch": torch, "copy": copy, "pickle": pickle, "f": torch.randn(5, requires_grad=codes.requires_grad)}
    names["w"] = torch.randn(5, 4, requires_grad=codes.requires_grad)
    got, expected = (eval(operation, {**names, "z": z}) for z in (codes, dense))
    got = got.dense() if isinstance(got, EntryCodes) else got
    torch.testing.assert_close(got, expected)  # shape and dtype too
    assert got.requires_grad == expected.requires_grad
    if expected.requires_grad:
        leaves, weight = (codes.values, names["f"], names["w"]), torch.randn(expected.shape, dtype=expected.dtype)
        torch.testing.assert_close(
            *(torch.autograd.grad(out, leaves, weight, allow_unused=True) for out in (got, expected))
        )


OPERATIONS = [
    "z.abs()", "torch.relu(z)", "z.pow(2)", "z.sum()", "z.sum(None)", "z.sum(0)", "z.sum(1)", "z.sum(-1)", "z.sum(-2)",
    "z.sum(dim=0)", "z.sum(0, keepdim=True)", "z.sum(-1, keepdim=True)", "z.sum((0, 1))", "torch.sum(z, 1)", "z.mean()",
    "z.mean(0)", "z == 0", "0 < z", "z[1]", "z[:, -1]", "z[z > 0]", "z.nonzero()", "z @ f", "z @ w", "z.matmul(w)",
    "z @ w.T.contiguous().T", "torch.matmul(z, w)", "w[:2, :3] @ z", "z @ torch.stack([w, w])", "torch.cat([z, z], 1)",
    "torch.nn.functional.linear(z, w.T)", "z.clone()", "z.bool()", "z.bool().sum(0)", "z.bool().float().sum(-2).bool()",
    "z.float()", "z.double()", "z.to_dense()", "z.detach()", "z * f", "z.mul(f)", "f * z", "z * w[:3, :1]", "2 * z * 3.0",
    "z * z", "z.bool() * f", "(z * (1 / w.norm(dim=-1))) @ w", "torch.empty(3, 5).copy_(z)", "torch.zeros_like(z)", "z.T",
    "torch.add(z.detach(), 1, out=torch.empty(3, 5))", "copy.deepcopy(z.detach())", "pickle.loads(pickle.dumps(z.detach()))",
    "z.flatten()", "z.max(0).values", "z.to(torch.float64)", "z.sum(0) * f", "z.sum(-1) * w[:3, 0]", "z.float() @ w",
]  # fmt: skip


@pytest.mark.parametrize("operation", OPERATIONS)
def test_codes_behave_as_the_dense_tensor(operation):
    for n in (7, 15, 0):
        same_of_both(operation, *make_codes(n))
        same_of_both(operation, *make_codes(n, requires_grad=True))


@pytest.mark.parametrize(
    "operation", ["z.sum(0, dtype=torch.float64)", "z.sum(axis=0)", "z.to_dense(dtype=torch.float64)"]
)
def test_codes_take_the_keywords_of_tensors(operation):
    same_of_both(operation, *make_codes())


@pytest.mark.parametrize("change", ["z.mul_(2)", "z.zero_()", "z.__setitem__((0, 0), 5.0)"])
def test_changes_in_place_are_seen_or_refused(change):
    codes, dense = make_codes(n=15)
    eval(change, {"z": dense})
    try:
        eval(change, {"z": codes})
    except (RuntimeError, TypeError):
        return
    assert torch.equal(codes.dense(), dense)


def test_codes_by_parts_of_the_features():
    # tokens 0 and 1; features 0 | 1 2 | 3: part i of token b is row 2 i + b
    codes = EntryCodes(Entries(torch.tensor([0, 0, 1, 1]), torch.tensor([1, 3, 0, 2]), 2, 4), t(5, 6, 7, -8))
    parts = codes.split_features([0, 1, 3, 4])
    assert isinstance(parts, EntryCodes)
    assert parts.dense().view(3, 2, 4).tolist() == [
        [[0, 0, 0, 0], [7, 0, 0, 0]],
        [[0, 5, 0, 0], [0, 0, -8, 0]],
        [[0, 0, 0, 6], [0, 0, 0, 0]],
    ]
    assert codes.split_features([0, 4]).dense().tolist() == codes.dense().tolist()


@pytest.mark.parametrize("edges", [[0, 5], [0, 2, 5], [0, 1, 2, 3, 4, 5]])
def test_parts_pass_gradients_to_their_codes(edges):
    codes, dense = make_codes(n=9, requires_grad=True)
    weight = torch.randn(len(edges) - 1, 3, 5)
    masks = [(torch.arange(5) >= a) & (torch.arange(5) < b) for a, b in itertools.pairwise(edges)]
    out = codes.split_features(edges).dense().view(weight.shape)
    assert torch.equal(out, torch.stack([dense * mask for mask in masks]))
    expected = sum(w * mask for w, mask in zip(weight, masks, strict=True))
    (gradient,) = torch.autograd.grad((out * weight).sum(), codes.values)
    entries = codes.entries
    torch.testing.assert_close(gradient, expected[entries.tokens, entries.features])


def test_what_codes_say_of_themselves():
    codes, dense = make_codes()
    for made in (codes, codes.bool(), codes.detach(), codes * torch.ones(5)):
        assert isinstance(made, EntryCodes)
        assert isinstance(made, torch.Tensor)
    assert (codes.shape, codes.dtype, codes.device) == (dense.shape, dense.dtype, dense.device)
    assert (len(codes), codes.ndim, codes.size(1), codes.numel(), codes.is_sparse) == (3, 2, 5, 15, False)
    assert repr(codes) == repr(dense)
    assert codes.numpy().tolist() == codes.tolist() == dense.tolist()
    assert codes.fired().tolist() == (dense != 0).any(0).tolist()
    assert EntryCodes(make_entries(1, 2, 2), t(0, 3)).fired().tolist() == [False, True]
    with pytest.raises(RuntimeError, match="requires grad"):
        make_codes(requires_grad=True)[0].numpy()


def test_what_saelens_does_in_training_never_makes_the_dense_tensor(monkeypatch):
    def step(codes, W_dec):
        firing = codes.bool().float()
        rescaled = codes * (1 / W_dec.norm(dim=-1))
        l0 = codes.bool().float().sum(-1).to_dense().mean()
        assert (codes.is_sparse, codes.shape[0], codes.dtype) == (False, 3, F32)
        return firing.sum(-2).bool(), firing.sum(0), l0, codes.detach().sum(), codes @ W_dec, rescaled @ W_dec

    codes, dense = make_codes(requires_grad=True)
    W_dec = torch.randn(5, 4, requires_grad=True)
    expected = step(dense, W_dec)
    monkeypatch.setattr(Entries, "to_dense", lambda *_: pytest.fail("the dense tensor was made"))
    *_, out, rescaled = results = step(codes, W_dec)
    torch.testing.assert_close(results, expected)
    (out + rescaled).sum().backward()
    with pytest.raises(pytest.fail.Exception, match="was made"):
        codes.abs()


def make_scores(parameter):
    """Pre-activations `x @ parameter [4, 6]` of three tokens, x, and what was asked for."""
    x, calls = torch.randn(3, 4), []

    def compute(features):
        calls.append(features)
        return x @ (parameter if features is None else parameter[:, features])

    return ScoresOnDemand(compute, [parameter], torch.zeros(0), shape=(3, 6), dtype=F32, device=x.device), x, calls


def test_scores_on_demand():
    parameter = torch.randn(4, 6, requires_grad=True)
    scores, x, calls = make_scores(parameter)
    assert isinstance(scores, torch.Tensor)
    assert (scores.shape, scores.dtype, len(scores), calls) == ((3, 6), F32, 3, [])  # nothing was computed for that
    expected = x @ parameter
    assert torch.equal(scores.dense(), expected)
    assert torch.equal(scores.relu(), expected.relu())
    assert torch.equal(scores[:, 1], expected[:, 1])
    few = scores.columns(torch.tensor([5, 0]))
    torch.testing.assert_close(few, expected[:, [5, 0]])
    few.sum().backward()
    torch.testing.assert_close(parameter.grad, x.sum(0).unsqueeze(1) * t(1, 0, 0, 0, 0, 1))


@pytest.mark.parametrize("fused", [False, True])
def test_scores_on_demand_are_gone_after_a_step(fused, watch):
    parameter = torch.nn.Parameter(torch.randn(6, 4).T)  # feature-major
    optimizer = torch.optim.Adam([parameter], lr=0.1)
    if fused:
        watch(parameter)
    scores, _, calls = make_scores(parameter)
    scores.sum().backward()
    optimizer.step()
    assert bool(optimizer.param_groups[0]["fused"]) == fused
    for ask in (scores.dense, lambda: scores.columns(torch.tensor([0])), lambda: scores + 1):
        with pytest.raises(RuntimeError, match='kernels="reference"'):
            ask()
    assert len(calls) == 1


def test_inference_between_fused_steps_sees_the_new_weights():
    sae, x = make_sae("cosine_topk", kernels="auto", d_sae=64), make_activations(5, 7)
    optimizer = torch.optim.Adam(sae.parameters(), lr=0.1)
    for step in range(2):
        sparse = encode_sparse(sae.eval(), x)
        codes = torch.zeros(5, 64).scatter_add(1, sparse.indices, sparse.values)
        torch.testing.assert_close(codes, sae.encode(x).detach())
        train_step(sae.train(), x, step).loss.backward()
        optimizer.step()


def test_lagged_count():
    count, source, other = LaggedCount(), torch.zeros(4), torch.zeros(4)
    assert count.get(source) is None
    count.put(torch.tensor(3), source)
    assert [count.get(source), count.get(source)] == [3, 3]
    assert [count.get(source.clone()), count.get(source[:])] == [None, None]
    for copied in (copy.deepcopy(count), copy.copy(count), pickle.loads(pickle.dumps(count))):
        assert isinstance(copied, LaggedCount)
        assert copied.get(source) is None
    source.add_(1)
    assert count.get(source) is None
    count.put(torch.tensor(5), source)
    assert count.get(source) == 5
    count.put(torch.tensor(0), other)
    assert [count.get(other), count.get(source)] == [0, None]


@pytest.fixture
def watch():
    """`fuse_adam_of`, ended after the test."""
    handles = []
    yield lambda parameter: handles.append(fuse_adam_of(parameter))
    for handle in handles:
        handle.remove()


def make_parameters(dtype=F32):
    """Feature-major, ordinary, feature-major and square, a vector, a scalar."""
    rng = torch.Generator().manual_seed(0)
    tensors = [torch.randn(shape, generator=rng, dtype=F64).to(dtype) for shape in ((13, 7), (5, 6), (9, 9), (11,), ())]
    return [torch.nn.Parameter(tensor.T if i in (0, 2) else tensor) for i, tensor in enumerate(tensors)]


def take_steps(optimizer, parameters, steps, other_layout=False):
    """With a random gradient for each step, in the parameter's layout as backward leaves it."""
    for step in steps:
        rng = torch.Generator().manual_seed(100 + step)
        for parameter in parameters:
            gradient = torch.randn(parameter.shape, generator=rng, dtype=F64).to(parameter.dtype)
            parameter.grad = gradient if other_layout else torch.empty_like(parameter).copy_(gradient)
        optimizer.step()


CHOICES = [
    ("Adam", {"betas": (0.9, 0.999)}, True),  # SAELens' arguments
    ("AdamW", {}, True),
    ("Adam", {"fused": True}, True),
    ("Adam", {"fused": False}, False),
    *(("Adam", option, None) for option in ({"foreach": True}, {"foreach": False}, {"differentiable": True})),
    *((kind, {}, None) for kind in ("NAdam", "SGD")),
]


@pytest.mark.parametrize(("kind", "options", "expected"), CHOICES)
def test_which_optimizers_are_fused(kind, options, expected, watch):
    parameters, strangers = make_parameters(), make_parameters()
    ours, theirs = (getattr(torch.optim, kind)(some, lr=1e-3, **options) for some in (parameters, strangers))
    watch(parameters[0])
    for optimizer in (ours, theirs):
        optimizer.step()  # no gradients yet: nothing is updated, but the step is what fuses
    assert ours.param_groups[0].get("fused") is expected
    assert theirs.param_groups[0].get("fused") is options.get("fused")


def test_an_adam_that_has_stepped_stays_and_a_watch_ends(watch):
    parameters = make_parameters()
    optimizer = torch.optim.Adam(parameters)
    fuse_adam_of(parameters[0]).remove()
    take_steps(optimizer, parameters, [0])
    assert optimizer.param_groups[0]["fused"] is None
    watch(parameters[0])
    take_steps(optimizer, parameters, [1])
    assert optimizer.param_groups[0]["fused"] is None


def assert_same_state(fused, unfused, parameters, others, tolerance):
    for one, other in zip(parameters, others, strict=True):
        assert (one - other).abs().max() <= tolerance
        assert fused.state[one].keys() == unfused.state[other].keys()
        for name, value in unfused.state[other].items():
            assert (fused.state[one][name] - value).abs().max() <= tolerance, name


@pytest.mark.parametrize(("dtype", "tolerance"), [(F32, 1e-6), (F64, 1e-12)])
@pytest.mark.parametrize(
    ("kind", "options"), [("Adam", {}), ("AdamW", {"weight_decay": 0.1}), ("Adam", {"amsgrad": True})]
)
def test_fused_steps_are_the_unfused(kind, options, dtype, tolerance, watch, monkeypatch):
    calls, function = [], f"_fused_{kind.lower()}_"
    step = getattr(torch, function)
    monkeypatch.setattr(torch, function, lambda *lists, **kw: calls.append(lists[:5]) or step(*lists, **kw))
    parameters, others = make_parameters(dtype), make_parameters(dtype)
    layout = [(p.shape, p.stride(), p.data_ptr()) for p in parameters]
    fused, unfused = (getattr(torch.optim, kind)(some, lr=0.01, **options) for some in (parameters, others))
    watch(parameters[0])
    take_steps(fused, parameters, range(5))
    take_steps(unfused, others, range(5))
    assert_same_state(fused, unfused, parameters, others, tolerance)
    assert [(p.shape, p.stride(), p.data_ptr()) for p in parameters] == layout
    for parameter in parameters:
        moments = [value for name, value in fused.state[parameter].items() if name != "step"]
        assert all((m.shape, m.stride()) == (parameter.shape, parameter.stride()) for m in moments)
    assert len(calls) == 5
    for lists in calls:  # the parameters themselves, and nothing that needs a copy
        assert [p.data_ptr() for p in lists[0]] == [pointer for _, _, pointer in layout]
        assert all(tensor.is_contiguous() for tensors in lists for tensor in tensors)


def test_gradients_in_another_layout(watch):
    both = make_parameters(), make_parameters()
    fused, unfused = (torch.optim.Adam(parameters, lr=0.01) for parameters in both)
    watch(both[0][0])
    for optimizer, parameters in zip((fused, unfused), both, strict=True):
        take_steps(optimizer, parameters, range(2), other_layout=True)
    assert_same_state(fused, unfused, *both, 1e-6)


def test_the_watch_may_last(watch):
    parameter = torch.nn.Parameter(torch.zeros(()))
    parameter.grad = torch.ones(())
    optimizer = torch.optim.Adam([parameter], lr=0.5)
    watch(parameter)
    for _ in range(sys.getrecursionlimit() + 100):  # more steps than Python nests calls
        optimizer.step()


@pytest.mark.parametrize("watched", [False, True])
def test_a_saved_optimizer_goes_on_identically(watched, watch):
    parameters = make_parameters()
    optimizer = torch.optim.Adam(parameters, lr=0.01)
    watch(parameters[0])
    take_steps(optimizer, parameters, range(3))
    resumed = [torch.nn.Parameter(p.detach().clone()) for p in parameters]
    fresh = torch.optim.Adam(resumed, lr=0.01)
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    if watched:
        watch(resumed[0])
    take_steps(optimizer, parameters, range(3, 6))
    take_steps(fresh, resumed, range(3, 6))
    assert_same_state(fresh, optimizer, resumed, parameters, 0)
    assert [p.stride() for p in resumed] == [p.stride() for p in parameters]

"""Which entries are kept: the best of a batch, the best of each token, those above a threshold."""

from dataclasses import replace

import pytest
import torch
from kernel_cases import (
    F32,
    F64,
    dtype,  # noqa: F401
    exact_scores,
    random_scores,
    t,
)

from saelens_cosine.kernels import filter, selection
from saelens_cosine.kernels.entries import Entries
from saelens_cosine.kernels.filter import Rounded
from saelens_cosine.kernels.selection import Encoder, UnitInputs
from saelens_cosine.kernels.terms import ScoreTerms
from saelens_cosine.kernels.whole import HERE


@pytest.mark.parametrize("all_negative", [False, True])
@pytest.mark.parametrize("per_feature", [False, True])
def test_few_are_candidates(per_feature, all_negative, dtype, monkeypatch):
    monkeypatch.setattr(filter, "TILE_TOKENS", 16)
    inputs, encoder = random_scores(0, "random", per_feature, dtype, (256, 501, 64))
    if all_negative:  # as dead features' scores are, and with them the floor
        terms = replace(encoder.terms, bias=-encoder.terms.bias.abs() / 100)
        weight = -encoder.weight.abs()
        encoder = replace(encoder, terms=terms, weight=weight, rounded=Rounded.of(weight))
        inputs = UnitInputs(inputs.unit.abs(), inputs.log_norm)
    score = exact_scores(inputs, encoder)[0]
    assert (score < 0).all() == all_negative
    wanted = score.numel() // 100
    floor = score.flatten().topk(wanted).values[-1].to(dtype)
    found = filter.candidates(inputs.unit, inputs.log_norm, encoder.rounded, encoder.terms, floor)
    assert wanted - 1 <= len(found[0]) <= 2 * wanted


@pytest.mark.parametrize("per_feature", [False, True])
def test_few_are_candidates_beside_sinks(per_feature, dtype):
    # what the filter's product may lose of a sink is not what it may lose of a token 150 times shorter
    inputs, encoder = random_scores(0, "random", per_feature, dtype, (256, 501, 64))
    inputs = UnitInputs(inputs.unit, torch.where(torch.arange(256) % 64 == 0, 5.0, inputs.log_norm * 0.1))
    terms = replace(encoder.terms, norm_exponent=1 + 0.1 * encoder.terms.norm_exponent, bias=0 * encoder.terms.bias)
    encoder = replace(encoder, terms=terms)
    score = exact_scores(inputs, encoder)[0]
    short = score[torch.arange(256) % 64 > 0]
    wanted = short.numel() // 100
    floor = short.flatten().topk(wanted).values[-1].to(dtype)
    tokens, _ = filter.candidates(inputs.unit, inputs.log_norm, encoder.rounded, encoder.terms, floor)
    assert wanted - 1 <= (tokens % 64 > 0).sum() <= 1.5 * wanted


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
    assert [v.item() for v in HERE.ranked(t(3, 1, 4, 1, 5), 1, 2, 3, 4, 5, 9)] == [5, 4, 3, 1, 1, 1]

    def at_least(score, tokens, quota, each, n_tokens=4):
        features = torch.arange(len(tokens))
        entries = Entries(torch.tensor(tokens), features, n_tokens, 9)
        scored = selection.Scored(entries, score, score, score)
        return selection._at_least(scored, torch.full_like(score, 3.0), quota, each, HERE).int().tolist()

    # cut 3, two of each token: 5 is sure and leaves a place for the first 3; 4 is sure and leaves one for the 3 before it
    score, tokens = t(5, 3, 3, 2, 3, 4), [0, 0, 0, 0, 1, 1]
    assert at_least(score, tokens, 2, True) == [1, 1, 0, 0, 1, 1]
    assert at_least(score, tokens, 1, True) == [1, 0, 0, 0, 0, 1]
    assert at_least(t(3, 3, 3), [0, 0, 2], 1, True) == [1, 0, 1]  # tokens 1 and 3 are empty
    # four of the batch: 5 and 4 are sure, the first two of the 3s go with them
    assert at_least(score, tokens, 4, False) == [1, 1, 1, 0, 0, 1]
    assert at_least(score, tokens, 2, False) == [1, 0, 0, 0, 0, 1]
    assert at_least(t(3, 3, 3), [0, 2, 2], 2, False) == [1, 1, 0]

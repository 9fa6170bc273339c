"""Where the cut lies and who may keep what lies at it, when features are split over ranks."""

from itertools import chain, pairwise

import pytest
import torch
from thread_world import over_ranks

from saelens_cosine.kernels.filter import Rounded
from saelens_cosine.kernels.selection import Encoder, UnitInputs, best_of_batch, best_of_each
from saelens_cosine.kernels.terms import ScoreTerms
from saelens_cosine.kernels.whole import HERE, keep_best
from saelens_cosine.ranks.whole import OverRanks


def on_parts(edges, run):
    """`run(whole, slice)` on each part."""
    return over_ranks(
        len(edges) - 1, lambda world: run(OverRanks(world, edges), slice(edges[world.rank], edges[world.rank + 1]))
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ranked_values_by_hand(dtype):
    values = torch.tensor([3, -2, 0.5, 3, -1e30, 7, -0.25, 1e-30], dtype=dtype)
    descending = [7, 3, 3, 0.5, 1e-30, -0.25, -2, -1e30]
    ranks = [*range(1, 9), 100]  # the smallest where there are fewer
    for edges in ([0, 8], [0, 3, 8], [0, 5, 5, 8]):
        for found in on_parts(edges, lambda whole, mine: whole.ranked(values[mine], *ranks)):
            assert [value.item() for value in found] == [
                torch.tensor(v, dtype=dtype).item() for v in [*descending, -1e30]
            ]


def test_ranked_values_are_those_of_a_sort():
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0)).mul(50).round() / 50  # many ties
    expected = values.sort(descending=True).values
    for found in on_parts([0, 400, 1000], lambda whole, mine: whole.ranked(values[mine], 1, 17, 500, 1000)):
        assert [v.item() for v in found] == [expected[i].item() for i in (0, 16, 499, 999)]


RANK = torch.tensor([[5.0, 3, 1, 3, 3, 0], [3, 3, 2, 4, 3, 3]])
"""Two tokens, six features; the cut is 3."""


@pytest.mark.parametrize("edges", [[0, 6], [0, 3, 6], [0, 1, 1, 4, 6]])
@pytest.mark.parametrize(
    ("quota", "each", "kept"),
    [
        (2, True, [[1, 1, 0, 0, 0, 0], [1, 0, 0, 1, 0, 0]]),
        (3, True, [[1, 1, 0, 1, 0, 0], [1, 1, 0, 1, 0, 0]]),
        (torch.tensor([2, 4]), True, [[1, 1, 0, 0, 0, 0], [1, 1, 0, 1, 1, 0]]),
        # of the batch: 5 and 4 are sure, then the 3s of the first token, then those of the second
        (4, False, [[1, 1, 0, 1, 0, 0], [0, 0, 0, 1, 0, 0]]),
        (7, False, [[1, 1, 0, 1, 1, 0], [1, 1, 0, 1, 0, 0]]),
    ],
)
def test_the_lowest_places_of_the_whole_dictionary_come_first(quota, each, kept, edges):
    cut = torch.tensor(3.0)
    found = on_parts(edges, lambda whole, mine: keep_best(RANK[:, mine], cut, quota, each, whole))
    assert torch.cat(found, dim=1).int().tolist() == kept
    assert keep_best(RANK, cut, quota, each).int().tolist() == kept


def test_each_tokens_largest():
    for found in on_parts([0, 2, 2, 6], lambda whole, mine: whole.largest_each(RANK[:, mine], 4)):
        assert found.tolist() == [[5, 3, 3, 3], [4, 3, 3, 3]]
    for found in on_parts([0, 2], lambda whole, mine: whole.largest_each(RANK[:, mine], 3)):
        assert found.tolist() == [[5, 3, -torch.inf], [3, 3, -torch.inf]]


def test_each_tokens_best_of_some_features():
    values = RANK.clone()
    values[0, :4] = -torch.inf  # not asked about: of the first token two are left

    def best(whole, mine):
        return whole.best_each(values[:, mine], 3)

    for edges in ([0, 3, 6], [0, 0, 5, 6]):
        found = on_parts(edges, best)
        kept = torch.cat([part.values for part in found], dim=1).sort(descending=True).values
        assert kept[:, :4].tolist() == [[3, 0, -torch.inf, -torch.inf], [4, 3, 3, -torch.inf]]
        for part, (first, end) in zip(found, pairwise(edges), strict=True):
            there = part.values > -torch.inf
            assert torch.equal(values[:, first:end].gather(1, part.indices)[there], part.values[there])


@pytest.mark.parametrize("select", [best_of_batch, best_of_each])
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("hint", [None, 0.01, 50.0])
def test_entries_with_ties_are_those_of_one_process(select, signed, hint):
    # every column three times, so that each score is there three times, on other ranks too
    rng = torch.Generator().manual_seed(1)
    weight = torch.randn(8, 5, generator=rng).repeat(3, 1)
    weight[4] = weight[5]
    inputs = UnitInputs(
        torch.nn.functional.normalize(torch.randn(6, 5, generator=rng), dim=1), torch.rand(6, generator=rng)
    )

    def entries(whole, mine):
        columns = weight[mine]
        terms = ScoreTerms(torch.tensor(0.5), torch.tensor(0.1), torch.ones(len(columns)), torch.zeros(len(columns)))
        encoder = Encoder(columns, terms, Rounded.of(columns), whole=whole)
        encoder = encoder.by_size() if signed and select is best_of_each else encoder
        scored, _ = select(inputs, encoder, 4, None if hint is None else torch.tensor(hint))
        return [
            (int(t), int(f) + mine.start) for t, f in zip(scored.entries.tokens, scored.entries.features, strict=True)
        ]

    expected = entries(HERE, slice(0, 24))
    assert len(expected) == (4 if select is best_of_batch else 4 * 6)
    for edges in ([0, 12, 24], [0, 9, 9, 18, 24]):
        assert sorted(chain.from_iterable(on_parts(edges, entries))) == expected


@pytest.mark.parametrize("p", [1, 2, 0.5])
def test_norms_over_parts_and_their_gradients(p):
    """Of 3, 0, -4 and 0, and of zeros alone, whose gradient is zero."""
    rows = torch.tensor([[3.0, 0, -4, 0], [0, 0, 0, 0]], dtype=torch.float64)

    def norm(whole, mine):
        x = rows[:, mine].clone().requires_grad_()
        value = whole.norm(x, p)
        value.sum().backward()
        return value.detach(), x.grad

    length = (3**p + 4**p) ** (1 / p)
    slope = [(size / length) ** (p - 1) for size in (3, 4)]
    for found in (on_parts([0, 2, 4], norm), on_parts([0, 1, 1, 4], norm), [norm(HERE, slice(0, 4))]):
        for value, _ in found:
            assert value.tolist() == pytest.approx([length, 0])
        gradient = torch.cat([gradient for _, gradient in found], dim=1)
        assert gradient.tolist()[0] == pytest.approx([slope[0], 0, -slope[1], 0])
        assert gradient.tolist()[1] == [0, 0, 0, 0]

import numpy as np
import pytest
from scipy import stats

from saelens_cosine.metrics.intervals import (
    DocumentErrors,
    by_chance,
    difference_over_documents,
    paired_difference,
)


def test_one_axis_is_the_paired_t_interval():
    # differences 1, 2, 3: sd 1, standard error 1 / sqrt(3), t(0.975, 2) = 4.30265
    difference = paired_difference([2, 4, 6], [1, 2, 3])
    assert (difference.mean, difference.low, difference.high) == pytest.approx((2, 2 - 2.48414, 2 + 2.48414), rel=1e-5)
    assert not difference.seen
    assert difference.shape == (3,)


def test_two_axes_by_hand():
    # row means 2 and 6: effects -2, 2; column means 3 and 5: effects -1, 1; nothing is left over
    a, b = [[2, 5], [8, 11]], [[1, 2], [3, 4]]
    # rows (2^2 + 2^2) / (1 degree of freedom * 2 units) = 4, columns 2 / 2 = 1; degrees of freedom 5^2 / (4^2 + 1^2)
    half = stats.t.ppf(0.975, 25 / 17) * 5**0.5
    difference = paired_difference(a, b)
    assert (difference.mean, difference.low, difference.high) == pytest.approx((4, 4 - half, 4 + half))


def test_what_is_left_over_counts_too():
    # rows and columns have mean 0, so all of it is interaction: 4 / (1 * 1 * 2 * 2), one degree of freedom
    difference = paired_difference([[1, -1], [-1, 1]], np.zeros((2, 2)))
    assert difference.high == pytest.approx(stats.t.ppf(0.975, 1))


def test_an_axis_of_one_unit_is_no_source_of_noise():
    flat, one_seed = paired_difference([1, 4, 2], [0, 0, 0]), paired_difference([[1, 4, 2]], [[0, 0, 0]])
    assert (flat.low, flat.high) == pytest.approx((one_seed.low, one_seed.high))


def test_agrees_with_drawing_both_axes_again():
    rng = np.random.default_rng(0)
    d = 3 + rng.normal(size=(40, 1)) + 2 * rng.normal(size=(1, 30)) + rng.normal(size=(40, 30))
    draws = [d[rng.integers(40, size=40)][:, rng.integers(30, size=30)].mean() for _ in range(4000)]
    difference = paired_difference(d, np.zeros_like(d))
    assert (difference.high - difference.mean) / 1.96 == pytest.approx(np.std(draws), rel=0.08)


def test_three_seeds_without_a_difference_show_one_in_a_twentieth_of_all_cases():
    rng = np.random.default_rng(0)
    seen = 0
    for _ in range(1500):
        d = rng.normal(size=(3, 1)) + 0.2 * rng.normal(size=(3, 5))
        seen += paired_difference(d, np.zeros_like(d)).seen
    assert 0.03 < seen / 1500 < 0.08  # percentiles of a bootstrap: 0.25


def test_a_difference_under_its_noise_says_so():
    # sd of 1, -1, 2, -1 is 1.5, so the half width is 3.18 * 1.5 / 2 = 2.39
    assert str(paired_difference([1, -1, 2, -1], [0] * 4)).startswith("no difference seen (-2.1")
    assert str(paired_difference([1, 1.1, 0.9], [0, 0, 0])) == "+1.0000 (+0.7516 to +1.2484)"


def test_pairs_that_all_agree():
    assert paired_difference([0.5, 0.75], [0.25, 0.5]).seen
    assert paired_difference([0.25, 0.5], [0.5, 0.75]).seen  # the other way round
    assert not paired_difference([0.5, 0.75], [0.5, 0.75]).seen


@pytest.mark.parametrize(
    "a, b, message", [([1], [2], "two"), ([1, 2], [1, 2, 3], "shape"), ([1, np.nan], [0, 0], "1 of 2")]
)
def test_what_cannot_be_paired_is_refused(a, b, message):
    with pytest.raises(ValueError, match=message):
        paired_difference(a, b)


def documents(fve, total):
    """Sums of documents with these fractions of variance explained."""
    total = np.asarray(total, dtype=np.float64)
    return DocumentErrors(tuple((1 - np.asarray(fve)) * total), tuple(total))


def test_documents_of_equal_length_by_hand():
    # differences .03 and .01, five of each: mean .02, and each left out in turn moves it by .01 / 9
    difference = difference_over_documents(documents([0.83, 0.81] * 5, [4] * 10), documents([0.8] * 10, [4] * 10))
    half = 2.262157 * (10 * (0.01 / 9) ** 2) ** 0.5  # t(.975, 9)
    found = (difference.mean, difference.low, difference.high)
    assert found == pytest.approx((0.02, 0.02 - half, 0.02 + half), rel=1e-6)
    assert difference.seen
    assert difference.shape == (10,)


def test_documents_are_left_out_one_by_one():
    rng = np.random.default_rng(0)
    total_a, total_b = rng.lognormal(size=(2, 12))  # as at two hooks
    a, b = rng.uniform(0.1, 0.4, size=12) * total_a, rng.uniform(0.1, 0.4, size=12) * total_b

    def difference(keep):
        return b[keep].sum() / total_b[keep].sum() - a[keep].sum() / total_a[keep].sum()

    whole = difference(np.arange(12))
    moved = [difference(np.delete(np.arange(12), i)) - whole for i in range(12)]
    shares = (total_a / total_a.sum() + total_b / total_b.sum()) / 2
    half = stats.t.ppf(0.975, 1 / sum(shares**2) - 1) * sum(step**2 for step in moved) ** 0.5
    found = difference_over_documents(DocumentErrors(a, total_a), DocumentErrors(b, total_b))
    assert (found.mean, found.high - found.mean) == pytest.approx((whole, half))
    assert difference_over_documents(DocumentErrors(a, total_a), DocumentErrors(b, total_b), mean=0.5).mean == 0.5


def test_few_documents_have_a_difference_and_no_interval():
    a, b = documents([0.9, 0.8, 0, 0], [1, 3, 0, 0]), documents([0.7, 0.7, 0, 0], [1, 3, 0, 0])
    difference = difference_over_documents(a, b)  # (.9 + 3 * .8) / 4 - .7
    assert str(difference) == "+0.1250 (no interval: it takes 10)"
    assert (difference.low, difference.high, difference.seen, difference.shape) == (None, None, False, (2,))
    nine, ten = (
        difference_over_documents(documents([0.9] * n, [1] * n), documents([0.8] * n, [1] * n)) for n in (9, 10)
    )
    assert (nine.low is None, ten.low is None) == (True, False)
    lengths = [1000] + [1] * 20  # as good as one
    one = difference_over_documents(documents([0.9] * 21, lengths), documents([0.8] * 21, lengths))
    assert one.no_interval == "one of them is most of the text"


@pytest.mark.parametrize("n", [10, 20, 78])
@pytest.mark.parametrize("tails", ["t(3)", "exponential"])
def test_intervals_over_documents_hold_the_truth(n, tails):
    """Documents are clusters: all tokens of one share its difference; lengths are unequal, tails heavy."""
    rng = np.random.default_rng(n)
    truth, found = 0.01, []
    for _ in range(1200):
        total = np.exp(1.2 * rng.normal(size=n)) * rng.uniform(0.8, 1.2, size=n)
        by_document = rng.standard_t(3, size=n) if tails == "t(3)" else rng.exponential(size=n) - 1
        b = rng.uniform(0.75, 0.85, size=n)
        found.append(difference_over_documents(documents(b + truth + 0.02 * by_document, total), documents(b, total)))
    held = [d.low < truth < d.high for d in found if d.low is not None]
    assert len(held) > 0.9 * len(found)  # one document is rarely most of the text
    assert 0.90 - 0.01 < np.mean(held) < 0.98 + 0.01  # .01: twice the standard error of 1,200 runs


def test_intervals_over_three_seeds_hold_the_truth_as_often_as_is_said():
    rng = np.random.default_rng(0)
    held = {"normal": 0, "exponential": 0}
    for _ in range(1500):
        for tails, d in (("normal", rng.normal(size=3)), ("exponential", rng.exponential(size=3) - 1)):
            found = paired_difference(d, np.zeros(3))
            held[tails] += found.low < 0 < found.high
    assert held["normal"] / 1500 == pytest.approx(0.95, abs=0.015)
    assert held["exponential"] / 1500 == pytest.approx(0.88, abs=0.02)


def test_how_many_would_be_seen_by_chance():
    few = difference_over_documents(documents([0.9] * 2, [1] * 2), documents([0.8] * 2, [1] * 2))  # no interval
    seen, unseen = paired_difference([1, 1.1, 0.9], [0, 0, 0]), paired_difference([1, -1, 2], [0, 0, 0])
    chance = by_chance([seen, unseen, few] * 20)
    assert chance == (40, 20, 2.0)
    assert str(chance).startswith("20 of 40 intervals leave out zero; without any true difference, about 2.0")

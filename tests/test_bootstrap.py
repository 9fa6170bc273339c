import numpy as np
import pytest
from scipy import stats

from saelens_cosine.evaluation.bootstrap import paired_difference


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

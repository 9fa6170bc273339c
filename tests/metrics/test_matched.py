"""Arms whose difference at the same x is known by hand."""

import math

import numpy as np
import pytest
from scipy import stats

from saelens_cosine.metrics.intervals import paired_difference
from saelens_cosine.metrics.matched import ONE_SEED, TWO_KS, Outside, Point, matched_differences

KS = (8, 16, 32, 64)


def log_arm(x_shift=0.0, y_shift=0.0, ks=KS):
    """y rises by 0.3 for each unit of x: x = 0.5 + 0.1 log2(k), y = 0.3 x."""
    found = [0.5 + 0.1 * math.log2(k / 8) for k in ks]
    return [Point(k, x + x_shift, 0.3 * x + y_shift) for k, x in zip(ks, found, strict=True)]


def test_matched_and_unmatched_differences_have_opposite_signs():
    # the arm: x .5, .6, .7, .8 and y .15, .18, .21, .24. The control has x larger by .05 and y larger by .005: at one k the arm is
    # worse by .005. At x = .55 the arm has y = .165 and the control .155: better by .010.
    arm, control = log_arm(), log_arm(x_shift=0.05, y_shift=0.005)
    found = matched_differences({0: arm, 1: arm}, {0: control, 1: control})
    assert [point.k for point in found] == list(KS)
    for point in found[:3]:
        assert (point.inside, point.seeds) == (2, (0, 1))
        assert point.difference.mean == pytest.approx(0.010)
        assert point.difference.seen
        assert point.interpolation == pytest.approx(0, abs=1e-12)  # on a line
    assert all(a.y - b.y == pytest.approx(-0.005) for a, b in zip(arm, control, strict=True))


def test_beyond_the_arms_points_is_outside():
    # the control's x at k = 64 is .85; the arm ends at .8
    last = matched_differences({0: log_arm()}, {0: log_arm(x_shift=0.05)})[-1]
    assert (last.difference, last.interpolation, last.inside, last.refused) == (None, None, 0, None)
    (outside,) = last.outside
    assert tuple(outside) == (0, pytest.approx(0.85), pytest.approx(0.5), pytest.approx(0.8))
    assert outside.by == pytest.approx(0.05)
    assert str(last) == "outside the range; seed 0: 0.85 is 0.05 above 0.5 to 0.8"
    first = matched_differences({0: log_arm()}, {0: log_arm(x_shift=-0.02)})[0]
    assert first.outside[0].by == pytest.approx(-0.02)
    assert Outside(1, 0.4, 0.5, 0.8).by == pytest.approx(-0.1)


def test_no_mean_over_the_seeds_that_happen_to_be_inside():
    arms = {0: log_arm(), 1: log_arm(), 2: log_arm(x_shift=0.2)}
    last = matched_differences(arms, dict.fromkeys(range(3), log_arm(x_shift=0.05)))[-1]
    assert (last.inside, last.difference, [outside.seed for outside in last.outside]) == (1, None, [0, 1])
    assert str(last).startswith("outside the range (1 of 3 seeds inside)")


def test_the_ends_belong_to_the_range():
    found = matched_differences({0: log_arm(), 1: log_arm()}, {0: log_arm(), 1: log_arm()})
    assert [(point.difference.mean, point.interpolation) for point in found] == [(0.0, 0.0)] * 4


def test_noise_of_seeds_is_the_paired_t_interval_and_the_interpolation_is_added():
    # y = sqrt(x) at x = 1, 4, 9 of both arms but for a shift of the arm's y by seed; the control stands at x = 2 and k = 2
    shifts = (0.10, 0.12, 0.17)
    arm = {seed: [Point(k, k**2, k + shift) for k in (1, 2, 3)] for seed, shift in enumerate(shifts)}
    control = {seed: [Point(2, 2.0, 1.4)] for seed in range(3)}
    (found,) = matched_differences(arm, control)
    # PCHIP: slopes of the pieces d0 = 1/3, d1 = 1/5. At the left end ((2 h0 + h1) d0 - h0 d1) / (h0 + h1) = (11/3 - 3/5) / 8 = .38333;
    # at the middle a weighted harmonic mean, w = (2 h1 + h0, h1 + 2 h0) = (13, 11): 24 / (13 * 3 + 11 * 5) = .25532
    t, h, left, middle = 1 / 3, 3, 0.383333333, 24 / 94
    cubic = (2 * t**3 - 3 * t**2 + 1) * 1 + (t**3 - 2 * t**2 + t) * h * left
    cubic += (-2 * t**3 + 3 * t**2) * 2 + (t**3 - t**2) * h * middle
    error = cubic - (1 + t)  # linear: 4/3
    assert found.interpolation == pytest.approx(error)
    plain = paired_difference(np.array(shifts) + cubic, np.full(3, 1.4))
    difference = found.difference
    assert difference.mean == pytest.approx(0.13 + cubic - 1.4)
    assert difference.high - difference.mean == pytest.approx(plain.high - plain.mean + error)
    assert difference.mean - difference.low == pytest.approx(plain.high - plain.mean + error)


def test_what_the_interpolation_may_have_made_is_not_seen():
    # as above without noise, so that the t-interval has no width: the cubic 1.373 is .04 from the line, and .023 from the control
    arm = {seed: [Point(k, k**2, k) for k in (1, 2, 3)] for seed in range(3)}
    (found,) = matched_differences(arm, {seed: [Point(2, 2.0, 1.35)] for seed in range(3)})
    assert found.difference.mean == pytest.approx(0.023, abs=5e-4)
    assert not found.difference.seen
    assert str(found).startswith("no difference seen")
    (found,) = matched_differences(arm, {seed: [Point(2, 2.0, 1.32)] for seed in range(3)})
    assert found.difference.seen


def test_one_seed_has_a_difference_and_no_interval():
    found = matched_differences({4: log_arm()}, {4: log_arm(x_shift=0.05, y_shift=0.005)})[0]
    assert (found.difference.low, found.difference.seen, found.difference.no_interval) == (None, False, ONE_SEED)
    assert str(found) == "+0.0100 (no interval: one seed)"


def test_two_ks_cannot_tell_the_interpolations_error():
    arm, control = log_arm(ks=(8, 64)), log_arm(x_shift=0.05, y_shift=0.005, ks=(8,))
    (found,) = matched_differences(dict.fromkeys(range(3), arm), dict.fromkeys(range(3), control))
    assert found.difference.mean == pytest.approx(0.010)
    assert (found.difference.no_interval, found.difference.high, found.interpolation) == (TWO_KS, None, None)


def test_one_k_is_a_range_of_one_x():
    # that is what a comparison without several ks has: only a control of the very same x can be matched
    same, other = log_arm(ks=(8,)), log_arm(x_shift=0.05, ks=(8,))
    assert matched_differences({0: same}, {0: same})[0].difference.mean == 0
    assert matched_differences({0: same}, {0: other})[0].outside == (Outside(0, 0.55, 0.5, 0.5),)


def test_a_curve_shorter_than_the_others_counts_as_it_is():
    control = dict.fromkeys(range(2), log_arm(x_shift=0.05, ks=(8, 32)))
    arm = {0: log_arm(), 1: log_arm(ks=(8, 16, 32))}
    near, far = matched_differences(arm, control)
    assert near.difference.mean == pytest.approx(0.015)
    assert (far.inside, far.outside[0].seed) == (1, 1)


@pytest.mark.parametrize(
    "points, reason",
    [
        ([Point(8, 0.5, 1), Point(16, 0.5, 2)], "what is matched does not rise with k: 0.5 at k=8, 0.5 at k=16"),
        ([Point(8, 0.5, 1), Point(16, 0.4, 2)], "what is matched does not rise with k: 0.5 at k=8, 0.4 at k=16"),
        ([Point(8, 0.5, 1), Point(8, 0.6, 2)], "the arm has two points at k=8"),
        ([Point(8, math.nan, 1), Point(16, 0.6, 2)], "the arm's figures at k=8 are not finite"),
        ([Point(8, 0.5, 1), Point(16, 0.6, math.inf)], "the arm's figures at k=16 are not finite"),
    ],
)
def test_what_is_no_curve_is_refused_with_its_reason(points, reason):
    good = [Point(8, 0.5, 1), Point(16, 0.6, 2)]
    (found,) = matched_differences({0: good, 1: points}, {seed: [Point(8, 0.55, 1)] for seed in range(2)})
    assert found.refused == f"seed 1: {reason}"
    assert (found.difference, found.inside, found.outside) == (None, 0, ())
    assert str(found) == f"not matched: {found.refused}"


def test_a_control_that_is_not_finite_at_one_k_is_refused_there():
    control = log_arm(x_shift=0.05)
    control[1] = Point(16, 0.65, math.nan)
    found = matched_differences({0: log_arm()}, {0: control})
    assert [point.refused is None for point in found] == [True, False, True, True]
    assert found[1].refused == "seed 0: the control's figures at k=16 are not finite"


def test_seeds_are_paired_and_others_left_out():
    arm, control = log_arm(), log_arm(x_shift=0.05, y_shift=0.005)
    found = matched_differences({2: arm, 0: arm, 7: arm}, {0: control, 2: control, 5: control})[0]
    assert found.seeds == (0, 2)
    assert found.difference.shape == (2,)
    assert matched_differences({1: arm}, {0: control})[0].refused == "no seed in common"
    assert matched_differences({0: []}, {0: control})[0].refused == "no seed in common"
    assert matched_differences({0: arm}, {}) == ()


def test_figures_that_vary_over_tasks_have_intervals_over_seeds_and_tasks():
    tasks = np.array([0.0, 0.1, 0.4])
    arm = {seed: [Point(p.k, p.x, p.y + tasks * seed) for p in log_arm()] for seed in range(2)}
    control = {seed: [Point(8, 0.55, np.zeros(3))] for seed in range(2)}
    found = matched_differences(arm, control)[0]
    by_hand = paired_difference(0.165 + np.outer([0, 1], tasks), np.zeros((2, 3)))
    assert found.difference.shape == (2, 3)
    assert (found.difference.low, found.difference.high) == pytest.approx((by_hand.low, by_hand.high))
    single = matched_differences({0: arm[0]}, {0: control[0]})[0]
    assert single.difference.low is not None  # over tasks
    unlike = matched_differences(arm, {0: [Point(8, 0.55, np.zeros(2))]})[0]
    assert unlike.refused == "figures of different shapes: [(2,), (3,)]"


def test_intervals_hold_a_planted_difference():
    """Both arms on curves that saturate, three seeds, noise in x and y of each point: 95 % intervals hold the truth at least so often."""
    rng = np.random.default_rng(0)

    def noisy(y_shift, x_shift):
        x = 1 - np.array(KS) ** -0.6 + x_shift + 0.002 * rng.normal(size=4)
        return [
            Point(k, a, math.sqrt(a - x_shift) + y_shift + 0.004 * rng.normal()) for k, a in zip(KS, x, strict=True)
        ]

    held = []
    for _ in range(150):
        found = matched_differences({s: noisy(0.02, 0) for s in range(3)}, {s: noisy(0, 0.01) for s in range(3)})[1]
        x = 1 - 16**-0.6 + 0.01  # the control's, where the arm has sqrt(x) + .02 and the control sqrt(x - .01)
        held.append(found.difference.low < math.sqrt(x) + 0.02 - math.sqrt(x - 0.01) < found.difference.high)
    assert np.mean(held) > 0.95 - 3 * math.sqrt(stats.bernoulli(0.95).var() / 150)

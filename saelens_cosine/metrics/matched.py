"""Differences between two arms at the same x, such as a fraction of variance explained (FVE) or an L0, when each has a curve.

An arm is trained with several k, so each of its seeds has a curve of points (x, y), one for each k. The control has its own, and at
one k the two differ in x and y at once: an arm may be better in y only because it reconstructs more. So at each point of
the control the arm's y is read off the arm's own curve at the control's x, and the control's y is taken off. Between an arm's points the
curve is the monotone cubic of Fritsch and Carlson 1980 (doi:10.1137/0717021; SciPy's PCHIP), which does not overshoot; beyond
them there is no curve, and "outside the range" is said instead of a number.

Seeds are pairs: the arm and the control of one seed share their start and data, and the difference is taken within the seed, at
that seed's own x of the control. What the noise of training does to the points of either curve is in the differences' spread over seeds, so
the interval is the paired t-interval over seeds (`intervals.paired_difference`). The interpolation is wrong on top of that,
by nearly the same in every seed since the ks are the same: more seeds do not make it smaller. So it is not averaged out but
added: the half width grows by the mean over seeds of |PCHIP - linear| at the x in question, which is 0 at the arm's own points.

That is an estimate and no bound. Where x and y are smooth, monotone functions of k (logarithms, powers, saturating ones) and k is
doubled twice, the cubic is wrong by 1 to 7 % of the curve's range at worst. The estimate is larger than that error in most of these
cases, but close to zero where the points lie on a line though the curve bends between them. More ks help; through two, both
interpolations are one line, so there is nothing to tell the error by and no interval. A mean is given only where all seeds are
inside: those that happen to reach the control's x are not seeds like any other.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.interpolate import PchipInterpolator

from saelens_cosine.metrics.intervals import Difference, about, by_chance, paired_difference

OUTSIDE = "outside the range"

TWO_KS = "two ks do not tell how far the interpolation is off"

ONE_SEED = "one seed"


class Point(NamedTuple):
    """
    An SAE on its seed's curve.

    Args:
        k (float): What the points of a curve were trained with; it tells the control's points apart.
        x (float): What is to be the same of both, rising with k: FVE, or L0.
        y (ArrayLike): What is compared: a number, or an array of the same shape for all, one axis for each thing that it varies over beside
            the seed, such as tasks and splits. Then the interval is over these, too.
    """

    k: float
    x: float
    y: ArrayLike


class Outside(NamedTuple):
    """
    A seed in which the control's x is none that the arm's curve reaches.

    Args:
        seed (int): Which.
        x (float): The control's.
        low (float): Smallest x of the arm.
        high (float): Largest.
    """

    seed: int
    x: float
    low: float
    high: float

    @property
    def by(self) -> float:
        """How far above the range, or below (negative), in the units of x."""
        return self.x - (self.high if self.x > self.high else self.low)

    def __str__(self) -> str:
        where = "above" if self.by > 0 else "below"
        return f"seed {self.seed}: {self.x:.4g} is {abs(self.by):.2g} {where} {self.low:.4g} to {self.high:.4g}"


@dataclass(frozen=True)
class MatchedDifference:
    """
    An arm minus the control, at the x that the control has at one of its ks.

    Args:
        k (float): The control's.
        x (float): Mean over seeds of the control's x there; NaN if nothing could be compared.
        seeds (tuple[int, ...]): Those that both arms have.
        difference (Difference | None): Mean over these seeds and its 95 % interval, the interpolation's error included; None unless
            all are inside the arm's range.
        interpolation (float | None): The part of the half width that is the interpolation's error, in the units of y; None if unknown.
        outside (tuple[Outside, ...]): Seeds in which the arm does not reach the control's x.
        refused (str | None): Why no curve could be drawn.
    """

    k: float
    x: float
    seeds: tuple[int, ...]
    difference: Difference | None = None
    interpolation: float | None = None
    outside: tuple[Outside, ...] = ()
    refused: str | None = None

    @property
    def inside(self) -> int:
        """In how many seeds the arm reaches the control's x."""
        return 0 if self.refused else len(self.seeds) - len(self.outside)

    def __str__(self) -> str:
        if self.refused:
            return f"not matched: {self.refused}"
        if self.difference is not None:
            return str(self.difference)
        of = f" ({self.inside} of {len(self.seeds)} seeds inside)" if len(self.seeds) > 1 else ""
        return f"{OUTSIDE}{of}; {'; '.join(map(str, self.outside))}"

    def brief(self, form: str) -> str:
        """What fits a column: `+0.0123 ±0.0040`."""
        if self.refused:
            return "not matched"
        if self.difference is None:
            return "outside" if len(self.seeds) == 1 else f"outside ({self.inside}/{len(self.seeds)} in)"
        return self.difference.brief(form)


def about_matched(found: Sequence[tuple[str, MatchedDifference]], axes: Iterable[str] = ("seeds",)) -> list[str]:
    """What a reader of matched differences has to know.

    Args:
        found: with the arms that they are of.
        axes: what their intervals are over.
    """
    differences = [item.difference for _, item in found if item.difference]
    intervals = [difference for difference in differences if difference.low is not None]
    missing = dict.fromkeys(d.no_interval for d in differences if d.no_interval)
    refused = dict.fromkeys(f"{arm}: {item.refused}" for arm, item in found if item.refused)
    lines = [f"No intervals: {'; '.join(filter(None, missing))}."] if missing else []
    if refused:
        lines.append(f"Not matched: {'; '.join(refused)}.")
    if any(item.outside for _, item in found):
        lines.append(
            f"{OUTSIDE.capitalize()}: what the control has there is beyond an arm's own points; nothing is extrapolated."
        )
    if intervals:
        lines.append("Intervals hold the interpolation's error between an arm's ks.")
    return lines + about(axes if intervals else [], by_chance(differences))


class _Refused(ValueError):
    """A seed's points are no curve."""


def matched_differences(
    arm: Mapping[int, Sequence[Point]], control: Mapping[int, Sequence[Point]]
) -> tuple[MatchedDifference, ...]:
    """The arm minus the control at each of the control's ks, over the seeds that both have.

    Points may miss where an SAE could not be trained: a curve then has fewer, and may reach less far. Points that are no curve
    are refused by name and not put in order or left out: a seed whose x does not rise with k, two points of one k, and
    what is not finite.

    Args:
        arm: by seed, the arm's points, in any order.
        control: likewise the control's.

    Returns:
        One for each k of the control, ascending.
    """
    ks = sorted({point.k for points in control.values() for point in points})
    return tuple(_at(k, arm, control) for k in ks)


def _at(k: float, arm: Mapping[int, Sequence[Point]], control: Mapping[int, Sequence[Point]]) -> MatchedDifference:
    at = {seed: [point for point in points if point.k == k] for seed, points in control.items()}
    seeds = tuple(seed for seed, points in at.items() if points and arm.get(seed))
    if not seeds:
        return MatchedDifference(k, math.nan, (), refused="no seed in common")
    try:
        curves = {seed: _curve(seed, "arm", arm[seed]) for seed in seeds}
        targets = {seed: _curve(seed, "control", at[seed])[0] for seed in seeds}
    except _Refused as refused:
        return MatchedDifference(k, math.nan, seeds, refused=str(refused))
    shapes = {np.shape(point.y) for seed in seeds for point in (*curves[seed], targets[seed])}
    if len(shapes) > 1:
        return MatchedDifference(k, math.nan, seeds, refused=f"figures of different shapes: {sorted(shapes)}")
    x = statistics.mean(target.x for target in targets.values())
    outside = tuple(
        Outside(seed, targets[seed].x, curve[0].x, curve[-1].x)
        for seed, curve in curves.items()
        if not curve[0].x <= targets[seed].x <= curve[-1].x
    )
    if outside:
        return MatchedDifference(k, x, seeds, outside=outside)
    read = [_read(curves[seed], targets[seed].x) for seed in seeds]
    error = _mean_error([error for _, error in read])
    difference = _widened(np.stack([y for y, _ in read]), np.stack([targets[seed].y for seed in seeds]), error)
    return MatchedDifference(k, x, seeds, difference, error)


def _curve(seed: int, whose: str, points: Sequence[Point]) -> list[Point]:
    """Points of a seed by k.

    Raises:
        _Refused: they are no curve.
    """
    points = sorted(points, key=lambda point: point.k)
    for point in points:
        if not (math.isfinite(point.x) and np.isfinite(point.y).all()):
            raise _Refused(f"seed {seed}: the {whose}'s figures at k={point.k:g} are not finite")
    for one, other in pairwise(points):
        if one.k == other.k:
            raise _Refused(f"seed {seed}: the {whose} has two points at k={one.k:g}")
        if one.x >= other.x:
            raise _Refused(
                f"seed {seed}: what is matched does not rise with k: {one.x:.6g} at k={one.k:g}, {other.x:.6g} at k={other.k:g}"
            )
    return points


def _read(curve: Sequence[Point], x: float) -> tuple[np.ndarray[Any, Any], float | None]:
    """y of a curve at an x within its range, and the size of the interpolation's error in its mean; None if that cannot be told."""
    xs, ys = np.array([point.x for point in curve]), np.array([point.y for point in curve], np.float64)
    if (knots := np.flatnonzero(xs == x)).size:
        return ys[knots[0]], 0.0
    right = int(np.searchsorted(xs, x))
    share = (x - xs[right - 1]) / (xs[right] - xs[right - 1])
    linear = ys[right - 1] + share * (ys[right] - ys[right - 1])
    y = np.asarray(PchipInterpolator(xs, ys)(x), np.float64)
    return y, abs(float((y - linear).mean())) if len(curve) > 2 else None


def _mean_error(errors: Sequence[float | None]) -> float | None:
    known = [error for error in errors if error is not None]
    return statistics.mean(known) if len(known) == len(errors) else None


def _widened(ours: np.ndarray[Any, Any], theirs: np.ndarray[Any, Any], error: float | None) -> Difference:
    """The paired difference `[seeds, ...]`, its interval wider by `error` on either side."""
    if len(ours) == 1 and ours.ndim > 1:  # what is left varies
        ours, theirs = ours[0], theirs[0]
    mean = float((ours - theirs).mean())
    if ours.size < 2 or error is None:
        return Difference(mean, None, None, False, ours.shape, ONE_SEED if ours.size < 2 else TWO_KS)
    found = paired_difference(ours, theirs)
    if found.low is None or found.high is None:
        return found
    low, high = found.low - error, found.high + error
    return replace(found, low=low, high=high, seen=low > 0 or high < 0)

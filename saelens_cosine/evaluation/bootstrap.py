"""Differences between two SAEs beside their own noise: over seeds, data sets and splits at once.

Each axis of the paired values is drawn again with replacement, all axes together, as the bootstrap of crossed factors does
(the pigeonhole bootstrap; Owen 2007, doi:10.1214/07-AOAS122). For a mean its variance has a closed form, so nothing is
drawn. A bootstrap of few units is too narrow: with three seeds, the percentiles of one put zero outside a 95 % interval in a
quarter of all cases where there is no difference. So each axis's share of the variance counts by its n - 1 degrees of freedom,
and the interval is Student's at the degrees of freedom that the shares make (Satterthwaite 1946). With one axis that is the
paired t-interval.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

NO_DIFFERENCE = "no difference seen"


@dataclass(frozen=True)
class Difference:
    """
    Mean of `a - b` over pairs, with its interval.

    Args:
        mean (float): Mean of the differences, in the units of the values.
        low (float): Lower end of the interval.
        high (float): Upper end.
        seen (bool): Whether the interval leaves out zero. Where it does not, say so instead of the mean.
        shape (tuple[int, ...]): Units on each axis that the values vary over, such as seeds and splits.
    """

    mean: float
    low: float
    high: float
    seen: bool
    shape: tuple[int, ...]

    def __str__(self) -> str:
        interval = f"{self.low:+.4f} to {self.high:+.4f}"
        return f"{self.mean:+.4f} ({interval})" if self.seen else f"{NO_DIFFERENCE} ({interval})"


def paired_difference(a: ArrayLike, b: ArrayLike, confidence: float = 0.95) -> Difference:
    """How much larger `a` is than `b`, entry by entry.

    Args:
        a: values of one SAE, `[units]`, or with one axis for each thing that was varied and that both SAEs share:
            `[seeds, splits]`, `[seeds, datasets]`, `[seeds, datasets, splits]`. Splits should not share test examples: counted as
            if they were new ones, these make any difference significant.
        b: values of the other, the same shape, in the same order.
        confidence: of the interval.

    Raises:
        ValueError: different shapes, fewer than two pairs, or values that are not finite.
    """
    ones, others = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if ones.shape != others.shape or ones.size < 2:
        raise ValueError(
            f"Values of shape {ones.shape} and {others.shape}: pairs need the same shape, and at least two of them."
        )
    differences = ones - others
    if not np.isfinite(differences).all():
        raise ValueError(f"{int((~np.isfinite(differences)).sum())} of {differences.size} differences are not finite.")
    shares = [(variance, freedom) for variance, freedom in _shares(differences) if variance > 0]
    half = 0.0
    if shares:
        variance = sum(share for share, _ in shares)
        freedom = variance**2 / sum(share**2 / freedom for share, freedom in shares)
        half = float(stats.t.ppf((1 + confidence) / 2, freedom)) * math.sqrt(variance)
    mean = float(differences.mean())
    return Difference(mean, mean - half, mean + half, abs(mean) > half, differences.shape)


def _shares(
    effect: np.ndarray[Any, Any], axis: int = 0, units: int = 1, freedom: int = 1
) -> Iterator[tuple[float, int]]:
    """Shares of each subset of axes in the variance of the mean, with their degrees of freedom.

    The shares are those of an analysis of variance: what varies along these axes once it is averaged over the others and
    the effects of fewer axes are taken off.
    """
    if axis == effect.ndim:
        if units > 1:
            yield float((effect**2).sum()) / (freedom * units), freedom
        return
    mean, n = effect.mean(axis=axis, keepdims=True), effect.shape[axis]
    yield from _shares(mean, axis + 1, units, freedom)
    if n > 1:
        yield from _shares(effect - mean, axis + 1, units * n, freedom * (n - 1))

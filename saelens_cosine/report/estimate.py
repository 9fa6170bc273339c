"""Numbers with their intervals, and how they are written."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from saelens_cosine.metrics.intervals import paired_difference


class Estimate(NamedTuple):
    """A value and the ends of its interval, None where none was computed. NaN: could not be measured."""

    value: float
    low: float | None = None
    high: float | None = None

    @property
    def bounds(self) -> tuple[float, float] | None:
        """The interval, None unless both ends are finite."""
        if self.low is None or self.high is None or not math.isfinite(self.low + self.high):
            return None
        return self.low, self.high

    def __str__(self) -> str:
        return written(self, "{:.4g}".format)


def over_seeds(values: Sequence[float | None]) -> Estimate:
    """Mean with its 95 % interval where there are several seeds; NaN unless all are known."""
    known = [math.nan if value is None else value for value in values]
    mean = sum(known) / len(known) if known else math.nan
    if len(known) < 2 or not math.isfinite(mean):
        return Estimate(mean)
    interval = paired_difference(known, [0.0] * len(known))
    return Estimate(interval.mean, interval.low, interval.high)


def short(value: float) -> str:
    """A number in few characters: `0.25`, `1.5M`, `3e-05`."""
    if not math.isfinite(value):
        return "-"
    for unit, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= unit:
            return f"{value / unit:.3g}{suffix}"
    return f"{value:.3g}"


def written(estimate: Estimate, form: Callable[[float], str]) -> str:
    """`0.8987 (0.8950 to 0.9024)`, without the bracket where there is no interval."""
    if not math.isfinite(estimate.value):
        return "-"
    bounds = f" ({form(estimate.bounds[0])} to {form(estimate.bounds[1])})" if estimate.bounds else ""
    return f"{form(estimate.value)}{bounds}"


def numbers(estimates: Iterable[float | Estimate]) -> list[float]:
    """Every finite number in estimates: values and ends of intervals."""
    found = [number for e in estimates for number in (e if isinstance(e, Estimate) else (e,))]
    return [number for number in found if number is not None and math.isfinite(number)]


def form_of(estimates: Iterable[Estimate], sign: str = "") -> Callable[[float], str]:
    """One form for numbers of a kind: as many decimals as give the largest four digits, none to whole numbers.

    Where values are a hundred times apart, four digits for each.
    """
    estimates = list(estimates)
    values = [abs(value) for value in numbers(e.value for e in estimates) if value]
    sizes = [abs(number) for number in numbers(estimates)]
    largest = max(sizes, default=0.0)
    if all(size == int(size) for size in sizes):
        return f"{{:{sign},.0f}}".format
    if largest < 1e-3 or (values and max(values) > 100 * min(values)):
        return f"{{:{sign},.4g}}".format
    return f"{{:{sign},.{max(0, 3 - math.floor(math.log10(largest)))}f}}".format

"""Progress in lines, for logs: what no terminal shows is written whole, and seldom."""

from __future__ import annotations

import time
from collections.abc import Callable

from saelens_cosine.console import visible

EVERY = 60.0
"""Seconds between two lines of one stage, at least."""

WORTH_AN_END = 1.0
"""Seconds that a stage of which nothing is counted lasts, at least, to have a line at its end."""


class ProgressLines:
    """A line when a stage begins, one when it has ended, with its time, and at most one a minute in between. A stage is what is
    done; the next one ends it.

    The rate is that since `done` last fell or `total` last changed: stages that share a count, as the evals of an evaluation do,
    share it too.

    Args:
        write: takes a line, without its end.
        clock: seconds since any fixed moment.
    """

    def __init__(self, write: Callable[[str], None], clock: Callable[[], float] = time.monotonic):
        self._write, self._clock = write, clock
        self._what: str | None = None
        self._done = self._total = self._done_at_start = 0
        self._began = self._counted_since = self._written = 0.0
        self._ended = True

    def __call__(self, what: str, done: int, total: int) -> None:
        now = self._clock()
        counts_on = total == self._total and done >= self._done
        if not counts_on:
            self._counted_since, self._done_at_start = now, done
        begins = what != self._what or (self._ended and not counts_on)
        if begins:
            self._end(now)
            self._what, self._began, self._ended = what, now, False
        self._done, self._total = done, total
        if self._ended:
            return
        if done >= total and not begins:
            self._end(now)
        elif begins or now - self._written >= EVERY:
            self._say(self._so_far(now))
            self._written, self._ended = now, done >= total

    def end(self) -> None:
        """The last stage is over."""
        self._end(self._clock())

    def _end(self, now: float) -> None:
        took, rate = now - self._began, self._per_second(now)
        counted = self._done >= self._total > 1
        if not self._ended and (counted or took >= WORTH_AN_END):
            parts = [self._count()] if counted else []
            parts.append(f"done in {lasting(took)}")
            if counted and rate:
                parts.append(_rate(rate))
            self._say(", ".join(parts))
        self._ended = True

    def _so_far(self, now: float) -> str:
        if self._total <= 1:  # nothing is counted
            return f"for {lasting(now - self._began)}" if now > self._began else "begun"
        rate = self._per_second(now)
        if not rate or self._done >= self._total:
            return self._count()
        return f"{self._count()}, {_rate(rate)}, {lasting((self._total - self._done) / rate)} left"

    def _count(self) -> str:
        return f"{self._done:,} of {self._total:,} ({100 * self._done // self._total} %)"

    def _per_second(self, now: float) -> float:
        seconds = now - self._counted_since
        return (self._done - self._done_at_start) / seconds if seconds > 0 else 0.0

    def _say(self, text: str) -> None:
        self._write(visible(f"{self._what}: {text}"))


def lasting(seconds: float) -> str:
    """Seconds as one would say them: 3.2 s, 42 s, 7 min, 2 h 5 min."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 60:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours:,} h {minutes} min" if hours else f"{minutes} min"


def _rate(per_second: float) -> str:
    """A rate in the shortest unit of time that has one whole thing or more."""
    units = {"second": 1, "minute": 60, "hour": 3600}
    unit = next((unit for unit, seconds in units.items() if per_second * seconds >= 1), "hour")
    many = per_second * units[unit]
    return f"{many:,.0f} a {unit}" if many >= 10 else f"{many:.1f} a {unit}"

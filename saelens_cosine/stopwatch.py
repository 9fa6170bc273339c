"""Where a run's time goes, part by part, without a line in what is timed.

The interpreter says when a function begins and ends (`sys.setprofile`); those of a table are parts, and time goes to the innermost
one that runs. Code that is Python through and through runs somewhat slower while it is timed; a training step, whose time is
in a few hundred calls of PyTorch, does not.
"""

from __future__ import annotations

import inspect
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import CodeType, FrameType
from typing import Any, NamedTuple

try:
    import resource
except ModuleNotFoundError:  # not on Windows
    resource = None

REST = "the rest"
"""What no part's function runs in."""

Of = Mapping[str, Any]
"""A call's arguments by name."""


class Part(NamedTuple):
    """
    What counts as one part of a run.

    Args:
        name (str | Callable[[Of], str]): What it is called, or what a call is called by its arguments.
        functions (tuple[Callable[..., Any], ...]): Whose calls it is; functions, methods of a class, generators.
        tokens (Callable[[Of], int] | None): How many tokens a call takes.
    """

    name: str | Callable[[Of], str]
    functions: tuple[Callable[..., Any], ...]
    tokens: Callable[[Of], int] | None = None


@dataclass
class Spent:
    """
    What a part has taken.

    Args:
        seconds (float): In its functions and what they call, without those of other parts.
        calls (int): Calls from outside of it; a generator's, for each that it yields.
        tokens (int): That they took.
        peak_growth_bytes (int): By how much the process's peak of memory rose in it.
    """

    seconds: float = 0.0
    calls: int = 0
    tokens: int = 0
    peak_growth_bytes: int = 0


@dataclass
class Stopwatch:
    """
    Times the parts of what runs in a with block, in its thread.

    Args:
        parts (tuple[Part, ...]): What there is to tell apart.
        spent (dict[str, Spent]): By part, in the order in which they began; `REST` is what is left.
    """

    parts: tuple[Part, ...]
    spent: dict[str, Spent] = field(default_factory=lambda: {REST: Spent()})

    def __post_init__(self) -> None:
        self._part_of: dict[CodeType, Part] = {
            code_of(function): part for part in self.parts for function in part.functions
        }
        self._stack = [REST]
        self._since, self._peak = 0.0, 0

    @property
    def seconds(self) -> float:
        """Of the whole."""
        return sum(spent.seconds for spent in self.spent.values())

    def __enter__(self) -> Stopwatch:
        self._before: Any = sys.getprofile()
        self._since, self._peak = time.perf_counter(), peak_bytes()
        sys.setprofile(self._event)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(self._before)
        self._charge()
        del self._stack[1:]

    def _event(self, frame: FrameType, event: str, _argument: object) -> None:
        if event not in ("call", "return"):
            return
        part = self._part_of.get(frame.f_code)
        if part is None:
            return
        if event == "return":
            if len(self._stack) > 1:
                self._charge()
                self._stack.pop()
            return
        arguments = frame.f_locals
        name = part.name if isinstance(part.name, str) else part.name(arguments)
        self._charge()
        spent = self.spent.setdefault(name, Spent())
        if self._stack[-1] != name:
            spent.calls += 1
            spent.tokens += part.tokens(arguments) if part.tokens else 0
        self._stack.append(name)

    def _charge(self) -> None:
        """Time and memory since the last call go to the part that has run."""
        now, peak, spent = time.perf_counter(), peak_bytes(), self.spent[self._stack[-1]]
        spent.seconds += now - self._since
        spent.peak_growth_bytes += peak - self._peak
        self._since, self._peak = now, peak


def code_of(function: Callable[..., Any]) -> CodeType:
    """The code that runs when a function is called, without its decorators."""
    inner: Any = inspect.unwrap(function)
    return inner.__code__


def peak_bytes() -> int:
    """The process's peak of resident memory so far; 0 where the system does not say."""
    if resource is None:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak

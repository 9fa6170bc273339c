"""What an eval is: a measurement, what it is called in tables and differences, and how its figures are drawn."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, fields
from functools import cached_property
from types import SimpleNamespace
from typing import Any, Generic, Literal, TypeVar, get_args, get_type_hints
from uuid import uuid4

import numpy as np

from saelens_cosine.experiments.evaluate.settings import EvaluationSettings
from saelens_cosine.metrics.intervals import DocumentErrors
from saelens_cosine.plain import OMITTED, from_plain
from saelens_cosine.report.browser import Browser
from saelens_cosine.report.chart import Arms, Chart

Treatment = Literal["with_sinks", "without_sinks"]
"""What happened to high-norm tokens."""

TREATMENTS: dict[Treatment, str] = {"with_sinks": "sinks in", "without_sinks": "sinks out"}
"""As results call them, and as a reader does."""

Of = Literal["text", "sae", "arm", "pair"]
"""A text alone, an SAE, the first SAE of an arm, or an SAE and its baseline."""

NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
"""Of an eval: files, places in a page and flags are called by it."""

Found = TypeVar("Found")
Result = TypeVar("Result")


class NotApplicable(Exception):
    """An eval that says nothing of an SAE, with the reason."""


@dataclass(frozen=True)
class NotMeasured:
    """
    Stands for the result of an eval that said nothing of an SAE or a text.

    Args:
        not_applicable (str): The reason.
        not_finite (int | None): How many tokens or weights were NaN or infinite, if that was it.
    """

    not_applicable: str
    not_finite: int | None = field(default=None, metadata=OMITTED)


@dataclass(frozen=True, kw_only=True)
class BySinks(Generic[Found]):
    """
    What was measured on all tokens, and on those that are left without sinks; None where the settings' `sinks` say so.

    Args:
        with_sinks (Found | None): On all tokens.
        without_sinks (Found | None): On ordinary ones.
    """

    with_sinks: Found | None = field(default=None, metadata=OMITTED)
    without_sinks: Found | None = field(default=None, metadata=OMITTED)

    def items(self) -> Iterator[tuple[Treatment, Found]]:
        """What there is, with sinks first."""
        if self.with_sinks is not None:
            yield "with_sinks", self.with_sinks
        if self.without_sinks is not None:
            yield "without_sinks", self.without_sinks

    def first(self) -> Found:
        """With sinks, if that was measured."""
        return next(found for _, found in self.items())


@dataclass(frozen=True)
class Figure:
    """
    One named number of one SAE or text: a row of the tables and, unless it says otherwise, of the differences between arms.

    Args:
        name (str): What it is, with its unit.
        value (float | None): The number; None or NaN where it could not be measured.
        sinks (Treatment | None): Which tokens it is of; None where these have no part in it.
        column (str | None): Its format in the table that one looks at first, as `{:.4f}`; None: it is listed below.
        compared (bool): Whether arms are compared in it. Not what is a difference to the first arm already, nor what is the text's.
        values (np.ndarray | None): What it is the mean of, where something was repeated.
        over (tuple[str, ...]): The axes of `values`, such as "tasks".
        units (tuple[str, ...]): What was measured: tasks, or a hash of the text. Values of other units are no pairs.
        documents (DocumentErrors | None): The sums that it is a ratio of, where it is one.
    """

    name: str
    value: float | None
    sinks: Treatment | None = None
    column: str | None = None
    compared: bool = True
    values: np.ndarray[Any, Any] | None = None
    over: tuple[str, ...] = ()
    units: tuple[str, ...] = ()
    documents: DocumentErrors | None = None

    @property
    def title(self) -> str:
        """With what happened to sinks."""
        return self.name if self.sinks is None else f"{self.name}, {TREATMENTS[self.sinks]}"

    @property
    def repeats(self) -> np.ndarray[Any, Any]:
        """What its mean is taken of."""
        return np.asarray(self.number) if self.values is None else self.values

    @property
    def number(self) -> float:
        """NaN where there is none."""
        return float("nan") if self.value is None else float(self.value)


@dataclass(frozen=True)
class Shown(Generic[Result]):
    """
    What an eval's charts are drawn of.

    Args:
        arms (Arms): The page's.
        results (dict[str, list[Result]]): By arm, what the eval found of its seeds, ascending; only arms and seeds that have a result.
        baseline (str): The arm that others are compared with.
        treatment (Treatment): Which tokens are shown where a chart has room for one of them only: without sinks if that was measured.
    """

    arms: Arms
    results: dict[str, list[Result]]
    baseline: str
    treatment: Treatment

    def of(self, treatment: Treatment) -> dict[str, list[Any]]:
        """By arm, what a `BySinks` has of these tokens, seed by seed; only arms that have any."""
        found = {
            arm: [measured for result in results if (measured := getattr(result, treatment)) is not None]
            for arm, results in self.results.items()
        }
        return {arm: measured for arm, measured in found.items() if measured}


@dataclass(frozen=True)
class EvalSection(Generic[Result]):
    """
    A part of the page.

    Args:
        heading (str): Above it and among the links.
        about (str): What its charts show, in a sentence or two.
        draw (Callable): The charts; a section without any is left out.
    """

    heading: str
    about: str
    draw: Callable[[Shown[Result]], Iterable[Chart | Browser]]


def _no_figures(_: Any) -> Iterator[Figure]:
    return iter(())


@dataclass(frozen=True)
class Eval(Generic[Result]):
    """
    One row of what can be measured.

    Args:
        name (str): What `--evals` and `evaluation.json` call it.
        of (Of): A text alone, an SAE, the first SAE of an arm, or an SAE and its baseline.
        about (str): One line for `--help`.
        measure (Callable): From a `Text` or a `Subject` to its result, of the type that it is annotated with: a dataclass of plain values, `BySinks` of one, or one that adds fields to it.
        figures (Callable): The named figures of a result.
        tokens (Callable): How many tokens a result is of, as one reads it: `tokens_of`.
        section (EvalSection | None): Its charts, if it has any.
        note (str): What a reader of its columns in the first table has to know.
        uses (tuple[str, ...]): Settings that change its result, beyond those that say what the tokens are.
        reads (Callable): The content of what else its result depends on, such as files that settings name.
    """

    name: str
    of: Of
    about: str
    measure: Callable[[Any], Result]
    figures: Callable[[Result], Iterator[Figure]] = _no_figures
    tokens: Callable[[Result], str] = field(default=lambda _: "")
    section: EvalSection[Result] | None = None
    note: str = ""
    uses: tuple[str, ...] = ()
    reads: Callable[[Any], Any] = lambda _: ()

    @cached_property
    def code(self) -> str:
        """The source of an eval from elsewhere, of which another one gives other results; of ours the version says it.

        Read when it is registered: who edits a file while it runs edits the next run. What has no file is of this process alone.
        """
        if self.measure.__module__.startswith("saelens_cosine."):
            return ""
        try:
            return inspect.getsource(inspect.getmodule(self.measure) or self.measure)
        except (OSError, TypeError):
            return uuid4().hex

    @cached_property
    def kind(self) -> Any:
        """The type of its results, by the annotation of its measure; Any without one."""
        told = {"return": getattr(self.measure, "__annotations__", {}).get("return", Any)}
        known = getattr(inspect.unwrap(self.measure), "__globals__", {})  # also of a measure that another one wraps
        return get_type_hints(SimpleNamespace(__annotations__=told), known)["return"]

    def check(self) -> None:
        """What must be right before anything is measured.

        Raises:
            ValueError: it cannot be run, or its results not be read; names the field.
        """
        if not NAME.fullmatch(self.name):
            raise ValueError(
                f"The name of an eval, {self.name!r:.80}, must be letters, digits, '_' and '-', at most 64."
            )
        if self.of not in get_args(Of):
            raise ValueError(f"of={self.of!r} of the eval {self.name!r} is none of {', '.join(get_args(Of))}.")
        settings = [part.name for part in fields(EvaluationSettings)]
        if unknown := [name for name in self.uses if name not in settings]:
            raise ValueError(
                f"uses of the eval {self.name!r} has {unknown[0]!r}, which is no setting; there are {', '.join(settings)}."
            )
        if getattr(self.measure, "__annotations__", {}).get("return") is None:
            raise ValueError(
                f"The eval {self.name!r} has no annotation of what its measure returns, by which results are read back: "
                "def measure(subject) -> Residual, with a dataclass of plain values."
            )
        try:
            _ = self.kind, self.code
        except NameError as error:
            raise ValueError(
                f"What the measure of the eval {self.name!r} returns is not to be found: {error}. Its type must be defined or "
                "imported in the measure's module, not for the type checker alone."
            ) from error

    def read(self, plain_result: Any) -> Result | NotMeasured:
        """A result, or the reason why there is none, from its plain form.

        Raises:
            ValueError: it is none.
        """
        refused = isinstance(plain_result, dict) and "not_applicable" in plain_result
        return from_plain(NotMeasured if refused else self.kind, plain_result, self.name)


def tokens_of(result: BySinks[Found], count: Callable[[Found], int]) -> str:
    """`50,176 (49,784 without sinks)`."""
    counts = [f"{count(found):,}" for _, found in result.items()]
    if len(set(counts)) == 2:
        return f"{counts[0]} ({counts[1]} without sinks)"
    return counts[0] + ("" if result.with_sinks is not None else " without sinks")


def by_sinks(treatments: tuple[str, ...], measure: Callable[[str], Found]) -> dict[str, Found]:
    """Arguments of a `BySinks`: a measure with sinks, without, or both."""
    return {name: measure(name) for name in treatments}

"""What an eval is: a measurement, what it is called in tables and differences, and how its figures are drawn."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypeVar, get_type_hints

import numpy as np

from saelens_cosine.metrics.intervals import DocumentErrors
from saelens_cosine.plain import OMITTED, from_plain

Treatment = Literal["with_sinks", "without_sinks"]
"""What happened to high-norm tokens."""

TREATMENTS: dict[Treatment, str] = {"with_sinks": "sinks in", "without_sinks": "sinks out"}
"""As results call them, and as a reader does."""

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
        arms (Any): The page's arms, `report.chart.Arms`.
        results (dict[str, list[Result]]): By arm, what the eval found of its seeds, ascending; only arms and seeds that have a result.
        baseline (str): The arm that others are compared with.
        treatment (Treatment): Which tokens are shown where a chart has room for one of them only: without sinks if that was measured.
        browsable (frozenset[tuple[str, int]]): Arm and number of the features in the page's browser.
    """

    arms: Any
    results: dict[str, list[Result]]
    baseline: str
    treatment: Treatment
    browsable: frozenset[tuple[str, int]] = frozenset()


@dataclass(frozen=True)
class EvalSection(Generic[Result]):
    """
    A part of the page.

    Args:
        heading (str): Above it and among the links.
        about (str): What its charts show, in a sentence or two.
        draw (Callable): The charts, `report.chart.Chart`; a section without any is left out.
    """

    heading: str
    about: str
    draw: Callable[[Shown[Result]], Iterable[Any]]


def _no_figures(_: Any) -> Iterator[Figure]:
    return iter(())


@dataclass(frozen=True)
class Eval(Generic[Result]):
    """
    One row of what can be measured.

    Args:
        name (str): What `--evals` and `evaluation.json` call it.
        of (Literal["text", "sae", "arm", "pair"]): A text alone, an SAE, the first SAE of an arm, or an SAE and its baseline.
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
    of: Literal["text", "sae", "arm", "pair"]
    about: str
    measure: Callable[[Any], Result]
    figures: Callable[[Result], Iterator[Figure]] = _no_figures
    tokens: Callable[[Result], str] = field(default=lambda _: "")
    section: EvalSection[Result] | None = None
    note: str = ""
    uses: tuple[str, ...] = ()
    reads: Callable[[Any], Any] = lambda _: ()

    @property
    def code(self) -> str:
        """The source of an eval from elsewhere, of which another one gives other results; of ours the version says it."""
        if self.measure.__module__.startswith("saelens_cosine."):
            return ""
        return inspect.getsource(inspect.getmodule(self.measure) or self.measure)

    def read(self, plain_result: Any) -> Result | NotMeasured:
        """A result, or the reason why there is none, from its plain form.

        Raises:
            ValueError: it is none.
        """
        refused = isinstance(plain_result, dict) and "not_applicable" in plain_result
        kind: Any = NotMeasured if refused else get_type_hints(self.measure).get("return", Any)
        return from_plain(kind, plain_result, self.name)


def tokens_of(result: BySinks[Found], count: Callable[[Found], int]) -> str:
    """`50,176 (49,784 without sinks)`."""
    counts = [f"{count(found):,}" for _, found in result.items()]
    if len(set(counts)) == 2:
        return f"{counts[0]} ({counts[1]} without sinks)"
    return counts[0] + ("" if result.with_sinks is not None else " without sinks")


def by_sinks(treatments: tuple[str, ...], measure: Callable[[str], Found]) -> dict[str, Found]:
    """Arguments of a `BySinks`: a measure with sinks, without, or both."""
    return {name: measure(name) for name in treatments}

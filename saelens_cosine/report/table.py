"""Tables of a page: texts, and numbers with their intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from saelens_cosine.files.secrets import published
from saelens_cosine.metrics.intervals import NO_DIFFERENCE
from saelens_cosine.report.estimate import Estimate, form_of, numbers

LONG = 40
"""Characters above which a text is broken into lines of a width of its own."""

Cell = str | Estimate


@dataclass(frozen=True)
class Table:
    """
    Rows under headings. The numbers of a row are of a kind and get the same decimals, unless they are differences.

    Args:
        label (str): What is in it; read aloud.
        headings (Sequence[str]): Of the columns. An arm's name gets its mark, here and at the head of a row.
        rows (Sequence[Sequence[Cell]]): As many cells in each; the first names the row.
        differences (bool): Whether its numbers are differences: with their sign, and named only if the interval leaves out zero.
    """

    label: str
    headings: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    differences: bool = False

    def html(self, marks: Mapping[str, str] | None = None) -> str:
        """A table in a box of its own that scrolls sideways, by keyboard too.

        Args:
            marks: HTML of each arm's mark by its name.
        """
        marks = marks or {}
        right = [any(isinstance(row[i], Estimate) for row in self.rows) for i in range(len(self.headings))]
        heads = "".join(
            f'<th scope="col"{_kind(heading, number)}>{_named(heading, marks)}</th>'
            for heading, number in zip(self.headings, right, strict=True)
        )
        body = "".join(f"<tr>{''.join(self._row(row, right, marks))}</tr>" for row in self.rows)
        return (
            f'<div class="scroll" tabindex="0" role="region" aria-label="{public(self.label)}">'
            f"<table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>"
        )

    def _row(self, row: Sequence[Cell], right: Sequence[bool], marks: Mapping[str, str]) -> list[str]:
        estimates = [cell for cell in row if isinstance(cell, Estimate)]
        form = form_of(estimates)
        strips = not self.differences and any(e.bounds for e in estimates)
        held = numbers(estimates) if strips else []
        cells: list[str] = []
        for i, (cell, heading) in enumerate(zip(row, self.headings, strict=True)):
            if isinstance(cell, str):
                tag, scope = ("td", "") if i else ("th", ' scope="row"')
                cells.append(f"<{tag}{scope}{_kind(cell, right[i])}>{_named(cell, {} if i else marks)}</{tag}>")
            elif self.differences:
                cells.append(f'<td class="number">{_difference(cell)}</td>')
            else:
                strip = _strip(cell, held, marks[heading]) if held and heading in marks else ""
                cells.append(f'<td class="number">{_value(cell, form)}{strip}</td>')
        return cells


def public(text: str) -> str:
    """Text as a page shows it: escaped, without secrets and places on this machine, for a page is handed around."""
    return escape(published(text))


def breakable(text: str) -> str:
    """Likewise, and it may also break after underscores and slashes."""
    return public(text).replace("/", "/<wbr>").replace("_", "_<wbr>")


def _named(text: str, marks: Mapping[str, str]) -> str:
    return marks.get(text, "") + breakable(text)


def _kind(text: str, number: bool = False) -> str:
    """The attribute of a cell by what is in it."""
    names = ["number"] * number + ["long"] * (len(text) > LONG)
    return f' class="{" ".join(names)}"' if names else ""


def _value(estimate: Estimate, form: Callable[[float], str]) -> str:
    if not math.isfinite(estimate.value):
        return "-"
    return form(estimate.value) + _bounds(estimate, form)


def _bounds(estimate: Estimate, form: Callable[[float], str]) -> str:
    return f"<small>{form(estimate.bounds[0])} to {form(estimate.bounds[1])}</small>" if estimate.bounds else ""


def _difference(estimate: Estimate) -> str:
    form = form_of([estimate], "+")  # of its own: an end of an interval shall not be rounded to zero
    if not math.isfinite(estimate.value):
        return "-"
    if estimate.bounds is None:
        return f"{form(estimate.value)}<small>no interval</small>"
    low, high = estimate.bounds
    seen = low > 0 or high < 0
    told = f"<b>{form(estimate.value)}</b>" if seen else f'<span class="unseen">{NO_DIFFERENCE}</span>'
    return told + _bounds(estimate, form)


def _strip(estimate: Estimate, held: Sequence[float], mark: str) -> str:
    """Value and interval on the scale of their row."""
    low, high = min(held), max(held)
    if not math.isfinite(estimate.value) or low == high:
        return ""
    at = [100 * (value - low) / (high - low) for value in (estimate.value, *(estimate.bounds or (estimate.value,) * 2))]
    places = f"--at:{at[0]:.1f}%;--low:{at[1]:.1f}%;--high:{at[2]:.1f}%"
    return f'<span class="strip" style="{places}" aria-hidden="true">{mark}</span>'

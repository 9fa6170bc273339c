"""Tables of the page that are only text: what each SAE is, and every figure of every eval."""

from __future__ import annotations

import math
from html import escape

from saelens_cosine.report.html.data import Listed, ReportData
from saelens_cosine.report.html.svg import breakable

LONG = 80
"""Characters above which a text is broken into lines."""


def saes(data: ReportData) -> str:
    """A row for each SAE; a dash where nothing is known."""
    if not data.saes:
        return ""
    names = list(dict.fromkeys(name for facts in data.saes for name in facts))
    rows = [[facts.get(name, "-") for name in names] for facts in data.saes]
    return _table("What each SAE is", names, [_row(cells) for cells in rows])


def listed(data: ReportData) -> str:
    """Figures of arms in one table and those of texts in another, rows by eval; what did not apply below."""
    by_columns: dict[tuple[str, ...], list[Listed]] = {}
    for item in data.listed:
        by_columns.setdefault(tuple(item.values), []).append(item)
    tables = [_figures(list(columns), items) for columns, items in by_columns.items()]
    left_out = [_row(item) for item in data.left_out]
    return "".join(tables) + (_table("Left out", ["eval", "of", "reason"], left_out) if left_out else "")


def _figures(columns: list[str], items: list[Listed]) -> str:
    rows = [_row([item.eval, item.name, *(_number(item.values[column]) for column in columns)]) for item in items]
    return _table(f"Figures of {', '.join(columns)}", ["eval", "figure", *columns], rows)


def _number(value: float) -> str:
    return f"{value:.4g}" if math.isfinite(value) else "-"


def _row(cells: list[str] | tuple[str, ...]) -> str:
    first, *others = cells
    rest = "".join(f"<td{is_long(cell)}>{breakable(cell)}</td>" for cell in others)
    return f'<tr><th scope="row">{breakable(first)}</th>{rest}</tr>'


def is_long(text: str) -> str:
    """The attribute of an element whose text gets lines of its own."""
    return ' class="long"' if len(text) > LONG else ""


def _table(label: str, heads: list[str], rows: list[str]) -> str:
    head = "".join(f'<th scope="col">{breakable(name)}</th>' for name in heads)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(label)}"><table class="listed">'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )

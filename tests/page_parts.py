"""What is on a page, for tests that look for one part of it."""

from __future__ import annotations

from saelens_cosine.report.chart import Chart
from saelens_cosine.report.page import Page
from saelens_cosine.report.table import Cell, Table


def content(page: Page, section: str) -> tuple:
    """Of a section by its id; nothing if the page lacks it."""
    return next((item.content for item in page.sections if item.id == section), ())


def charts(page: Page, section: str) -> dict[str, Chart]:
    """By title."""
    return {item.title: item for item in content(page, section) if isinstance(item, Chart)}


def table(page: Page, section: str) -> dict[str, dict[str, Cell]]:
    """The first table of a section: by row, what stands in each column."""
    found = next(item for item in content(page, section) if isinstance(item, Table))
    return {row[0]: dict(zip(found.headings, row, strict=True)) for row in found.rows}

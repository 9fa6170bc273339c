"""What goes to a terminal. Text from outside is shown as it is: rich takes `[a]` for a style and `:key:` for a picture.

Whatever prints the tables, a notebook too, they are made of `PlainTable`.
"""

from __future__ import annotations

import copy
import math
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


def visible(text: str) -> str:
    r"""Text in which control characters, all but tab and newline, are written as `\x1b`: a terminal would obey them.

    Bytes of a file's name that are no text are written as `\udcff`: they could not be printed.
    """
    return _CONTROL.sub(lambda found: f"\\x{code:02x}" if (code := ord(found[0])) < 256 else f"\\u{code:04x}", text)


def literal(text: str, style: str = "") -> Text:
    """Text that is shown as it is; the style is of its letters, not of what a table fills a cell up with."""
    return Text.assemble((visible(text), style))


def shown_number(value: float, form: str) -> str | Text:
    """A number in a format, in rich's red if it is NaN or infinite."""
    return form.format(value) if math.isfinite(value) else literal(str(value), "red")


def say(console: Console, text: str, wrap: bool = True) -> None:
    """Print text as it is.

    Args:
        console: where to.
        text: a line or several.
        wrap: at the console's width; off for what is to be copied.
    """
    console.print(literal(text), soft_wrap=not wrap)


def plain_table(title: str, names: Sequence[str], figures: Sequence[str] = ()) -> Table:
    """An empty table under its title: columns of names, then columns of figures, which are never cut: where it is too wide, names are
    broken, the first of them only to make room for figures."""
    table = PlainTable(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.caption_justify = "left"
    for i, name in enumerate(names):
        table.add_column(name, no_wrap=i == 0 and not figures)
    for figure in figures:
        table.add_column(figure, justify="right")
    return table


def print_tables(tables: Iterable[Table], width: int) -> Console:
    """Print tables where a wrapped line is read more easily than a cut figure: at this width at least, in columns."""
    console = Console()
    console.width = max(console.width, width)
    for table in tables:
        console.print(table)
    return console


def tell(sentence: str) -> None:
    """Say on stderr what is no result."""
    print(sentence, file=sys.stderr)  # noqa: T201


class PlainTable(Table):
    """A table whose strings are shown as they are. A cell with a style is a `Text`."""

    def __rich_console__(self, console: Any, options: Any) -> Any:
        return Table.__rich_console__(self._literal(), console, options)

    def __rich_measure__(self, console: Any, options: Any) -> Any:
        return Table.__rich_measure__(self._literal(), console, options)

    def _literal(self) -> Table:
        shown = copy.copy(self)
        shown.title = _cell(self.title, self.title_style or "table.title")
        shown.caption = _cell(self.caption, self.caption_style or "table.caption")
        shown.columns = [
            replace(column, header=_cell(column.header), _cells=cells, min_width=_widest(cells) if figures else None)
            for column in self.columns
            for figures, cells in [(column.justify == "right", [_cell(cell) for cell in column.cells])]
        ]
        return shown


def _widest(cells: Sequence[Any]) -> int:
    return max((cell_len(line) for cell in cells for line in str(cell).splitlines()), default=0)


def _cell(value: Any, style: Any = "") -> Any:
    return Text(visible(value), style) if isinstance(value, str) else value

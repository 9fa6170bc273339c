"""Small charts as SVG text: they need no script, follow the page's colours, scale with its columns and print.

plotly.js, which SAELens installs, was the alternative: 4.8 MB in every report, plots that neither rescale when printed nor
take part in keyboard use and colour schemes, for zoom and hover. Hover is a line of script here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import NamedTuple

STYLES = 8
"""Colours and marks that the style sheet tells apart; further arms begin again."""

# Marks about (0, 0): besides its colour, each arm has a shape.
_SHAPES = (
    "M-4,0a4,4 0 1,0 8,0a4,4 0 1,0 -8,0z",
    "M-3.6,-3.6h7.2v7.2h-7.2z",
    "M0,-4.8l4.6,8.2h-9.2z",
    "M0,-5l5,5l-5,5l-5,-5z",
    "M0,4.8l4.6,-8.2h-9.2z",
    "M-4.5,-1.5h3v-3h3v3h3v3h-3v3h-3v-3h-3z",
    "M-5,-2.4h10v4.8h-10z",
    "M-2.4,-5h4.8v10h-4.8z",
)
_DASHES = ("", "6 3", "2 3", "8 3 2 3", "", "6 3", "2 3", "8 3 2 3")


def style(arm: int) -> str:
    """The style sheet's class of an arm."""
    return f"s{arm % STYLES}"


def short(value: float) -> str:
    """A number as axes and tooltips write it: `0.25`, `1.5M`, `3e-05`."""
    if not math.isfinite(value):
        return "-"
    for unit, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= unit:
            return f"{value / unit:.3g}{suffix}"
    return f"{value:.3g}"


def breakable(text: str) -> str:
    """Escaped text that may also break after underscores."""
    return escape(text).replace("_", "_<wbr>")


@dataclass(frozen=True)
class Axis:
    """
    A scale.

    Args:
        label (str): Written beside it, with units.
        low (float): Left or lower end.
        high (float): The other end, larger.
        log (bool): Logarithmic; both ends are then positive.
        ticks (tuple[tuple[float, str], ...]): Where lines and texts are; round numbers if empty.
    """

    label: str
    low: float
    high: float
    log: bool = False
    ticks: tuple[tuple[float, str], ...] = ()

    def place(self, value: float) -> float:
        """0 at the low end, 1 at the high one."""
        if self.log:
            return math.log(max(value, 1e-300) / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def marks(self) -> Sequence[tuple[float, str]]:
        """Ticks inside the axis and their texts."""
        if self.ticks:
            return self.ticks
        if not self.log:
            step = _round_step((self.high - self.low) / 5)
            first = math.ceil(self.low / step - 1e-9)
            count = math.floor(self.high / step + 1e-9) - first + 1
            values = [(first + i) * step for i in range(count)]
            return [(value, short(0.0 if abs(value) < step / 2 else value)) for value in values]
        decades = math.log10(self.high / self.low)
        digits = (1,) if decades > 2.5 else (1, 3) if decades > 1.2 else (1, 2, 5)
        every = max(1, math.ceil(decades / 6))
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        values = [digit * 10.0**power for power in powers if power % every == 0 for digit in digits]
        return [(v, short(v)) for v in values if self.low * 0.999 <= v <= self.high * 1.001]


def axis(label: str, values: Iterable[float | None], *, log: bool = False, margin: float = 0.06) -> Axis:
    """An axis that holds all finite values, positive ones if it is logarithmic, with some room at both ends."""
    found = [v for v in values if v is not None and math.isfinite(v) and (v > 0 or not log)]
    low, high = (min(found), max(found)) if found else (1.0, 10.0)
    if log:
        room = max((high / low) ** margin, 1.05)
        return Axis(label, low / room, high * room, log=True)
    room = (high - low) * margin or max(abs(high), 1e-3) * 0.1
    return Axis(label, low - room, high + room)


def _round_step(step: float) -> float:
    power = 10.0 ** math.floor(math.log10(step))
    return power * next(digit for digit in (1, 2, 2.5, 5, 10) if digit * power >= step * 0.999)


class _Margins(NamedTuple):
    left: float
    right: float
    top: float
    bottom: float


class Chart:
    """
    Marks and lines between two axes, drawn in the order of the calls.

    Args:
        name (str): What it shows; read aloud in its place.
        x (Axis): Horizontal scale.
        y (Axis): Vertical scale.
        width (float): Of the whole drawing in units that are about pixels.
        height (float): Likewise.
        left (float): Room for the vertical axis' texts.
    """

    def __init__(self, name: str, x: Axis, y: Axis, width: float = 420, height: float = 280, left: float = 58):
        self.name, self.x, self.y, self.width, self.height = name, x, y, width, height
        self.margins = _Margins(left, 14, 10, 50)
        self.inner_width = width - left - self.margins.right
        self.inner_height = height - self.margins.top - self.margins.bottom
        self._parts: list[str] = []

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Place of a value pair inside the axes."""
        return round(self.x.place(x) * self.inner_width, 1), round((1 - self.y.place(y)) * self.inner_height, 1)

    def line(self, points: Iterable[tuple[float, float]], arm: int, faint: bool = False) -> None:
        """A line in an arm's style, broken where a value is not finite."""
        dash = f' stroke-dasharray="{_DASHES[arm % STYLES]}"' if _DASHES[arm % STYLES] else ""
        opacity = ' opacity=".45"' if faint else ""
        self._parts.append(f'<path class="line {style(arm)}" d="{self._path(points)}"{dash}{opacity}/>')

    def guide(self, points: Iterable[tuple[float, float]]) -> None:
        """A thin grey dashed line: what values are to be compared with."""
        self._parts.append(f'<path class="guide" d="{self._path(points)}"/>')

    def region(self, points: Iterable[tuple[float, float]], name: str = "band") -> None:
        """A filled polygon of a class of the style sheet."""
        self._parts.append(f'<path class="{name}" d="{self._path(points)}z"/>')

    def _path(self, points: Iterable[tuple[float, float]]) -> str:
        pieces: list[str] = []
        command = "M"
        for x, y in points:
            if not (math.isfinite(x) and math.isfinite(y)):
                command = "M"
                continue
            left, top = self.at(x, y)
            pieces.append(f"{command}{left:g},{top:g}")
            command = "L"
        return "".join(pieces)

    def mark(self, x: float, y: float, arm: int, tip: str) -> None:
        """An arm's mark; `tip` is shown where the pointer touches it."""
        if math.isfinite(x) and math.isfinite(y):
            left, top = self.at(x, y)
            place = f'transform="translate({left:g},{top:g})"'
            self._parts.append(
                f'<path class="mark {style(arm)}" d="{_SHAPES[arm % STYLES]}" {place} data-t="{escape(tip)}"/>'
            )

    def dot(self, x: float, y: float, tip: str, *, arm: int | None = None, fill: str = "", link: str = "") -> None:
        """One of very many points: a small disc in an arm's colour, or in one of its own."""
        if math.isfinite(x) and math.isfinite(y):
            left, top = self.at(x, y)
            look = f'class="dot {style(arm)}"' if arm is not None else f'class="dot" fill="{fill}"'
            target = f' data-f="{escape(link)}"' if link else ""
            self._parts.append(f'<circle {look} cx="{left:g}" cy="{top:g}" r="2.2" data-t="{escape(tip)}"{target}/>')

    def whisker(self, x: tuple[float, float], y: tuple[float, float], arm: int) -> None:
        """An interval, from `(x[0], y[0])` to `(x[1], y[1])`."""
        self._parts.append(f'<path class="whisker {style(arm)}" d="{self._path(zip(x, y, strict=True))}"/>')

    def svg(self) -> str:
        """The drawing. What lies outside the axes is cut off."""
        w, h = self.inner_width, self.inner_height
        grid: list[str] = []
        for value, text in self.x.marks():
            left = round(self.x.place(value) * w, 1)
            lines = text.split("\n")
            texts = "".join(f'<tspan x="{left:g}" dy="{13 * (i > 0)}">{escape(t)}</tspan>' for i, t in enumerate(lines))
            grid.append(
                f'<path class="grid" d="M{left:g},0V{h:g}"/><text y="{h + 15:g}" text-anchor="middle">{texts}</text>'
            )
        for value, text in self.y.marks():
            top = round((1 - self.y.place(value)) * h, 1)
            grid.append(
                f'<path class="grid" d="M0,{top:g}H{w:g}"/><text x="-7" y="{top + 4:g}" text-anchor="end">{escape(text)}</text>'
            )
        labels = (
            f'<text class="label" x="{w / 2:g}" y="{h + 46:g}" text-anchor="middle">{escape(self.x.label)}</text>'
            f'<text class="label" transform="translate({14 - self.margins.left:g},{h / 2:g}) rotate(-90)" '
            f'text-anchor="middle">{escape(self.y.label)}</text>'
        )
        return (
            f'<svg class="chart" role="img" aria-label="{escape(self.name)}" viewBox="0 0 {self.width:g} {self.height:g}">'
            f'<g transform="translate({self.margins.left:g},{self.margins.top:g})">{"".join(grid)}{labels}</g>'
            f'<svg x="{self.margins.left:g}" y="{self.margins.top:g}" width="{w:g}" height="{h:g}">'
            f"{''.join(self._parts)}</svg></svg>"
        )


def key_mark(arm: int) -> str:
    """An arm's mark for legends."""
    return (
        f'<svg class="key {style(arm)}" viewBox="-7 -7 14 14" aria-hidden="true">'
        f'<path class="mark {style(arm)}" d="{_SHAPES[arm % STYLES]}"/></svg>'
    )

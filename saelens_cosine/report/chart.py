"""Charts of a page, drawn with plotly: what an arm looks like, and marks, lines and histograms that go with its name.

plotly is what SAELens brings for its own plots. It is imported where something is drawn, so that a command that draws nothing
does not wait for it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from textwrap import wrap
from typing import TYPE_CHECKING, Any, NamedTuple

from saelens_cosine.report.estimate import Estimate, numbers, short
from saelens_cosine.report.table import Table

if TYPE_CHECKING:
    import plotly.graph_objects as go

MAX_DOTS = 1000
"""Points of one scatter that are drawn, at even steps through all of them."""

_SHADES = ((0.0, "#2a5a9e"), (0.5, "#7c7b78"), (1.0, "#f0cd3c"))
"""From blue over grey to yellow, the order visible in grey and to colour-blind eyes (close to cividis)."""

_UNKNOWN = "#999999"


class Style(NamedTuple):
    """
    What tells an arm apart: by colour, and without it.

    Args:
        colour (str): On light paper; the style sheet has those for dark.
        symbol (str): Plotly's name of its mark.
        mark (str): The same mark as a character.
        dash (str): Plotly's name of its lines' dashes.
    """

    colour: str
    symbol: str
    mark: str
    dash: str


STYLES = (  # Okabe and Ito's colours, those too light for lines on white darkened
    Style("#0072b2", "circle", "●", "solid"),
    Style("#d55e00", "square", "■", "dash"),
    Style("#009e73", "triangle-up", "▲", "dot"),
    Style("#b3588f", "diamond", "◆", "dashdot"),
    Style("#c28400", "triangle-down", "▼", "solid"),
    Style("#3d9bd0", "cross", "✚", "dash"),
    Style("#30343a", "x", "✖", "dot"),
    Style("#7a6a53", "star", "★", "dashdot"),
)
"""Further arms begin again."""


@dataclass(frozen=True)
class Arms:
    """
    What a page compares.

    Args:
        names (tuple[str, ...]): In the page's order; each has its style by its number.
    """

    names: tuple[str, ...] = ()

    def number(self, name: str) -> int:
        """Place in the order, from 0.

        Raises:
            ValueError: no arm of that name.
        """
        if name not in self.names:
            raise ValueError(f"{name!r} is none of the page's arms, {list(self.names)}.")
        return self.names.index(name)

    def style(self, name: str) -> Style:
        """Colour, mark and dashes."""
        return STYLES[self.number(name) % len(STYLES)]


@dataclass(frozen=True)
class Chart:
    """
    A chart under its title.

    Args:
        title (str): What it shows.
        note (str): What a reader must know of it: how many tokens, which direction is better; or nothing.
        figure (go.Figure): Any figure of plotly; `Plot` makes the usual ones. Traces with `meta={"arm": number}` follow that arm's
            box and colours. Plotly reads tags and entities in its texts: pass what others wrote through `literal`.
        table (Table | None): The numbers in it, also for those who don't see it.
        height (int): Pixels.
    """

    title: str
    note: str
    figure: go.Figure
    table: Table | None = None
    height: int = 300


@dataclass(frozen=True)
class Axis:
    """
    A scale.

    Args:
        label (str): Written beside it, with units.
        log (bool): Logarithmic.
        ends (tuple[float, float] | None): What it holds, the left or lower end first; None: what is drawn.
        ticks (Mapping[float, str] | None): Where lines and texts are; None: at round numbers.
    """

    label: str
    log: bool = False
    ends: tuple[float, float] | None = None
    ticks: Mapping[float, str] | None = None

    def layout(self) -> dict[str, Any]:
        """As plotly takes it."""
        found: dict[str, Any] = {"title": {"text": literal(self.label)}, "type": "log" if self.log else "linear"}
        if self.ends and max(map(abs, self.ends)) < 1:
            found["tickformat"] = "~g"  # 0.0001, not 100µ
        if self.ends:
            found["range"] = [math.log10(end) for end in self.ends] if self.log else list(self.ends)
        if self.ticks is not None:
            found |= {"tickvals": list(self.ticks), "ticktext": [_lines(text) for text in self.ticks.values()]}
        return found


def ends(values: Iterable[float | Estimate], *, log: bool = False, margin: float = 0.06) -> tuple[float, float] | None:
    """Ends of an axis that holds all finite values, positive ones if it is logarithmic, with some room at both."""
    found = [value for value in numbers(values) if value > 0 or not log]
    if not found:
        return None
    low, high = min(found), max(found)
    if log:
        room = max((high / low) ** margin, 1.05)
        return low / room, high * room
    room = (high - low) * margin or max(abs(high), 1e-3) * 0.1
    return low - room, high + room


def beside(names: Sequence[str], most: float = 0.12) -> dict[str, float]:
    """Places around 0 for arms that would cover each other: `most` apart, or closer where there are many."""
    step = min(most, 0.7 / max(1, len(names)))
    return {name: (i - (len(names) - 1) / 2) * step for i, name in enumerate(names)}


def literal(text: str) -> str:
    """Text that plotly shows as it is: no tag, link, entity or template in it is one."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace("%{", "%\u200b{")


def cut(text: str, length: int) -> str:
    """Shortened in its middle: names of tasks often differ at the end."""
    kept = length // 2
    return text if len(text) <= length else f"{text[:kept]}…{text[-(length - 1 - kept) :]}"


class Plot:
    """
    A figure between two axes, to which arms' lines, marks and histograms are added. What is not finite is left out.

    Args:
        arms (Arms): Whose.
        x (Axis): Horizontal scale.
        y (Axis): Vertical scale.
    """

    def __init__(self, arms: Arms, x: Axis, y: Axis):
        import plotly.graph_objects as go

        self.arms = arms
        self.figure = go.Figure(layout={"xaxis": x.layout(), "yaxis": y.layout(), "showlegend": False})

    def line(
        self,
        arm: str,
        x: Sequence[float | Estimate],
        y: Sequence[float | Estimate],
        tips: Sequence[str] | None = None,
        *,
        joined: bool = True,
        marked: bool = True,
        faint: bool = False,
    ) -> None:
        """A line through an arm's values, broken where one is not finite.

        Args:
            arm: whose.
            x: values, ascending; estimates show their intervals.
            y: likewise.
            tips: what is shown of each where the pointer touches it, after the arm's name; None: the two values.
            joined: whether there is a line between them.
            marked: whether each has a mark.
            faint: whether the line only leads the eye.
        """
        if tips is None:
            tips = [f"{_text(a)}, {_text(b)}" for a, b in zip(x, y, strict=True)]
        style = self.arms.style(arm)
        self._add(
            arm,
            tips,
            x=_values(x),
            y=_values(y),
            error_x=_whiskers(x, style.colour),
            error_y=_whiskers(y, style.colour),
            mode="+".join(["lines"] * joined + ["markers"] * marked),
            line={"color": style.colour, "dash": style.dash, "width": 1 if faint else 2},
            marker={"color": style.colour, "symbol": style.symbol, "size": 8},
        )

    def steps(self, arm: str, values: Iterable[float], edges: Sequence[float]) -> float:
        """A histogram as an outline: the share of the finite values in each bin of `edges`, the last with its upper edge.

        Returns:
            The highest share.
        """
        found = [value for value in values if math.isfinite(value) and edges[0] <= value <= edges[-1]]
        bins, width = len(edges) - 1, (edges[-1] - edges[0]) / (len(edges) - 1)
        counts = Counter(min(int((value - edges[0]) / width), bins - 1) for value in found)
        shares = [counts[i] / max(1, len(found)) for i in range(bins)]
        style = self.arms.style(arm)
        tips = [f"{short(edges[i])} to {short(edges[i + 1])}: {share:.2%}" for i, share in enumerate(shares)]
        self._add(
            arm,
            ["", *tips, ""],
            x=_rounded([edges[0], *edges]),
            y=_rounded([0.0, *shares, 0.0]),
            mode="lines",
            line={"color": style.colour, "dash": style.dash, "width": 2, "shape": "hv"},
        )
        return max(shares)

    def dots(
        self,
        arm: str,
        x: Sequence[float],
        y: Sequence[float],
        tips: Sequence[str],
        *,
        features: Sequence[int] | None = None,
        shades: Sequence[float] | None = None,
        shade: str = "",
    ) -> int:
        """Very many points as small discs, at most `MAX_DOTS` of them.

        Args:
            arm: whose.
            x: one for each point.
            y: likewise.
            tips: what is shown of each where the pointer touches it, after the arm's name.
            features: which of the arm's features each opens in the browser, where that has it; None: none.
            shades: 0 to 1, from blue to yellow, grey where not finite; None: the arm's colour.
            shade: what the shades say.

        Returns:
            How many are drawn.
        """
        step = max(1.0, len(x) / MAX_DOTS)
        chosen = [int(i * step) for i in range(min(len(x), MAX_DOTS))]
        looks: list[tuple[list[int], dict[str, Any]]] = [(chosen, {"color": self.arms.style(arm).colour})]
        if shades is not None:
            known = [i for i in chosen if math.isfinite(shades[i])]
            scale = {"colorscale": _SHADES, "cmin": 0, "cmax": 1, "colorbar": _colour_bar(shade)}
            looks = [
                (known, {"color": _rounded([shades[i] for i in known]), "showscale": True, **scale}),
                ([i for i in chosen if not math.isfinite(shades[i])], {"color": _UNKNOWN}),
            ]
        number = self.arms.number(arm)
        for points, look in looks:
            self._add(
                arm,
                [tips[i] for i in points],
                x=_rounded([x[i] for i in points]),
                y=_rounded([y[i] for i in points]),
                customdata=[f"{number}/{features[i]}" for i in points] if features else None,
                mode="markers",
                marker={"size": 5, "opacity": 0.6 if shades is None else 0.85, **look},
            )
        return len(chosen)

    def guide(self, x: Sequence[float], y: Sequence[float]) -> None:
        """A thin grey dashed line: what values are to be compared with."""
        line = {"color": "#808890", "dash": "dash", "width": 1}
        self.figure.add_scatter(x=_rounded(x), y=_rounded(y), mode="lines", line=line, hoverinfo="skip")

    def band(self, x: Sequence[float], low: Sequence[float], high: Sequence[float], arm: str | None = None) -> None:
        """A pale area between two lines, of an arm or of none."""
        own = {} if arm is None else {"meta": {"arm": self.arms.number(arm)}}
        self.figure.add_scatter(
            x=_rounded([*x, *reversed(x)]),
            y=_rounded([*low, *reversed(high)]),
            mode="lines",
            fill="toself",
            fillcolor="#56b4e921" if arm is None else self.arms.style(arm).colour + "21",
            line={"width": 0},
            hoverinfo="skip",
            **own,
        )

    def _add(self, arm: str, tips: Iterable[str], **trace: Any) -> None:
        texts = [_lines(f"{arm}: {tip}" if tip else arm) for tip in tips]
        meta = {"arm": self.arms.number(arm)}
        self.figure.add_scatter(name=literal(arm), text=texts, hoverinfo="text", meta=meta, **trace)


def _lines(text: str) -> str:
    """Literal text in lines that fit a narrow chart."""
    return "<br>".join(literal(line) for part in text.split("\n") for line in wrap(part, 44) or [""])


def _text(value: float | Estimate) -> str:
    return str(value) if isinstance(value, Estimate) else short(value)


def _rounded(values: Iterable[float]) -> list[float | None]:
    """Five digits, which is more than a chart shows; None for what is not finite."""
    return [float(f"{value:.5g}") if math.isfinite(value) else None for value in values]


def _values(values: Iterable[float | Estimate]) -> list[float | None]:
    return _rounded(value.value if isinstance(value, Estimate) else value for value in values)


def _whiskers(values: Iterable[float | Estimate], colour: str) -> dict[str, Any] | None:
    bounds = [(e.value, *(e.bounds or (e.value,) * 2)) if isinstance(e, Estimate) else (0.0,) * 3 for e in values]
    up, down = [high - value for value, _, high in bounds], [value - low for value, low, _ in bounds]
    if not any(numbers([*up, *down])):
        return None
    look = {"type": "data", "color": colour, "thickness": 1.5, "width": 0}
    return {**look, "symmetric": False, "array": _rounded(up), "arrayminus": _rounded(down)}


def _colour_bar(title: str) -> dict[str, Any]:
    look = {"orientation": "h", "thickness": 10, "len": 0.7, "y": 1.02, "yanchor": "bottom", "outlinewidth": 0}
    text = {"text": literal(title), "side": "top", "font": {"size": 12}}
    return {**look, "title": text, "tickvals": [0, 0.5, 1], "ticktext": ["0 %", "50 %", "100 %"]}

"""The charts of a report: each function draws one section's data as HTML figures."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from html import escape
from typing import TypeVar

from saelens_cosine.report.html.data import Arm, Estimate, Feature, MatchedFeatures, ReportData
from saelens_cosine.report.html.svg import Axis, Chart, axis, breakable, short

MAX_DOTS = 1000
"""Points of one scatter that are drawn, at even steps through all of them."""

# From blue over grey to yellow, the order visible in grey and to colour-blind eyes (ends and middle of cividis).
_RAMP = ((0, 52, 110), (124, 123, 120), (240, 205, 60))

Item = TypeVar("Item")


def figure(title: str, note: str, drawing: str, table: str = "") -> str:
    """A chart under its title, and the numbers behind it."""
    numbers = f"<details><summary>Numbers</summary>{table}</details>" if table else ""
    return f"<figure><figcaption><strong>{breakable(title)}</strong> {escape(note)}</figcaption>{drawing}{numbers}</figure>"


def table(headings: Sequence[str], rows: Iterable[Sequence[str]], label: str) -> str:
    """A table that scrolls sideways in its own box, by keyboard too."""
    head = "".join(f'<th scope="col">{escape(heading)}</th>' for heading in headings)
    body = "".join(
        f'<tr><th scope="row">{breakable(row[0])}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in row[1:])}</tr>'
        for row in rows
    )
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(label)}">'
        f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def interval(estimate: Estimate, form: Callable[[float], str] = "{:.4g}".format) -> str:
    """`0.8987 (0.8950 to 0.9024)`, without the bracket where there is no interval."""
    if not math.isfinite(estimate.value):
        return "-"
    bounds = f" ({form(estimate.bounds[0])} to {form(estimate.bounds[1])})" if estimate.bounds else ""
    return f"{form(estimate.value)}{bounds}"


def ends(estimates: Iterable[Estimate]) -> list[float | None]:
    """All that an axis must hold to show estimates."""
    return [number for estimate in estimates for number in estimate]


def learning_curves(data: ReportData) -> list[str]:
    """A chart for each measure; its axis holds what follows the first tenth of training."""
    order = data.arm_names()
    drawn: list[str] = []
    for measure in dict.fromkeys(name for arm in data.arms for name in arm.curves):
        curves = [(arm.name, curve) for arm in data.arms for curve in arm.curves.get(measure, ()) if curve.tokens]
        if not curves:
            continue
        end = max(curve.tokens[-1] for _, curve in curves)
        points = [(t, v) for _, curve in curves for t, v in zip(curve.tokens, curve.values, strict=True)]
        late = [v for t, v in points if t >= end / 10]
        chart = Chart(
            f"{measure} during training",
            Axis("training tokens", 0, end * 1.02),
            axis(measure, late or [v for _, v in points]),
        )
        for name, curve in curves:
            seeds = sum(name == other for other, _ in curves)
            chart.line(zip(curve.tokens, curve.values, strict=True), order.index(name), faint=seeds > 3)
            if curve.values:
                tip = f"{name}: {measure} {short(curve.values[-1])} after {short(curve.tokens[-1])} tokens"
                chart.mark(curve.tokens[-1], curve.values[-1], order.index(name), tip)
        rows = [(name, short(curve.tokens[-1]), f"{curve.values[-1]:.4g}") for name, curve in curves]
        numbers = table(("arm", "tokens", measure), rows, f"{measure} at the end of training")
        note = "One line per seed." if any(len(arm.curves.get(measure, ())) > 1 for arm in data.arms) else ""
        drawn.append(figure(measure, note, chart.svg(), numbers))
    return drawn


def exponents(data: ReportData) -> list[str]:
    """Exponents of all features in one histogram; arms that share a single one as a line."""
    order = data.arm_names()
    values = [a for arm in data.arms for a in arm.exponents if math.isfinite(a)]
    if not values:
        return []
    scale = axis("norm exponent a (0: cosine, 1: inner product)", [*values, 0.0], margin=0.08)
    edges = [scale.low + (scale.high - scale.low) * i / 48 for i in range(49)]
    shares = {arm.name: _histogram(arm.exponents, edges) for arm in data.arms if len(arm.exponents) > 1}
    highest = max((max(found) for found in shares.values()), default=1.0)
    chart = Chart("Distribution of norm exponents", scale, Axis("share of features", 0, highest * 1.08))
    chart.guide([(0, 0), (0, highest * 1.08)])
    for arm in data.arms:
        number = order.index(arm.name)
        if len(arm.exponents) == 1:
            a = arm.exponents[0]
            chart.line([(a, 0), (a, highest)], number)
            chart.mark(a, highest, number, f"{arm.name}: one exponent for all features, {a:.3f}")
        elif arm.name in shares:
            _steps(chart, edges, shares[arm.name], number)
    rows = [_exponent_row(arm) for arm in data.arms if arm.exponents]
    headings = ("arm", "features", "mean", "least", "median", "largest", "a > 0.5")
    return [figure("Norm exponents", "", chart.svg(), table(headings, rows, "Norm exponents"))]


def _exponent_row(arm: Arm) -> tuple[str, ...]:
    a = sorted(value for value in arm.exponents if math.isfinite(value))
    if not a:
        return (arm.name, *["-"] * 6)
    middle = (a[(len(a) - 1) // 2] + a[len(a) // 2]) / 2
    count = "shared" if len(arm.exponents) == 1 else f"{len(a):,}"
    numbers = (sum(a) / len(a), a[0], middle, a[-1])
    return (arm.name, count, *(f"{v:.3f}" for v in numbers), f"{sum(v > 0.5 for v in a) / len(a):.1%}")


def _histogram(values: Iterable[float], edges: Sequence[float]) -> list[float]:
    """Share of the finite values in each of equally wide bins; the last one holds its upper edge."""
    bins = len(edges) - 1
    width = (edges[-1] - edges[0]) / bins
    counts = Counter(min(int((v - edges[0]) / width), bins - 1) for v in values if math.isfinite(v))
    return [counts[i] / max(1, counts.total()) for i in range(bins)]


def _steps(chart: Chart, edges: Sequence[float], heights: Sequence[float], arm: int) -> None:
    corners = [(x, h) for i, h in enumerate(heights) for x in (edges[i], edges[i + 1])]
    chart.line([(edges[0], 0), *corners, (edges[-1], 0)], arm)


def estimate_mark(chart: Chart, x: float, estimate: Estimate, arm: int, tip: str) -> None:
    """A mark with its interval upright."""
    if estimate.bounds:
        chart.whisker((x, x), estimate.bounds, arm)
    chart.mark(x, estimate.value, arm, tip)


def thinned(items: Sequence[Item]) -> list[Item]:
    """At most `MAX_DOTS` of them, at even steps."""
    step = max(1.0, len(items) / MAX_DOTS)
    return [items[int(i * step)] for i in range(min(len(items), MAX_DOTS))]


def probing(data: ReportData) -> list[str]:
    """Accuracy by task, a chart for each k, all on one scale."""
    order, drawn = data.arm_names(), list[str]()
    scale = axis("probe accuracy", ends(item.accuracy for item in data.probing))
    for k in dict.fromkeys(item.k for item in data.probing):
        found = [item for item in data.probing if item.k == k]
        tasks = list(dict.fromkeys(item.task for item in found))
        arms = [name for name in order if any(item.arm == name for item in found)]
        band = 12 * len(arms) + 10
        ticks = tuple((i, _cut(task, 18)) for i, task in enumerate(tasks))
        y = Axis("", len(tasks) - 0.5, -0.5, ticks=ticks)  # downwards
        chart = Chart(f"Accuracy of probes on {k} features", scale, y, height=band * len(tasks) + 60, left=128)
        for item in found:
            place = (arms.index(item.arm) - (len(arms) - 1) / 2) * 12 / band + tasks.index(item.task)
            if item.accuracy.bounds:
                chart.whisker(item.accuracy.bounds, (place, place), order.index(item.arm))
            chart.mark(
                item.accuracy.value, place, order.index(item.arm), f"{item.task}, {item.arm}: {interval(item.accuracy)}"
            )
        cells = {(item.task, item.arm): interval(item.accuracy) for item in found}
        rows = [(task, *(cells.get((task, arm), "-") for arm in arms)) for task in tasks]
        title = "All features" if k == "all" else f"k = {k}"
        drawn.append(figure(title, "", chart.svg(), table(("task", *arms), rows, f"Probe accuracy, {title}")))
    return drawn


def _cut(text: str, length: int) -> str:
    """Shortened in its middle: names of tasks often differ at the end."""
    kept = length // 2
    return text if len(text) <= length else f"{text[:kept]}…{text[-(length - 1 - kept) :]}"


def precision(data: ReportData) -> list[str]:
    """Ablation precision against the number of features; intended against collateral effect where both are known."""
    order = data.arm_names()
    found = [item for item in data.precision if item.n_features]
    if not found:
        return []
    chart = Chart(
        "Ablation precision",
        axis("features ablated", [n for item in found for n in item.n_features], log=True),
        axis("intended / collateral effect", ends(e for item in found for e in item.precision)),
    )
    for item in found:
        number = order.index(item.arm)
        chart.line([(n, e.value) for n, e in zip(item.n_features, item.precision, strict=True)], number)
        for n, e in zip(item.n_features, item.precision, strict=True):
            estimate_mark(chart, n, e, number, f"{item.arm}, {n} features: {interval(e)}")
    counts = sorted({n for item in found for n in item.n_features})
    cells = {(item.arm, n): interval(e) for item in found for n, e in zip(item.n_features, item.precision, strict=True)}
    rows = [(item.arm, *(cells.get((item.arm, n), "-") for n in counts)) for item in found]
    numbers = table(("arm", *map(str, counts)), rows, "Ablation precision by number of features")
    drawn = [figure("Precision", "Larger: less damage elsewhere.", chart.svg(), numbers)]
    both = [item for item in found if item.intended and item.collateral]
    if both:
        chart = Chart(
            "Intended against collateral effect",
            axis("collateral effect (KL, nats)", [v for item in both for v in item.collateral], log=True),
            axis("intended effect (KL, nats)", [v for item in both for v in item.intended], log=True),
        )
        for item in both:
            number = order.index(item.arm)
            points = [
                (n, c, i)
                for n, i, c in zip(item.n_features, item.intended, item.collateral, strict=True)
                if c > 0 and i > 0
            ]
            chart.line([(c, i) for _, c, i in points], number)
            for n, c, i in points:
                chart.mark(c, i, number, f"{item.arm}, {n} features: intended {i:.3g}, collateral {c:.3g}")
        drawn.append(figure("Effects", "Up and left is better.", chart.svg()))
    return drawn


def matched(data: ReportData) -> list[str]:
    """Correlation of codes against cosine of decoder rows; the colour is the share of firings on high norms."""
    browsable = {(feature.arm, feature.index) for feature in data.features}
    order = data.arm_names()
    return [_matched(item, order.index(item.arm), browsable) for item in data.matches if item.pairs]


def _matched(item: MatchedFeatures, arm: int, browsable: set[tuple[str, int]]) -> str:
    chart = Chart(
        f"Features of {item.arm} matched with {item.other}",
        Axis("correlation of the codes", *_unit(pair.correlation for pair in item.pairs)),
        Axis("cosine of the decoder rows", *_unit(pair.decoder_cosine for pair in item.pairs)),
        height=408,
    )
    dots = thinned(item.pairs)
    for pair in dots:
        share = f"{pair.top_quartile_share:.0%}" if math.isfinite(pair.top_quartile_share) else "unknown"
        tip = (
            f"{item.arm} {pair.feature} and {item.other} {pair.other}: correlation {short(pair.correlation)}, "
            f"decoder cosine {short(pair.decoder_cosine)}, {share} of its firings in the top norm quartile"
        )
        link = f"{arm}/{pair.feature}" if (item.arm, pair.feature) in browsable else ""
        chart.dot(pair.correlation, pair.decoder_cosine, tip, fill=_ramp(pair.top_quartile_share), link=link)
    stops = "".join(f'<i style="background:{_ramp(i / 9)}"></i>' for i in range(10))
    key = (
        f'<p class="ramp">firings in the top quartile of the norm: <b><span>0 %</span>{stops}<span>100 %</span></b></p>'
    )
    note = (
        f"{item.matched:,} of {item.alive:,} alive features ({item.matched / max(1, item.alive):.1%}) have both above 0.7. "
        f"{item.paired:,} have a counterpart, {len(dots):,} of these are drawn."
    )
    return figure(f"{item.arm} → {item.other}", note, chart.svg() + key)


def _unit(values: Iterable[float]) -> tuple[float, float]:
    """0 to 1, or from the lowest value where that is negative."""
    low = min((v for v in values if math.isfinite(v)), default=0.0)
    return min(-0.02, low - 0.02), 1.02


def _ramp(share: float) -> str:
    if not math.isfinite(share):
        return "#999999"
    place = min(max(share, 0.0), 1.0) * 2
    first = min(int(place), 1)
    channels = (round(a + (b - a) * (place - first)) for a, b in zip(_RAMP[first], _RAMP[first + 1], strict=True))
    return "#{:02x}{:02x}{:02x}".format(*channels)


def densities(data: ReportData) -> list[str]:
    """Histogram of log density, and exponent against density, of the features in the browser."""
    order = data.arm_names()
    found = [feature for feature in data.features if feature.density > 0]
    if not found:
        return []
    logs = [math.log10(feature.density) for feature in found]
    low, high = math.floor(min(logs)), max(0, math.ceil(max(logs)))
    edges = [low + (high - low) * i / 40 for i in range(41)]
    by_arm: dict[str, list[Feature]] = {}
    for feature in found:
        by_arm.setdefault(feature.arm, []).append(feature)
    shares = {
        arm: _histogram([math.log10(feature.density) for feature in features], edges)
        for arm, features in by_arm.items()
    }
    highest = max(max(heights) for heights in shares.values()) * 1.08
    ticks = tuple((float(power), short(10.0**power)) for power in range(low, high + 1))
    label = "density: share of tokens where it fires (log scale)"
    chart = Chart("Densities of features", Axis(label, low, high, ticks=ticks), Axis("share of features", 0, highest))
    for arm, heights in shares.items():
        _steps(chart, edges, heights, order.index(arm))
    drawn = [figure("Density", "Of the features below.", chart.svg())]
    learned = [feature for feature in found if feature.exponent is not None]
    if learned:
        chart = Chart(
            "Exponent against density",
            axis(label, [feature.density for feature in learned], log=True),
            axis("norm exponent a", [feature.exponent for feature in learned]),
        )
        for feature in thinned(learned):
            number = order.index(feature.arm)
            tip = f"{feature.arm} {feature.index}: density {short(feature.density)}, a {feature.exponent:.3f}"
            chart.dot(feature.density, feature.exponent or 0.0, tip, arm=number, link=f"{number}/{feature.index}")
        drawn.append(figure("Exponent and density", "Choose a point to open its feature.", chart.svg()))
    return drawn

"""The charts of a report that are about norms: FVE by norm, the ZF plot, and what scaling a token does."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from saelens_cosine.report.html.charts import ends, estimate_mark, figure, interval, table, thinned
from saelens_cosine.report.html.data import ReportData, ZFPoints
from saelens_cosine.report.html.svg import Axis, Chart, axis, short

BANDS = (1.0, 0.5, 0.25)
"""Values of epsilon (h - 1) whose bands the ZF plot shows (Lee et al., arXiv 2503.24277, section 4)."""


def norm_quartiles(data: ReportData) -> list[str]:
    """FVE by quartile, with sinks and without, on one scale."""
    order, drawn = data.arm_names(), list[str]()
    scale = axis("FVE", ends(e for item in data.quartiles for e in item.fve))
    for sinks, title in (("in", "High-norm tokens in"), ("out", "High-norm tokens out")):
        found = [item for item in data.quartiles if item.sinks == sinks]
        if not found:
            continue
        bins, edges = len(found[0].fve), found[0].edges
        ticks = [(q, f"Q{q + 1}" + (f"\n≤ {short(edges[q + 1])}" if edges else "")) for q in range(bins)]
        x = Axis(
            "quartile of the norm" if not edges else f"norm, from {short(edges[0])}",
            -0.5,
            bins - 0.5,
            ticks=tuple(ticks),
        )
        chart = Chart(f"FVE by quartile of the norm, {title.lower()}", x, scale)
        for i, item in enumerate(found):
            number, shift = order.index(item.arm), (i - (len(found) - 1) / 2) * min(0.12, 0.7 / len(found))
            chart.line([(q + shift, e.value) for q, e in enumerate(item.fve)], number, faint=True)
            for q, e in enumerate(item.fve):
                estimate_mark(chart, q + shift, e, number, f"{item.arm}, Q{q + 1}: {interval(e)}")
        headings = ["arm", *(f"Q{q + 1}" for q in range(bins))]
        rows = [(item.arm, *map(interval, item.fve)) for item in found]
        counts = found[0].tokens
        note = f"{sum(counts):,} tokens." if counts else ""
        drawn.append(figure(title, note, chart.svg(), table(headings, rows, f"FVE by quartile, {title.lower()}")))
    return drawn


def zf_plots(data: ReportData) -> list[str]:
    """Norm of the codes against that of the centred input, an arm to a chart; one scale for tokens with sinks, one without."""
    return [
        drawing
        for sinks in ("out", "in")
        for drawing in _zf_plots([i for i in data.zf if i.sinks == sinks], data.arm_names())
    ]


def _zf_plots(found: Sequence[ZFPoints], order: Sequence[str]) -> list[str]:
    everything = [v for item in found for v in (*item.input_norms, *item.code_norms) if v > 0 and math.isfinite(v)]
    inputs = sorted(v for item in found for v in item.input_norms if math.isfinite(v))
    if not (everything and inputs):
        return []
    log = inputs[-1] > 3 * inputs[len(inputs) // 2]  # sinks among the tokens would crush the others
    both = axis("", everything, log=log) if log else Axis("", 0, max(everything) * 1.05)
    drawn: list[str] = []
    for item in found:
        sinks = f"high-norm tokens {item.sinks}"
        chart = Chart(
            f"ZF plot of {item.arm}, {sinks}",
            Axis("norm of the input less b_dec, ‖x - b_dec‖", both.low, both.high, log),
            Axis("norm of the codes ‖f‖", both.low, both.high, log),
            height=408,
        )
        low, high = both.low, both.high
        for e in BANDS:  # between ‖z‖ / sqrt(1 + e) and ‖z‖ / sqrt(1 - e)
            under, over = 1 / math.sqrt(1 + e), 1 / math.sqrt(1 - e) if e < 1 else 1e3
            chart.region([(low, low * under), (high, high * under), (high, high * over), (low, low * over)])
        chart.guide([(low, low), (high, high)])
        points = thinned(list(zip(item.input_norms, item.code_norms, strict=True)))
        for z, f in points:
            chart.dot(z, f, f"{item.arm}: ‖x - b_dec‖ {short(z)}, ‖f‖ {short(f)}", arm=order.index(item.arm))
        silent = f", {item.without_codes:,} of them without codes" if item.without_codes else ""
        note = (
            f"Median ‖f‖/‖x - b_dec‖ {item.median_ratio:.3f}, {item.share_below:.1%} below the line, of {item.tokens:,} "
            f"tokens{silent}; {len(points):,} drawn."
        )
        drawn.append(figure(f"{item.arm}, {sinks}", note, chart.svg()))
    return drawn


def scale_responses(data: ReportData) -> list[str]:
    """Overlap of active sets against the factor, about b_dec and about 0, on one scale."""
    order, drawn = data.arm_names(), list[str]()
    titles = {"b_dec": "About b_dec: what is scored keeps its direction", "0": "About 0: what is scored turns"}
    for about, title in titles.items():
        found = [item for item in data.scaling if item.about == about]
        if not found:
            continue
        factors = sorted({scale for item in found for scale in item.scales})
        x = replace(axis("factor s", factors, log=True), ticks=tuple((scale, f"{scale:g}") for scale in factors))
        chart = Chart(
            f"Active features of scaled tokens, about {about}", x, Axis("overlap of active features", 0, 1.04)
        )
        for item in found:
            number = order.index(item.arm)
            chart.line([(s, e.value) for s, e in zip(item.scales, item.overlap, strict=True)], number, faint=True)
            for s, e in zip(item.scales, item.overlap, strict=True):
                estimate_mark(chart, s, e, number, f"{item.arm}, s = {s:g}: {interval(e)}")
        cells = {(item.arm, s): interval(e) for item in found for s, e in zip(item.scales, item.overlap, strict=True)}
        rows = [
            (item.arm, f"{item.bias_ratio:.3f}", *(cells.get((item.arm, s), "-") for s in factors)) for item in found
        ]
        headings = ("arm", "‖b_dec‖ / median ‖x‖", *(f"s = {s:g}" for s in factors))
        ratios = ", ".join(f"{item.arm} {item.bias_ratio:.2f}" for item in found)
        note = f"‖b_dec‖ / median ‖x‖: {ratios}."
        drawn.append(
            figure(title, note, chart.svg(), table(headings, rows, f"Overlap of active features, about {about}"))
        )
    return drawn

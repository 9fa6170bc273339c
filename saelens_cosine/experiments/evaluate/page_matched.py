"""The page's section of arms at the baseline's FVE and L0: charts, and tables of differences."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from saelens_cosine.experiments.evaluate.evals import Treatment
from saelens_cosine.experiments.evaluate.results.evaluation import Evaluation
from saelens_cosine.experiments.evaluate.results.listing import (
    about_matched_figures,
    columns,
    in_condition,
    matched_by_hook,
    without_sinks_told,
)
from saelens_cosine.experiments.evaluate.results.matched import Curves, MatchedFigure, OnCurve, curves, matched_at
from saelens_cosine.metrics.matched import OUTSIDE, MatchedDifference
from saelens_cosine.report.chart import Arms, Axis, Chart, Plot, ends
from saelens_cosine.report.estimate import Estimate, over_seeds, short
from saelens_cosine.report.table import Cell, Table


def matched_section(found: Evaluation, arms: Arms, treatment: Treatment) -> Iterator[Chart | Table | str]:
    """Figures of the first table against FVE and L0, hook by hook, then the differences at each.

    Args:
        found: the evaluation.
        arms: the page's.
        treatment: which tokens charts show.
    """
    first = columns(found.saes)
    of_texts = curves(found.on_curves)
    for text, of in of_texts.items():
        where = found.texts[text].hook if len(of_texts) > 1 else ""
        at = matched_at(_saes(of))
        for x in at.values():
            for y in (title for title, one in first.items() if one.sinks in (None, treatment)):
                if y not in at.values() or (x, y) == (at.get("L0"), at.get("FVE")):
                    yield _chart(arms, of, x, y, where)
    shown: list[MatchedFigure] = []
    for hook, at, items in matched_by_hook(found):
        title = in_condition(f"At matched {at}", hook)
        yield f"{title}:"
        yield _table(title, found.baseline, at, items)
        shown += items
    if shown:
        yield " ".join(about_matched_figures(shown))


def _table(title: str, baseline: str, at: str, items: Sequence[MatchedFigure]) -> Table:
    """A row for each measure and k of the baseline, a column for each arm."""
    arms = list(dict.fromkeys(item.arm for item in items))
    by_row: dict[tuple[str, float], dict[str, MatchedDifference]] = {}
    for item in items:
        by_row.setdefault((item.measure, item.found.k), {})[item.arm] = item.found
    rows: list[list[Cell]] = []
    for (measure, k), of in by_row.items():
        x = next((one.x for one in of.values() if math.isfinite(one.x)), math.nan)
        rows.append([measure, f"{short(x)} (k={k:g})", *(_cell(of[arm]) if arm in of else "-" for arm in arms)])
    return Table(title, (f"minus {baseline}", f"{without_sinks_told(at)} of {baseline}", *arms), rows, differences=True)


def _cell(found: MatchedDifference) -> Cell:
    if found.refused:
        return "not matched"
    difference = found.difference
    if difference is None:
        return f"{OUTSIDE} in {len(found.outside)} of {len(found.seeds)} seeds" if found.inside else OUTSIDE
    return Estimate(difference.mean, difference.low, difference.high)


def _chart(arms: Arms, found: Curves, x: str, y: str, where: str) -> Chart:
    """One figure against what arms are matched at: a point for each k, joined, in a band over seeds."""
    points = {arm: _points(seeds, x, y) for arm, seeds in found.items()}
    every = [point for of in points.values() for point in of.values()]
    log = without_sinks_told(x) == "L0"
    at = Axis(x, log=log, ends=ends([a.value for a, _ in every], log=log))
    plot = Plot(arms, at, Axis(y, ends=ends([b for _, b in every])))
    for arm, of in points.items():
        known = [(a.value, b) for a, b in of.values() if math.isfinite(a.value + b.value)]
        if len(known) > 1 and any(b.bounds for _, b in known):
            bounds = [b.bounds or (b.value, b.value) for _, b in known]
            plot.band([a for a, _ in known], [low for low, _ in bounds], [high for _, high in bounds], arm)
        tips = [f"k={k}: {x} {short(a.value)}, {y} {b}" for k, (a, b) in of.items()]
        plot.line(arm, [a.value for a, _ in of.values()], [b.value for _, b in of.values()], tips)
    rows = [(arm, str(k), a, b) for arm, of in points.items() for k, (a, b) in of.items()]
    table = Table(f"{y} and {x}", ("arm", "k", x, y), rows)
    return Chart(in_condition(f"{y} against {without_sinks_told(x)}", where), "", plot.figure, table)


def _points(seeds: dict[int, list[OnCurve]], x: str, y: str) -> dict[int, tuple[Estimate, Estimate]]:
    """By k, means over seeds of both, of the SAEs that have both."""
    saes = [sae for of in seeds.values() for sae in of if x in sae.compared and y in sae.compared]
    by_k = {k: [sae for sae in saes if sae.k == k] for k in sorted({sae.k or 0 for sae in saes})}
    return {
        k: (over_seeds([sae.compared[x].number for sae in of]), over_seeds([sae.compared[y].number for sae in of]))
        for k, of in by_k.items()
    }


def _saes(found: Curves) -> list[OnCurve]:
    return [sae for seeds in found.values() for of in seeds.values() for sae in of]

"""Arms at the baseline's FVE and L0: the tables of a terminal, and the page's section with its charts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from rich.table import Table as RichTable

from saelens_cosine.console import plain_table
from saelens_cosine.experiments.evaluate.evals import Figure, Treatment
from saelens_cosine.experiments.evaluate.results.evaluation import Evaluation
from saelens_cosine.experiments.evaluate.results.listing import columns, in_condition
from saelens_cosine.experiments.evaluate.results.matched import Curves, MatchedFigure, OnCurve, curves, matched_at
from saelens_cosine.metrics.matched import OUTSIDE, MatchedDifference, about_matched
from saelens_cosine.report.chart import Arms, Axis, Chart, Plot, ends
from saelens_cosine.report.estimate import Estimate, over_seeds, short
from saelens_cosine.report.table import Cell, Table

REST = "All other figures stand in the field matched of evaluation.json."


def matched_tables(found: Evaluation) -> list[RichTable]:
    """For each hook at FVE and at L0 a row for each arm and figure of the first table, a column for each k of the baseline; below the
    last what to know of them all."""
    first = columns(found.saes)
    tables: list[RichTable] = []
    shown: list[MatchedFigure] = []
    for hook, at, items in _by_hook(found, first):
        title = in_condition(f"At matched {at}: minus {found.baseline} at each of its ks", hook)
        ks = {item.found.k: item.found for item in reversed(items)}
        heads = [f"k={k:g}, {_name(at)} {short(ks[k].x)}" for k in sorted(ks)]
        table = plain_table(title, ["arm", "measure"], heads)
        for arm, measure in dict.fromkeys((item.arm, item.measure) for item in items):
            of = {item.found.k: item.found for item in items if (item.arm, item.measure) == (arm, measure)}
            form = first[measure].column or "{:.4g}"
            table.add_row(arm, measure, *(of[k].brief(form) if k in of else "-" for k in sorted(ks)))
        tables.append(table)
        shown += items
    if tables:
        tables[-1].caption = "\n".join(_about(shown))
    return tables


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
    for hook, at, items in _by_hook(found, first):
        title = in_condition(f"At matched {at}", hook)
        yield f"{title}:"
        yield _table(title, found.baseline, at, items)
        shown += items
    if shown:
        yield " ".join(_about(shown))


def _by_hook(found: Evaluation, first: dict[str, Figure]) -> Iterator[tuple[str, str, list[MatchedFigure]]]:
    """Of the figures of the first table: the hook, empty where there is one, what arms are matched at, and the differences."""
    items = [item for item in found.matched if item.measure in first]
    several = len({item.text for item in items}) > 1
    for text, at in dict.fromkeys((item.text, item.at) for item in items):
        hook = found.texts[text].hook if several else ""
        yield hook, at, [item for item in items if (item.text, item.at) == (text, at)]


def _about(items: Sequence[MatchedFigure]) -> list[str]:
    known = [item for item in items if item.found.difference and item.found.difference.low is not None]
    axes = dict.fromkeys(axis for item in known for axis in item.over)
    return [*about_matched([(item.arm, item.found) for item in items], axes), REST]


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
    return Table(title, (f"minus {baseline}", f"{_name(at)} of {baseline}", *arms), rows, differences=True)


def _name(at: str) -> str:
    return at.partition(",")[0]


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
    log = _name(x) == "L0"
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
    return Chart(in_condition(f"{y} against {_name(x)}", where), "", plot.figure, table)


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

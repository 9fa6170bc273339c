"""Arms of a comparison at the control's FVE and at its L0, where there are several ks. The mathematics is `metrics.matched`'s."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from saelens_cosine.console import plain_table
from saelens_cosine.experiments.compare.results import Comparison
from saelens_cosine.experiments.compare.summary.measures import (
    CE,
    DEAD,
    FVE,
    L0,
    QUARTILES,
    ByK,
    Measure,
    at_hook,
    ks_of,
)
from saelens_cosine.metrics.matched import MatchedDifference, Point, about_matched, matched_differences

MEASURES = (FVE, CE, DEAD, L0, *QUARTILES)

AT = (FVE, L0)
"""What arms are matched at."""

IN_TERMINAL = (FVE, CE, DEAD, L0)


@dataclass(frozen=True)
class Matched:
    """
    One measure of one arm minus the control's at one of the control's ks, both at the same FVE or L0.

    Args:
        hook_name (str): Hook point.
        at (Measure): What is the same of both.
        architecture (str): The arm.
        measure (Measure): What is compared.
        found (MatchedDifference): The difference, or why there is none.
    """

    hook_name: str
    at: Measure
    architecture: str
    measure: Measure
    found: MatchedDifference


def matched(comparison: Comparison) -> tuple[Matched, ...]:
    """All matched differences: hook by hook, at FVE and at L0, arm by arm, measure by measure, k by k. None with one k."""
    return tuple(_matched(comparison))


def _matched(comparison: Comparison) -> Iterator[Matched]:
    control, *others = comparison.settings.arms
    for hook in comparison.hooks:
        arms = at_hook(comparison, hook.hook_name)
        if control not in arms or len(ks_of(arms)) < 2:
            continue
        for at in AT:
            for arm in others:
                for measure in MEASURES if arm in arms else ():
                    theirs = _curves(arms[control], at, measure)
                    known = any(math.isfinite(measure.of(result)) for of in arms[control].values() for result in of)
                    if measure != at and known:
                        for found in matched_differences(_curves(arms[arm], at, measure), theirs):
                            yield Matched(hook.hook_name, at, arm, measure, found)


def _curves(by_k: ByK, x: Measure, y: Measure) -> dict[int, list[Point]]:
    """An arm's points by seed."""
    results = [result for of in by_k.values() for result in of]
    seeds = sorted({result.seed for result in results})
    return {s: [Point(r.k, x.of(r), y.of(r)) for r in results if r.seed == s] for s in seeds}


def as_json(comparison: Comparison) -> list[dict[str, Any]]:
    """The field `matched` of `comparison.json`."""
    return [
        {
            "hook_name": item.hook_name,
            "at": item.at.name,
            "architecture": item.architecture,
            "minus": comparison.settings.arms[0],
            "measure": item.measure.name,
            **asdict(item.found),
            "inside": item.found.inside,
            "outside": [{**outside._asdict(), "by": outside.by} for outside in item.found.outside],
        }
        for item in matched(comparison)
    ]


def as_tables(comparison: Comparison) -> list[Table]:
    """For each hook at FVE and at L0, a row for each arm and k of the control; below the last what to know of them all."""
    found = [item for item in matched(comparison) if item.measure in IN_TERMINAL]
    tables: list[Table] = []
    several = len(comparison.hooks) > 1
    for hook, at in dict.fromkeys((item.hook_name, item.at) for item in found):
        items = [item for item in found if (item.hook_name, item.at) == (hook, at)]
        measures = [measure for measure in IN_TERMINAL if measure != at]
        where = f", {hook}" if several else ""
        table = plain_table(
            f"At matched {at.title}: minus {comparison.settings.arms[0]} at each of its ks{where}",
            ["architecture"],
            ["k", at.title, *(measure.title for measure in measures)],
        )
        for arm, k in dict.fromkeys((item.architecture, item.found.k) for item in items):
            row = {i.measure: i.found for i in items if (i.architecture, i.found.k) == (arm, k)}
            at_x = next((at.form.format(of.x) for of in row.values() if math.isfinite(of.x)), "-")
            cells = [row[measure].brief(measure.form) if measure in row else "-" for measure in measures]
            table.add_row(arm, f"{k:g}", at_x, *cells)
        tables.append(table)
    if tables:
        tables[-1].caption = "\n".join(notes(found))
    return tables


def notes(items: list[Matched]) -> list[str]:
    """What a reader of matched differences has to know."""
    return about_matched([(item.architecture, item.found) for item in items])

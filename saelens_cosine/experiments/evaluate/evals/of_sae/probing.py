"""Sparse probing: what linear probes on an SAE's best k features read of labelled texts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import get_args

import numpy as np

from saelens_cosine.experiments.evaluate.evals.eval import BySinks, Eval, EvalSection, Figure, Shown, by_sinks
from saelens_cosine.experiments.evaluate.subject import Subject
from saelens_cosine.metrics.probing.probing import K_VALUES, KProbe, Units
from saelens_cosine.report.chart import Axis, Chart, Plot, beside, cut, ends
from saelens_cosine.report.estimate import Estimate, over_seeds
from saelens_cosine.report.table import Table

SPLITS = 5
"""Of the texts of each task into five parts, each tested once."""

IN_FIRST_TABLE = ("probing k=1, canonical", "probing k=all, canonical")


@dataclass(frozen=True, kw_only=True)
class ProbingByTask(BySinks[dict[str, tuple[tuple[KProbe, ...], ...]]]):
    """
    Probes by units of the codes, `canonical` and `scale_free`; then task by task, k by k.

    Args:
        tasks (tuple[str, ...]): What was probed for.
        texts (tuple[int, ...]): Texts of each task.
    """

    tasks: tuple[str, ...]
    texts: tuple[int, ...]


def ks_up_to(most: int) -> tuple[int | None, ...]:
    """The numbers of features that are probed, of a dictionary of `most`; None: all."""
    return tuple(k for k in K_VALUES if k is None or k <= most)


def _measure(subject: Subject) -> ProbingByTask:
    tasks = subject.text.labelled
    ks = ks_up_to(subject.sae.cfg.d_sae)

    def of(name: str) -> dict[str, tuple[tuple[KProbe, ...], ...]]:
        by_task = [subject.probed(i, name, ks, SPLITS, *get_args(Units)) for i in range(len(tasks))]
        return {units: tuple(found[units] for found in by_task) for units in get_args(Units)}

    return ProbingByTask(
        tasks=tuple(task.name for task in tasks),
        texts=tuple(len(task.labels) for task in tasks),
        **by_sinks(subject.settings.treatments, of),
    )


def _figures(result: ProbingByTask) -> Iterator[Figure]:
    for sinks, by_units in result.items():
        for units, tasks in by_units.items():
            for by_task in zip(*tasks, strict=True):  # k by k
                accuracies = np.asarray([task.accuracies for task in by_task])
                name = f"probing k={by_task[0].k or 'all'}, {units.replace('_', '-')}"
                yield Figure(
                    name,
                    float(accuracies.mean()),
                    sinks,
                    "{:.4f}" if name in IN_FIRST_TABLE else None,
                    values=accuracies,
                    over=("tasks", "splits"),
                    units=result.tasks,
                )


def _charts(shown: Shown[ProbingByTask]) -> Iterator[Chart]:
    """Accuracy by task, a chart for each k, all on one scale."""
    found: dict[str, dict[tuple[str, int | None], Estimate]] = {}
    for arm, of in shown.of(shown.treatment).items():
        tasks = shown.results[arm][0].tasks
        for task, *seeds in zip(tasks, *(by_units["canonical"] for by_units in of), strict=True):
            for probes in zip(*seeds, strict=True):
                accuracy = over_seeds([one.accuracy for one in probes])
                found.setdefault(arm, {})[task, probes[0].k] = accuracy
    scale = Axis("probe accuracy", ends=ends(e for by_task in found.values() for e in by_task.values()))
    for k in dict.fromkeys(k for by_task in found.values() for _, k in by_task):
        tasks = list(dict.fromkeys(task for by_task in found.values() for task, of in by_task if of == k))
        y = Axis("", ends=(len(tasks) - 0.5, -0.5), ticks={float(i): cut(task, 18) for i, task in enumerate(tasks)})
        plot, places = Plot(shown.arms, scale, y), beside(list(found), 0.3)
        for arm, by_task in found.items():
            values = [by_task.get((task, k), Estimate(float("nan"))) for task in tasks]
            tips = [f"{task}, {e}" for task, e in zip(tasks, values, strict=True)]
            plot.line(arm, values, [i + places[arm] for i in range(len(tasks))], tips, joined=False)
        title, height = "All features" if k is None else f"k = {k}", 100 + len(tasks) * (12 * len(found) + 10)
        rows = [(task, *(by_task.get((task, k), "-") for by_task in found.values())) for task in tasks]
        table = Table(f"Probe accuracy, {title}", ("task", *found), rows)
        yield Chart(title, "", plot.figure, table, height)


PROBING = Eval(
    "probing",
    "sae",
    "k-sparse probing, canonical and scale-free",
    _measure,
    figures=_figures,
    tokens=lambda result: f"{sum(result.texts):,} texts",
    section=EvalSection("Probing", "Accuracy of linear probes on the best k features of each task.", _charts),
    reads=lambda subject: subject.text.labelled,
)

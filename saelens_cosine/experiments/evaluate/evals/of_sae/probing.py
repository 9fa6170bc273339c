"""Sparse probing: what linear probes on an SAE's best k features read of labelled texts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from saelens_cosine.experiments.evaluate.evals.eval import BySinks, Eval, Figure, by_sinks
from saelens_cosine.experiments.evaluate.subject import Subject
from saelens_cosine.metrics.probing.probing import K_VALUES, KProbe, probe

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
    tasks = subject.text.tasks
    ks = ks_up_to(subject.sae.cfg.d_sae)

    def of(name: str) -> dict[str, tuple[tuple[KProbe, ...], ...]]:
        return {
            units: tuple(
                probe(subject.pooled(i, name), task.labels, ks, units, SPLITS) for i, (task, _) in enumerate(tasks)
            )
            for units in ("canonical", "scale_free")
        }

    return ProbingByTask(
        tasks=tuple(task.name for task, _ in tasks),
        texts=tuple(len(task.labels) for task, _ in tasks),
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


PROBING = Eval(
    "probing",
    "sae",
    "k-sparse probing, canonical and scale-free",
    _measure,
    figures=_figures,
    tokens=lambda result: f"{sum(result.texts):,} texts",
    reads=lambda subject: subject.text.labelled,
)

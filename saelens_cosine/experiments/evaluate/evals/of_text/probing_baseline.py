"""Probes on the activations themselves: what an SAE's codes are compared with."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from saelens_cosine.experiments.evaluate.evals.eval import BySinks, Eval, Figure
from saelens_cosine.experiments.evaluate.evals.of_sae.probing import SPLITS
from saelens_cosine.experiments.evaluate.subject import Text
from saelens_cosine.metrics.probing.probing import KProbe, probe_activations


def _measure(text: Text) -> BySinks[tuple[KProbe, ...]]:
    found = {
        name: tuple(
            probe_activations(text.treated(text.tasks.of(i), name), task.labels, splits=SPLITS)
            for i, task in enumerate(text.labelled)
        )
        for name in text.settings.treatments
    }
    return BySinks(**found)


def _figures(result: BySinks[tuple[KProbe, ...]]) -> Iterator[Figure]:
    for sinks, tasks in result.items():
        accuracy = float(np.mean([task.accuracy for task in tasks]))
        yield Figure("probes on activations, mean accuracy", accuracy, sinks, compared=False)


PROBING_BASELINE = Eval(
    "probing_baseline",
    "text",
    "probes on the activations",
    _measure,
    figures=_figures,
    reads=lambda text: text.labelled,
)

"""Direction against norm of activations in the model's predictions."""

from __future__ import annotations

from collections.abc import Iterator

from saelens_cosine.experiments.evaluate.evals.eval import BySinks, Eval, Figure
from saelens_cosine.experiments.evaluate.subject import Text
from saelens_cosine.metrics.causal.patching import Patching, direction_norm_patching

WHERE = {"alone": "in a context of one token", "text": "in the text"}


def _measure(text: Text) -> BySinks[dict[str, Patching]]:
    sample = text.sample_of(text.run)
    found = {
        name: {
            "alone": direction_norm_patching(text.run, text.treated(sample, name), context="alone"),
            "text": direction_norm_patching(text.run, text.treated(sample, name), context="text"),
        }
        for name in text.settings.treatments
    }
    return BySinks(**found)


def _figures(result: BySinks[dict[str, Patching]]) -> Iterator[Figure]:
    for sinks, found in result.items():
        for context, patching in found.items():
            direction, norm = patching.random.direction_kl.mean, patching.random.norm_kl.mean
            yield Figure(f"KL of a direction patch {WHERE[context]}, nats", direction, sinks, compared=False)
            yield Figure(f"KL of a norm patch {WHERE[context]}, nats", norm, sinks, compared=False)


PATCHING = Eval(
    "patching",
    "text",
    "direction against norm of activations in the model's predictions",
    _measure,
    figures=_figures,
    uses=("causal_contexts",),
)

"""How much of the model's prediction survives reconstruction."""

from __future__ import annotations

from collections.abc import Iterator

from saelens_cosine.experiments.evaluate.evals.eval import BySinks, Eval, Figure, tokens_of
from saelens_cosine.experiments.evaluate.subject import Subject
from saelens_cosine.metrics.reconstruction.loss_recovered import CE_NOTE, LossRecovered, loss_recovered


def _measure(subject: Subject) -> BySinks[LossRecovered]:
    settings, clean = subject.settings, subject.text.clean_losses
    bounds = {"with_sinks": None, "without_sinks": settings.max_norm_multiple}
    found = {name: loss_recovered(subject.sae, clean, bounds[name]) for name in settings.treatments}
    return BySinks(**found)


def _figures(result: BySinks[LossRecovered]) -> Iterator[Figure]:
    for sinks, loss in result.items():
        overall = loss.by_norm.all_norms.overall
        yield Figure("CE recovered", overall.ce_loss_score, sinks, "{:.4f}")
        yield Figure("KL, nats", overall.kl_div_with_sae, sinks, "{:.4f}")


LOSS = Eval(
    "loss",
    "sae",
    "cross-entropy and KL recovered, by norm",
    _measure,
    figures=_figures,
    tokens=lambda result: tokens_of(result, lambda loss: loss.by_norm.all_norms.overall.tokens),
    note=CE_NOTE,
    uses=("loss_tokens",),
)

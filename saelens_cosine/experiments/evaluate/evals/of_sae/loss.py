"""How much of the model's prediction survives reconstruction."""

from __future__ import annotations

import re
from collections.abc import Iterator

from saelens_cosine.experiments.evaluate.evals.eval import BySinks, Eval, Figure, NotApplicable, tokens_of
from saelens_cosine.experiments.evaluate.subject import Subject
from saelens_cosine.metrics.reconstruction.loss_recovered import CE_NOTE, LossRecovered, loss_recovered


def _measure(subject: Subject) -> BySinks[LossRecovered]:
    settings, text = subject.settings, subject.text
    if text.head is not None and not re.search("hook_[qkvz]", text.hook):  # SAELens would give all heads to the SAE
        raise NotApplicable(
            f"SAELens' loss replaces one head at hook_q, hook_k, hook_v and hook_z, not at {text.hook}."
        )
    batches = text.contexts.at_even_steps(max(1, settings.loss_tokens // text.form.context_size)).batches
    bounds = {"with_sinks": None, "without_sinks": settings.max_norm_multiple}
    found = {name: loss_recovered(subject.sae, text.model, batches, bounds[name]) for name in settings.treatments}
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

"""The feature browser's data from an SAE, its model and text."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from sae_lens.saes.sae import SAE

from saelens_cosine.metrics.dictionary.features import Context, feature_dashboards, top_activations
from saelens_cosine.report.html.data import Feature


def features_for_report(
    sae: SAE[Any],
    model: Any,
    token_batches: Iterable[torch.Tensor],
    arm: str,
    *,
    features: Iterable[int] | None = None,
    max_features: int = 2000,
    n_contexts: int = 8,
    before: int = 20,
    after: int = 8,
    n_logits: int = 6,
    max_norm_multiple: float | None = None,
) -> tuple[Feature, ...]:
    """Best contexts of some features, cut to the tokens around each context's largest code.

    Args:
        sae: any SAELens SAE in its inference form; its metadata names the hook point.
        model: the hooked model that it was trained on, with a tokenizer.
        token_batches: `[contexts, positions]` tokens each.
        arm: what the report calls the SAE.
        features: their numbers. None: of those that fired, `max_features` at even steps through their numbers, which favours
            none.
        max_features: what the browser should hold; 2,000 with the other defaults make 3 to 6 MB.
        n_contexts: contexts shown of each feature.
        before: tokens shown before the largest code.
        after: tokens shown after it.
        n_logits: tokens that the decoder row promotes and suppresses.
        max_norm_multiple: leave out tokens above this multiple of their batch's median norm; None keeps every token.
    """
    found = top_activations(sae, model, token_batches, n_contexts, max_norm_multiple)
    if features is None:
        alive = found.active.nonzero().squeeze(1)
        steps = torch.linspace(0, len(alive) - 1, min(max_features, len(alive)), dtype=torch.float64)
        features = alive[steps.round().long()].tolist()
    exponents = getattr(sae, "norm_exponent", None)
    if exponents is not None:
        exponents = exponents.detach().float().cpu().expand(sae.cfg.d_sae).tolist()
    return tuple(
        Feature(
            arm=arm,
            index=dashboard.index,
            density=dashboard.density,
            exponent=None if exponents is None else exponents[dashboard.index],
            contexts=tuple(_around_the_largest(context, before, after) for context in dashboard.contexts),
            promotes=dashboard.top_logits,
            suppresses=dashboard.bottom_logits,
        )
        for dashboard in feature_dashboards(sae, model, found, features, n_logits)
    )


def _around_the_largest(context: Context, before: int, after: int) -> Context:
    largest = max(range(len(context.values)), key=context.values.__getitem__)
    shown = slice(max(0, largest - before), largest + after + 1)
    return Context(context.tokens[shown], context.values[shown])

"""Where each feature of an arm's first seed is largest, for the page's browser."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from math import ceil, floor, log10
from typing import Any

import torch
from sae_lens.saes.sae import SAE

from saelens_cosine.experiments.evaluate.evals.eval import Eval, EvalSection, Figure, Shown
from saelens_cosine.experiments.evaluate.subject import Subject
from saelens_cosine.metrics.dictionary.features import Context, feature_dashboards, top_activations
from saelens_cosine.report.browser import Browser, Feature
from saelens_cosine.report.chart import Axis, Chart, Plot
from saelens_cosine.report.estimate import short


@dataclass(frozen=True)
class BrowsedFeatures:
    """
    Features with their contexts.

    Args:
        features (tuple[Feature, ...]): At most as many as the settings' `browser_features`.
    """

    features: tuple[Feature, ...]


def _measure(subject: Subject) -> BrowsedFeatures:
    text = subject.text
    found = features_for_browser(
        subject.sae,
        text.model,
        text.contexts.batches,
        subject.source.arm,
        max_features=subject.settings.browser_features,
    )
    return BrowsedFeatures(found)


def _figures(result: BrowsedFeatures) -> Iterator[Figure]:
    if result.features:
        yield Figure("features in the page's browser", len(result.features), compared=False)


def _draw(shown: Shown[BrowsedFeatures]) -> Iterator[Chart | Browser]:
    """Densities, exponents against them, and the browser of the features."""
    found = {arm: [replace(one, arm=arm) for one in first.features] for arm, (first, *_) in shown.results.items()}
    active = {arm: [one for one in features if one.density > 0] for arm, features in found.items()}
    powers = [log10(one.density) for features in active.values() for one in features]
    label = "density: share of tokens where it fires"
    if powers:
        low, high = min(-1, floor(min(powers))), max(0, ceil(max(powers)))  # though each fires on every token
        ticks = {float(power): short(10.0**power) for power in range(low, high + 1)}
        plot = Plot(shown.arms, Axis(f"{label} (log scale)", ticks=ticks), Axis("share of features"))
        for arm, features in active.items():
            logs = [log10(one.density) for one in features]
            plot.steps(arm, logs, [low + (high - low) * i / 40 for i in range(41)])
        yield Chart("Density", "Of the features below.", plot.figure)
    learned = {arm: [one for one in features if one.exponent is not None] for arm, features in active.items()}
    if any(learned.values()):
        plot = Plot(shown.arms, Axis(label, log=True), Axis("norm exponent a"))
        for arm, features in learned.items():
            density, exponent = [one.density for one in features], [one.exponent or 0.0 for one in features]
            tips = [f"{one.index}, density {short(one.density)}, a {one.exponent:.3f}" for one in features]
            plot.dots(arm, density, exponent, tips, features=[one.index for one in features])
        yield Chart("Exponent and density", "Of the features below.", plot.figure)
    features = tuple(one for of in found.values() for one in of)
    if features:
        yield Browser(features)


FEATURES = Eval(
    "features",
    "arm",
    "best contexts of an arm's first seed, for the page's browser",
    _measure,
    figures=_figures,
    section=EvalSection(
        "Features",
        "Contexts in which each feature is largest. Search for text that it fires on, or for #number.",
        _draw,
    ),
    uses=("browser_features",),
)


def features_for_browser(
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
        arm: what the page calls the SAE.
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

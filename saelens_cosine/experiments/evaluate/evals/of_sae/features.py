"""Where each feature of an arm's first seed is largest, for the page's browser."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from saelens_cosine.experiments.evaluate.evals.eval import Eval, Figure
from saelens_cosine.experiments.evaluate.subject import Subject
from saelens_cosine.report.html.data import Feature
from saelens_cosine.report.html.features import features_for_report


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
    found = features_for_report(
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


FEATURES = Eval(
    "features",
    "arm",
    "best contexts of an arm's first seed, for the page's browser",
    _measure,
    figures=_figures,
    uses=("browser_features",),
)

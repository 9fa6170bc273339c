"""Features that an SAE shares with the one that it is compared with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from math import isnan
from typing import Any

import numpy as np

from saelens_cosine.experiments.evaluate.evals.eval import (
    BySinks,
    Eval,
    EvalSection,
    Figure,
    NotApplicable,
    Shown,
    by_sinks,
    tokens_of,
)
from saelens_cosine.experiments.evaluate.subject import Subject
from saelens_cosine.metrics.dictionary.matching import FeatureMatching, FeaturePairs, MatchCounts, MatchedBy
from saelens_cosine.metrics.norms.norm_detectors import NormDetectors, norm_detectors
from saelens_cosine.metrics.token_gram import firings
from saelens_cosine.report.chart import Axis, Chart, Plot
from saelens_cosine.report.estimate import Estimate, short
from saelens_cosine.report.table import Table

PAIRS_LISTED = 2000
"""Features whose partners are listed, at even steps through those that have one."""


@dataclass(frozen=True)
class PairCounts(MatchCounts):
    """
    Counts of matches.

    Args:
        paired (int): How many features have a partner at all.
    """

    paired: int


@dataclass(frozen=True)
class Matching(MatchedBy):
    """
    Matched features, and the norms of the tokens that they fire on.

    Args:
        features (PairCounts): Of the SAE.
        baseline_features (MatchCounts): Of the one that it is compared with.
        pairs (FeaturePairs): At most `PAIRS_LISTED` of the SAE's features that have a partner.
        top_quartile_share (tuple[float, ...]): Of each of these, the share of its firings on the top quartile of norms.
        matched_norms (NormDetectors): Of the features that are matched.
        unique_norms (NormDetectors): Of those that are not.
    """

    features: PairCounts
    baseline_features: MatchCounts
    pairs: FeaturePairs
    top_quartile_share: tuple[float, ...]
    matched_norms: NormDetectors
    unique_norms: NormDetectors


def matchings_of(subject: Subject) -> dict[str, FeatureMatching]:
    """By treatment, all features with a partner in the baseline.

    Raises:
        NotApplicable: there is no baseline on the same activations.
    """
    if subject.baseline is None or subject.baseline.text is not subject.text:
        raise NotApplicable("The SAE that it is compared with was not measured on the same activations.")
    return subject.matchings


def _measure(subject: Subject) -> BySinks[Matching]:
    matchings = matchings_of(subject)

    def of(name: str) -> Matching:
        found, codes = matchings[name], subject.codes_of(name)
        norms = subject.text.treated(subject.text.sample, name).norms
        in_top = firings(codes[(norms >= norms.quantile(0.75)).numpy()]) / np.maximum(firings(codes), 1)
        pairs = found.a.pairs
        steps = (
            np.linspace(0, len(pairs.features) - 1, min(len(pairs.features), PAIRS_LISTED)).round().astype(int).tolist()
        )
        listed = FeaturePairs(*(tuple(getattr(pairs, part.name)[i] for i in steps) for part in fields(FeaturePairs)))
        return Matching(
            **_values(MatchedBy, found),
            features=PairCounts(**_values(MatchCounts, found.a), paired=len(pairs.features)),
            baseline_features=MatchCounts(**_values(MatchCounts, found.b)),
            pairs=listed,
            top_quartile_share=tuple(float(in_top[feature]) for feature in listed.features),
            matched_norms=norm_detectors(codes, norms, found.a.matched_features),
            unique_norms=norm_detectors(codes, norms, found.a.unique_features),
        )

    return BySinks(**by_sinks(subject.settings.treatments, of))


def _values(kind: type[MatchedBy] | type[MatchCounts], found: Any) -> dict[str, Any]:
    """The fields that a result has from one of its bases."""
    return {part.name: getattr(found, part.name) for part in fields(kind)}


def _figures(result: BySinks[Matching]) -> Iterator[Figure]:
    for sinks, found in result.items():
        share = found.features.matched / max(1, found.features.alive)
        yield Figure("matched share of alive features", share, sinks, compared=False)


def _charts(shown: Shown[BySinks[Matching]]) -> Iterator[Chart]:
    """Correlation of codes against cosine of decoder rows, of each arm's first seed that has a partner."""
    for arm, (found, *_) in shown.of(shown.treatment).items():
        pairs, counts = found.pairs, found.features
        if not pairs.features:
            continue
        columns = pairs.features, pairs.partners, pairs.correlations, pairs.decoder_cosines, found.top_quartile_share
        tips = [
            f"{feature} and {shown.baseline}: {partner}, correlation {short(correlation)}, decoder cosine {short(cosine)}, "
            f"{'unknown' if isnan(share) else f'{share:.0%}'} of its firings in the top norm quartile"
            for feature, partner, correlation, cosine, share in zip(*columns, strict=True)
        ]
        x = Axis("correlation of the codes", ends=_from_0(pairs.correlations))
        plot = Plot(shown.arms, x, Axis("cosine of the decoder rows", ends=_from_0(pairs.decoder_cosines)))
        drawn = plot.dots(
            arm,
            pairs.correlations,
            pairs.decoder_cosines,
            tips,
            features=pairs.features,
            shades=found.top_quartile_share,
            shade="firings in the top quartile of the norm",
        )
        share = counts.matched / max(1, counts.alive)
        note = (
            f"{counts.matched:,} of {counts.alive:,} alive features ({share:.1%}) have both above {found.strong_correlation:g}. "
            f"{counts.paired:,} have a counterpart, {drawn:,} of these are drawn."
        )
        title, heads = f"{arm} → {shown.baseline}", ("arm", "alive", "with a counterpart", "matched", "share")
        row = (arm, f"{counts.alive:,}", f"{counts.paired:,}", f"{counts.matched:,}", Estimate(share))
        yield Chart(title, note, plot.figure, Table(title, heads, [row]), height=400)


def _from_0(values: tuple[float, ...]) -> tuple[float, float]:
    """0 to 1, or from the lowest value where that is negative."""
    return min(0.0, *(value for value in values if not isnan(value)), 0.0) - 0.02, 1.02


MATCHING = Eval(
    "matching",
    "pair",
    "features shared with the first arm",
    _measure,
    figures=_figures,
    tokens=lambda result: tokens_of(result, lambda found: found.tokens),
    section=EvalSection(
        "Matched features",
        "Each feature of one arm with the best counterpart in the other. A match has both numbers high.",
        _charts,
    ),
)

"""Features themselves: which detect norms, which fire together, how decoder rows lie, what their exponents are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from saelens_cosine.experiments.evaluate.evals.eval import (
    BySinks,
    Eval,
    EvalSection,
    Figure,
    Shown,
    by_sinks,
    tokens_of,
)
from saelens_cosine.experiments.evaluate.subject import Subject
from saelens_cosine.metrics.dictionary.cofiring import Cofiring, cofiring
from saelens_cosine.metrics.dictionary.geometry import DecoderGeometry, decoder_geometry
from saelens_cosine.metrics.norms.exponents import ExponentDistribution, exponent_distribution, norm_exponents
from saelens_cosine.metrics.norms.norm_detectors import NormDetectors, norm_detectors
from saelens_cosine.metrics.token_gram import firings
from saelens_cosine.report.chart import Axis, Chart, Plot, ends
from saelens_cosine.report.estimate import Estimate
from saelens_cosine.report.table import Table


@dataclass(frozen=True)
class Firings:
    """
    What firings say of a dictionary.

    Args:
        norm_detectors (NormDetectors): Features by the norm of the tokens that they fire on.
        cofiring (Cofiring): Pairs of features beside chance.
    """

    norm_detectors: NormDetectors
    cofiring: Cofiring


@dataclass(frozen=True, kw_only=True)
class Dictionary(BySinks[Firings]):
    """
    A dictionary's firings and weights.

    Args:
        geometry (DecoderGeometry): Decoder rows beside each other.
        exponents (ExponentDistribution | None): The norm exponents; None where the score has none.
        exponent_values (tuple[float, ...]): One for each feature, a single one where they share it, none where there is none.
    """

    geometry: DecoderGeometry
    exponents: ExponentDistribution | None
    exponent_values: tuple[float, ...]


def _measure(subject: Subject) -> Dictionary:
    def of(name: str) -> Firings:
        codes, sample = subject.codes_of(name), subject.text.treated(subject.text.sample, name)
        return Firings(norm_detectors(codes, sample.norms), cofiring(codes, top=20))

    exponents = norm_exponents(subject.sae)
    firing_rate = torch.from_numpy(firings(subject.codes) / len(subject.text.sample))
    return Dictionary(
        **by_sinks(subject.settings.treatments, of),
        geometry=decoder_geometry(subject.sae),
        exponents=exponent_distribution(subject.sae, firing_rate),
        exponent_values=() if exponents is None else tuple(exponents.double().flatten().tolist()),
    )


def _figures(result: Dictionary) -> Iterator[Figure]:
    for sinks, found in result.items():
        detectors = found.norm_detectors
        yield Figure("share of firings in the top norm quartile", detectors.median_shares[3], sinks)
        yield Figure("norm detectors", detectors.detectors, sinks)
        yield Figure("co-firing of pairs over chance", found.cofiring.lift, sinks)
    yield Figure("largest cosine of a decoder row with another, mean", result.geometry.mean_max_cosine)
    yield Figure("effective dimension of the decoder", result.geometry.effective_dimension)
    if result.exponent_values:
        yield Figure("norm exponent, mean", float(np.mean(result.exponent_values)))


def _charts(shown: Shown[Dictionary]) -> Iterator[Chart]:
    """Exponents of all features in one histogram; arms that share a single one as a line."""
    of_arms = {arm: np.asarray(results[0].exponent_values) for arm, results in shown.results.items()}
    found = {arm: values[np.isfinite(values)] for arm, values in of_arms.items() if np.isfinite(values).any()}
    held = ends([0.0, *(value for values in found.values() for value in (values.min(), values.max()))], margin=0.08)
    if not found or held is None:
        return
    x = Axis("norm exponent a (0: cosine, 1: inner product)", ends=held)
    plot, edges = Plot(shown.arms, x, Axis("share of features")), np.linspace(*held, 49).tolist()
    learned = {arm: values.tolist() for arm, values in found.items() if len(of_arms[arm]) > 1}
    highest = max((plot.steps(arm, values, edges) for arm, values in learned.items()), default=1.0)
    for arm, (a, *_) in ((arm, values) for arm, values in found.items() if arm not in learned):
        plot.line(arm, [a, a], [0, highest], [f"one exponent for all features, {a:.3f}"] * 2)
    plot.guide([0, 0], [0, highest])
    rows = [
        (
            arm,
            f"{len(values):,}" if arm in learned else "shared",
            *(Estimate(float(value)) for value in (values.mean(), values.min(), np.median(values), values.max())),
            f"{(values > 0.5).mean():.1%}",
        )
        for arm, values in found.items()
    ]
    heads = ("arm", "features", "mean", "least", "median", "largest", "a > 0.5")
    yield Chart("Norm exponents", "Of each arm's first seed.", plot.figure, Table("Norm exponents", heads, rows))


DICTIONARY = Eval(
    "dictionary",
    "sae",
    "norm detectors, co-firing, decoder geometry, exponents",
    _measure,
    figures=_figures,
    tokens=lambda result: tokens_of(result, lambda found: found.norm_detectors.tokens),
    section=EvalSection(
        "Exponents",
        "A score grows with the activation's norm to the power a: 0 is cosine, 1 the inner product.",
        _charts,
    ),
)

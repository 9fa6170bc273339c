"""Features themselves: which detect norms, which fire together, how decoder rows lie, what their exponents are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from saelens_cosine.experiments.evaluate.evals.eval import BySinks, Eval, Figure, by_sinks, tokens_of
from saelens_cosine.experiments.evaluate.subject import Subject
from saelens_cosine.metrics.dictionary.cofiring import Cofiring, cofiring
from saelens_cosine.metrics.dictionary.geometry import DecoderGeometry, decoder_geometry
from saelens_cosine.metrics.norms.exponents import ExponentDistribution, exponent_distribution, norm_exponents
from saelens_cosine.metrics.norms.norm_detectors import NormDetectors, norm_detectors
from saelens_cosine.metrics.token_gram import firings


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


DICTIONARY = Eval(
    "dictionary",
    "sae",
    "norm detectors, co-firing, decoder geometry, exponents",
    _measure,
    figures=_figures,
    tokens=lambda result: tokens_of(result, lambda found: found.norm_detectors.tokens),
)

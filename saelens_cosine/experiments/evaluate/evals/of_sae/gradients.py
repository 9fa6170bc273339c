"""Which tokens' norms train the encoder."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from saelens_cosine.activations.sample import TokenSample
from saelens_cosine.experiments.evaluate.evals.eval import BySinks, Eval, Figure, tokens_of
from saelens_cosine.experiments.evaluate.subject import Subject
from saelens_cosine.metrics.norms.encoder_gradients import EncoderGradients, encoder_gradients


def _measure(subject: Subject) -> BySinks[EncoderGradients]:
    def of(sample: TokenSample) -> EncoderGradients:
        mixed = torch.randperm(len(sample), generator=torch.Generator().manual_seed(0))
        return encoder_gradients(subject.sae, sample.activations[mixed])

    return BySinks(**subject.by_treatment(of))


def _figures(result: BySinks[EncoderGradients]) -> Iterator[Figure]:
    for sinks, found in result.items():
        alone = found.only_largest / max(1, found.features)
        yield Figure("encoder gradient, largest norms over smallest, median", found.median_ratio, sinks)
        yield Figure("features trained by the largest norms alone", alone, sinks)


GRADIENTS = Eval(
    "gradients",
    "sae",
    "which tokens' norms train the encoder",
    _measure,
    figures=_figures,
    tokens=lambda result: tokens_of(result, lambda found: found.tokens),
)

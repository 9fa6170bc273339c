"""What edits along features do to the model's predictions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from saelens_cosine.bundled import BUNDLED
from saelens_cosine.experiments.evaluate.evals.eval import BySinks, Eval, Figure, by_sinks, tokens_of
from saelens_cosine.experiments.evaluate.subject import Subject
from saelens_cosine.experiments.evaluate.texts.concepts import bundled_concepts
from saelens_cosine.metrics.causal.ablation import AblationPrecision, ablation_precision
from saelens_cosine.metrics.causal.steering import Steering, steering
from saelens_cosine.metrics.causal.win_rate import WinRate, win_rate
from saelens_cosine.metrics.causal.win_rate_protocol import PROTOCOLS


@dataclass(frozen=True)
class Causal:
    """
    Causal diagnostics of one SAE.

    Args:
        win_rate (dict[str, WinRate]): By protocol, how often the cosine foretells an ablation's effect better.
        steering (Steering): What scaling codes does.
        concepts (tuple[str, ...]): What ablation precision is measured on.
        ablation (AblationPrecision): What ablating a concept's features does where it is, and elsewhere.
    """

    win_rate: dict[str, WinRate]
    steering: Steering
    concepts: tuple[str, ...]
    ablation: AblationPrecision


def _concept_texts(subject: Subject) -> Any:
    """Of other corpora they are the tokens measured."""
    return bundled_concepts(subject.settings.concept_texts) if subject.text.dataset == BUNDLED else None


def _measure(subject: Subject) -> BySinks[Causal]:
    run, sae, settings = subject.text.run, subject.sae, subject.settings
    sample = subject.text.sample_of(run)

    def of(name: str) -> Causal:
        tokens = subject.text.treated(sample, name)
        rates = {
            protocol: win_rate(run, sae, tokens, replace(row, features=min(row.features, settings.causal_features)))
            for protocol, row in PROTOCOLS.items()
        }
        concepts = subject.text.concepts
        texts = subject.text.treated(subject.text.sample_of(concepts.run), name)
        return Causal(
            rates,
            steering(run, sae, tokens),
            tuple(concepts.names),
            ablation_precision(concepts.run, sae, texts, torch.tensor(concepts.labels)),
        )

    return BySinks(**by_sinks(settings.treatments, of))


def _figures(result: BySinks[Causal]) -> Iterator[Figure]:
    for sinks, found in result.items():
        for protocol, rate in found.win_rate.items():
            yield Figure(f"win rate {protocol}", rate.win_rate, sinks)
            yield Figure(f"win rate {protocol} within norm quartiles", rate.win_rate_within_quartiles, sinks)
        for effect in found.ablation.mean:
            yield Figure(f"ablation selectivity k={effect.k}", effect.selectivity, sinks)
        for effect in found.ablation.mean:
            yield Figure(f"ablation precision k={effect.k}", effect.precision, sinks)
        for effect in found.steering.effects:
            yield Figure(f"steering KL at {effect.factor:g} times a code, nats", effect.kl_where_active, sinks)


CAUSAL = Eval(
    "causal",
    "sae",
    "win rate of the cosine, ablation precision, steering",
    _measure,
    figures=_figures,
    tokens=lambda result: tokens_of(result, lambda found: next(iter(found.win_rate.values())).tokens),
    uses=("causal_contexts", "causal_features", "concept_texts"),
    reads=_concept_texts,
)

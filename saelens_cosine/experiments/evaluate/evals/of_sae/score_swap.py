"""One dictionary read with both scores, at one L0: how much of a result is the score at read time, how much the weights.

The paper swaps the score and keeps threshold and scale (arXiv 2606.15054, experiment 64), so L0 goes from 80 to 55 or 86 and
fidelity, sparsity and score change together. Here `saelens_cosine.rescore` fits threshold and scale again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from numpy.typing import ArrayLike
from sae_lens.saes.sae import SAE

from saelens_cosine.activations.sample import TokenSample
from saelens_cosine.experiments.evaluate.evals.eval import BySinks, Eval, Figure, tokens_of
from saelens_cosine.experiments.evaluate.subject import Subject
from saelens_cosine.metrics.probing.probing import Probing, probe_sae
from saelens_cosine.metrics.reconstruction.by_norm import Reconstruction, evaluate_reconstruction
from saelens_cosine.rescoring import rescore

Score = Literal["own", "cosine", "inner_product"]


@dataclass(frozen=True)
class Reading:
    """
    A dictionary under one score.

    Args:
        score (Score): `own` is the SAE as it is, per-feature exponents included.
        architecture (str): SAELens architecture of what was measured.
        scale (float | None): Factor of the score, see `rescore`; None for `own`.
        threshold (float | None): The fitted threshold; None for `own`, and for TopK, which has none.
        reconstruction (Reconstruction): FVE, L0, dead features and norm quartiles on the measured tokens.
        probing (Probing | None): On the same tokens; None without labels.
    """

    score: Score
    architecture: str
    scale: float | None
    threshold: float | None
    reconstruction: Reconstruction
    probing: Probing | None


@dataclass(frozen=True)
class ScoreSwap:
    """
    One SAE under its own score, cosine and inner product.

    Args:
        fitted_on_tokens (int): Tokens that scales and thresholds were fitted on.
        target_l0 (float | None): Active features per token that the thresholds were fitted to, on these tokens; None for TopK, which keeps its k.
        readings (tuple[Reading, ...]): `own`, `cosine`, `inner_product`.
    """

    fitted_on_tokens: int
    target_l0: float | None
    readings: tuple[Reading, ...]


def score_swap(
    sae: SAE[Any],
    fit_on: TokenSample,
    sample: TokenSample,
    labels: ArrayLike | None = None,
    scale: Literal["keep", "fit"] = "keep",
    progress: bool = True,
    **probing: Any,
) -> ScoreSwap:
    """Measure an SAE as it is, and its dictionary with either score at the same L0.

    Args:
        sae: an SAE that `rescore` takes.
        fit_on: tokens for scale and threshold, with or without sinks as the SAE was trained; none of `sample`'s contexts.
        sample: tokens to measure on.
        labels: `[contexts]` of `sample`, to probe for; None leaves probing out.
        scale: as in `rescore`.
        progress: show `rescore`'s bar.
        probing: further arguments of `probe_sae`.

    Raises:
        ValueError: as `rescore` and `probe_sae`.
    """
    readings = [_read("own", sae, sample, labels, None, probing)]
    target_l0: float | None = None
    for score in ("cosine", "inner_product"):
        swapped = rescore(sae, fit_on.activations, score, scale=scale, progress=progress)
        note = swapped.cfg.metadata.rescored[-1]
        target_l0 = None if note["threshold"] is None else note["l0_before"]
        readings.append(_read(score, swapped, sample, labels, note, probing))
    return ScoreSwap(len(fit_on), target_l0, tuple(readings))


def _read(
    score: Score,
    sae: SAE[Any],
    sample: TokenSample,
    labels: ArrayLike | None,
    note: dict[str, Any] | None,
    probing: dict[str, Any],
) -> Reading:
    return Reading(
        score,
        sae.cfg.architecture(),
        None if note is None else note["scale"],
        None if note is None else note["threshold"],
        evaluate_reconstruction(sae, sample.activations),
        None if labels is None else probe_sae(sae, sample, labels, **probing),
    )


def _measure(subject: Subject) -> BySinks[ScoreSwap]:
    def of(sample: TokenSample) -> ScoreSwap:
        fit_on = sample.contexts % 2 == 0
        return score_swap(subject.sae, sample.where(fit_on), sample.where(~fit_on), progress=False)

    return BySinks(**subject.by_treatment(of))


def _figures(result: BySinks[ScoreSwap]) -> Iterator[Figure]:
    for sinks, swap in result.items():
        for reading in swap.readings:
            score = reading.score.replace("_", " ")
            yield Figure(f"FVE read by {score} score", reading.reconstruction.fve, sinks)
            yield Figure(f"L0 read by {score} score", reading.reconstruction.l0, sinks)


SCORE_SWAP = Eval(
    "score_swap",
    "sae",
    "the same dictionary read by the other score",
    _measure,
    figures=_figures,
    tokens=lambda result: tokens_of(result, lambda swap: swap.readings[0].reconstruction.tokens),
)

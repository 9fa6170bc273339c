"""What was recovered of the features that are known."""

from __future__ import annotations

from dataclasses import dataclass

from saelens_cosine.experiments.ground_truth.recovery import MEASURES, Recovery
from saelens_cosine.experiments.ground_truth.settings import GroundTruthSettings
from saelens_cosine.metrics.intervals import Difference, paired_difference


@dataclass(frozen=True)
class GroundTruthRun:
    """
    One SAE, trained, saved and scored.

    Args:
        architecture (str): Training architecture.
        norm_spread (float): Spread of the token norms, in training and scoring.
        seed (int): Of the model, the initialisation and the samples.
        k (float): Active features per token that were asked for.
        without_sinks (Recovery): mcc, classification.f1_score, f1_one_to_one, explained_variance, dead_latents, ... on tokens that are none.
        with_sinks (Recovery | None): The same with sinks among the tokens; None if none are planted. mcc and uniqueness are of the decoder alone, so they do not change.
        norm_exponent (tuple[float, float, float] | None): Mean, minimum and maximum; None for scores without one.
        seconds (float): Training time.
    """

    architecture: str
    norm_spread: float
    seed: int
    k: float
    without_sinks: Recovery
    with_sinks: Recovery | None
    norm_exponent: tuple[float, float, float] | None
    seconds: float


@dataclass(frozen=True)
class FailedRun:
    """
    An SAE whose training became non-finite. It is neither saved nor scored.

    Args:
        architecture (str): Training architecture.
        norm_spread (float): Spread of the token norms.
        seed (int): Of the model, the initialisation and the samples.
        reason (str): What was not finite.
    """

    architecture: str
    norm_spread: float
    seed: int
    reason: str


@dataclass(frozen=True)
class GroundTruth:
    """
    All runs.

    Args:
        settings (GroundTruthSettings): As given.
        runs (tuple[GroundTruthRun, ...]): By seed, then spread, then arm.
        failed (tuple[FailedRun, ...]): Those that are missing there.
    """

    settings: GroundTruthSettings
    runs: tuple[GroundTruthRun, ...]
    failed: tuple[FailedRun, ...] = ()

    def values(self, measure: str, architecture: str, norm_spread: float, sinks: bool = False) -> dict[int, float]:
        """One of MEASURES for an arm at a spread, by the seeds that were trained to their end."""
        scored = [run for run in self.runs if (run.architecture, run.norm_spread) == (architecture, norm_spread)]
        results = {run.seed: run.with_sinks if sinks else run.without_sinks for run in scored}
        if None in results.values():
            raise ValueError("No sinks were planted (sink_share=0), so nothing was scored with them.")
        return {seed: MEASURES[measure](result) for seed, result in results.items() if result is not None}

    def difference(self, measure: str, architecture: str, norm_spread: float, sinks: bool = False) -> Difference | None:
        """An arm minus the first one, paired by seed; None without two seeds that both have."""
        ours, first = (self.values(measure, arm, norm_spread, sinks) for arm in (architecture, self.settings.arms[0]))
        shared = [seed for seed in ours if seed in first]
        if len(shared) < 2:
            return None
        return paired_difference([ours[seed] for seed in shared], [first[seed] for seed in shared])

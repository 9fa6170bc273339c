"""What a comparison finds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from saelens_cosine.activations.site import Site
from saelens_cosine.experiments.compare.settings import ComparisonSettings
from saelens_cosine.metrics.reconstruction.by_norm import Reconstruction
from saelens_cosine.training.monitor import TrainingLogEntry


@dataclass(frozen=True)
class ArmResult:
    """
    One trained SAE: its saved form on held-out text, and how it got there.

    Args:
        architecture (str): Training architecture.
        seed (int): Seed of initialisation and data order.
        path (str): Folder of the SAE, relative to the output folder.
        reconstruction (Reconstruction): On held-out activations, filtered as in training.
        ce_loss_recovered (float): On held-out text, high-norm tokens passed through.
        norm_exponent (tuple[float, float, float] | None): Mean, minimum and maximum; None for scores without one.
        seconds (float): Training time of this SAE alone.
        log (tuple[TrainingLogEntry, ...]): The course of its training.
        weights_sha256 (str): Hash of the saved tensors, which tells it from another SAE that is put in its place.
        hook_name (str): Hook point.
        k (int): Active features per token that it was trained for.
        lr (float | None): Learning rate; None where a record of an earlier version does not say.
    """

    architecture: str
    seed: int
    path: str
    reconstruction: Reconstruction
    ce_loss_recovered: float
    norm_exponent: tuple[float, float, float] | None
    seconds: float
    log: tuple[TrainingLogEntry, ...] = field(repr=False)
    weights_sha256: str = ""
    hook_name: str = ""
    k: int = 0
    lr: float | None = None


@dataclass(frozen=True)
class FailedArm:
    """
    An SAE whose training became non-finite while that of others went on. It is neither saved nor measured.

    Args:
        architecture (str): Training architecture.
        seed (int): Seed of initialisation and data order.
        training_tokens (int): Tokens trained on before.
        reason (str): What was not finite.
        hook_name (str): Hook point.
        k (int): Active features per token.
        lr (float | None): Learning rate.
    """

    architecture: str
    seed: int
    training_tokens: int
    reason: str
    hook_name: str = ""
    k: int = 0
    lr: float | None = None


@dataclass(frozen=True)
class TrainedArm:
    """
    How one SAE got to its end.

    Args:
        architecture (str): Training architecture.
        norm_exponent (tuple[float, float, float] | None): Mean, minimum and maximum; None for scores without one.
        seconds (float): Training time of this SAE alone.
        log (tuple[TrainingLogEntry, ...]): The course of its training.
        judged (Reconstruction | None): On documents that serve the choice of a learning rate, where one is chosen.
    """

    architecture: str
    norm_exponent: tuple[float, float, float] | None
    seconds: float
    log: tuple[TrainingLogEntry, ...]
    judged: Reconstruction | None


@dataclass(frozen=True)
class Trained:
    """
    What comes of a training.

    Args:
        arms (tuple[TrainedArm, ...]): SAEs that reached its end.
        failed (tuple[FailedArm, ...]): Those that did not.
        dropped_share (float): Of the training tokens, by the norm filter.
        lr (float): Learning rate.
    """

    arms: tuple[TrainedArm, ...]
    failed: tuple[FailedArm, ...]
    dropped_share: float
    lr: float


@dataclass(frozen=True)
class RateTried:
    """
    One learning rate of an arm at a hook, tried with seed 0.

    Args:
        architecture (str): Training architecture.
        hook_name (str): Hook point.
        k (int): Active features per token.
        lr (float): Learning rate.
        fve (float | None): On held-out documents that nothing else is measured on; None where training failed.
        dead_fraction (float | None): Share of features with no activation there; likewise.
        chosen (bool): Whether it is the arm's best by `fve`.
    """

    architecture: str
    hook_name: str
    k: int
    lr: float
    fve: float | None
    dead_fraction: float | None
    chosen: bool = False


@dataclass(frozen=True)
class PointResult:
    """
    What is found at a point of the grid.

    Args:
        arms (tuple[ArmResult, ...]): In the order of the settings' arms.
        failed (tuple[FailedArm, ...]): Those that are missing there.
        dropped_share (float): Of the training tokens, by the norm filter.
        rates (tuple[RateTried, ...]): Learning rates that were tried there.
    """

    arms: tuple[ArmResult, ...]
    failed: tuple[FailedArm, ...]
    dropped_share: float
    rates: tuple[RateTried, ...] = ()


@dataclass(frozen=True)
class HookResult:
    """
    What the activations at one hook are.

    Args:
        hook_name (str): Hook point.
        d_in (int): Size of the activations there.
        high_norm_share_dropped (float): Share of the training tokens that the filter dropped, mean over trainings.
        high_norm_share_dropped_heldout (float): The same for the held-out tokens.
        site (Site | None): What the held-out activations are like, with what the filter drops.
    """

    hook_name: str
    d_in: int
    high_norm_share_dropped: float
    high_norm_share_dropped_heldout: float
    site: Site | None = None


@dataclass(frozen=True)
class Comparison:
    """
    All results of a comparison.

    Args:
        settings (ComparisonSettings): As resolved.
        hooks (tuple[HookResult, ...]): Hook points in the settings' order.
        arms (tuple[ArmResult, ...]): Hook by hook, k by k, seed by seed, in the order of the settings' arms.
        failed (tuple[FailedArm, ...]): Those that are missing there.
        rates (tuple[RateTried, ...]): Learning rates that were tried, hook by hook and arm by arm.
    """

    settings: ComparisonSettings
    hooks: tuple[HookResult, ...]
    arms: tuple[ArmResult, ...]
    failed: tuple[FailedArm, ...] = ()
    rates: tuple[RateTried, ...] = ()


def rates_tried(tried: Sequence[Trained], arms: Sequence[str], hook_name: str, k: int) -> tuple[RateTried, ...]:
    """Every arm at every learning rate that it was trained with, arm by arm, rates ascending; its best one is marked as chosen.

    Args:
        tried: trainings of all arms, one for each rate.
        arms: in the order of the result.
        hook_name: where.
        k: active features per token.
    """
    return tuple(one for arm in arms for one in _of_arm(tried, arm, hook_name, k))


def chosen_rates(tried: Sequence[RateTried], hook_name: str) -> Mapping[str, float]:
    """By arm, the rate for all ks and seeds at a hook; without arms that no rate was good for."""
    return {one.architecture: one.lr for one in tried if one.chosen and one.hook_name == hook_name}


def about_edges(tried: Sequence[RateTried]) -> str:
    """Which arms did best at the smallest or the largest rate that was tried, where a better one may lie beyond; empty if none did."""
    rates = sorted({one.lr for one in tried})
    ends = {"smaller": rates[:1], "larger": rates[-1:]}
    arms = {
        end: dict.fromkeys(one.architecture for one in tried if one.chosen and [one.lr] == rate)
        for end, rate in ends.items()
    }
    return " ".join(f"A {end} rate may be better for {', '.join(found)}." for end, found in arms.items() if found)


def _of_arm(tried: Sequence[Trained], arm: str, hook_name: str, k: int) -> list[RateTried]:
    found: list[RateTried] = []
    for training in sorted(tried, key=lambda training: training.lr):
        judged = next((one.judged for one in training.arms if one.architecture == arm), None)
        if judged is None or not math.isfinite(judged.fve):
            found.append(RateTried(arm, hook_name, k, training.lr, None, None))
        else:
            found.append(RateTried(arm, hook_name, k, training.lr, judged.fve, judged.dead_fraction))
    best = max((one.fve for one in found if one.fve is not None), default=None)
    chosen = next((one for one in found if best is not None and one.fve == best), None)
    return [replace(one, chosen=one is chosen) for one in found]

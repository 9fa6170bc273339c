"""What a comparison finds."""

from __future__ import annotations

from dataclasses import dataclass, field

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

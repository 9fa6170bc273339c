"""What a comparison finds."""

from __future__ import annotations

from dataclasses import dataclass, field

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


@dataclass(frozen=True)
class FailedArm:
    """
    An SAE whose training became non-finite while that of others went on. It is neither saved nor measured.

    Args:
        architecture (str): Training architecture.
        seed (int): Seed of initialisation and data order.
        training_tokens (int): Tokens trained on before.
        reason (str): What was not finite.
    """

    architecture: str
    seed: int
    training_tokens: int
    reason: str


@dataclass(frozen=True)
class Comparison:
    """
    All results of a comparison.

    Args:
        settings (ComparisonSettings): As resolved.
        hook_name (str): Hook point.
        d_in (int): Size of the activations there.
        high_norm_share_dropped (float): Share of the training tokens that the filter dropped.
        high_norm_share_dropped_heldout (float): The same for the held-out tokens.
        arms (tuple[ArmResult, ...]): Seed by seed, in the order of the settings' arms.
        failed (tuple[FailedArm, ...]): Those that are missing there.
    """

    settings: ComparisonSettings
    hook_name: str
    d_in: int
    high_norm_share_dropped: float
    high_norm_share_dropped_heldout: float
    arms: tuple[ArmResult, ...]
    failed: tuple[FailedArm, ...] = ()

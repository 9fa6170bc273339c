"""Causal diagnostics: what edits of activations do to a model's next-token predictions.

All start from one `clean_run` of a model over contexts and take tokens of it, `run.sample()` or `run.sample().without_sinks()`.
"""

from saelens_cosine.metrics.causal.ablation import (
    AblationEffect,
    AblationPrecision,
    ConceptAblation,
    ablation_precision,
)
from saelens_cosine.metrics.causal.code_edits import decoded_change, reconstruct
from saelens_cosine.metrics.causal.forward import CleanRun, ResumedModel, clean_run, kl_divergence
from saelens_cosine.metrics.causal.patching import Mean, Patches, Patching, ScaledKL, direction_norm_patching
from saelens_cosine.metrics.causal.steering import Steering, SteeringEffect, steering
from saelens_cosine.metrics.causal.win_rate import FeatureCorrelations, NormRangeWinRate, WinRate, win_rate
from saelens_cosine.metrics.causal.win_rate_protocol import PROTOCOLS, WinRateProtocol

__all__ = [
    "clean_run",
    "CleanRun",
    "ResumedModel",
    "kl_divergence",
    "win_rate",
    "PROTOCOLS",
    "WinRateProtocol",
    "WinRate",
    "NormRangeWinRate",
    "FeatureCorrelations",
    "direction_norm_patching",
    "Patching",
    "Patches",
    "ScaledKL",
    "Mean",
    "ablation_precision",
    "AblationPrecision",
    "ConceptAblation",
    "AblationEffect",
    "steering",
    "Steering",
    "SteeringEffect",
    "reconstruct",
    "decoded_change",
]

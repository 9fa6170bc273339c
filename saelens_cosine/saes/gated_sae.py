"""Gated: SAELens' `GatedTrainingSAE` and `GatedSAE`, whose gate and magnitude both come from one score.

    s_i = score without b_enc,  gate_i = s_i + b_gate_i,  magnitude_i = exp(r_mag_i) s_i + b_mag_i
    code_i = relu(magnitude_i) where gate_i > 0

as SAELens has it for `s = x_c W_enc`, and experiment 63 of the paper for the cosine. The recipe's unit decoder, start of
`b_dec` and auxiliary loss (from magnitudes) apply beside SAELens' own two losses of the gate.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from sae_lens.saes.gated_sae import GatedSAE, GatedSAEConfig, GatedTrainingSAE, GatedTrainingSAEConfig
from sae_lens.saes.sae import SAEConfig, TrainStepInput
from torch import nn
from typing_extensions import override

from saelens_cosine.registry import register_inference, register_training
from saelens_cosine.saes.choices import check_choices
from saelens_cosine.saes.cosine import CosineScore, CosineScoreConfig, FoldedCosineScore, refuse_normalisation
from saelens_cosine.saes.per_feature_cosine import (
    FoldedPerFeatureCosineScore,
    PerFeatureCosineScore,
    PerFeatureCosineScoreConfig,
)
from saelens_cosine.saes.recipe.training_sae import RecipeConfig, RecipeTrainingSAE
from saelens_cosine.saes.scored_sae import InnerProductScore, ScoredSAE


@dataclass
class CosineGatedSAEConfig(GatedSAEConfig):
    """Configuration of a saved cosine Gated SAE; fields as in SAELens' GatedSAEConfig."""

    @override
    @classmethod
    def architecture(cls) -> str:
        return "cosine_gated"

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        check_choices(self)
        refuse_normalisation(self)


@dataclass
class PerFeatureCosineGatedSAEConfig(CosineGatedSAEConfig):
    """Configuration of a saved per-feature cosine Gated SAE; fields as in SAELens' GatedSAEConfig."""

    @override
    @classmethod
    def architecture(cls) -> str:
        return "per_feature_cosine_gated"


class GatedSelector(ScoredSAE):
    """SAELens' gate and magnitude on a score. `hook_sae_acts_pre` sees magnitudes before the ReLU, as in SAELens."""

    b_gate: nn.Parameter
    b_mag: nn.Parameter
    r_mag: nn.Parameter

    @override
    def encoder_bias(self) -> torch.Tensor:
        return torch.zeros_like(self.b_gate)

    def magnitude(self, score: torch.Tensor) -> torch.Tensor:
        """Magnitudes `[..., d_sae]` before the ReLU."""
        return (score * self.r_mag.exp() + self.b_mag).to(score.dtype)

    def gated(self, score: torch.Tensor, magnitude: torch.Tensor) -> torch.Tensor:
        """Codes `[..., d_sae]`."""
        return self.activation_fn(magnitude) * (score + self.b_gate > 0)

    @override
    def select(self, hidden_pre: torch.Tensor) -> torch.Tensor:
        return self.gated(hidden_pre, self.magnitude(hidden_pre))

    @override
    def encode_with_hidden_pre(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        score = self.score(self.process_sae_in(x))
        magnitude = self.hook_sae_acts_pre(self.magnitude(score))
        return self.hook_sae_acts_post(self.gated(score, magnitude).to(self.dtype)), magnitude


class CosineGatedSAE(GatedSelector, FoldedCosineScore, GatedSAE):
    """SAELens' GatedSAE with the cosine score, inference form."""


class PerFeatureCosineGatedSAE(GatedSelector, FoldedPerFeatureCosineScore, GatedSAE):
    """SAELens' GatedSAE with the cosine score and one exponent per feature, inference form."""


@dataclass
class InnerProductGatedTrainingSAEConfig(RecipeConfig, GatedTrainingSAEConfig):
    """Configuration of SAELens' Gated with the standard score under the paper's recipe; saved as SAELens' `gated`."""

    @override
    @classmethod
    def architecture(cls) -> str:
        return "inner_product_gated"

    @override
    def get_inference_config_class(self) -> type[SAEConfig]:
        return GatedSAEConfig


@dataclass
class CosineGatedTrainingSAEConfig(CosineScoreConfig, RecipeConfig, GatedTrainingSAEConfig):
    """Configuration for training Gated with the cosine score; saved as `cosine_gated`."""

    @override
    @classmethod
    def architecture(cls) -> str:
        return "cosine_gated"


@dataclass
class PerFeatureCosineGatedTrainingSAEConfig(PerFeatureCosineScoreConfig, CosineGatedTrainingSAEConfig):
    """Configuration for training Gated with one exponent and scale per feature; saved as `per_feature_cosine_gated`."""

    @override
    @classmethod
    def architecture(cls) -> str:
        return "per_feature_cosine_gated"


class GatedTraining(GatedSelector, RecipeTrainingSAE):
    """SAELens' losses of the gate, from our score: L1 of the rectified gate, and the error of reconstructing from it."""

    @override
    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return self.encode_with_hidden_pre(x)[0]

    @override
    def sparsity_losses(
        self,
        step_input: TrainStepInput,
        feature_acts: torch.Tensor,
        hidden_pre: torch.Tensor,
        sae_out: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        sae: Any = self
        gate = (self.score(self.process_sae_in(step_input.sae_in)) + self.b_gate).relu().to(self.dtype)
        l1 = self.whole.total((gate * self.W_dec.norm(dim=-1)).sum(dim=-1).mean())
        error = (sae.run_time_activation_norm_fn_out(self.add_up(gate) + self.b_dec) - step_input.sae_in).pow(2)
        return {"l1_loss": step_input.coefficients["l1"] * l1, "gate_reconstruction_loss": error.sum(dim=-1).mean()}


class InnerProductGatedTrainingSAE(InnerProductScore, GatedTraining, GatedTrainingSAE):
    """The control: SAELens' Gated and the standard score, under the same recipe as the cosine arms."""


class CosineGatedTrainingSAE(CosineScore, GatedTraining, GatedTrainingSAE):
    """Gated on the cosine score with one exponent and log-scale for all features."""


class PerFeatureCosineGatedTrainingSAE(PerFeatureCosineScore, GatedTraining, GatedTrainingSAE):
    """Gated on the cosine score with one exponent and log-scale per feature."""


register_inference(CosineGatedSAE, CosineGatedSAEConfig)
register_inference(PerFeatureCosineGatedSAE, PerFeatureCosineGatedSAEConfig)
register_training(InnerProductGatedTrainingSAE, InnerProductGatedTrainingSAEConfig)
register_training(CosineGatedTrainingSAE, CosineGatedTrainingSAEConfig)
register_training(PerFeatureCosineGatedTrainingSAE, PerFeatureCosineGatedTrainingSAEConfig)

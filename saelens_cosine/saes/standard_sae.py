"""ReLU with an L1 penalty: SAELens' `StandardTrainingSAE` and `StandardSAE` with the scores of this package.

Of the paper's recipe, the unit decoder and the start of `b_dec` apply. With rectified scores the auxiliary loss has no
gradient here, since a dead ReLU feature has no positive score; it is off by default, and `normalize_aux_loss=False` with a
coefficient gives SAELens' form, which sees negative scores.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from sae_lens.saes.sae import SAEConfig, TrainStepInput
from sae_lens.saes.standard_sae import (
    StandardSAE,
    StandardSAEConfig,
    StandardTrainingSAE,
    StandardTrainingSAEConfig,
)
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
from saelens_cosine.saes.scored_sae import InnerProductScore


@dataclass
class CosineStandardSAEConfig(StandardSAEConfig):
    """Configuration of a saved cosine Standard SAE; fields as in SAELens' StandardSAEConfig."""

    @override
    @classmethod
    def architecture(cls) -> str:
        return "cosine_standard"

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        check_choices(self)
        refuse_normalisation(self)


@dataclass
class PerFeatureCosineStandardSAEConfig(CosineStandardSAEConfig):
    """Configuration of a saved per-feature cosine Standard SAE; fields as in SAELens' StandardSAEConfig."""

    @override
    @classmethod
    def architecture(cls) -> str:
        return "per_feature_cosine_standard"


class CosineStandardSAE(FoldedCosineScore, StandardSAE):
    """SAELens' StandardSAE with the cosine score, inference form."""


class PerFeatureCosineStandardSAE(FoldedPerFeatureCosineScore, StandardSAE):
    """SAELens' StandardSAE with the cosine score and one exponent per feature, inference form."""


@dataclass(kw_only=True)
class StandardRecipeConfig(RecipeConfig):
    """The recipe without the auxiliary loss, which cannot reach a dead ReLU feature's rectified score."""

    keeps = frozenset({"aux_loss_coefficient"})

    aux_loss_coefficient: float = 0.0


@dataclass
class InnerProductStandardTrainingSAEConfig(StandardRecipeConfig, StandardTrainingSAEConfig):
    """Configuration of SAELens' Standard with the standard score under the paper's recipe; saved as SAELens' `standard`."""

    @override
    @classmethod
    def architecture(cls) -> str:
        return "inner_product_standard"

    @override
    def get_inference_config_class(self) -> type[SAEConfig]:
        return StandardSAEConfig


@dataclass
class CosineStandardTrainingSAEConfig(CosineScoreConfig, StandardRecipeConfig, StandardTrainingSAEConfig):
    """Configuration for training Standard with the cosine score; saved as `cosine_standard`."""

    @override
    @classmethod
    def architecture(cls) -> str:
        return "cosine_standard"


@dataclass
class PerFeatureCosineStandardTrainingSAEConfig(PerFeatureCosineScoreConfig, CosineStandardTrainingSAEConfig):
    """Configuration for training Standard with one exponent and scale per feature; saved as `per_feature_cosine_standard`."""

    @override
    @classmethod
    def architecture(cls) -> str:
        return "per_feature_cosine_standard"


class L1Penalty(RecipeTrainingSAE):
    """SAELens' penalty, `l1_coefficient` times the `lp_norm` of the codes, these weighted by decoder norms."""

    @override
    def sparsity_losses(
        self,
        step_input: TrainStepInput,
        feature_acts: torch.Tensor,
        hidden_pre: torch.Tensor,
        sae_out: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        size = self.whole.norm(feature_acts * self.W_dec.norm(dim=1), p=self.cfg.lp_norm)
        return {"l1_loss": (step_input.coefficients["l1"] * size).mean()}


class InnerProductStandardTrainingSAE(InnerProductScore, L1Penalty, StandardTrainingSAE):
    """The control: SAELens' ReLU and L1 and the standard score, under the same recipe as the cosine arms."""


class CosineStandardTrainingSAE(CosineScore, L1Penalty, StandardTrainingSAE):
    """ReLU and L1 on the cosine score with one exponent and log-scale for all features."""


class PerFeatureCosineStandardTrainingSAE(PerFeatureCosineScore, L1Penalty, StandardTrainingSAE):
    """ReLU and L1 on the cosine score with one exponent and log-scale per feature."""


register_inference(CosineStandardSAE, CosineStandardSAEConfig)
register_inference(PerFeatureCosineStandardSAE, PerFeatureCosineStandardSAEConfig)
register_training(InnerProductStandardTrainingSAE, InnerProductStandardTrainingSAEConfig)
register_training(CosineStandardTrainingSAE, CosineStandardTrainingSAEConfig)
register_training(PerFeatureCosineStandardTrainingSAE, PerFeatureCosineStandardTrainingSAEConfig)

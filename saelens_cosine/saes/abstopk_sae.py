"""AbsTopK, per-token selection by size with signs kept: SAELens' `AbsTopKTrainingSAE` and `AbsTopKSAE` with our scores.

The paper's recipe applies whole; a feature fires when its code is not zero, and the paper's auxiliary loss rectifies the
scores of dead features here too (experiment 63). A shared exponent cancels from the ranking within a token, up to `b_enc`.
"""

from __future__ import annotations

from dataclasses import dataclass

from sae_lens.saes.abstopk_sae import AbsTopKSAE, AbsTopKSAEConfig, AbsTopKTrainingSAE, AbsTopKTrainingSAEConfig
from sae_lens.saes.sae import SAEConfig
from typing_extensions import override

from saelens_cosine.registry import register_inference, register_training
from saelens_cosine.saes.choices import check_choices
from saelens_cosine.saes.cosine import CosineScore, CosineScoreConfig, FoldedCosineScore, refuse_normalisation
from saelens_cosine.saes.per_feature_cosine import (
    FoldedPerFeatureCosineScore,
    PerFeatureCosineScore,
    PerFeatureCosineScoreConfig,
)
from saelens_cosine.saes.recipe.training_sae import RecipeTrainingSAE, TopKRecipeConfig
from saelens_cosine.saes.scored_sae import InnerProductScore


@dataclass
class CosineAbsTopKSAEConfig(AbsTopKSAEConfig):
    """Configuration of a saved cosine AbsTopK SAE; fields as in SAELens' AbsTopKSAEConfig."""

    @override
    @classmethod
    def architecture(cls) -> str:
        return "cosine_abstopk"

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        check_choices(self)
        refuse_normalisation(self)


@dataclass
class PerFeatureCosineAbsTopKSAEConfig(CosineAbsTopKSAEConfig):
    """Configuration of a saved per-feature cosine AbsTopK SAE; fields as in SAELens' AbsTopKSAEConfig."""

    @override
    @classmethod
    def architecture(cls) -> str:
        return "per_feature_cosine_abstopk"


class CosineAbsTopKSAE(FoldedCosineScore, AbsTopKSAE):
    """SAELens' AbsTopKSAE with the cosine score, inference form."""


class PerFeatureCosineAbsTopKSAE(FoldedPerFeatureCosineScore, AbsTopKSAE):
    """SAELens' AbsTopKSAE with the cosine score and one exponent per feature, inference form."""


@dataclass
class InnerProductAbsTopKTrainingSAEConfig(TopKRecipeConfig, AbsTopKTrainingSAEConfig):
    """Configuration of SAELens' AbsTopK with the standard score under the paper's recipe; saved as SAELens' `abstopk`."""

    @override
    @classmethod
    def architecture(cls) -> str:
        return "inner_product_abstopk"

    @override
    def get_inference_config_class(self) -> type[SAEConfig]:
        return AbsTopKSAEConfig


@dataclass
class CosineAbsTopKTrainingSAEConfig(CosineScoreConfig, TopKRecipeConfig, AbsTopKTrainingSAEConfig):
    """Configuration for training AbsTopK with the cosine score; saved as `cosine_abstopk`."""

    @override
    @classmethod
    def architecture(cls) -> str:
        return "cosine_abstopk"


@dataclass
class PerFeatureCosineAbsTopKTrainingSAEConfig(PerFeatureCosineScoreConfig, CosineAbsTopKTrainingSAEConfig):
    """Configuration for training AbsTopK with one exponent and scale per feature; saved as `per_feature_cosine_abstopk`."""

    @override
    @classmethod
    def architecture(cls) -> str:
        return "per_feature_cosine_abstopk"


class SignedCodes(RecipeTrainingSAE):
    """Dead features are ranked by the size of their scores, unless the auxiliary loss rectifies these."""

    signed_codes = True


class InnerProductAbsTopKTrainingSAE(InnerProductScore, SignedCodes, AbsTopKTrainingSAE):
    """The control: SAELens' AbsTopK and the standard score, under the same recipe as the cosine arms."""


class CosineAbsTopKTrainingSAE(CosineScore, SignedCodes, AbsTopKTrainingSAE):
    """AbsTopK on the cosine score with one exponent and log-scale for all features."""


class PerFeatureCosineAbsTopKTrainingSAE(PerFeatureCosineScore, SignedCodes, AbsTopKTrainingSAE):
    """AbsTopK on the cosine score with one exponent and log-scale per feature."""


register_inference(CosineAbsTopKSAE, CosineAbsTopKSAEConfig)
register_inference(PerFeatureCosineAbsTopKSAE, PerFeatureCosineAbsTopKSAEConfig)
register_training(InnerProductAbsTopKTrainingSAE, InnerProductAbsTopKTrainingSAEConfig)
register_training(CosineAbsTopKTrainingSAE, CosineAbsTopKTrainingSAEConfig)
register_training(PerFeatureCosineAbsTopKTrainingSAE, PerFeatureCosineAbsTopKTrainingSAEConfig)

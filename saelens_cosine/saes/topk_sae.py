"""Per-token TopK: SAELens' `TopKTrainingSAE` and `TopKSAE` with the scores of this package."""

from __future__ import annotations

from dataclasses import dataclass

from sae_lens.saes.sae import SAEConfig
from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig, TopKTrainingSAE, TopKTrainingSAEConfig
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
class CosineTopKSAEConfig(TopKSAEConfig):
    """Configuration of a saved cosine TopK SAE; fields as in SAELens' TopKSAEConfig."""

    @override
    @classmethod
    def architecture(cls) -> str:
        return "cosine_topk"

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        check_choices(self)
        refuse_normalisation(self)


@dataclass
class PerFeatureCosineTopKSAEConfig(CosineTopKSAEConfig):
    """Configuration of a saved per-feature cosine TopK SAE; fields as in SAELens' TopKSAEConfig."""

    @override
    @classmethod
    def architecture(cls) -> str:
        return "per_feature_cosine_topk"


class CosineTopKSAE(FoldedCosineScore, TopKSAE):
    """SAELens' TopKSAE with the cosine score, inference form."""


class PerFeatureCosineTopKSAE(FoldedPerFeatureCosineScore, TopKSAE):
    """SAELens' TopKSAE with the cosine score and one exponent per feature, inference form."""


@dataclass
class InnerProductTopKTrainingSAEConfig(TopKRecipeConfig, TopKTrainingSAEConfig):
    """Configuration of SAELens' TopK with the standard score under the paper's recipe; saved as SAELens' `topk`."""

    @override
    @classmethod
    def architecture(cls) -> str:
        return "inner_product_topk"

    @override
    def get_inference_config_class(self) -> type[SAEConfig]:
        return TopKSAEConfig


@dataclass
class CosineTopKTrainingSAEConfig(CosineScoreConfig, TopKRecipeConfig, TopKTrainingSAEConfig):
    """Configuration for training TopK with the cosine score; saved as `cosine_topk`."""

    @override
    @classmethod
    def architecture(cls) -> str:
        return "cosine_topk"


@dataclass
class PerFeatureCosineTopKTrainingSAEConfig(PerFeatureCosineScoreConfig, CosineTopKTrainingSAEConfig):
    """Configuration for training TopK with one exponent and scale per feature; saved as `per_feature_cosine_topk`."""

    @override
    @classmethod
    def architecture(cls) -> str:
        return "per_feature_cosine_topk"


class InnerProductTopKTrainingSAE(InnerProductScore, RecipeTrainingSAE, TopKTrainingSAE):
    """The control: SAELens' TopK and the standard score, under the same recipe as the cosine arms."""


class CosineTopKTrainingSAE(CosineScore, RecipeTrainingSAE, TopKTrainingSAE):
    """TopK on the cosine score. A shared exponent cancels from the ranking within a token, up to `b_enc`."""


class PerFeatureCosineTopKTrainingSAE(PerFeatureCosineScore, RecipeTrainingSAE, TopKTrainingSAE):
    """TopK on the cosine score with one exponent and log-scale per feature."""


register_inference(CosineTopKSAE, CosineTopKSAEConfig)
register_inference(PerFeatureCosineTopKSAE, PerFeatureCosineTopKSAEConfig)
register_training(InnerProductTopKTrainingSAE, InnerProductTopKTrainingSAEConfig)
register_training(CosineTopKTrainingSAE, CosineTopKTrainingSAEConfig)
register_training(PerFeatureCosineTopKTrainingSAE, PerFeatureCosineTopKTrainingSAEConfig)

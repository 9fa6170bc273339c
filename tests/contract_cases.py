"""What test_contract and its neighbours share."""

from dataclasses import dataclass

import pytest
from helpers import (
    SELECTORS,
    TRAINING,
    selector_of,
)
from sae_lens.saes.standard_sae import (
    StandardSAE,
    StandardSAEConfig,
    StandardTrainingSAE,
    StandardTrainingSAEConfig,
)
from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig, TopKTrainingSAE, TopKTrainingSAEConfig

from saelens_cosine import register_inference, register_training
from saelens_cosine.saes.recipe.training_sae import RecipeTrainingSAE, TopKRecipeConfig
from saelens_cosine.saes.scored_sae import ScoredSAE, ScoredTrainingSAE


class L1Score(ScoredSAE):
    def score(self, x_centered):
        share = x_centered / x_centered.abs().sum(dim=-1, keepdim=True).clamp_min(1e-8)
        return (share.to(self.W_enc.dtype) @ self.W_enc + self.b_enc).to(x_centered.dtype)


@dataclass
class L1StandardSAEConfig(StandardSAEConfig):
    @classmethod
    def architecture(cls):
        return "l1_standard"


@dataclass
class L1StandardTrainingSAEConfig(StandardTrainingSAEConfig):
    @classmethod
    def architecture(cls):
        return "l1_standard"


@dataclass
class L1TopKSAEConfig(TopKSAEConfig):
    @classmethod
    def architecture(cls):
        return "l1_topk"


@dataclass
class L1TopKTrainingSAEConfig(TopKRecipeConfig, TopKTrainingSAEConfig):
    @classmethod
    def architecture(cls):
        return "l1_topk"


class L1StandardSAE(L1Score, StandardSAE): ...


class L1TopKSAE(L1Score, TopKSAE): ...


class L1StandardTrainingSAE(L1Score, ScoredTrainingSAE, StandardTrainingSAE): ...


class L1TopKTrainingSAE(L1Score, RecipeTrainingSAE, TopKTrainingSAE): ...


TOYS = ["l1_standard", "l1_topk"]
ALL = [*TRAINING, *TOYS]


@pytest.fixture(autouse=True)
def _third_party(registries):
    register_inference(L1StandardSAE, L1StandardSAEConfig)
    register_inference(L1TopKSAE, L1TopKSAEConfig)
    register_training(L1StandardTrainingSAE, L1StandardTrainingSAEConfig)
    register_training(L1TopKTrainingSAE, L1TopKTrainingSAEConfig)


TRAINABLE = ["standard", "gated", "jumprelu", "topk", "abstopk", "batchtopk", "matryoshka_batchtopk"]  # by SAELens


def plain_selector(name):
    """What SAELens calls the selector that an SAE is saved with."""
    return SELECTORS[selector_of(name)].saved_as


def saved_as(name):
    score = name.removesuffix(selector_of(name))
    return plain_selector(name) if score == "inner_product_" else score + plain_selector(name)

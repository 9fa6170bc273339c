"""BatchTopK: SAELens' `BatchTopKTrainingSAE` with the scores of this package; saved with a threshold, as JumpReLU."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
from sae_lens.saes.sae import SAEConfig, TrainStepInput, TrainStepOutput
from typing_extensions import override

from saelens_cosine.kernels.codes import EntryCodes
from saelens_cosine.kernels.selection import EntrySelector, above
from saelens_cosine.kernels.whole import least
from saelens_cosine.registry import register_training
from saelens_cosine.saes.cosine import CosineScore, CosineScoreConfig
from saelens_cosine.saes.jumprelu_sae import CosineJumpReLUSAEConfig, PerFeatureCosineJumpReLUSAEConfig
from saelens_cosine.saes.per_feature_cosine import PerFeatureCosineScore, PerFeatureCosineScoreConfig
from saelens_cosine.saes.recipe.training_sae import RecipeTrainingSAE, TopKRecipeConfig
from saelens_cosine.saes.scored_sae import InnerProductScore, ScoredTrainingSAE
from saelens_cosine.score import wide


@dataclass(kw_only=True)
class BatchTopKThresholdConfig(BatchTopKTrainingSAEConfig):
    """
    How the threshold that replaces batch-wide selection after training is learned.

    Args:
        topk_threshold_lr (float): Weight of each batch in the threshold's running average. SAELens uses 0.01 and starts at 0, so that a run of a few hundred steps is saved with far too low a threshold; here the average starts at the first batch's smallest selected score and spans about 5 steps, which follows scores that still move when a short run ends.
        topk_threshold_start_step (int): Training step at which the average starts. The paper: 1000, the end of its learning-rate warm-up.
    """

    topk_threshold_lr: float = 0.2
    topk_threshold_start_step: int = 0

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.topk_threshold_lr <= 1:
            raise ValueError(f"topk_threshold_lr={self.topk_threshold_lr} must be in (0, 1].")


class BatchTopKThreshold(ScoredTrainingSAE):
    """BatchTopK while training, the learned threshold in eval mode: what is evaluated is what is saved.

    `topk_threshold` is 0 until the average has started. Source: experiment 40 of the paper's released code, an
    exponential average of each batch's smallest selected score that starts at the first of them, compared with `>`.
    """

    topk_threshold: torch.Tensor

    @override
    def select(self, hidden_pre: torch.Tensor) -> torch.Tensor:
        if self.training or not self.topk_threshold > 0:
            return super().select(hidden_pre)
        return hidden_pre.relu() * (hidden_pre > self.topk_threshold)

    @override
    def entry_selector(self, n_tokens: int) -> EntrySelector | None:
        if self.training or not self.topk_threshold > 0:
            return super().entry_selector(n_tokens)
        return lambda inputs, encoder, hint: (above(inputs, encoder, self.topk_threshold), hint)

    @override
    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        before = self.topk_threshold  # 0, or what a checkpoint brought
        output = super().training_forward_pass(step_input)
        if step_input.n_training_steps < self.cfg.topk_threshold_start_step:
            self.topk_threshold = before
        return output

    @torch.no_grad()
    def update_topk_threshold(self, acts_topk: torch.Tensor) -> None:
        """One step of the average; called by SAELens with this batch's codes. A batch without codes changes nothing."""
        old = self.topk_threshold
        codes = acts_topk.values if isinstance(acts_topk, EntryCodes) else acts_topk
        smallest = self.whole.smallest(least(torch.where(codes > 0, codes, torch.inf))).to(old.dtype)
        average = old + self.cfg.topk_threshold_lr * (smallest - old)
        new = torch.where(old > 0, average, smallest)
        self.topk_threshold = torch.where(smallest < torch.inf, new, old)

    @override
    def training_metrics(self) -> dict[str, torch.Tensor]:
        return {**super().training_metrics(), "topk_threshold": self.topk_threshold}

    @override
    def process_state_dict_for_saving_inference(self, state_dict: dict[str, Any]) -> None:
        threshold = state_dict["topk_threshold"].item()
        if not threshold > 0:
            warnings.warn(
                f"{self.cfg.architecture()} is saved without a learned threshold: the average starts at step "
                f"topk_threshold_start_step={self.cfg.topk_threshold_start_step}, which training did not reach. Every "
                "positive score will be active.",
                stacklevel=2,
            )
        super().process_state_dict_for_saving_inference(state_dict)
        state_dict["threshold"] = torch.full_like(self.b_enc, threshold, dtype=wide(self.dtype))


@dataclass
class InnerProductBatchTopKTrainingSAEConfig(TopKRecipeConfig, BatchTopKThresholdConfig):
    """Configuration of SAELens' BatchTopK with the standard score under the paper's recipe; saved as `jumprelu`."""

    @override
    @classmethod
    def architecture(cls) -> str:
        return "inner_product_batchtopk"


@dataclass
class CosineBatchTopKTrainingSAEConfig(CosineScoreConfig, TopKRecipeConfig, BatchTopKThresholdConfig):
    """Configuration for training BatchTopK with the cosine score; saved as `cosine_jumprelu`."""

    @override
    @classmethod
    def architecture(cls) -> str:
        return "cosine_batchtopk"

    @override
    def get_inference_config_class(self) -> type[SAEConfig]:
        return CosineJumpReLUSAEConfig


@dataclass
class PerFeatureCosineBatchTopKTrainingSAEConfig(PerFeatureCosineScoreConfig, CosineBatchTopKTrainingSAEConfig):
    """Configuration for training BatchTopK with one exponent and scale per feature; saved as `per_feature_cosine_jumprelu`."""

    @override
    @classmethod
    def architecture(cls) -> str:
        return "per_feature_cosine_batchtopk"

    @override
    def get_inference_config_class(self) -> type[SAEConfig]:
        return PerFeatureCosineJumpReLUSAEConfig


class InnerProductBatchTopKTrainingSAE(InnerProductScore, RecipeTrainingSAE, BatchTopKThreshold, BatchTopKTrainingSAE):
    """The control: SAELens' BatchTopK and the standard score, under the same recipe as the cosine arms."""


class CosineBatchTopKTrainingSAE(CosineScore, RecipeTrainingSAE, BatchTopKThreshold, BatchTopKTrainingSAE):
    """BatchTopK on the cosine score with one exponent and log-scale for all features."""


class PerFeatureCosineBatchTopKTrainingSAE(
    PerFeatureCosineScore, RecipeTrainingSAE, BatchTopKThreshold, BatchTopKTrainingSAE
):
    """BatchTopK on the cosine score with one exponent and log-scale per feature, the paper's headline model."""


register_training(InnerProductBatchTopKTrainingSAE, InnerProductBatchTopKTrainingSAEConfig)
register_training(CosineBatchTopKTrainingSAE, CosineBatchTopKTrainingSAEConfig)
register_training(PerFeatureCosineBatchTopKTrainingSAE, PerFeatureCosineBatchTopKTrainingSAEConfig)

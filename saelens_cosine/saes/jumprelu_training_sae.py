"""JumpReLU with learned thresholds: SAELens' `JumpReLUTrainingSAE` with the scores of this package, and a signal that works.

SAELens' settings are absolute: a bandwidth of 0.05, thresholds from 0.01 that Adam moves by the learning rate, a penalty
against a reconstruction loss of any size. Scores of some tens or hundreds then never see their thresholds, and the paper's
own attempt (experiment 63) stayed at an L0 of thousands, its thresholds bound to a factor of three by the learning rate.
Here everything is relative:

- thresholds and bandwidth count in units of the root mean square of positive scores (experiment 63 has its bandwidth so), a
  running one, so that they follow when scores grow as a whole;
- thresholds start where the first batch's L0 is `target_l0`, and move three times as far in a step as weights do;
- the penalty, quadratic in the batch's mean L0 about the target, is multiplied by the (detached) reconstruction loss.

Of the paper's recipe the unit decoder, the start of `b_dec` and the auxiliary loss apply.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from sae_lens.saes.jumprelu_sae import (
    JumpReLU,
    JumpReLUSAEConfig,
    JumpReLUTrainingSAE,
    JumpReLUTrainingSAEConfig,
    Step,
    calculate_pre_act_loss,
)
from sae_lens.saes.sae import SAEConfig, TrainStepInput
from torch import nn
from typing_extensions import override

from saelens_cosine.kernels.whole import HERE, Whole, least
from saelens_cosine.registry import register_training
from saelens_cosine.saes.cosine import CosineScore, CosineScoreConfig
from saelens_cosine.saes.per_feature_cosine import PerFeatureCosineScore, PerFeatureCosineScoreConfig
from saelens_cosine.saes.recipe.training_sae import RecipeConfig, RecipeTrainingSAE
from saelens_cosine.saes.scored_sae import InnerProductScore

UNIT_RATE = 0.1
"""Weight of each batch in the running root mean square."""

SAMPLE_SCORES = 2**24
"""Scores of the first batch that the start of the thresholds is taken from, at most."""


@dataclass(kw_only=True)
class JumpReLUThresholdConfig(RecipeConfig, JumpReLUTrainingSAEConfig):
    """
    SAELens' JumpReLU settings in units of the scores, and a target for L0.

    Args:
        jumprelu_sparsity_loss_mode (Literal["step", "tanh", "quadratic"]): SAELens' modes. "quadratic" is 2 / target_l0 times the squared distance of the batch's mean L0 from target_l0; SAELens takes each token's, which settles below the target where tokens differ.
        target_l0 (float | None): Active features per token that thresholds start at and that "quadratic" holds.
        jumprelu_bandwidth (float): Width of the window in which a score moves its threshold, as a multiple of the root mean square of positive scores (the paper's experiment 63: 0.5).
        jumprelu_init_threshold (float): Start of the thresholds without a target_l0, as a multiple of the same.
        threshold_lr_multiplier (float): Times the learning rate, how far an optimizer like Adam moves a threshold in a step, as a multiple of the same.
        relative_l0_loss (bool): Multiply the sparsity loss by the (detached) reconstruction loss, so that l0_coefficient means the same at any scale of the activations. False is SAELens'.
    """

    jumprelu_sparsity_loss_mode: Literal["step", "tanh", "quadratic"] = "quadratic"
    target_l0: float | None = 100.0
    jumprelu_bandwidth: float = 0.5
    threshold_lr_multiplier: float = 3.0
    relative_l0_loss: bool = True

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        if self.target_l0 is not None and not 0 < self.target_l0 < self.d_sae:
            raise ValueError(f"target_l0={self.target_l0} must lie between 0 and d_sae={self.d_sae}.")
        if self.target_l0 is None and self.jumprelu_sparsity_loss_mode == "quadratic":
            raise ValueError("jumprelu_sparsity_loss_mode='quadratic' needs a target_l0; set one, or 'step' or 'tanh'.")
        for name in ("jumprelu_bandwidth", "threshold_lr_multiplier"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be positive.")


@dataclass
class InnerProductJumpReLUTrainingSAEConfig(JumpReLUThresholdConfig):
    """Configuration of SAELens' JumpReLU with the standard score under the paper's recipe; saved as SAELens' `jumprelu`."""

    @override
    @classmethod
    def architecture(cls) -> str:
        return "inner_product_jumprelu"

    @override
    def get_inference_config_class(self) -> type[SAEConfig]:
        return JumpReLUSAEConfig


@dataclass
class CosineJumpReLUTrainingSAEConfig(CosineScoreConfig, JumpReLUThresholdConfig):
    """Configuration for training JumpReLU with the cosine score; saved as `cosine_jumprelu`."""

    @override
    @classmethod
    def architecture(cls) -> str:
        return "cosine_jumprelu"


@dataclass
class PerFeatureCosineJumpReLUTrainingSAEConfig(PerFeatureCosineScoreConfig, CosineJumpReLUTrainingSAEConfig):
    """Configuration for training JumpReLU with one exponent and scale per feature; saved as `per_feature_cosine_jumprelu`."""

    @override
    @classmethod
    def architecture(cls) -> str:
        return "per_feature_cosine_jumprelu"


class LearnedThreshold(RecipeTrainingSAE):
    """SAELens' JumpReLU with its straight-through gradients, on thresholds and windows in units of the scores."""

    training_state: ClassVar[dict[str, torch.dtype]] = {
        **RecipeTrainingSAE.training_state,
        "threshold_unit": torch.float32,
    }

    threshold: nn.Parameter
    threshold_unit: torch.Tensor

    def __init__(self, cfg: Any, use_error_term: bool = False):
        super().__init__(cfg, use_error_term)
        self.register_buffer("threshold_unit", torch.ones((), device=self.W_dec.device))

    def score_thresholds(self) -> torch.Tensor:
        """Thresholds in units of the scores, `[d_sae]`."""
        return self.threshold * (self.cfg.threshold_lr_multiplier * self.threshold_unit)

    @override
    @torch.no_grad()
    def initialize_from_data(self, batch: torch.Tensor) -> None:
        super().initialize_from_data(batch)  # b_dec and scale, which scores depend on
        sample = batch[: max(1, SAMPLE_SCORES // self.whole.size(self.cfg.d_sae))]
        scores = self.score(self.process_sae_in(sample))
        self.threshold_unit = root_mean_square_positive(scores, self.whole).to(self.threshold_unit.dtype)
        start = self.threshold_unit * self.cfg.jumprelu_init_threshold
        if self.cfg.target_l0 is not None:
            start = self.whole.ranked(scores.flatten(), math.ceil(self.cfg.target_l0 * len(scores)))[0].clamp_min(0)
        self.threshold.copy_(
            (start / (self.cfg.threshold_lr_multiplier * self.threshold_unit)).expand_as(self.threshold)
        )

    @override
    def select(self, hidden_pre: torch.Tensor) -> torch.Tensor:
        threshold = self.score_thresholds().to(hidden_pre.dtype)
        if not self.training:  # SAELens' training step starts with the same clamp
            return hidden_pre * (hidden_pre > threshold.clamp_min(0))
        return JumpReLU.apply(hidden_pre, threshold, self._window(), self.cfg.jumprelu_ste_to_input)

    def _window(self) -> torch.Tensor:
        return self.cfg.jumprelu_bandwidth * self.threshold_unit

    @override
    def sparsity_losses(
        self,
        step_input: TrainStepInput,
        feature_acts: torch.Tensor,
        hidden_pre: torch.Tensor,
        sae_out: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        cfg, threshold = self.cfg, self.score_thresholds().to(hidden_pre.dtype)
        decoder_norm = self.W_dec.norm(dim=-1)
        if cfg.jumprelu_sparsity_loss_mode == "tanh":
            loss = self.whole.total(
                torch.tanh(cfg.jumprelu_tanh_scale * feature_acts * decoder_norm).sum(dim=-1).mean()
            )
        else:
            active: Any = Step.apply(hidden_pre, threshold, self._window(), cfg.jumprelu_ste_to_input)
            loss = self.whole.total(active.sum(dim=-1).mean())
            if cfg.jumprelu_sparsity_loss_mode == "quadratic":
                loss = 2 / cfg.target_l0 * (loss - cfg.target_l0) ** 2
        loss = step_input.coefficients["l0"] * loss
        if cfg.relative_l0_loss:
            loss = loss * (sae_out - step_input.sae_in).detach().pow(2).sum(dim=-1).mean()
        now = root_mean_square_positive(hidden_pre.detach(), self.whole).to(self.threshold_unit.dtype)
        self.threshold_unit = self.threshold_unit.lerp(now, UNIT_RATE)
        losses = {"l0_loss": loss}
        if cfg.pre_act_loss_coefficient is not None:
            loss = calculate_pre_act_loss(
                cfg.pre_act_loss_coefficient, threshold, hidden_pre, step_input.dead_neuron_mask, decoder_norm
            )
            losses["pre_act_loss"] = self.whole.total(loss)
        return losses

    @override
    def training_metrics(self) -> dict[str, torch.Tensor]:
        thresholds = self.score_thresholds().detach()
        return {
            **super().training_metrics(),
            "threshold_mean": self.whole.mean(thresholds),
            "threshold_min": self.whole.smallest(least(thresholds)),
            "threshold_max": -self.whole.smallest(least(-thresholds)),
        }

    @override
    def process_state_dict_for_saving_inference(self, state_dict: dict[str, Any]) -> None:
        super().process_state_dict_for_saving_inference(state_dict)
        state_dict["threshold"] = self.score_thresholds().detach().clamp_min(0)


def root_mean_square_positive(scores: torch.Tensor, whole: Whole = HERE) -> torch.Tensor:
    """Root mean square of the positive scores, `[]`; the smallest normal number if there are none."""
    positive = scores.relu()
    mean = whole.sum(positive.square().sum()) / whole.sum((positive > 0).sum()).clamp_min(1)
    return mean.sqrt().clamp_min(torch.finfo(scores.dtype).tiny)


class InnerProductJumpReLUTrainingSAE(InnerProductScore, LearnedThreshold, JumpReLUTrainingSAE):
    """The control: JumpReLU and the standard score, under the same recipe as the cosine arms."""


class CosineJumpReLUTrainingSAE(CosineScore, LearnedThreshold, JumpReLUTrainingSAE):
    """JumpReLU on the cosine score with one exponent and log-scale for all features."""


class PerFeatureCosineJumpReLUTrainingSAE(PerFeatureCosineScore, LearnedThreshold, JumpReLUTrainingSAE):
    """JumpReLU on the cosine score with one exponent and log-scale per feature."""


register_training(InnerProductJumpReLUTrainingSAE, InnerProductJumpReLUTrainingSAEConfig)
register_training(CosineJumpReLUTrainingSAE, CosineJumpReLUTrainingSAEConfig)
register_training(PerFeatureCosineJumpReLUTrainingSAE, PerFeatureCosineJumpReLUTrainingSAEConfig)

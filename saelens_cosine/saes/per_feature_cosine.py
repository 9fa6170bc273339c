"""One exponent and one log-scale per feature: the paper's headline score, what features may share, and its regularisers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from torch import nn
from typing_extensions import override

from saelens_cosine.saes.cosine import CosineScore, CosineScoreConfig, FoldedCosineScore, parameter, times


@dataclass(kw_only=True)
class PerFeatureCosineScoreConfig(CosineScoreConfig):
    """
    Configuration of the cosine score with one exponent and log-scale per feature.

    Args:
        exponent_sharing (Literal["independent", "base_delta", "groups"]): What features share. "independent": nothing, the form that the paper's authors published. "base_delta": exponents are a common one plus each feature's own difference, which kept deep layers alive (experiment 47). "groups": exponent and log-scale are those of a block of features (experiment 37).
        n_exponent_groups (int | None): Number of blocks of consecutive features for exponent_sharing="groups"; what d_sae leaves over joins the last.
        norm_exponent_init_std (float): Standard deviation of the exponents' starts around norm_exponent_init (experiment 47: 0.05).
        norm_exponent_variance_penalty (float): Adds this times the unbiased variance of the exponents over features to the loss (experiment 47: 0.1).
        norm_exponent_variance_constant_steps (int): The variance penalty is constant up to this step (experiment 47: 2000).
        norm_exponent_variance_end_step (int): It then falls linearly to 0 at this one (experiment 47: 8000).
        norm_exponent_dropout (float): Probability that a training step takes a feature's exponent as 0, for all its tokens; otherwise exponents count 1 - p times themselves (experiment 37).
    """

    exponent_sharing: Literal["independent", "base_delta", "groups"] = "independent"
    n_exponent_groups: int | None = None
    norm_exponent_init_std: float = 0.0
    norm_exponent_variance_penalty: float = 0.0
    norm_exponent_variance_constant_steps: int = 2000
    norm_exponent_variance_end_step: int = 8000
    norm_exponent_dropout: float = 0.0

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        groups = self.n_exponent_groups
        if (self.exponent_sharing == "groups") != (groups is not None):
            raise ValueError(
                f"n_exponent_groups={groups} does not go with exponent_sharing={self.exponent_sharing!r}: set a number of "
                "groups exactly when exponent_sharing='groups'."
            )
        if groups is not None and not 0 < groups <= self.d_sae:
            raise ValueError(f"n_exponent_groups={groups} must be between 1 and d_sae={self.d_sae}.")
        if not 0 <= self.norm_exponent_dropout < 1:
            raise ValueError(f"norm_exponent_dropout={self.norm_exponent_dropout} must be in [0, 1).")
        first, last = self.norm_exponent_variance_constant_steps, self.norm_exponent_variance_end_step
        if not 0 <= first < last:
            raise ValueError(
                f"norm_exponent_variance_constant_steps={first} must lie below norm_exponent_variance_end_step={last}."
            )
        if self.norm_exponent_variance_penalty and not self.learn_norm_exponent:
            raise ValueError(
                f"norm_exponent_variance_penalty={self.norm_exponent_variance_penalty} has nothing to move with "
                "learn_norm_exponent=False; set one."
            )


class PerFeatureCosineScore(CosineScore):
    """One exponent and one log-scale per feature, the form that the paper's authors published, or shared as configured."""

    per_feature = True
    norm_exponent_base: nn.Parameter
    dropout_draws: torch.Tensor
    _dropped: torch.Tensor | None = None

    @override
    def initialize_weights(self) -> None:
        super().initialize_weights()
        cfg: Any = self.cfg
        if cfg.exponent_sharing == "base_delta":
            start = cfg.norm_exponent_init / cfg.norm_exponent_lr_multiplier
            self.norm_exponent_base = parameter(self, (), start, cfg.learn_norm_exponent)
            self.norm_exponent.data.zero_()
        if cfg.norm_exponent_dropout:
            self.register_buffer("dropout_draws", torch.zeros((), dtype=torch.int64, device=self.device))
        if cfg.norm_exponent_init_std:
            noise = torch.randn_like(self.norm_exponent.data)
            self.norm_exponent.data.add_(noise, alpha=cfg.norm_exponent_init_std / cfg.norm_exponent_lr_multiplier)

    @override
    def _score_parameter(self, value: float, learn: bool) -> nn.Parameter:
        return parameter(self, (self.cfg.n_exponent_groups or self.cfg.d_sae,), value, learn)

    @override
    def own_exponent(self) -> torch.Tensor:
        own = super().own_exponent()
        if self.cfg.exponent_sharing == "base_delta":
            return own + times(self.whole.shared(self.norm_exponent_base), self.cfg.norm_exponent_lr_multiplier)
        return own

    @override
    def spread(self, own: torch.Tensor) -> torch.Tensor:
        if self.cfg.exponent_sharing != "groups":
            return own
        d_sae, n_groups = self.whole.size(self.cfg.d_sae), len(own)
        sizes = torch.full((n_groups,), d_sae // n_groups, device=own.device)
        sizes[-1] += d_sae % n_groups
        every = self.whole.shared(own).repeat_interleave(sizes, output_size=d_sae)
        return every[self.whole.first :][: self.cfg.d_sae]

    @override
    def exponents(self, in_training: bool) -> torch.Tensor:
        exponents = super().exponents(in_training)
        if in_training and self._dropped is not None:
            return exponents * (~self._dropped).to(exponents)
        return times(exponents, 1 - self.cfg.norm_exponent_dropout)

    @override
    def _kept_exponent(self) -> torch.Tensor:
        return times(self.own_exponent(), 1 - self.cfg.norm_exponent_dropout)

    @override
    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        p = self.cfg.norm_exponent_dropout
        if p:
            # from a count that checkpoints keep, so that a resumed run drops what an uninterrupted one does; SAELens' own
            # count is one behind in a checkpoint
            rng = torch.Generator().manual_seed(int(self.dropout_draws))
            self.dropout_draws += 1
            every = torch.rand(self.whole.size(self.cfg.d_sae), generator=rng) < p
            self._dropped = every[self.whole.first :][: self.cfg.d_sae].to(self.W_dec.device)
        return super().training_forward_pass(step_input)

    @override
    def exponent_penalties(self, step: int) -> dict[str, torch.Tensor]:
        penalties = super().exponent_penalties(step)
        first, last = self.cfg.norm_exponent_variance_constant_steps, self.cfg.norm_exponent_variance_end_step
        weight = self.cfg.norm_exponent_variance_penalty * min(1.0, max(0.0, (last - step) / (last - first)))
        if weight:
            penalties["norm_exponent_variance_loss"] = weight * self.whole.variance(self.spread(self.own_exponent()))
        return penalties

    @override
    def process_state_dict_for_saving_inference(self, state_dict: dict[str, Any]) -> None:
        for name in ("norm_exponent_base", "dropout_draws"):
            state_dict.pop(name, None)
        super().process_state_dict_for_saving_inference(state_dict)

    @override
    def process_state_dict_for_loading(self, state_dict: dict[str, Any]) -> None:
        super().process_state_dict_for_loading(state_dict)
        if "dropout_draws" in state_dict:  # SAELens' loaders have cast it to the SAE's dtype
            state_dict["dropout_draws"] = state_dict["dropout_draws"].to(torch.int64)


class FoldedPerFeatureCosineScore(FoldedCosineScore):
    """Inference form with one exponent per feature."""

    per_feature = True

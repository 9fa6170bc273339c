"""JumpReLU, the form in which threshold selectors are saved: SAELens' `JumpReLUSAE` with the cosine score."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from sae_lens.saes.jumprelu_sae import JumpReLUSAE, JumpReLUSAEConfig
from torch import nn
from typing_extensions import override

from saelens_cosine.kernels.selection import EntrySelector, above
from saelens_cosine.registry import register_inference
from saelens_cosine.saes.choices import check_choices
from saelens_cosine.saes.cosine import FoldedCosineScore, refuse_normalisation
from saelens_cosine.saes.per_feature_cosine import FoldedPerFeatureCosineScore
from saelens_cosine.saes.scored_sae import ScoredSAE
from saelens_cosine.score import wide


@dataclass
class CosineJumpReLUSAEConfig(JumpReLUSAEConfig):
    """Configuration of a saved cosine SAE with a threshold per feature; fields as in SAELens' JumpReLUSAEConfig."""

    @override
    @classmethod
    def architecture(cls) -> str:
        return "cosine_jumprelu"

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        check_choices(self)
        refuse_normalisation(self)


@dataclass
class PerFeatureCosineJumpReLUSAEConfig(CosineJumpReLUSAEConfig):
    """Configuration of a saved per-feature cosine SAE with a threshold per feature."""

    @override
    @classmethod
    def architecture(cls) -> str:
        return "per_feature_cosine_jumprelu"


class ThresholdSelector(ScoredSAE):
    """SAELens' JumpReLU rule, `relu(pre) * (pre > threshold)`, with the threshold in float32 or wider."""

    threshold: nn.Parameter

    @override
    def initialize_weights(self) -> None:
        super().initialize_weights()
        self.threshold = nn.Parameter(self.threshold.data.to(wide(self.dtype)))

    @override
    def select(self, hidden_pre: torch.Tensor) -> torch.Tensor:
        return self.select_features(hidden_pre, slice(None))

    def select_features(self, hidden_pre: torch.Tensor, features: slice) -> torch.Tensor:
        """`select` of some features, from their pre-activations alone: `[..., n] -> [..., n]`."""
        return self.activation_fn(hidden_pre) * (hidden_pre > self.threshold[features])

    @override
    def entry_selector(self, n_tokens: int) -> EntrySelector | None:
        return lambda inputs, encoder, hint: (above(inputs, encoder, self.threshold), hint)


class CosineJumpReLUSAE(FoldedCosineScore, ThresholdSelector, JumpReLUSAE):
    """SAELens' JumpReLUSAE with the cosine score, inference form."""


class PerFeatureCosineJumpReLUSAE(FoldedPerFeatureCosineScore, ThresholdSelector, JumpReLUSAE):
    """SAELens' JumpReLUSAE with the cosine score and one exponent per feature, inference form."""


register_inference(CosineJumpReLUSAE, CosineJumpReLUSAEConfig)
register_inference(PerFeatureCosineJumpReLUSAE, PerFeatureCosineJumpReLUSAEConfig)

"""What a cosine score is said to help with, planted in SAELens' synthetic data: spread token norms and attention sinks.

Each token's features are multiplied by one log-normal factor, exp(s z - s^2), with z normal and s the spread. Its mean square is 1, so the
activations' second moment stays. A share of the tokens become sinks, as in `activations.planted_sinks`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from sae_lens.synthetic import (
    FeatureDictionary,
    FoldedNormalMagnitudeConfig,
    HierarchyConfig,
    LinearMagnitudeConfig,
    LowRankCorrelationConfig,
    OrthogonalizationConfig,
    SyntheticModelConfig,
    ZipfianFiringProbabilityConfig,
)
from torch import nn
from torch.nn.functional import normalize

from saelens_cosine.activations.planted_sinks import sinks_of


def small_model() -> SyntheticModelConfig:
    """SynthSAEBench-16k at a hundredth: 128 features in 64 dimensions, 6.5 of them active, for runs of seconds."""
    return SyntheticModelConfig(
        num_features=128,
        hidden_dim=64,
        firing_probability=ZipfianFiringProbabilityConfig(exponent=0.5, max_prob=0.4, min_prob=0.02),
        hierarchy=HierarchyConfig(
            total_root_nodes=16,
            branching_factor=3,
            max_depth=1,
            mutually_exclusive_portion=1.0,
            compensate_probabilities=True,
            scale_children_by_parent=True,
        ),
        orthogonalization=OrthogonalizationConfig(num_steps=100, lr=3e-4),
        correlation=LowRankCorrelationConfig(rank=4, correlation_scale=0.1),
        mean_firing_magnitudes=LinearMagnitudeConfig(start=5.0, end=4.0),
        std_firing_magnitudes=FoldedNormalMagnitudeConfig(mean=0.5, std=0.5),
        seed=0,
    )


class NormSpread:
    """Multiplies each token's features by one log-normal factor of mean square 1, after the model's own modifier."""

    def __init__(self, spread: float, modifier: Callable[..., torch.Tensor] | None):
        self.spread, self.modifier = spread, modifier

    def __call__(self, activations: torch.Tensor, generator: Any) -> torch.Tensor:
        if self.modifier is not None:
            activations = self.modifier(activations, generator)
        z = torch.randn(len(activations), 1, device=activations.device, dtype=activations.dtype)
        return activations * (self.spread * z - self.spread**2).exp()


class SinkDictionary(nn.Module):
    """A feature dictionary that turns a share of the tokens into attention sinks."""

    def __init__(self, dictionary: FeatureDictionary, share: float, seed: int):
        super().__init__()
        self.dictionary, self.share = dictionary, share
        self.feature_vectors, self.bias = dictionary.feature_vectors, dictionary.bias
        direction = torch.randn(dictionary.hidden_dim, generator=torch.Generator().manual_seed(seed))
        self.direction = normalize(direction, dim=0).to(self.bias)

    def forward(self, feature_activations: torch.Tensor) -> torch.Tensor:
        x: torch.Tensor = self.dictionary(feature_activations)
        centred = x - self.bias
        norms = centred.norm(dim=-1, keepdim=True)
        draws = torch.rand(2, len(x), 1, device=x.device, dtype=x.dtype)
        sinks = sinks_of(self.direction, centred, draws[1], norms.median())
        return torch.where(draws[0] < self.share, self.bias + sinks, x)

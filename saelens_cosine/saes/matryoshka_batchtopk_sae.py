"""Matryoshka BatchTopK: SAELens' `MatryoshkaBatchTopKTrainingSAE`, nested reconstructions, with our scores; saved as JumpReLU.

The paper's recipe applies whole, with BatchTopK's threshold. SAELens adds a reconstruction loss per level; with
`use_matryoshka_aux_loss` dead features of a level predict the residual of that level.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from sae_lens.saes.jumprelu_sae import JumpReLUSAEConfig
from sae_lens.saes.matryoshka_batchtopk_sae import (
    MatryoshkaBatchTopKTrainingSAE,
    MatryoshkaBatchTopKTrainingSAEConfig,
)
from sae_lens.saes.sae import SAEConfig, TrainStepInput
from sae_lens.saes.topk_sae import act_times_W_dec
from typing_extensions import override

from saelens_cosine.kernels.codes import EntryCodes
from saelens_cosine.registry import register_training
from saelens_cosine.saes.batchtopk_sae import BatchTopKThreshold, BatchTopKThresholdConfig
from saelens_cosine.saes.cosine import CosineScore, CosineScoreConfig
from saelens_cosine.saes.jumprelu_sae import CosineJumpReLUSAEConfig, PerFeatureCosineJumpReLUSAEConfig
from saelens_cosine.saes.per_feature_cosine import PerFeatureCosineScore, PerFeatureCosineScoreConfig
from saelens_cosine.saes.recipe.dead_features import DeadFeatures
from saelens_cosine.saes.recipe.training_sae import RecipeTrainingSAE, TopKRecipeConfig
from saelens_cosine.saes.scored_sae import InnerProductScore


@dataclass(kw_only=True)
class MatryoshkaThresholdConfig(BatchTopKThresholdConfig, MatryoshkaBatchTopKTrainingSAEConfig):
    """SAELens' Matryoshka settings, and how BatchTopK's threshold is learned."""


@dataclass
class InnerProductMatryoshkaBatchTopKTrainingSAEConfig(TopKRecipeConfig, MatryoshkaThresholdConfig):
    """Configuration of SAELens' MatryoshkaBatchTopK with the standard score under the paper's recipe; saved as SAELens' `jumprelu`."""

    @override
    @classmethod
    def architecture(cls) -> str:
        return "inner_product_matryoshka_batchtopk"

    @override
    def get_inference_config_class(self) -> type[SAEConfig]:
        return JumpReLUSAEConfig


@dataclass
class CosineMatryoshkaBatchTopKTrainingSAEConfig(CosineScoreConfig, TopKRecipeConfig, MatryoshkaThresholdConfig):
    """Configuration for training MatryoshkaBatchTopK with the cosine score; saved as `cosine_jumprelu`."""

    @override
    @classmethod
    def architecture(cls) -> str:
        return "cosine_matryoshka_batchtopk"

    @override
    def get_inference_config_class(self) -> type[SAEConfig]:
        return CosineJumpReLUSAEConfig


@dataclass
class PerFeatureCosineMatryoshkaBatchTopKTrainingSAEConfig(
    PerFeatureCosineScoreConfig, CosineMatryoshkaBatchTopKTrainingSAEConfig
):
    """Configuration for training MatryoshkaBatchTopK with one exponent and scale per feature; saved as `per_feature_cosine_jumprelu`."""

    @override
    @classmethod
    def architecture(cls) -> str:
        return "per_feature_cosine_matryoshka_batchtopk"

    @override
    def get_inference_config_class(self) -> type[SAEConfig]:
        return PerFeatureCosineJumpReLUSAEConfig


class MatryoshkaLevels(RecipeTrainingSAE, MatryoshkaBatchTopKTrainingSAE):
    """SAELens' levels, from active codes where the fast path has them, and the recipe's auxiliary loss by level."""

    @override
    def _iterable_decode(
        self, feature_acts: torch.Tensor, include_outer_loss: bool = False
    ) -> Generator[tuple[int, torch.Tensor], None, None]:
        widths, edges = self.cfg.matryoshka_widths, self._edges()
        codes: Any = feature_acts
        if self.cfg.rescale_acts_by_decoder_norm:
            codes = codes * (1 / self.W_dec.norm(dim=-1))
        if isinstance(codes, EntryCodes):
            # one product for all levels: each level's share of the codes is a token of its own
            shares = (codes.split_features(edges) @ self.W_dec).view(len(widths), -1, self.cfg.d_in)
        else:
            levels = ((codes[:, first:end], self.W_dec[first:end]) for first, end in pairwise(edges))
            shares = torch.stack([act_times_W_dec(*level, rescale_acts_by_decoder_norm=False) for level in levels])
        nested = self.whole.total(shares).cumsum(dim=0) + self.b_dec
        for width, decoded in zip(widths, nested, strict=True):
            if include_outer_loss or width != widths[-1]:
                yield width, self.run_time_activation_norm_fn_out(decoded)

    def _edges(self) -> list[int]:
        """Where the levels begin and end among the features that are held here."""
        return [min(max(edge - self.whole.first, 0), self.cfg.d_sae) for edge in (0, *self.cfg.matryoshka_widths)]

    @override
    def aux_loss(
        self,
        step_input: TrainStepInput,
        feature_acts: torch.Tensor,
        hidden_pre: torch.Tensor,
        sae_out: torch.Tensor,
        dead: DeadFeatures,
    ) -> torch.Tensor:
        if not self.cfg.use_matryoshka_aux_loss:
            return super().aux_loss(step_input, feature_acts, hidden_pre, sae_out, dead)
        losses = []
        levels = pairwise(self._edges())
        decoded = (part.detach() for _, part in self._iterable_decode(feature_acts, include_outer_loss=True))
        for (first, end), nested in zip(levels, decoded, strict=True):
            here = dead.certain & (dead.features >= first) & (dead.features < end)
            losses.append(self.revival_loss(step_input.sae_in - nested, hidden_pre, dead._replace(certain=here)))
        return torch.stack(losses).sum()


class InnerProductMatryoshkaBatchTopKTrainingSAE(
    InnerProductScore, MatryoshkaLevels, BatchTopKThreshold, MatryoshkaBatchTopKTrainingSAE
):
    """The control: SAELens' Matryoshka BatchTopK and the standard score, under the same recipe as the cosine arms."""


class CosineMatryoshkaBatchTopKTrainingSAE(
    CosineScore, MatryoshkaLevels, BatchTopKThreshold, MatryoshkaBatchTopKTrainingSAE
):
    """Matryoshka BatchTopK on the cosine score with one exponent and log-scale for all features."""


class PerFeatureCosineMatryoshkaBatchTopKTrainingSAE(
    PerFeatureCosineScore, MatryoshkaLevels, BatchTopKThreshold, MatryoshkaBatchTopKTrainingSAE
):
    """Matryoshka BatchTopK on the cosine score with one exponent and log-scale per feature."""


register_training(InnerProductMatryoshkaBatchTopKTrainingSAE, InnerProductMatryoshkaBatchTopKTrainingSAEConfig)
register_training(CosineMatryoshkaBatchTopKTrainingSAE, CosineMatryoshkaBatchTopKTrainingSAEConfig)
register_training(PerFeatureCosineMatryoshkaBatchTopKTrainingSAE, PerFeatureCosineMatryoshkaBatchTopKTrainingSAEConfig)

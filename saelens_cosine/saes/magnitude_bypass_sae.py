"""Magnitude bypass: features are selected by cosine alone, and the codes carry all of the input's norm.

    z = select(relu(<u, w_i / ||w_i||>))          u = x_c / ||x_c||; no encoder bias, no exponent, no scale
    x_hat = ||x_c|| r / ||r|| + b_dec             r = z W_dec

Source: the "no C" model of arXiv 2606.15054 (experiments 39, 42, 46). Its authors restore the norm in `decode`, from a norm
that `encode` left on the module. Here it is in the codes, `f = z ||x_c|| / ||r||`: the same reconstruction, from SAELens' own
`decode`, and codes that can be edited, re-batched and ablated. The three switches of experiment 46 are `unit_encoder`,
`unit_decoder` and `restore_output_norm`, which reach all eight of its cells, the two that its authors left out included.

The recipe's auxiliary loss sees dead features' scores times the same gain as the living ones': un-restored scores of at most
0.02 predict nothing of a residual of 36, which is why theirs was inert (experiment 43).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE
from sae_lens.saes.jumprelu_sae import JumpReLUSAE, JumpReLUSAEConfig
from sae_lens.saes.sae import SAEConfig, TrainStepInput, TrainStepOutput
from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig, TopKTrainingSAE, TopKTrainingSAEConfig
from typing_extensions import override

from saelens_cosine.kernels.codes import EntryCodes, scores_of
from saelens_cosine.registry import register_inference, register_training
from saelens_cosine.saes.batchtopk_sae import BatchTopKThreshold, BatchTopKThresholdConfig
from saelens_cosine.saes.choices import check_choices
from saelens_cosine.saes.cosine import PLUGIN_NOTE, FoldedCosineScore, refuse_normalisation, refuse_whitening
from saelens_cosine.saes.jumprelu_sae import ThresholdSelector
from saelens_cosine.saes.recipe.dead_features import DeadFeatures
from saelens_cosine.saes.recipe.training_sae import RecipeTrainingSAE, TopKRecipeConfig
from saelens_cosine.saes.scored_sae import ConfigMixin, ScoredSAE
from saelens_cosine.score import NORM_FLOOR, ScoreParameters, centred_norm, cosine_score, fold_scale, folded_score, wide

RESTORED_FLOOR = 1e-8
"""Smallest norm of a reconstruction that is told apart from zero, the authors'."""


@dataclass(kw_only=True)
class NormRestoreConfig(ConfigMixin):
    """
    What both forms of a magnitude-bypass SAE need to know.

    Args:
        restore_output_norm (bool): Give the reconstruction the norm of the centred input. False leaves it at what the selected cosines add up to.
    """

    restore_output_norm: bool = True

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        check_choices(self)
        refuse_normalisation(self)


@dataclass
class MagnitudeBypassTopKSAEConfig(NormRestoreConfig, TopKSAEConfig):
    """Configuration of a saved magnitude-bypass TopK SAE; other fields as in SAELens' TopKSAEConfig."""

    @override
    @classmethod
    def architecture(cls) -> str:
        return "magnitude_bypass_topk"


@dataclass
class MagnitudeBypassJumpReLUSAEConfig(NormRestoreConfig, JumpReLUSAEConfig):
    """Configuration of a saved magnitude-bypass SAE with a threshold on the cosines; other fields as in SAELens' JumpReLUSAEConfig."""

    @override
    @classmethod
    def architecture(cls) -> str:
        return "magnitude_bypass_jumprelu"


class NormRestore(ScoredSAE):
    """Codes times one factor per token, so that the reconstruction has the norm of the centred input."""

    @override
    def finish(self, codes: torch.Tensor, x_centered: torch.Tensor) -> torch.Tensor:
        return codes * self.gain(codes, x_centered) if self.cfg.restore_output_norm else codes

    def gain(self, codes: torch.Tensor, x_centered: torch.Tensor) -> torch.Tensor:
        """`||x_c|| / ||codes W_dec||`, `[..., 1]`; a token without codes has none to scale."""
        restored = self.whole.shared(self.add_up(codes.to(self.dtype)))
        norm = restored.to(wide(self.dtype)).norm(dim=-1, keepdim=True)
        return centred_norm(x_centered) / norm.clamp_min(RESTORED_FLOOR)


class MagnitudeBypassTopKSAE(NormRestore, FoldedCosineScore, TopKSAE):
    """SAELens' TopKSAE on cosines, with the norm restored, inference form."""


class MagnitudeBypassJumpReLUSAE(NormRestore, FoldedCosineScore, ThresholdSelector, JumpReLUSAE):
    """SAELens' JumpReLUSAE on cosines, with the norm restored, inference form."""


@dataclass(kw_only=True)
class MagnitudeBypassConfig(NormRestoreConfig):
    """
    Configuration of the magnitude bypass; its third switch is the recipe's `unit_decoder`.

    Args:
        unit_encoder (bool): Score by cosine, so that encoder columns count by direction alone. False scores by the product of the unit input with a free column.
    """

    unit_encoder: bool = True

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        self.metadata.requires = PLUGIN_NOTE
        if getattr(self, "use_sparse_activations", False):
            raise ValueError(
                f"use_sparse_activations=True does not go with architecture={self.architecture()!r}: PyTorch cannot divide "
                "sparse codes by a norm per token. The fast path (kernels='auto') never makes dense ones."
            )


@dataclass
class MagnitudeBypassTopKTrainingSAEConfig(MagnitudeBypassConfig, TopKRecipeConfig, TopKTrainingSAEConfig):
    """Configuration for training TopK with the magnitude bypass; saved as `magnitude_bypass_topk`."""

    @override
    @classmethod
    def architecture(cls) -> str:
        return "magnitude_bypass_topk"


@dataclass
class MagnitudeBypassBatchTopKTrainingSAEConfig(MagnitudeBypassConfig, TopKRecipeConfig, BatchTopKThresholdConfig):
    """Configuration for training BatchTopK with the magnitude bypass; saved as `magnitude_bypass_jumprelu`."""

    @override
    @classmethod
    def architecture(cls) -> str:
        return "magnitude_bypass_batchtopk"

    @override
    def get_inference_config_class(self) -> type[SAEConfig]:
        return MagnitudeBypassJumpReLUSAEConfig


class MagnitudeBypass(NormRestore, RecipeTrainingSAE):
    """Training form: the cosine with exponent and log-scale 0; `b_enc` is there for SAELens' tools, at 0 and not trained."""

    @override
    def initialize_weights(self) -> None:
        super().initialize_weights()
        self.b_enc.requires_grad_(False)

    @override
    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        if (
            self.cfg.unit_encoder
        ):  # the authors do so after each step; the length of a column sets how far a step turns it
            with torch.no_grad():
                self.W_enc.div_(self.W_enc.norm(dim=0).clamp_min(NORM_FLOOR))
        return super().training_forward_pass(step_input)

    @override
    def score(self, x_centered: torch.Tensor) -> torch.Tensor:
        zero, log_scale, unit_columns = self.score_parameters()
        if unit_columns:
            return cosine_score(x_centered, self.W_enc, self.b_enc, zero, log_scale)
        return folded_score(x_centered, self.W_enc, self.b_enc, zero)

    @override
    def score_parameters(self) -> ScoreParameters:
        zero = torch.zeros((), dtype=wide(self.dtype), device=self.W_enc.device)
        return ScoreParameters(zero, zero, unit_columns=self.cfg.unit_encoder)

    @override
    def aux_loss(
        self,
        step_input: TrainStepInput,
        feature_acts: torch.Tensor,
        hidden_pre: torch.Tensor,
        sae_out: torch.Tensor,
        dead: DeadFeatures,
    ) -> torch.Tensor:
        residual = (step_input.sae_in - sae_out).detach()
        return self.revival_loss(residual, hidden_pre, dead, self.living_gain(feature_acts, hidden_pre))

    @torch.no_grad()
    def living_gain(self, feature_acts: torch.Tensor, hidden_pre: torch.Tensor) -> torch.Tensor:
        """From scores to codes as this batch's living features have it, `[tokens, 1]`; 1 for a token without codes."""
        scores = scores_of(feature_acts, hidden_pre)
        if isinstance(feature_acts, EntryCodes):
            scores = feature_acts.with_values(scores)
        codes, scores = (self.whole.sum(part.sum(dim=-1)) for part in (feature_acts, scores))
        return torch.where(scores > 0, codes / scores, 1).unsqueeze(-1)

    @override
    @torch.no_grad()
    def fold_W_dec_norm(self) -> None:
        """Refuse.

        Raises:
            NotImplementedError: scores that count by direction cannot hold a norm per feature.
        """
        raise NotImplementedError(
            f"{self.cfg.architecture()!r} has no scale that could hold decoder norms. Save it (save_inference_model): the "
            "inference form folds decoder norms exactly."
        )

    @override
    @torch.no_grad()
    def fold_activation_norm_scaling_factor(self, scaling_factor: float) -> None:
        """Make an SAE trained on `s * x` exact on `x`: decoder and its bias by `1 / s`; cosines do not see `s`."""
        W_enc = self.W_enc.clone()
        super().fold_activation_norm_scaling_factor(scaling_factor)
        self.W_enc.copy_(W_enc)

    @override
    def fold_activation_whitening(
        self, mean: torch.Tensor, whitening_matrix: torch.Tensor, unwhitening_matrix: torch.Tensor
    ) -> None:
        refuse_whitening(self)

    @override
    def process_state_dict_for_saving_inference(self, state_dict: dict[str, Any]) -> None:
        zero, log_scale, unit_columns = self.score_parameters()
        if unit_columns:
            state_dict["W_enc"] = fold_scale(state_dict["W_enc"], log_scale).contiguous()
        state_dict["norm_exponent"] = zero
        super().process_state_dict_for_saving_inference(state_dict)


class MagnitudeBypassTopKTrainingSAE(MagnitudeBypass, TopKTrainingSAE):
    """TopK on cosines, with the norm restored."""


class MagnitudeBypassBatchTopKTrainingSAE(MagnitudeBypass, BatchTopKThreshold, BatchTopKTrainingSAE):
    """BatchTopK on cosines, with the norm restored: tokens with few aligned features get fewer codes."""

    cfg: Any

    @override
    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        before = self.topk_threshold
        output = super().training_forward_pass(step_input)
        self.topk_threshold = before  # SAELens has averaged codes, which carry the norm; the threshold is on cosines
        if step_input.n_training_steps >= self.cfg.topk_threshold_start_step:
            self.update_topk_threshold(scores_of(output.feature_acts, output.hidden_pre))
        return output


register_inference(MagnitudeBypassTopKSAE, MagnitudeBypassTopKSAEConfig)
register_inference(MagnitudeBypassJumpReLUSAE, MagnitudeBypassJumpReLUSAEConfig)
register_training(MagnitudeBypassTopKTrainingSAE, MagnitudeBypassTopKTrainingSAEConfig)
register_training(MagnitudeBypassBatchTopKTrainingSAE, MagnitudeBypassBatchTopKTrainingSAEConfig)

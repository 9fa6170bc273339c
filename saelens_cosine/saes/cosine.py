"""The cosine score on SAEs: its parameters, its exact folds, and the way from the training to the inference form."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from sae_lens.saes.sae import SAEConfig, TrainStepInput
from torch import nn
from typing_extensions import override

from saelens_cosine.activations.norm_filter import token_norms
from saelens_cosine.kernels.whole import least
from saelens_cosine.saes.scored_sae import ConfigMixin, ScoredSAE, ScoredTrainingSAE
from saelens_cosine.score import ScoreParameters, cosine_score, fold_scale, folded_score, wide

PLUGIN_NOTE = (
    "pip install saelens-cosine, then `import saelens_cosine` before SAE.load_from_disk or SAE.from_pretrained"
)
"""Saved in each cosine SAE's metadata: without the import, SAELens answers with a bare `KeyError: '<architecture>'`."""

SAME = 1e-5
"""Share of the mean norm below which a token's distance from the centre is float32's rounding, over many additions."""

OUTLYING = 10.0
"""Multiple of the median norm that no mean norm of ordinary tokens comes near; attention sinks take it to two or three."""

_REFUSED_NORMALISATIONS = {
    "covariance_whitening": (
        "a whitened input's norm is a Mahalanobis norm of the raw input, which no SAE weight can reproduce, so the "
        "whitening could not be folded into the saved SAE"
    ),
    "constant_norm_rescale": "it gives every token the same norm, so the exponent has nothing to learn from",
    "layer_norm": "it gives every token the same norm, so the exponent has nothing to learn from",
}


def refuse_normalisation(config: SAEConfig) -> None:
    """Raise ValueError when `config.normalize_activations` makes a cosine score meaningless or impossible to save."""
    reason = _REFUSED_NORMALISATIONS.get(config.normalize_activations)
    if reason is not None:
        raise ValueError(
            f"normalize_activations={config.normalize_activations!r} does not go with architecture="
            f"{config.architecture()!r}: {reason}. Use 'none' or 'expected_average_only_in'."
        )


@dataclass(kw_only=True)
class CosineScoreConfig(ConfigMixin):
    """
    Configuration of the cosine score exp(log_scale) * norm ** norm_exponent * cosine + b_enc.

    Args:
        norm_exponent_init (float): Start of the exponent on the centred input's norm. 0 is cosine, 1 (with log_scale_init 0) is inner product with unit encoder rows.
        learn_norm_exponent (bool): Whether the exponent is trained. False keeps it at norm_exponent_init.
        log_scale_init (float | None): Start of the log-scale (natural log). None is log(sqrt(d_in)), the paper's default.
        log_scale_from_data (bool): Start the log-scale where scores have the size of the first batch's mean centred norm instead: (1 - norm_exponent_init) * log(mean norm). Better where norms are much smaller than sqrt(d_in) (the paper's experiment 42), and in short runs where they are larger (27); worse in long runs there (34, 41).
        learn_log_scale (bool): Whether the log-scale is trained.
        norm_exponent_lr_multiplier (float): Times the learning rate, how far an optimizer like Adam moves the exponent in a step. The trained parameter is the exponent divided by it. The paper has 1, which limits how far the exponent can get (experiments 12 and 17).
        log_scale_lr_multiplier (float): Likewise for the log-scale.
        norm_exponent_l2 (float): Adds this times the sum of squared exponents to the loss (experiment 37).
        relative_exponent_penalties (bool): Multiply penalties on exponents by the (detached) reconstruction loss. The paper does not; against a loss of 10,000 its variance penalty (experiment 47) did nothing.
    """

    norm_exponent_init: float = 0.0
    learn_norm_exponent: bool = True
    log_scale_init: float | None = None
    log_scale_from_data: bool = False
    learn_log_scale: bool = True
    norm_exponent_lr_multiplier: float = 1.0
    log_scale_lr_multiplier: float = 1.0
    norm_exponent_l2: float = 0.0
    relative_exponent_penalties: bool = False

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        self.metadata.requires = PLUGIN_NOTE
        refuse_normalisation(self)
        if self.log_scale_from_data and self.log_scale_init is not None:
            raise ValueError(
                f"log_scale_from_data=True measures the start that log_scale_init={self.log_scale_init} fixes; set one."
            )
        for name in ("norm_exponent_lr_multiplier", "log_scale_lr_multiplier"):
            if not getattr(self, name) > 0:
                raise ValueError(
                    f"{name}={getattr(self, name)} must be positive; learn_{name.removesuffix('_lr_multiplier')}=False "
                    "keeps a parameter fixed."
                )
        if self.norm_exponent_l2 and not self.learn_norm_exponent:
            raise ValueError(
                f"norm_exponent_l2={self.norm_exponent_l2} has nothing to shrink with learn_norm_exponent=False; set one."
            )


class CosineScore(ScoredTrainingSAE):
    """Training form: encoder direction, exponent and log-scale are separate parameters.

    `norm_exponent` and `log_scale` are what the optimizer moves; `score_parameters` are the exponents and log-scales that they
    stand for, which differ by the learning-rate multipliers and by what features share.
    """

    per_feature: ClassVar[bool] = False
    norm_exponent: nn.Parameter
    log_scale: nn.Parameter

    @override
    def initialize_weights(self) -> None:
        super().initialize_weights()
        cfg: Any = self.cfg
        # from d_in now, not in the config: SAELens' synthetic runner corrects d_in after the config was made
        log_scale = math.log(math.sqrt(cfg.d_in)) if cfg.log_scale_init is None else cfg.log_scale_init
        self.norm_exponent = self._score_parameter(
            cfg.norm_exponent_init / cfg.norm_exponent_lr_multiplier, cfg.learn_norm_exponent
        )
        self.log_scale = self._score_parameter(log_scale / cfg.log_scale_lr_multiplier, cfg.learn_log_scale)

    def _score_parameter(self, value: float, learn: bool) -> nn.Parameter:
        return parameter(self, (self.cfg.d_sae,) if self.per_feature else (), value, learn)

    def own_exponent(self) -> torch.Tensor:
        """The exponents that the parameters stand for, in the shape of `log_scale`."""
        return times(self.norm_exponent, self.cfg.norm_exponent_lr_multiplier)

    def spread(self, own: torch.Tensor) -> torch.Tensor:
        """Values in the shape of `log_scale` as each feature has them: `[]` or `[d_sae]`."""
        return own if own.ndim else self.whole.shared(own)

    @override
    def score(self, x_centered: torch.Tensor) -> torch.Tensor:
        norm_exponent, log_scale, _ = self.score_parameters()
        return cosine_score(x_centered, self.W_enc, self.encoder_bias(), norm_exponent, log_scale)

    def exponents(self, in_training: bool) -> torch.Tensor:
        """Exponents that the score takes, `[]` or `[d_sae]`."""
        return self.spread(self.own_exponent())

    @override
    def score_parameters(self) -> ScoreParameters:
        log_scale = times(self.log_scale, self.cfg.log_scale_lr_multiplier)
        return ScoreParameters(self.exponents(self.training), self.spread(log_scale), unit_columns=True)

    def inference_parameters(self) -> ScoreParameters:
        """`score_parameters` as they are after training, without gradients."""
        log_scale = self.score_parameters().log_scale.detach()
        return ScoreParameters(self.exponents(in_training=False).detach(), log_scale, unit_columns=True)

    @override
    @torch.no_grad()
    def initialize_from_data(self, batch: torch.Tensor) -> None:
        super().initialize_from_data(batch)  # first b_dec, which the norm is measured from
        if self.cfg.log_scale_from_data:
            mean_norm = typical_norm(batch, token_norms(self.process_sae_in(batch)))
            if mean_norm is None:
                warnings.warn(
                    f"log_scale_from_data: the first batch at {self.cfg.metadata.hook_name}, of {len(batch):,} tokens, has no "
                    "norm to start from: they are all the same, or a few of them are far longer than the rest. log_scale "
                    f"starts at log sqrt(d_in) = {math.log(math.sqrt(self.cfg.d_in)):.3f} instead.",
                    stacklevel=2,
                )
                return
            # a share norm_exponent_init of the norm is in the score already
            log_scale = (1 - self.cfg.norm_exponent_init) * math.log(mean_norm)
            self.log_scale.fill_(log_scale / self.cfg.log_scale_lr_multiplier)

    @override
    def training_metrics(self) -> dict[str, torch.Tensor]:
        exponent, log_scale, _ = self.inference_parameters()
        return {
            **super().training_metrics(),
            "norm_exponent_mean": self.whole.mean(exponent),
            "norm_exponent_min": self.whole.smallest(least(exponent)),
            "norm_exponent_max": -self.whole.smallest(least(-exponent)),
            "norm_exponent_share_above_0.5": self.whole.mean((exponent > 0.5).float()),
            "log_scale_mean": self.whole.mean(log_scale),
        }

    @override
    def calculate_aux_loss(
        self,
        step_input: TrainStepInput,
        feature_acts: torch.Tensor,
        hidden_pre: torch.Tensor,
        sae_out: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        selector: Any = super()
        losses: dict[str, torch.Tensor] = selector.calculate_aux_loss(step_input, feature_acts, hidden_pre, sae_out)
        penalties = self.exponent_penalties(step_input.n_training_steps)
        if penalties and self.cfg.relative_exponent_penalties:
            error = (sae_out - step_input.sae_in).detach().pow(2).sum(dim=-1).mean()
            penalties = {name: error * penalty for name, penalty in penalties.items()}
        return losses | penalties

    def exponent_penalties(self, step: int) -> dict[str, torch.Tensor]:
        """Penalties on the exponents at a training step, by the name they are logged under; those of weight 0 left out."""
        if not self.cfg.norm_exponent_l2:
            return {}
        own = self.own_exponent()
        squares = self.whole.total(self.spread(own).pow(2).sum()) if own.ndim else own.pow(2)
        return {"norm_exponent_l2_loss": self.cfg.norm_exponent_l2 * squares}

    @override
    @torch.no_grad()
    def fold_activation_norm_scaling_factor(self, scaling_factor: float) -> None:
        """Make an SAE trained on `s * x` exact on `x`: `b += a log s`; `b_enc` is in score units and stays."""
        super().fold_activation_norm_scaling_factor(scaling_factor)
        shift = self._kept_exponent() * math.log(scaling_factor)
        self.log_scale.add_(shift / self.cfg.log_scale_lr_multiplier)

    def _kept_exponent(self) -> torch.Tensor:
        """`own_exponent` as it is after training."""
        return self.own_exponent()

    @override
    @torch.no_grad()
    def fold_W_dec_norm(self) -> None:
        """Move decoder norms `r_i` into the score: `b_i += log r_i`, `b_enc_i *= r_i`.

        Raises:
            NotImplementedError: a log-scale that features share cannot hold a norm per feature.
        """
        if self.log_scale.shape != (self.cfg.d_sae,):
            whose = "all features" if self.log_scale.ndim == 0 else "each group of features"
            raise NotImplementedError(
                f"{self.cfg.architecture()!r} has one log_scale for {whose}, which cannot hold a decoder norm per feature. "
                "Save it (save_inference_model): the inference form folds decoder norms exactly."
            )
        W_enc = self.W_enc.clone()
        norms = self.get_W_dec_norm()
        super().fold_W_dec_norm()
        self.W_enc.copy_(W_enc)  # SAELens scales the columns, which a cosine does not see
        self.log_scale.add_(norms.log() / self.cfg.log_scale_lr_multiplier)

    @override
    def fold_activation_whitening(
        self, mean: torch.Tensor, whitening_matrix: torch.Tensor, unwhitening_matrix: torch.Tensor
    ) -> None:
        refuse_whitening(self)

    @override
    def process_state_dict_for_saving_inference(self, state_dict: dict[str, Any]) -> None:
        norm_exponent, log_scale, _ = self.inference_parameters()
        del state_dict["log_scale"]
        state_dict["W_enc"] = fold_scale(state_dict["W_enc"], log_scale).contiguous()
        state_dict["norm_exponent"] = norm_exponent.clone()
        super().process_state_dict_for_saving_inference(state_dict)


class FoldedCosineScore(ScoredSAE):
    """Inference form: `W_enc` columns carry the scale, so only the exponent stands beside SAELens' tensors.

    A plain SAELens class refuses such a file because of the extra key instead of loading it as an inner product. SAELens'
    decoder-norm and threshold folds are exact as they are.
    """

    per_feature: ClassVar[bool] = False
    norm_exponent: nn.Parameter

    @override
    def initialize_weights(self) -> None:
        super().initialize_weights()
        self.norm_exponent = parameter(self, (self.cfg.d_sae,) if self.per_feature else (), 0.0, learn=True)

    @override
    def score(self, x_centered: torch.Tensor) -> torch.Tensor:
        return folded_score(x_centered, self.W_enc, self.encoder_bias(), self.norm_exponent)

    @override
    def score_parameters(self) -> ScoreParameters:
        return ScoreParameters(self.norm_exponent, self.norm_exponent.new_zeros(()), False)

    @override
    @torch.no_grad()
    def fold_activation_norm_scaling_factor(self, scaling_factor: float) -> None:
        """Make an SAE for `s * x` exact on `x`: `W_enc *= s ** a`. SAELens' fold multiplies by `s`."""
        super().fold_activation_norm_scaling_factor(scaling_factor)
        self.W_enc.mul_(torch.pow(scaling_factor, self.norm_exponent - 1).to(self.W_enc.dtype))

    @override
    def fold_activation_whitening(
        self, mean: torch.Tensor, whitening_matrix: torch.Tensor, unwhitening_matrix: torch.Tensor
    ) -> None:
        refuse_whitening(self)


def typical_norm(batch: torch.Tensor, norms: torch.Tensor) -> float | None:
    """Mean of the centred `norms [tokens]` of a batch `[tokens, d_in]`; None where it says nothing about other batches.

    That is where tokens are equal, so that only the rounding of their own centre is left, and where the mean is above
    `OUTLYING` times the median: one token's norm then.
    """
    mean, apart = norms.mean().item(), norms[norms > SAME * token_norms(batch).mean()]
    usable = math.isfinite(mean) and len(apart) > 0 and mean <= OUTLYING * apart.median().item()
    return mean if usable else None


def parameter(sae: ScoredSAE, shape: tuple[int, ...], value: float, learn: bool) -> nn.Parameter:
    """A score's parameter, float32 or wider, filled with its start."""
    return nn.Parameter(torch.full(shape, value, dtype=wide(sae.dtype), device=sae.device), requires_grad=learn)


def times(tensor: torch.Tensor, factor: float) -> torch.Tensor:
    """The product; the tensor itself for a factor of 1."""
    return tensor if factor == 1 else tensor * factor


def refuse_whitening(sae: ScoredSAE) -> None:
    """Raise NotImplementedError: no weights of a cosine SAE reproduce a whitened input's norm."""
    raise NotImplementedError(
        f"A whitening cannot be folded into {sae.cfg.architecture()!r}: {_REFUSED_NORMALISATIONS['covariance_whitening']}."
    )

"""The paper's training recipe as far as it lives in the SAE, so that SAELens' trainer runs it unchanged.

Each part is an option, and each option's other value is SAELens' own behaviour. What lives outside the SAE (learning rate,
schedule, batch, token filter) is in `saelens_cosine.training.recipe`. Source: the released code of arXiv 2606.15054,
experiment 40 (the dictionary_learning recipe), which all published checkpoints and the headline table use.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from saelens_cosine.activations.norm_filter import token_norms
from saelens_cosine.kernels.optimizer import fuse_adam_of
from saelens_cosine.saes.choices import check_choices
from saelens_cosine.saes.recipe.dead_features import DeadFeatureRevival
from saelens_cosine.saes.recipe.losses import ReconstructionLoss
from saelens_cosine.saes.scored_encoder import rescales_by_decoder_norm
from saelens_cosine.saes.scored_sae import ConfigMixin
from saelens_cosine.score import wide

PROJECTION_BLOCK = 2**18
"""Weights whose gradients are projected at a time on a CPU: 1 MiB in float32."""

CHECK_EVERY_STEPS = 10
"""How often a training step looks for non-finite losses: SAELens' default logging interval."""


@dataclass(kw_only=True)
class RecipeConfig(ConfigMixin):
    """
    The paper's recipe, as far as it lives in the SAE.

    Args:
        unit_decoder (bool): Keep decoder rows at norm 1: project their gradient onto the sphere's tangent and renormalise before each step. False leaves them free, as SAELens does.
        decoder_init_norm (float | None): Norm of decoder rows and encoder columns at the start. Must be 1 (or None) with unit_decoder.
        b_dec_init (Literal["geometric_median", "mean", "zeros"]): Start of the decoder bias: geometric median or mean of the first training batch, or SAELens' zeros.
        normalize_aux_loss (bool): Divide the auxiliary loss by the residual's variance and let it see rectified scores, as the paper does (AbsTopK included). False is SAELens' un-normalised loss on raw scores.
        aux_loss_coefficient (float): Weight of the auxiliary loss. The paper uses 1/32 with the normalised loss; SAELens 1 with its own.
        dead_feature_window_tokens (int): A feature is dead when it has not fired for this many training tokens. Counted by the SAE, in tokens; the paper uses 10,000,000 of 500,000,000.
        mse_weight (float): Weight of the squared error in the reconstruction loss. This and the next four lines are options of the paper's experiments; the defaults are SAELens' loss.
        token_weighting (Literal["none", "inverse_norm", "inverse_squared_norm"]): Divide each token's squared error by its centred norm, or by that squared, relative to the batch's mean weight (experiment 59).
        cosine_loss_weight (float): Weight of 1 - cos(x, x_hat) (experiments 10 and 12).
        post_norm_loss_weight (float): Weight of the squared error after the model's next RMS norm (experiments 14, 18, 21, 22). The norm's gain is read from the model: `saelens_cosine.training.next_norm.take_next_norms(runner)`, which `saelens-cosine train` does.
        post_norm_eps (float): eps of that norm, read along with the gain.
        kernels (Literal["auto", "reference", "fast"]): How a training step is computed. "reference" is the dense formula, "fast" computes only the active codes (the same codes and gradients), "auto" takes the fast path wherever it is exact and pays (on a GPU from 128 MiB of scores in a batch on, which are 2^25 in float32 and 2^26 under bfloat16 autocast), and logs why when it does not.
    """

    keeps: ClassVar[frozenset[str]] = frozenset()
    """Fields that a named recipe (`saelens_cosine.training.recipe`) leaves as this class has them."""

    unit_decoder: bool = True
    decoder_init_norm: float | None = 1.0
    b_dec_init: Literal["geometric_median", "mean", "zeros"] = "geometric_median"
    normalize_aux_loss: bool = True
    aux_loss_coefficient: float = 1 / 32
    dead_feature_window_tokens: int = 10_000_000
    mse_weight: float = 1.0
    token_weighting: Literal["none", "inverse_norm", "inverse_squared_norm"] = "none"
    cosine_loss_weight: float = 0.0
    post_norm_loss_weight: float = 0.0
    post_norm_eps: float = 1e-6
    kernels: Literal["auto", "reference", "fast"] = "auto"

    @property
    def reconstruction_loss(self) -> ReconstructionLoss:
        """What the weights above make."""
        return ReconstructionLoss(
            self.mse_weight,
            self.cosine_loss_weight,
            self.post_norm_loss_weight,
            self.token_weighting,
            self.post_norm_eps,
        )

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        check_choices(self)
        _ = self.reconstruction_loss  # refuses impossible weights
        if self.unit_decoder and rescales_by_decoder_norm(self):
            raise ValueError(
                "unit_decoder=True keeps every decoder norm at 1, where rescale_acts_by_decoder_norm=True does nothing; "
                "set one of them."
            )
        if self.unit_decoder and self.decoder_init_norm not in (None, 1.0):
            raise ValueError(
                f"unit_decoder=True keeps decoder rows at norm 1, but decoder_init_norm={self.decoder_init_norm}; "
                "set decoder_init_norm=1.0 or unit_decoder=False."
            )
        k = getattr(self, "k", None)
        if k is not None and not 0 < k <= self.d_sae:
            raise ValueError(f"k={k} features cannot be active out of d_sae={self.d_sae}; 0 < k <= d_sae is needed.")
        if self.dead_feature_window_tokens <= 0:
            raise ValueError(
                f"dead_feature_window_tokens={self.dead_feature_window_tokens} must be a positive token count."
            )


@dataclass(kw_only=True)
class TopKRecipeConfig(RecipeConfig):
    """
    The paper's recipe for SAELens' TopK family.

    Args:
        rescale_acts_by_decoder_norm (bool): Multiply scores by decoder norms before selecting. Needless with unit_decoder.
    """

    rescale_acts_by_decoder_norm: bool = False


class RecipeTrainingSAE(DeadFeatureRevival):
    """Mix in between a score and a SAELens training class."""

    training_state: ClassVar[dict[str, torch.dtype]] = {
        "tokens_since_fired": torch.int64,
        "initialized_from_data": torch.bool,
        "post_norm_gain": torch.float32,
    }
    """Buffers that only training needs: saved in checkpoints, left out of the inference form.

    Resuming restores them exactly. `TrainingSAE.load_from_disk` casts them to the SAE's dtype on the way, so a bfloat16 SAE
    that is fine-tuned starts with token counts rounded to 8 bits.
    """

    initialized_from_data: torch.Tensor
    post_norm_gain: torch.Tensor
    _adam_watch: RemovableHandle | None = None

    def __init__(self, cfg: Any, use_error_term: bool = False):
        super().__init__(cfg, use_error_term)
        device = self.W_dec.device
        self.register_buffer("initialized_from_data", torch.zeros((), dtype=torch.bool, device=device))
        if cfg.post_norm_loss_weight:
            self.register_buffer("post_norm_gain", torch.zeros(cfg.d_in, device=device))
        if not cfg.reconstruction_loss.is_mse:
            self.mse_loss_fn = self._reconstruction_loss

    @override
    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        if torch.compiler.is_compiling() and self.cfg.kernels != "reference":
            # torch.compile could only break the fast path into pieces
            eager: Any = torch.compiler.disable
            return eager(self._training_step)(step_input)
        return self._training_step(step_input)

    def _training_step(self, step_input: TrainStepInput) -> TrainStepOutput:
        # the flag is asked only at step 0: it costs a device synchronisation, and guards fine-tuning from a checkpoint
        if step_input.n_training_steps == 0 and not self.initialized_from_data:
            self.initialize_from_data(step_input.sae_in)
            self.initialized_from_data.fill_(True)
        self._fuse_adam()
        if self.cfg.unit_decoder:
            self.normalize_decoder()
            self._project_next_decoder_gradient()
        if self.cfg.post_norm_loss_weight and step_input.n_training_steps == 0 and not self.post_norm_gain.any():
            raise ValueError(
                f"post_norm_loss_weight={self.cfg.post_norm_loss_weight} needs the gain of the model's norm after "
                f"{self.cfg.metadata.hook_name}: call saelens_cosine.training.next_norm.take_next_norms(runner) before "
                "runner.run(), or set_next_norm on the SAE."
            )
        output = super().training_forward_pass(step_input)
        if not self.cfg.reconstruction_loss.is_mse:
            output.losses["reconstruction_loss"] = output.losses.pop("mse_loss")
        if step_input.is_logging_step or step_input.n_training_steps % CHECK_EVERY_STEPS == 0:
            self._check_finite(step_input, output)
        if step_input.is_logging_step:
            output.metrics.update(self.training_metrics())
        return output

    def _reconstruction_loss(self, sae_out: torch.Tensor, sae_in: torch.Tensor) -> torch.Tensor:
        gain = self.post_norm_gain if self.cfg.post_norm_loss_weight else None
        return self.cfg.reconstruction_loss(sae_out, sae_in, self.b_dec, gain)

    def set_next_norm(self, gain: torch.Tensor, eps: float) -> None:
        """Give the post-norm loss the RMS norm that follows in the model: gain `[d_in]` and eps."""
        if gain.shape != self.post_norm_gain.shape:
            raise ValueError(f"gain has shape {tuple(gain.shape)}, the activations have d_in={self.cfg.d_in}.")
        self.post_norm_gain.copy_(gain)
        self.cfg.post_norm_eps = eps

    def _fuse_adam(self) -> None:
        """Watch for the optimizer in this object's first training step, be it a run's or that of a resumed one."""
        if self._adam_watch is not None:
            self._adam_watch.remove()
        elif self.cfg.kernels != "reference" and torch.is_grad_enabled():
            learned: Any = [p for p in self.parameters() if p.requires_grad]
            self._adam_watch = fuse_adam_of(learned[0])

    @override
    @torch.no_grad()
    def initialize_from_data(self, batch: torch.Tensor) -> None:
        super().initialize_from_data(batch)
        points = batch.to(wide(self.b_dec.dtype))
        if self.cfg.b_dec_init == "geometric_median":
            self.b_dec.copy_(geometric_median(points))
        elif self.cfg.b_dec_init == "mean":
            self.b_dec.copy_(points.mean(dim=0))

    @torch.no_grad()
    def normalize_decoder(self) -> None:
        """Scale decoder rows back to norm 1, in place. What the next training step would do first."""
        self.W_dec.div_(self.get_W_dec_norm().unsqueeze(-1))

    def _release_decoder(self) -> None:
        """Project a last time before a fold that gives decoder rows other lengths, for good."""
        if self.cfg.unit_decoder:
            self.normalize_decoder()
            self.cfg.unit_decoder = False

    def _project_next_decoder_gradient(self) -> None:
        """Remove the part of the next gradient that would change decoder norms, before SAELens clips it.

        A hook that removes itself: a lasting one would be lost whenever loading or copying replaces the parameter.
        """
        if not (torch.is_grad_enabled() and self.W_dec.requires_grad):
            return

        def project(parameter: torch.Tensor) -> None:
            handle.remove()
            gradient, rows = parameter.grad, parameter.detach()
            assert gradient is not None
            # a CPU reads what its cache holds once; a GPU waits for the launches of many blocks
            block = max(1, PROJECTION_BLOCK // rows.shape[1]) if rows.device.type == "cpu" else len(rows)
            for part, row in zip(gradient.split(block), rows.split(block), strict=True):
                part.addcmul_(row, (part * row).sum(dim=-1, keepdim=True), value=-1)

        handle = self.W_dec.register_post_accumulate_grad_hook(project)

    def _check_finite(self, step_input: TrainStepInput, output: TrainStepOutput) -> None:
        if bool(output.loss.isfinite()):
            return
        x = step_input.sae_in
        bad = int((~x.isfinite()).any(dim=-1).sum())
        broken = not_finite(self.named_parameters())
        if bad:
            cause = f"{bad} of {len(x)} activations in this batch are not finite"
        elif not bool(x.to(wide(self.dtype)).square().sum().isfinite()):
            cause = (
                f"the activations of this batch are finite, but reach {x.abs().max():.3g}, whose square is not; "
                "filter_high_norm_tokens drops such tokens"
            )
        elif broken:
            cause = (
                f"the activations of this batch are finite, but {', '.join(broken)} no longer: activations of an earlier "
                "batch, or the learning rate"
            )
        else:
            cause = "activations and weights are finite, but reconstructions are out of range: the learning rate"
        raise FloatingPointError(
            f"Loss is {output.loss.item()} at training step {step_input.n_training_steps}, hook "
            f"{self.cfg.metadata.hook_name}, architecture {self.cfg.architecture()}: {cause}. "
            "Training stops; checkpoints written so far are kept."
        )

    @override
    def train(self, mode: bool = True) -> Any:
        # the optimizer has moved the rows since the last projection; eval mode shows what would be saved
        if not mode and self.cfg.unit_decoder:
            self.normalize_decoder()
        return super().train(mode)

    @override
    @torch.no_grad()
    def fold_activation_norm_scaling_factor(self, scaling_factor: float) -> None:
        self._release_decoder()
        super().fold_activation_norm_scaling_factor(scaling_factor)

    @override
    @torch.no_grad()
    def fold_activation_whitening(
        self, mean: torch.Tensor, whitening_matrix: torch.Tensor, unwhitening_matrix: torch.Tensor
    ) -> None:
        self._release_decoder()
        super().fold_activation_whitening(mean, whitening_matrix, unwhitening_matrix)

    @override
    def process_state_dict_for_saving(self, state_dict: dict[str, Any]) -> None:
        super().process_state_dict_for_saving(state_dict)
        broken = not_finite(state_dict.items())
        if broken:
            raise FloatingPointError(
                f"Not saved: {', '.join(broken)} of {self.cfg.architecture()} at {self.cfg.metadata.hook_name} hold "
                "non-finite values. The checkpoints written before are kept; resume from the last one."
            )

    @override
    def process_state_dict_for_saving_inference(self, state_dict: dict[str, Any]) -> None:
        for name in self.training_state:
            state_dict.pop(name, None)
        if self.cfg.unit_decoder:
            state_dict["W_dec"] = state_dict["W_dec"] / self.get_W_dec_norm().unsqueeze(-1)
        super().process_state_dict_for_saving_inference(state_dict)
        self._warn_if_dead(state_dict)

    def _warn_if_dead(self, state_dict: dict[str, Any]) -> None:
        silent = int(self.tokens_since_fired.min())
        if silent > 0 or not state_dict["W_enc"].any():
            cause = f"no feature has fired for {silent:,} training tokens" if silent > 0 else "its encoder is 0"
            warnings.warn(
                f"{self.cfg.architecture()} at {self.cfg.metadata.hook_name} is saved dead: {cause}. Look at the norms of the "
                "first batches, the scale, the thresholds and the learning rate.",
                stacklevel=2,
            )

    @override
    def process_state_dict_for_loading(self, state_dict: dict[str, Any]) -> None:
        super().process_state_dict_for_loading(state_dict)
        for name, dtype in self.training_state.items():
            if name in state_dict:  # SAELens' loaders have cast them to the SAE's dtype
                state_dict[name] = state_dict[name].to(dtype)


@torch.no_grad()
def geometric_median(points: torch.Tensor, max_steps: int = 100, tolerance: float = 1e-5) -> torch.Tensor:
    """The point with the smallest sum of distances to `points` `[n, d]`, by Weiszfeld's iteration from the mean."""
    median = points.mean(dim=0)
    for _ in range(max_steps):
        weights = 1 / token_norms(points - median).unsqueeze(-1).clamp_min(1e-8)
        previous, median = median, (weights * points).sum(dim=0) / weights.sum()
        if (median - previous).norm() < tolerance:
            break
    return median


def not_finite(named: Iterable[tuple[str, torch.Tensor]]) -> list[str]:
    """Names of the tensors that hold a NaN or an infinity."""
    return [name for name, tensor in named if not bool(tensor.isfinite().all())]

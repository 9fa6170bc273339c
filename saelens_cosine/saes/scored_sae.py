"""The seam that SAELens' classes lack: an encoder that is a score followed by a selection.

SAELens writes `sae_in @ W_enc + b_enc` inside every class's `encode`. `ScoredSAE` splits that line out as `score` and
leaves the rest of each class (activation function, decoder, losses, saving, folds) to SAELens. Mix it in *before* a
SAELens class; a score is one method, a selector is a SAELens class.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from sae_lens.saes.sae import SAE, TrainingSAE, TrainingSAEConfig
from typing_extensions import override

from saelens_cosine.score import wide

# What a mix-in for training configs derives from. At run time it must bring no fields of its own: a dataclass takes each
# base's whole list, so a second copy of SAELens' defaults would override what another mix-in has set.
ConfigMixin = TrainingSAEConfig if TYPE_CHECKING else object


class ScoredSAE(SAE[Any]):
    """Encode as `select(score(x - b_dec))`, with SAELens' hook points in SAELens' order.

    From the centring to the selection everything is float32 or wider whatever the SAE's dtype, so that norms, scores and
    thresholds carry no rounding beyond that of the inputs and the weights. Codes and reconstructions have the SAE's dtype.
    """

    kept_wide: ClassVar[dict[str, torch.dtype]] = {
        "norm_exponent": torch.float32,
        "log_scale": torch.float32,
        "threshold": torch.float32,
        "topk_threshold": torch.float64,
    }
    """Parameters and buffers that no cast may narrow further: rounded, they would stop learning and shift L0."""

    b_enc: torch.nn.Parameter

    def score(self, x_centered: torch.Tensor) -> torch.Tensor:
        """Pre-activations `[..., d_sae]` of centred inputs `[..., d_in]`, both float32 or wider."""
        raise NotImplementedError(f"{type(self).__name__} has no score: mix in a class that defines one.")

    def select(self, hidden_pre: torch.Tensor) -> torch.Tensor:
        """Codes `[..., d_sae]` from pre-activations: SAELens' activation function unless a selector says otherwise."""
        return self.activation_fn(hidden_pre)

    def encode_with_hidden_pre(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes and (decoder-norm rescaled) pre-activations, both `[..., d_sae]`."""
        hidden_pre = self.hook_sae_acts_pre(self.score(self.process_sae_in(x)))
        if getattr(self.cfg, "rescale_acts_by_decoder_norm", False):
            hidden_pre = hidden_pre * self.W_dec.norm(dim=-1)
        return self.hook_sae_acts_post(self.select(hidden_pre).to(self.dtype)), hidden_pre

    @override
    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return self.encode_with_hidden_pre(x)[0]

    @override
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).to(x.dtype)

    @override
    def process_sae_in(self, sae_in: torch.Tensor) -> torch.Tensor:
        """SAELens' input processing, with the centring in float32 or wider.

        Raises:
            ValueError: the input's last dimension is not `d_in`.
        """
        sae_in = self.reshape_fn_in(sae_in.to(self.dtype))
        if sae_in.shape[-1] != self.cfg.d_in:
            raise ValueError(
                f"This SAE has d_in={self.cfg.d_in} but the activations at "
                f"{self.cfg.metadata.hook_name or 'its input'} have size {sae_in.shape[-1]} "
                f"(shape {tuple(sae_in.shape)}). Set d_in={sae_in.shape[-1]}, or use the hook the SAE was made for."
            )
        sae_in = self.run_time_activation_norm_fn_in(self.hook_sae_input(sae_in))
        return sae_in.to(wide(sae_in.dtype)) - self.b_dec * self.cfg.apply_b_dec_to_input

    @override
    def get_name(self) -> str:
        """SAELens' name and the architecture, so that two arms at one hook don't share an artifact."""
        return f"{super().get_name()}_{self.cfg.architecture()}"

    @override
    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        before = {name: tensor.data for name, tensor in self._wide_tensors().items()}
        result = super()._apply(fn, recurse)
        for name, tensor in self._wide_tensors().items():
            dtype = torch.promote_types(tensor.dtype, self.kept_wide[name])
            if tensor.dtype != dtype:
                tensor.data = before[name].to(tensor.device, dtype)  # the value before it was rounded
        return result

    @override
    def process_state_dict_for_loading(self, state_dict: dict[str, Any]) -> None:
        super().process_state_dict_for_loading(state_dict)
        # SAELens' loaders cast every tensor to the SAE's dtype before a class sees it
        for name in self._wide_tensors():
            if name in state_dict:
                dtype = torch.promote_types(state_dict[name].dtype, self.kept_wide[name])
                state_dict[name] = state_dict[name].to(dtype)

    def _wide_tensors(self) -> dict[str, torch.Tensor]:
        tensors = {name: getattr(self, name, None) for name in self.kept_wide}
        return {name: tensor for name, tensor in tensors.items() if isinstance(tensor, torch.Tensor)}


class ScoredTrainingSAE(ScoredSAE, TrainingSAE[Any]):
    """Two more seams for training: starts that need activations, and what a log should show."""

    def initialize_from_data(self, batch: torch.Tensor) -> None:
        """Set starts that need activations `[tokens, d_in]`; called once, with the first training batch."""

    def training_metrics(self) -> dict[str, torch.Tensor]:
        """What a training log should show beyond SAELens' own metrics: name -> 0-dimensional tensor."""
        return {}


class InnerProductScore(ScoredTrainingSAE):
    """The standard score, `<x_c, w_i> + b_enc_i`: the control that shares everything but the score.

    Saved as SAELens' own class, so there is no inference form here.
    """

    @override
    def score(self, x_centered: torch.Tensor) -> torch.Tensor:
        return (x_centered.to(self.W_enc.dtype) @ self.W_enc + self.b_enc).to(x_centered.dtype)

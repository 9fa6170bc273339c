"""SAELens' classes with an encoder that is a score followed by a selection.

`ScoredSAE` leaves the rest of each class (activation function, decoder, losses, saving, folds) to SAELens. Mix it in *before* a SAELens
class; a score is one method, a selector is a SAELens class.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from sae_lens.saes.sae import TrainingSAE, TrainingSAEConfig
from sae_lens.util import dtype_to_str
from typing_extensions import override

from saelens_cosine.saes.encoding import SparseCodes, encode_in_chunks, encode_sparse, fast_encode
from saelens_cosine.saes.path import has_hooks, use_fast_path
from saelens_cosine.saes.scored_encoder import ScoredEncoder
from saelens_cosine.score import ScoreParameters, folded_score, multiplies_in_float16, wide

# What a mix-in for training configs derives from. At run time it must bring no fields of its own: a dataclass takes each
# base's whole list, so a second copy of SAELens' defaults would override what another mix-in has set.
ConfigMixin = TrainingSAEConfig if TYPE_CHECKING else object


def feature_major(W_enc: torch.Tensor) -> torch.Tensor:
    """`W_enc [d_in, d_sae]` with each feature's column in one piece of memory, so that gathers move whole rows."""
    return W_enc.T.contiguous().T


class ScoredSAE(ScoredEncoder):
    """A `ScoredEncoder` in SAELens: which path a call takes, what no cast narrows, what is loaded and saved."""

    kept_wide: ClassVar[dict[str, torch.dtype]] = {
        "norm_exponent": torch.float32,
        "norm_exponent_base": torch.float32,
        "log_scale": torch.float32,
        "threshold": torch.float32,
        "threshold_unit": torch.float32,
        "post_norm_gain": torch.float32,
        "topk_threshold": torch.float64,
    }
    """Parameters and buffers that no cast may narrow further: rounded, they would stop learning and shift L0."""

    @override
    def initialize_weights(self) -> None:
        super().initialize_weights()
        self.W_enc.data = feature_major(self.W_enc.data)

    @override
    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Codes `[..., d_sae]`; without gradients and hooks, in chunks that bound the memory."""
        if torch.is_grad_enabled() or has_hooks(self):
            return self.encode_with_hidden_pre(x)[0]
        return encode_in_chunks(self, x)

    def encode_sparse(self, x: torch.Tensor) -> SparseCodes:
        """The active codes alone, without gradients and hooks: `[..., d_in] -> values, indices`, both `[..., K]`.

        K is the largest number of active codes of a token, or k for a TopK. Faster than `encode`, and in 1 / d_sae of its
        memory per code.
        """
        return encode_sparse(self, x)

    @override
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).to(x.dtype)

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
            # the value before it was rounded, also where SAELens' JumpReLU has widened it again
            if tensor.dtype != dtype or self.W_enc.dtype != wide(self.W_enc.dtype):
                tensor.data = before[name].to(tensor.device, dtype)
        # SAELens' `to` notes the new dtype; `double`, `half` and `bfloat16` come by here alone
        self.dtype = self.W_dec.dtype
        self.cfg.dtype = dtype_to_str(self.dtype)
        return result

    @override
    def process_state_dict_for_loading(self, state_dict: dict[str, Any]) -> None:
        super().process_state_dict_for_loading(state_dict)
        if "W_enc" in state_dict:
            state_dict["W_enc"] = feature_major(state_dict["W_enc"])
        # SAELens' loaders cast every tensor to the SAE's dtype before a class sees it
        for name in self._wide_tensors():
            if name in state_dict:
                dtype = torch.promote_types(state_dict[name].dtype, self.kept_wide[name])
                state_dict[name] = state_dict[name].to(dtype)

    @override
    def process_state_dict_for_saving(self, state_dict: dict[str, Any]) -> None:
        super().process_state_dict_for_saving(state_dict)
        state_dict["W_enc"] = state_dict["W_enc"].contiguous()  # safetensors saves no views

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

    @override
    def encode_with_hidden_pre(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes and (decoder-norm rescaled) pre-activations, both `[..., d_sae]`.

        In training both may be tensors that hold only the active codes and become dense when something asks
        (`saelens_cosine.kernels.codes`).
        """
        if use_fast_path(self, x):
            return fast_encode(self, x)
        return super().encode_with_hidden_pre(x)

    @override
    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return super().encode_with_hidden_pre(x)[0]


class InnerProductScore(ScoredSAE):
    """The standard score, `<x_c, w_i> + b_enc_i`: the control that shares everything but the score."""

    @override
    def score(self, x_centered: torch.Tensor) -> torch.Tensor:
        if multiplies_in_float16(self.W_enc):
            return folded_score(x_centered, self.W_enc, self.encoder_bias(), self.score_parameters().norm_exponent)
        return (x_centered.to(self.W_enc.dtype) @ self.W_enc + self.encoder_bias()).to(x_centered.dtype)

    @override
    def score_parameters(self) -> ScoreParameters:
        one = torch.ones((), dtype=wide(self.dtype), device=self.W_enc.device)
        return ScoreParameters(one, torch.zeros_like(one), unit_columns=False)

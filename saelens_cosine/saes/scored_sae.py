"""The seam that SAELens' classes lack: an encoder that is a score followed by a selection.

SAELens writes `sae_in @ W_enc + b_enc` inside every class's `encode`. `ScoredSAE` splits that line out as `score` and
leaves the rest of each class (activation function, decoder, losses, saving, folds) to SAELens. Mix it in *before* a
SAELens class; a score is one method, a selector is a SAELens class.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from sae_lens.saes.sae import SAE, TrainingSAE, TrainingSAEConfig
from sae_lens.util import dtype_to_str
from typing_extensions import override

from saelens_cosine.kernels.selection import ENTRY_SELECTORS, EntrySelector
from saelens_cosine.saes.encoding import SparseCodes, encode_in_chunks, encode_sparse, fast_encode
from saelens_cosine.saes.path import has_hooks, use_fast_path
from saelens_cosine.score import ScoreParameters, cosine_score, folded_score, multiplies_in_float16, wide

# What a mix-in for training configs derives from. At run time it must bring no fields of its own: a dataclass takes each
# base's whole list, so a second copy of SAELens' defaults would override what another mix-in has set.
ConfigMixin = TrainingSAEConfig if TYPE_CHECKING else object


def feature_major(W_enc: torch.Tensor) -> torch.Tensor:
    """`W_enc [d_in, d_sae]` with each feature's column in one piece of memory, so that gathers move whole rows."""
    return W_enc.T.contiguous().T


class ScoredSAE(SAE[Any]):
    """Encode as `select(score(x - b_dec))`, with SAELens' hook points in SAELens' order.

    The fast path (`saelens_cosine.kernels`) computes only the active codes. It needs to know a score by its parameters and
    a selection by its entries: a class that defines `score` defines `score_parameters` beside it, and one that defines
    `select` defines `entry_selector`, or its calls take the reference path.

    From the centring to the selection everything is float32 or wider whatever the SAE's dtype, so that norms, scores and
    thresholds carry no rounding beyond that of the inputs and the weights. Codes and reconstructions have the SAE's dtype.
    """

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

    b_enc: torch.nn.Parameter

    floor_hint: Any = None
    """What the last selection by entries suggests to the next. It changes the time taken, never the result."""

    @override
    def initialize_weights(self) -> None:
        super().initialize_weights()
        self.W_enc.data = feature_major(self.W_enc.data)

    def score(self, x_centered: torch.Tensor) -> torch.Tensor:
        """Pre-activations `[..., d_sae]` of centred inputs `[..., d_in]`, both float32 or wider."""
        raise NotImplementedError(f"{type(self).__name__} has no score: mix in a class that defines one.")

    def select(self, hidden_pre: torch.Tensor) -> torch.Tensor:
        """Codes `[..., d_sae]` from pre-activations: SAELens' activation function unless a selector says otherwise."""
        return self.activation_fn(hidden_pre)

    def finish(self, codes: torch.Tensor, x_centered: torch.Tensor) -> torch.Tensor:
        """What a selector does with its codes `[..., d_sae]` that takes the centred input `[..., d_in]`: by default nothing."""
        return codes

    def score_parameters(self) -> ScoreParameters:
        """The parameters that make `score`."""
        raise NotImplementedError(f"{type(self).__name__} has no score_parameters.")

    def encoder_bias(self) -> torch.Tensor:
        """`b_enc` of the score, `[d_sae]`."""
        return self.b_enc

    def score_features(self, x_centered: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """`score` of some features only: `[..., d_in] -> [..., len(features)]`."""
        parameters = self.score_parameters()
        norm_exponent, log_scale = (p[features] if p.ndim else p for p in parameters[:2])
        W_enc, b_enc = self.W_enc.T.index_select(0, features).T, self.encoder_bias()[features]
        if parameters.unit_columns:
            return cosine_score(x_centered, W_enc, b_enc, norm_exponent, log_scale)
        return folded_score(x_centered, W_enc, b_enc, norm_exponent)

    def entry_selector(self, n_tokens: int) -> EntrySelector | None:
        """`select` on entries, for a batch of this size; None if there is no such form."""
        make = ENTRY_SELECTORS.get(type(self.activation_fn))
        return make(self.activation_fn, n_tokens) if make else None

    def rescale(self, hidden_pre: torch.Tensor) -> torch.Tensor:
        """Scores times decoder norms, where the config says so: what is selected from."""
        rescales = getattr(self.cfg, "rescale_acts_by_decoder_norm", False)
        return hidden_pre * self.W_dec.norm(dim=-1) if rescales else hidden_pre

    def encode_with_hidden_pre(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes and (decoder-norm rescaled) pre-activations, both `[..., d_sae]`."""
        x_centered = self.process_sae_in(x)
        hidden_pre = self.rescale(self.hook_sae_acts_pre(self.score(x_centered)))
        codes = self.finish(self.select(hidden_pre), x_centered)
        return self.hook_sae_acts_post(codes.to(self.dtype)), hidden_pre

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
    def process_sae_in(self, sae_in: torch.Tensor) -> torch.Tensor:
        """SAELens' input processing, with the centring in float32 or wider.

        Raises:
            ValueError: the input's last dimension is not `d_in`.
        """
        return self.centre(self.sae_input(sae_in))

    def centre(self, sae_in: torch.Tensor) -> torch.Tensor:
        """`sae_in - b_dec` (or `sae_in`, without `apply_b_dec_to_input`) in float32 or wider."""
        return sae_in.to(wide(sae_in.dtype)) - self.b_dec * self.cfg.apply_b_dec_to_input

    def sae_input(self, sae_in: torch.Tensor) -> torch.Tensor:
        """The first half of `process_sae_in`, up to the centring."""
        sae_in = self.reshape_fn_in(sae_in.to(self.dtype))
        if sae_in.shape[-1] != self.cfg.d_in:
            raise ValueError(
                f"This SAE has d_in={self.cfg.d_in} but the activations at "
                f"{self.cfg.metadata.hook_name or 'its input'} have size {sae_in.shape[-1]} "
                f"(shape {tuple(sae_in.shape)}). Set d_in={sae_in.shape[-1]}, or use the hook the SAE was made for."
            )
        return self.run_time_activation_norm_fn_in(self.hook_sae_input(sae_in))

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

"""The seam that SAELens' classes lack: an encoder that is a score followed by a selection.

SAELens writes `sae_in @ W_enc + b_enc` inside every class's `encode`. Here that line is `score`, and what is kept of the scores `select`.
This is the formula alone; which path a call takes to it is the business of `ScoredSAE`.
"""

from __future__ import annotations

from typing import Any

import torch
from sae_lens.saes.sae import SAE
from sae_lens.saes.topk_sae import act_times_W_dec
from typing_extensions import override

from saelens_cosine.kernels.selection import ENTRY_SELECTORS, EntrySelector
from saelens_cosine.kernels.whole import HERE, Whole
from saelens_cosine.score import ScoreParameters, cosine_score, folded_score, wide


def rescales_by_decoder_norm(cfg: Any) -> bool:
    """Whether scores are multiplied by decoder norms before selecting, so that codes are coefficients on unit directions.

    An option of SAELens' TopK, BatchTopK and Matryoshka; a config without it does not.
    """
    return getattr(cfg, "rescale_acts_by_decoder_norm", False)


class ScoredEncoder(SAE[Any]):
    """`select(score(x - b_dec))`, with SAELens' hook points in SAELens' order.

    The fast path (`saelens_cosine.kernels`) computes only the active codes. It needs to know a score by its parameters and
    a selection by its entries: a class that defines `score` defines `score_parameters` beside it, and one that defines
    `select` defines `entry_selector`, or its calls take the reference path.

    From the centring to the selection everything is float32 or wider whatever the SAE's dtype, so that norms, scores and
    thresholds carry no rounding beyond that of the inputs and the weights. Codes and reconstructions have the SAE's dtype.
    """

    b_enc: torch.nn.Parameter

    floor_hint: Any = None
    """What the last selection by entries suggests to the next. It changes the time taken, never the result."""

    whole: Whole = HERE
    """The dictionary whose features these are; where it is split over ranks, they are a block of it."""

    def score(self, x_centered: torch.Tensor) -> torch.Tensor:
        """Pre-activations `[..., d_sae]` of centred inputs `[..., d_in]`, both float32 or wider."""
        raise NotImplementedError(f"{type(self).__name__} has no score: mix in a class that defines one.")

    def select(self, hidden_pre: torch.Tensor) -> torch.Tensor:
        """Codes `[..., d_sae]` from pre-activations: SAELens' activation function unless a selector says otherwise."""
        return self.whole.activate(self.activation_fn, hidden_pre)

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
        return hidden_pre * self.W_dec.norm(dim=-1) if rescales_by_decoder_norm(self.cfg) else hidden_pre

    def encode_with_hidden_pre(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes and (decoder-norm rescaled) pre-activations, both `[..., d_sae]`."""
        x_centered = self.process_sae_in(x)
        hidden_pre = self.rescale(self.hook_sae_acts_pre(self.score(x_centered)))
        codes = self.finish(self.select(hidden_pre), x_centered)
        return self.hook_sae_acts_post(codes.to(self.dtype)), hidden_pre

    @override
    def decode(self, feature_acts: torch.Tensor) -> torch.Tensor:
        """Reconstructions `[..., d_in]` of codes `[..., d_sae]`, SAELens' way."""
        sae_out = self.hook_sae_recons(self.add_up(feature_acts) + self.b_dec)
        return self.reshape_fn_out(self.run_time_activation_norm_fn_out(sae_out), self.d_head)

    def add_up(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes times decoder rows, summed over the features of the whole dictionary: `[..., d_sae] -> [..., d_in]`."""
        return self.whole.total(act_times_W_dec(codes, self.W_dec, rescales_by_decoder_norm(self.cfg)))

    @override
    def process_sae_in(self, sae_in: torch.Tensor) -> torch.Tensor:
        """SAELens' input processing, with the centring in float32 or wider.

        Raises:
            ValueError: the input's last dimension is not `d_in`.
        """
        return self.centre(self.sae_input(sae_in))

    def centre(self, sae_in: torch.Tensor) -> torch.Tensor:
        """`sae_in - b_dec` (or `sae_in`, without `apply_b_dec_to_input`) in float32 or wider."""
        return sae_in.to(wide(sae_in.dtype)) - self.whole.shared(self.b_dec) * self.cfg.apply_b_dec_to_input

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

"""Which path a training step takes, and why; and the fast path itself."""

from __future__ import annotations

import logging
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch

from saelens_cosine.kernels.autograd import EntryScores, ScoredBatch
from saelens_cosine.kernels.codes import EntryCodes, ScoresOnDemand
from saelens_cosine.kernels.filter import ScoreTerms
from saelens_cosine.kernels.selection import Encoder, UnitInputs
from saelens_cosine.score import NORM_FLOOR, centred_norm

if TYPE_CHECKING:
    from saelens_cosine.saes.scored_sae import ScoredTrainingSAE

logger = logging.getLogger(__name__)

SPARSE_ENOUGH = 8
"""The fast path pays when at most one in this many codes is active; measured in `kernels/README.md`."""


def use_fast_path(sae: ScoredTrainingSAE, x: torch.Tensor) -> bool:
    """Whether this call takes the fast path.

    Raises:
        RuntimeError: it is demanded (`kernels="fast"`) and impossible.
    """
    wanted = getattr(sae.cfg, "kernels", "reference")
    if wanted == "reference" or not sae.training or torch.compiler.is_compiling():
        return False
    reason = decline_reason(sae, x)
    if reason is None:
        return True
    if wanted == "fast":
        raise RuntimeError(f'kernels="fast" is impossible here: {reason}. Use kernels="auto" or "reference".')
    _log_once(f"{sae.cfg.architecture()} takes the reference path: {reason}.")
    return False


@lru_cache(maxsize=256)
def _log_once(message: str) -> None:
    logger.info(message)


def decline_reason(sae: ScoredTrainingSAE, x: torch.Tensor) -> str | None:
    """Why a training call cannot take the fast path, in a few words; None when it can."""
    if _owner(sae, "score") is not _owner(sae, "score_parameters"):
        return f"{_owner(sae, 'score').__name__}.score has no entry-wise form (score_parameters)"
    if _owner(sae, "select") is not _owner(sae, "entry_selector") or sae.entry_selector(x.shape[0]) is None:
        return f"{_owner(sae, 'select').__name__}.select has no entry-wise form (entry_selector)"
    if any(hook._forward_hooks or hook._backward_hooks for hook in (sae.hook_sae_acts_pre, sae.hook_sae_acts_post)):
        return "a hook wants dense scores or codes"
    if x.ndim != 2:
        return f"activations of shape {tuple(x.shape)} are not [tokens, d_in]"
    if sae.dtype not in (torch.float32, torch.float64):
        return f"parameters are {sae.dtype}, not float32 or float64"
    if x.device.type != "cpu":
        return f"there are no kernels for {x.device.type}"
    if sae.cfg.kernels == "auto" and sae.cfg.k * SPARSE_ENOUGH > sae.cfg.d_sae:
        return f"k={sae.cfg.k} of d_sae={sae.cfg.d_sae} is too dense to gain from it"
    return None


def _owner(sae: ScoredTrainingSAE, method: str) -> type[Any]:
    return next(c for c in type(sae).__mro__ if method in vars(c))


def fast_encode(sae: ScoredTrainingSAE, x: torch.Tensor) -> tuple[EntryCodes, ScoresOnDemand]:
    """Codes and pre-activations of a training batch `[tokens, d_in]`, as entries and as a promise."""
    sae_in = sae.sae_input(x)
    x_centered = sae.centre(sae_in)
    log_scale: torch.Tensor
    norm_exponent, log_scale, unit_columns = sae.score_parameters()
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        norm = centred_norm(x_centered)
        inputs = UnitInputs(x_centered / norm, norm.log().squeeze(-1))
        weight = sae.W_enc.T.to(inputs.unit.dtype).contiguous()
        column_norm = weight.norm(dim=1).clamp_min(NORM_FLOOR)
        gain = column_norm.reciprocal() if unit_columns else torch.ones_like(column_norm)
        terms = ScoreTerms(norm_exponent.detach(), log_scale.detach(), gain, sae.b_enc.detach())
        rescale = getattr(sae.cfg, "rescale_acts_by_decoder_norm", False)
        if rescale:
            decoder_norm = sae.W_dec.norm(dim=-1)
            terms = ScoreTerms(terms.norm_exponent, terms.log_scale, gain * decoder_norm, terms.bias * decoder_norm)
        select = sae.entry_selector(len(x))
        assert select is not None
        scored, sae.floor_hint = select(inputs, Encoder(weight, column_norm, terms), sae.floor_hint)
    entries = scored.entries
    factor = scored.factor
    if rescale:
        factor = factor / decoder_norm.index_select(0, entries.features)
    batch = ScoredBatch(
        entries, scored.product, factor, inputs.unit, inputs.log_norm, gain**2 if unit_columns else None
    )
    b_dec = sae.b_dec if sae.cfg.apply_b_dec_to_input else None
    values: Any = EntryScores.apply(sae_in, b_dec, sae.W_enc, sae.b_enc, norm_exponent, log_scale, batch)
    if rescale:
        values = values * sae.W_dec.norm(dim=-1).index_select(0, entries.features)

    def scores(features: torch.Tensor | None) -> torch.Tensor:
        hidden_pre = sae.score(x_centered) if features is None else sae.score_features(x_centered, features)
        if rescale:
            decoder = sae.W_dec if features is None else sae.W_dec[features]
            hidden_pre = hidden_pre * decoder.norm(dim=-1)
        return hidden_pre

    hidden_pre = ScoresOnDemand(
        scores, list(sae.parameters()), shape=(len(x), sae.cfg.d_sae), dtype=x_centered.dtype, device=x.device
    )
    return EntryCodes(entries, values.to(sae.dtype)), hidden_pre

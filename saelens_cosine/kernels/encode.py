"""Encoding by entries: a training batch with its gradients, and inference."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from sae_lens.saes.sae import TrainingSAE

from saelens_cosine.kernels.autograd import EntryScores, ScoredBatch
from saelens_cosine.kernels.codes import EntryCodes, ScoresOnDemand
from saelens_cosine.kernels.dispatch import decline_reason
from saelens_cosine.kernels.entries import Entries
from saelens_cosine.kernels.filter import Rounded, ScoreTerms
from saelens_cosine.kernels.selection import Encoder, Scored, UnitInputs
from saelens_cosine.score import NORM_FLOOR, centred_norm

if TYPE_CHECKING:
    from saelens_cosine.saes.scored_sae import ScoredSAE, ScoredTrainingSAE

CHUNK_ENTRIES = 2**22
"""Scores that inference holds at a time: 16 MiB in float32, below what allocators return to the system after each use."""


class SparseCodes(NamedTuple):
    """
    The active codes of each token, side by side.

    Args:
        values (torch.Tensor): `[..., K]`, zero where a token has fewer than K.
        indices (torch.Tensor): `[..., K]` int64, their features in ascending order; 0 where the value is zero.
    """

    values: torch.Tensor
    indices: torch.Tensor


def fast_encode(sae: ScoredTrainingSAE, x: torch.Tensor) -> tuple[EntryCodes, ScoresOnDemand]:
    """Codes and pre-activations of a training batch `[tokens, d_in]`, as entries and as a promise."""
    sae_in = sae.sae_input(x)
    x_centered = sae.centre(sae_in)
    norm_exponent, log_scale, _ = sae.score_parameters()
    rescale = getattr(sae.cfg, "rescale_acts_by_decoder_norm", False)
    scored, inputs, inverse_square = _select(sae, x_centered)
    entries, factor = scored.entries, scored.factor
    decoder_norm = sae.W_dec.norm(dim=-1).index_select(0, entries.features) if rescale else None
    if decoder_norm is not None:
        factor = factor / decoder_norm.detach()
    batch = ScoredBatch(entries, scored.product, factor, inputs.unit, inputs.log_norm, inverse_square)
    b_dec = sae.b_dec if sae.cfg.apply_b_dec_to_input else None
    values: Any = EntryScores.apply(sae_in, b_dec, sae.W_enc, sae.b_enc, norm_exponent, log_scale, batch)
    if decoder_norm is not None:
        values = values * decoder_norm

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


@torch.no_grad()
def encode_in_chunks(sae: ScoredSAE, x: torch.Tensor) -> torch.Tensor:
    """Dense codes `[..., d_sae]`, a few tokens' scores at a time."""
    x_centered = sae.process_sae_in(x)
    flat = x_centered.reshape(-1, x_centered.shape[-1])
    codes = torch.empty(len(flat), sae.cfg.d_sae, dtype=sae.dtype, device=flat.device)
    size = max(1, CHUNK_ENTRIES // sae.cfg.d_sae)
    for chunk, out in zip(flat.split(size), codes.split(size), strict=True):
        out.copy_(sae.select(sae.rescale(sae.score(chunk))))
    return codes.view(*x_centered.shape[:-1], sae.cfg.d_sae)


@torch.no_grad()
def encode_sparse(sae: ScoredSAE, x: torch.Tensor) -> SparseCodes:
    """The active codes of `x [..., d_in]`, at most `CHUNK_ENTRIES` dense scores at a time."""
    x_centered = sae.process_sae_in(x)
    shape = x_centered.shape[:-1]
    flat = x_centered.reshape(-1, x_centered.shape[-1])
    if decline_reason(sae, flat) is None:
        scored = _select(sae, flat)[0]
        entries, values = scored.entries, scored.score.relu()
    else:
        entries, values = _entries_in_chunks(sae, flat)
    found = entries.token_offsets.diff()
    width = max(int(found.max()) if len(found) else 0, getattr(sae.activation_fn, "k", 0) if _per_token(sae) else 0)
    # entry j of a token goes to place j of its row
    rows_start = torch.arange(len(flat), device=found.device) * width - entries.token_offsets[:-1]
    place = torch.arange(len(entries), device=found.device) + rows_start.index_select(0, entries.tokens)
    padded = torch.zeros(len(flat) * width, dtype=sae.dtype, device=flat.device)
    indices = torch.zeros(len(flat) * width, dtype=torch.int64, device=flat.device)
    padded.scatter_(0, place, values.to(sae.dtype))
    indices.scatter_(0, place, entries.features)
    return SparseCodes(padded.view(*shape, width), indices.view(*shape, width))


def _per_token(sae: ScoredSAE) -> bool:
    return isinstance(getattr(sae.activation_fn, "k", None), int)


def _entries_in_chunks(sae: ScoredSAE, flat: torch.Tensor) -> tuple[Entries, torch.Tensor]:
    size = max(1, CHUNK_ENTRIES // sae.cfg.d_sae)
    if isinstance(sae, TrainingSAE):  # may select over the whole batch
        size = max(1, len(flat))
    tokens, features, values = [], [], []
    for i, chunk in enumerate(flat.split(size)):
        codes = sae.select(sae.rescale(sae.score(chunk)))
        token, feature = codes.nonzero(as_tuple=True)
        tokens.append(token + i * size)
        features.append(feature)
        values.append(codes[token, feature])
    return Entries(torch.cat(tokens), torch.cat(features), len(flat), sae.cfg.d_sae), torch.cat(values)


@torch.no_grad()
def _select(sae: ScoredSAE, x_centered: torch.Tensor) -> tuple[Scored, UnitInputs, torch.Tensor | None]:
    """The entries that an SAE keeps of centred inputs `[tokens, d_in]`; with unit columns also 1 / ||w_i||^2 `[d_sae]`."""
    device = x_centered.device.type
    product_dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    with torch.autocast(device, enabled=False):
        norm = centred_norm(x_centered)
        inputs = UnitInputs(x_centered / norm, norm.log().squeeze(-1))
        weight, column_norm, rounded = _prepared(sae)
        norm_exponent, log_scale, unit_columns = sae.score_parameters()
        gain = column_norm.reciprocal() if unit_columns else torch.ones_like(column_norm)
        bias = sae.b_enc.detach()
        if getattr(sae.cfg, "rescale_acts_by_decoder_norm", False):
            decoder_norm = sae.W_dec.norm(dim=-1)
            gain, bias = gain * decoder_norm, bias * decoder_norm
        terms = ScoreTerms(norm_exponent.detach(), log_scale.detach(), gain, bias)
        encoder = Encoder(weight, terms, rounded, product_dtype)
        select = sae.entry_selector(len(x_centered))
        assert select is not None, "asked of an SAE that declines"
        scored, sae.floor_hint = select(inputs, encoder, sae.floor_hint)
    return scored, inputs, column_norm.square().reciprocal() if unit_columns else None


_Prepared = tuple[torch.Tensor, torch.Tensor, Rounded | None]
_PREPARED: WeakKeyDictionary[torch.nn.Module, tuple[tuple[Any, ...], _Prepared]] = WeakKeyDictionary()


def _prepared(sae: ScoredSAE) -> _Prepared:
    """Encoder columns as rows, their norms, and the rows as the filter multiplies them; kept while inference changes nothing."""
    W_enc = sae.W_enc.detach()
    key = (W_enc.data_ptr(), sae.W_enc._version, W_enc.dtype, W_enc.device)
    known = _PREPARED.get(sae)
    if known is not None and known[0] == key and not sae.training:
        return known[1]
    weight = W_enc.T.to(torch.promote_types(W_enc.dtype, torch.float32)).contiguous()
    rounded = Rounded.of(weight) if weight.device.type == "cpu" else None
    column_norm = weight.norm(dim=1) if rounded is None else rounded.norm
    prepared = (weight, column_norm.clamp_min(NORM_FLOOR), rounded)
    if not sae.training:
        _PREPARED[sae] = (key, prepared)
    return prepared

"""Encoding by entries: a training batch with its gradients, and inference."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from sae_lens.saes.abstopk_sae import AbsTopK
from sae_lens.saes.sae import TrainingSAE
from sae_lens.saes.topk_sae import TopK

from saelens_cosine.kernels.autograd import EntryScores, ScoredBatch
from saelens_cosine.kernels.codes import EntryCodes, ScoresOnDemand
from saelens_cosine.kernels.entries import Entries
from saelens_cosine.kernels.filter import TILE_TOKENS, Rounded
from saelens_cosine.kernels.selection import Encoder, Scored, UnitInputs, above, few_positive_of_each, on_gpu
from saelens_cosine.kernels.terms import ScoreTerms
from saelens_cosine.kernels.whole import HERE
from saelens_cosine.saes.path import decline_reason, defined_together
from saelens_cosine.saes.scored_encoder import ScoredEncoder, rescales_by_decoder_norm
from saelens_cosine.score import NORM_FLOOR, centred_norm, folded_score

CHUNK_ENTRIES = 2**22
"""Scores that inference holds at a time: 16 MiB in float32, below what allocators return to the system after each use."""

GPU_CHUNK_ENTRIES = 2**26
"""The same on a GPU, 256 MiB in float32: each chunk reads the encoder again, and under autocast rounds it again."""

WORTH_ROUNDING = 64
"""Tokens from which on a product in low precision saves more than rounding the encoder costs."""

CPU_TILE = 2**19
"""Scores in a tile that passes through several operations in a CPU's cache: 2 MiB in float32."""


class SparseCodes(NamedTuple):
    """
    The active codes of each token, side by side.

    Args:
        values (torch.Tensor): `[..., K]`, zero where a token has fewer than K.
        indices (torch.Tensor): `[..., K]` int64, their features in ascending order; 0 where the value is zero.
    """

    values: torch.Tensor
    indices: torch.Tensor


class Selected(NamedTuple):
    """
    Entries of a batch, and what their gradients take.

    Args:
        scored (Scored): The entries.
        inputs (UnitInputs): The batch.
        inverse_square (torch.Tensor | None): `[d_sae]`, 1 / ||w_i||^2 of their features where the score is by direction.
    """

    scored: Scored
    inputs: UnitInputs
    inverse_square: torch.Tensor | None


def fast_encode(sae: ScoredEncoder, x: torch.Tensor) -> tuple[EntryCodes, ScoresOnDemand]:
    """Codes and pre-activations of a training batch `[tokens, d_in]`, as entries and as a promise."""
    sae_in = sae.sae_input(x)
    x_centered = sae.centre(sae_in)
    selected = _select(sae, x_centered)
    active = _with_gradients(sae, sae_in, selected)

    def scores(features: torch.Tensor | None) -> torch.Tensor:
        hidden_pre = sae.score(x_centered) if features is None else sae.score_features(x_centered, features)
        if rescales_by_decoder_norm(sae.cfg):
            decoder = sae.W_dec if features is None else sae.W_dec[features]
            hidden_pre = hidden_pre * decoder.norm(dim=-1)
        return hidden_pre

    def few(features: torch.Tensor, certain: torch.Tensor, k: int) -> EntryCodes | None:
        if on_gpu(selected.inputs) or sae.whole is not HERE:
            return None
        found = _few_positive(sae, selected.inputs, features[certain], k)
        return None if found is None else _with_gradients(sae, sae_in, found)

    hidden_pre = ScoresOnDemand(
        scores,
        few,
        [parameter for _, parameter in sae.named_parameters()],
        active.values.detach(),
        shape=(len(x), sae.cfg.d_sae),
        dtype=x_centered.dtype,
        device=x.device,
    )
    codes: Any = sae.finish(active, x_centered)
    return codes.to(sae.dtype), hidden_pre


def _with_gradients(sae: ScoredEncoder, sae_in: torch.Tensor, selected: Selected) -> EntryCodes:
    """The selected scores, rectified unless signed, as functions of the weights."""
    scored, inputs, inverse_square = selected
    entries, factor = scored.entries, scored.factor
    decoder_norm = None
    if rescales_by_decoder_norm(sae.cfg):
        decoder_norm = sae.W_dec.norm(dim=-1).index_select(0, entries.features)
        factor = factor / decoder_norm.detach()
    norm_exponent, log_scale, _ = sae.score_parameters()
    batch = ScoredBatch(entries, scored.product, factor, inputs.unit, inputs.log_norm, inverse_square, scored.signed)
    b_dec = sae.whole.shared(sae.b_dec) if sae.cfg.apply_b_dec_to_input else None
    values: Any = EntryScores.apply(sae_in, b_dec, sae.W_enc, sae.b_enc, norm_exponent, log_scale, batch)
    return EntryCodes(entries, values if decoder_norm is None else values * decoder_norm)


@torch.no_grad()
def encode_in_chunks(sae: ScoredEncoder, x: torch.Tensor) -> torch.Tensor:
    """Dense codes `[..., d_sae]`, at most `chunk_entries` scores at a time."""
    x_centered = sae.process_sae_in(x)
    flat = x_centered.reshape(-1, x_centered.shape[-1])
    codes = torch.empty(len(flat), sae.cfg.d_sae, dtype=sae.dtype, device=flat.device)
    pairs = (("score", "score_parameters"), ("select", "select_features"), ("finish", "encode_with_hidden_pre"))
    by_feature = all(defined_together(sae, *pair) for pair in pairs)
    if by_feature and not sae.score_parameters().unit_columns:
        _encode_tiles(sae, flat, codes)
    else:
        size = max(1, chunk_entries(flat) // sae.cfg.d_sae)
        for chunk, out in zip(flat.split(size), codes.split(size), strict=True):
            out.copy_(_codes(sae, chunk))
    return codes.view(*x_centered.shape[:-1], sae.cfg.d_sae)


def chunk_entries(flat: torch.Tensor) -> int:
    """Scores that inference holds at a time, for inputs on a device."""
    return GPU_CHUNK_ENTRIES if flat.device.type == "cuda" else CHUNK_ENTRIES


def _codes(sae: ScoredEncoder, x_centered: torch.Tensor) -> torch.Tensor:
    return sae.finish(sae.select(sae.rescale(sae.score(x_centered))), x_centered)


def _encode_tiles(sae: Any, flat: torch.Tensor, codes: torch.Tensor) -> None:
    """Scores and thresholds in tiles of many tokens and a few features, which fit a CPU's cache and read `W_enc` once."""
    exponent = sae.score_parameters().norm_exponent
    for chunk, out in zip(flat.split(TILE_TOKENS), codes.split(TILE_TOKENS), strict=True):
        norm = centred_norm(chunk)
        at_most = max(1, (CPU_TILE if flat.device.type == "cpu" else chunk_entries(flat)) // max(1, len(chunk)))
        n_tiles = math.ceil(codes.shape[1] / at_most)
        edges = [round(i * codes.shape[1] / n_tiles) for i in range(n_tiles + 1)]  # no thin last tile
        for part in map(slice, edges, edges[1:]):
            a = exponent[part] if exponent.ndim else exponent
            scores = folded_score(chunk, sae.W_enc[:, part], sae.b_enc[part], a, norm)
            out[:, part] = sae.select_features(scores, part)


@torch.no_grad()
def encode_sparse(sae: ScoredEncoder, x: torch.Tensor) -> SparseCodes:
    """The active codes of `x [..., d_in]`, at most `chunk_entries` dense scores at a time."""
    x_centered = sae.process_sae_in(x)
    shape = x_centered.shape[:-1]
    flat = x_centered.reshape(-1, x_centered.shape[-1])
    entries, values = _entries(sae, flat)
    found = entries.token_offsets.diff()
    width = (
        sae.activation_fn.k if isinstance(sae.activation_fn, (TopK, AbsTopK)) else int(found.max()) if len(found) else 0
    )
    # entry j of a token goes to place j of its row
    rows_start = torch.arange(len(flat), device=found.device) * width - entries.token_offsets[:-1]
    place = torch.arange(len(entries), device=found.device) + rows_start.index_select(0, entries.tokens)
    padded = torch.zeros(len(flat) * width, dtype=sae.dtype, device=flat.device)
    indices = torch.zeros(len(flat) * width, dtype=torch.int64, device=flat.device)
    padded.scatter_(0, place, values.to(sae.dtype))
    indices.scatter_(0, place, entries.features)
    return SparseCodes(padded.view(*shape, width), indices.view(*shape, width))


@torch.no_grad()
def encode_entries(sae: ScoredEncoder, x: torch.Tensor) -> tuple[Entries, torch.Tensor]:
    """The active codes of `x [tokens, d_in]` and where they are, as `encode_sparse` finds them."""
    return _entries(sae, sae.process_sae_in(x))


@torch.no_grad()
def scores_above(sae: ScoredEncoder, x: torch.Tensor, floor: torch.Tensor) -> torch.Tensor:
    """The scores of `x [tokens, d_in]` above a floor `[]` of 0 or more, `[N]`, whatever the SAE selects; for one whose `decline_reason` is None."""
    inputs = _unit_inputs(sae.process_sae_in(x))
    return above(inputs, _encoder(sae, len(x))[0], floor).score


def _entries(sae: ScoredEncoder, x_centered: torch.Tensor) -> tuple[Entries, torch.Tensor]:
    if decline_reason(sae, x_centered) is None:
        scored = _select(sae, x_centered).scored
        return _as_entries(sae.finish(EntryCodes(scored.entries, scored.score), x_centered))
    return _entries_in_chunks(sae, x_centered)


def _entries_in_chunks(sae: ScoredEncoder, flat: torch.Tensor) -> tuple[Entries, torch.Tensor]:
    size = max(1, chunk_entries(flat) // sae.cfg.d_sae)
    if isinstance(sae, TrainingSAE):  # may select over the whole batch
        size = max(1, len(flat))
    tokens, features, values = [], [], []
    for i, chunk in enumerate(flat.split(size)):
        entries, value = _as_entries(_codes(sae, chunk))
        tokens.append(entries.tokens + i * size)
        features.append(entries.features)
        values.append(value)
    return Entries(torch.cat(tokens), torch.cat(features), len(flat), sae.cfg.d_sae), torch.cat(values)


def _as_entries(codes: torch.Tensor) -> tuple[Entries, torch.Tensor]:
    if isinstance(codes, EntryCodes):
        return codes.entries, codes.values
    tokens, features = codes.nonzero(as_tuple=True)
    return Entries(tokens, features, *codes.shape), codes[tokens, features]


@torch.no_grad()
def _select(sae: ScoredEncoder, x_centered: torch.Tensor) -> Selected:
    """The entries that an SAE keeps of centred inputs `[tokens, d_in]`."""
    device = x_centered.device.type
    product_dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    with torch.autocast(device, enabled=False):
        inputs = _unit_inputs(x_centered)
        encoder, inverse_square = _encoder(sae, len(x_centered), product_dtype=product_dtype)
        select = sae.entry_selector(len(x_centered))
        assert select is not None, "asked of an SAE that declines"
        hint = sae.floor_hint if sae.floor_hint is None or sae.floor_hint.isfinite() else None
        scored, sae.floor_hint = select(inputs, encoder, hint)
    return Selected(scored, inputs, inverse_square)


def _unit_inputs(x_centered: torch.Tensor) -> UnitInputs:
    norm = centred_norm(x_centered)
    return UnitInputs(x_centered / norm, norm.log().squeeze(-1))


@torch.no_grad()
def _few_positive(sae: ScoredEncoder, inputs: UnitInputs, features: torch.Tensor, k: int) -> Selected | None:
    """Each token's k highest positive scores among some features, if few are positive."""
    with torch.autocast(inputs.unit.device.type, enabled=False):
        encoder, inverse_square = _encoder(sae, len(inputs.unit), features)
        scored = few_positive_of_each(inputs, encoder, k)
    if scored is None:
        return None
    found = scored.entries
    entries = Entries(found.tokens, features.index_select(0, found.features), found.n_tokens, sae.cfg.d_sae)
    if inverse_square is not None:
        inverse_square = inverse_square.new_zeros(sae.cfg.d_sae).index_copy(0, features, inverse_square)
    return Selected(replace(scored, entries=entries), inputs, inverse_square)


def _encoder(
    sae: ScoredEncoder,
    n_tokens: int,
    features: torch.Tensor | None = None,
    product_dtype: torch.dtype | None = None,
) -> tuple[Encoder, torch.Tensor | None]:
    """The encoder of all features or some; with unit columns also 1 / ||w_i||^2 of each."""

    def of(parameter: torch.Tensor) -> torch.Tensor:
        parameter = parameter.detach()
        return parameter if features is None or parameter.ndim == 0 else parameter.index_select(0, features)

    weight, column_norm, rounded = _prepared(of(sae.W_enc.T), n_tokens)
    norm_exponent, log_scale, unit_columns = sae.score_parameters()
    gain = column_norm.reciprocal() if unit_columns else torch.ones_like(column_norm)
    bias = of(sae.b_enc)
    if rescales_by_decoder_norm(sae.cfg):
        decoder_norm = of(sae.W_dec).norm(dim=-1)
        gain, bias = gain * decoder_norm, bias * decoder_norm
    terms = ScoreTerms(of(norm_exponent), of(log_scale), gain, bias)
    encoder = Encoder(weight, terms, rounded, product_dtype, sae.whole)
    return encoder, column_norm.square().reciprocal() if unit_columns else None


def _prepared(columns: torch.Tensor, n_tokens: int) -> tuple[torch.Tensor, torch.Tensor, Rounded | None]:
    """Encoder columns as rows, `[n, d_in]`, their norms, and the rows as the filter multiplies them.

    Made anew in each call: nothing would tell that a write to `W_enc.data`, SAELens' own way to fold, has made them stale.
    """
    weight = columns.to(torch.promote_types(columns.dtype, torch.float32)).contiguous()
    if weight.device.type != "cpu":
        return weight, weight.norm(dim=1).clamp_min(NORM_FLOOR), None
    rounded = Rounded.of(weight, None if n_tokens >= WORTH_ROUNDING else weight.dtype)
    return weight, rounded.norm.clamp_min(NORM_FLOOR), rounded

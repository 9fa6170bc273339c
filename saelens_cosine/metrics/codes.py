"""Codes of many tokens, kept as their active entries: 200,000 tokens with 80 codes each take 130 MB, whatever d_sae is."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from sae_lens.saes.jumprelu_sae import JumpReLUSAE
from sae_lens.saes.sae import SAE
from scipy import sparse
from scipy.sparse import get_index_dtype

from saelens_cosine.kernels.codes import EntryCodes
from saelens_cosine.kernels.entries import Entries
from saelens_cosine.metrics.flat_tokens import check_eval_mode, flat_heads
from saelens_cosine.metrics.not_finite import NotFiniteError
from saelens_cosine.saes.encoding import encode_entries
from saelens_cosine.saes.jumprelu_sae import CosineJumpReLUSAE, CosineJumpReLUSAEConfig
from saelens_cosine.saes.path import SPARSE_ENOUGH, decline_reason, defined_together, has_hooks
from saelens_cosine.saes.scored_encoder import rescales_by_decoder_norm
from saelens_cosine.saes.scored_sae import ScoredSAE
from saelens_cosine.score import wide

CODES_AT_ONCE = 2**20
"""Dense codes that are held at a time, for classes that make no others: 4 MiB in float32, which a CPU's cache holds."""

ENTRY_TOKENS = 2**14
"""Tokens at a time where codes are found entry by entry: the encoder is prepared anew for each."""

FEWEST_TOKENS = 256
"""Tokens at a time, whatever d_sae is: a product of fewer reads the weights too often."""


def tokens_at_once(sae: SAE[Any], activations: torch.Tensor | None = None) -> int:
    """Tokens whose dense codes are held at a time; more where codes of these activations are found without."""
    if activations is not None and scored_form(sae, activations) is not None:
        return ENTRY_TOKENS
    return max(FEWEST_TOKENS, CODES_AT_ONCE // sae.cfg.d_sae)


def most_at_once(sae: SAE[Any]) -> int:
    """Tokens whose dense codes are held at a time where nothing else is made of them: 64 MiB in float32."""
    return max(1, 2**24 // sae.cfg.d_sae)


def code_units(sae: SAE[Any]) -> torch.Tensor:
    """`[d_sae]` float32 or wider on the CPU: how far a code of 1 moves the reconstruction, to compare features and SAEs by."""
    if rescales_by_decoder_norm(sae.cfg):
        return torch.ones(sae.cfg.d_sae)
    return sae.W_dec.detach().to(wide(sae.W_dec.dtype)).norm(dim=-1).cpu()


def canonical_codes(sae: SAE[Any], activations: torch.Tensor) -> sparse.csr_array:
    """Codes `[tokens, d_sae]` times `code_units`: what each feature adds to the reconstruction."""
    codes = sparse_codes(sae, activations)
    codes.data *= code_units(sae).numpy()[codes.indices]
    return codes


@torch.no_grad()
def sparse_codes(sae: SAE[Any], activations: torch.Tensor) -> sparse.csr_array:
    """Codes of `activations [tokens, d_in]` as a `[tokens, d_sae]` matrix of float32 with int32 indices.

    Args:
        sae: any SAELens SAE; an inference form, or a training form in eval mode.
        activations: as the SAE takes them.

    Raises:
        ValueError: a training form in training mode, whose selection may depend on the batch.
        NotFiniteError: a code is NaN or infinite.
    """
    check_eval_mode(sae)
    counts = np.zeros(len(activations), np.int64)
    # filled as they come: small arrays that are kept between dense codes that go would hold the room of those
    features, values = np.empty(0, np.int32), np.empty(0, np.float32)
    done = entries = bad = 0
    with flat_heads(sae):
        for x in activations.split(tokens_at_once(sae, activations)):
            found = entry_codes(sae, x)
            token, value = found.entries.tokens, found.values.float()
            end = entries + len(value)
            if end > len(features):
                room = max(end, math.ceil(1.1 * end * len(activations) / (done + len(x))))
                features, values = (_longer(array, room) for array in (features, values))
            features[entries:end], values[entries:end] = found.entries.features.cpu(), value.cpu()
            counts[done : done + len(x)] = torch.bincount(token, minlength=len(x)).cpu()
            bad += len(token[~value.isfinite()].unique())
            done, entries = done + len(x), end
    if bad:
        raise NotFiniteError(f"Codes of {type(sae).__name__}", bad, len(activations))
    # scipy widens the indices of the entries to the type of this one
    indptr = np.concatenate([[0], np.cumsum(counts)]).astype(get_index_dtype(maxval=entries))
    shape = (len(activations), sae.cfg.d_sae)
    return sparse.csr_array((values[:entries].copy(), features[:entries].copy(), indptr), shape=shape)


@torch.no_grad()
def entry_codes(sae: SAE[Any], x: torch.Tensor) -> EntryCodes:
    """Codes of `x [tokens, d_in]` that are not 0 (NaN is not), on the SAE's device; at most `tokens_at_once` tokens."""
    return _compressed(_encode(sae, x.to(sae.device)))


def _longer(array: Any, length: int) -> Any:
    """The same entries at the beginning of a longer array."""
    longer = np.empty(length, array.dtype)
    longer[: len(array)] = array
    return longer


def scored_form(sae: SAE[Any], activations: torch.Tensor) -> ScoredSAE | None:
    """What finds an SAE's codes entry by entry, without the dense ones; None where nothing does.

    That is an SAE of ours itself, if its `encode` is ours and no length overflows, and of SAELens' own JumpReLU the same function as a
    cosine score with an exponent of 1, which shares its weights.
    """
    if "encode" in vars(sae):
        return None
    form = sae
    if type(sae) is JumpReLUSAE:  # whose encoder is turned and rounded for each call
        form = _as_scored(sae) if len(activations) >= FEWEST_TOKENS else None
    if not isinstance(form, ScoredSAE) or not defined_together(form, "encode", "encode_sparse"):
        return None
    if decline_reason(form, activations[:1].to(sae.device)) is not None:
        return None
    return form if bool(activations.norm(dim=-1).isfinite().all()) else None


def _as_scored(sae: JumpReLUSAE) -> ScoredSAE | None:
    cfg = sae.cfg
    if cfg.normalize_activations != "none" or has_hooks(sae):  # pyright: ignore[reportArgumentType]  (it asks for hook points alone)
        return None
    dtype = str(sae.W_enc.dtype).removeprefix("torch.")
    shape = CosineJumpReLUSAEConfig(cfg.d_in, cfg.d_sae, dtype, "meta", apply_b_dec_to_input=cfg.apply_b_dec_to_input)
    with torch.device("meta"):  # no room, and no random numbers
        form = CosineJumpReLUSAE(shape)
    for name, parameter in sae.named_parameters():
        setattr(form, name, parameter)
    form.hook_sae_input = sae.hook_sae_input
    form.norm_exponent = torch.nn.Parameter(torch.ones((), device=sae.device))
    form.device = sae.device
    return form


def _encode(sae: SAE[Any], x: torch.Tensor) -> EntryCodes | torch.Tensor:
    """Codes of `x [tokens, d_in]`, on the SAE's device: their entries where these are found without the dense ones."""
    form = scored_form(sae, x)
    return sae.encode(x).to_dense() if form is None else EntryCodes(*encode_entries(form, x))


def _compressed(codes: EntryCodes | torch.Tensor) -> EntryCodes:
    """The codes that are not 0; what is NaN is not."""
    if isinstance(codes, EntryCodes):
        on = codes.values != 0
        if bool(on.all()):
            return codes
        tokens, features, values = codes.entries.tokens[on], codes.entries.features[on], codes.values[on]
    else:
        tokens, features = codes.nonzero(as_tuple=True)
        values = codes[tokens, features]
    return EntryCodes(Entries(tokens, features, *codes.shape), values)


@torch.no_grad()
def reconstruct(sae: SAE[Any], x: torch.Tensor) -> tuple[EntryCodes, torch.Tensor]:
    """The codes of `x [tokens, d_in]` that are not 0, and what the SAE makes of them, `[tokens, d_in]`.

    Both at once: SAELens keeps a normalisation from `encode` to `decode`. Where few codes are active, a CPU decodes these alone.
    """
    codes = _encode(sae, x.to(sae.device))
    compressed = _compressed(codes)
    few = len(compressed.values) * SPARSE_ENOUGH <= codes.numel()
    exact = codes.device.type == "cpu" and codes.dtype in (torch.float32, torch.float64)
    return compressed, sae.decode(compressed if few and exact else codes)

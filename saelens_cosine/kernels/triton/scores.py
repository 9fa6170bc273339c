"""Scores made from the dense product, as Triton makes them in every pass anew, and where they are above a threshold.

No kernel keeps `[B, F]` scores: one helper makes them and rounds alike everywhere. Places and addresses are 64-bit.
"""

# The bodies of kernels are Triton's language, which Python's types do not describe.
# pyright: reportMissingParameterType=false, reportUnknownParameterType=false, reportUnknownVariableType=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false, reportArgumentType=false
# pyright: reportUntypedFunctionDecorator=false, reportIndexIssue=false, reportCallIssue=false, reportMissingImports=false

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from saelens_cosine.kernels import reference
from saelens_cosine.kernels.terms import ScoreTerms

SCORE_BLOCK = 2048
"""Scores that a program makes at once."""


def places_above(
    product: torch.Tensor, log_norm: torch.Tensor, terms: ScoreTerms, threshold: torch.Tensor
) -> torch.Tensor:
    """See `reference.places_above`. The host waits once, for the size; float64 products go to the reference."""
    if product.dtype == torch.float64:
        return reference.places_above(product, log_norm, terms, threshold)
    n_tokens = product.shape[0]
    ends = torch.zeros(n_tokens + 1, dtype=torch.int64, device=product.device)
    if product.numel() == 0:
        return ends[:0]
    arguments, options = score_arguments(product, log_norm, terms)
    arguments = (*arguments, threshold.to(torch.float32).contiguous())
    options = {**options, "THRESHOLD_STEP": threshold.ndim}
    with torch.cuda.device_of(product):
        _places_above[(n_tokens,)](*arguments, ends[1:], ends, WRITE=False, **options)
        ends = ends.cumsum(dim=0)
        places = torch.empty(int(ends[-1]), dtype=torch.int64, device=product.device)
        _places_above[(n_tokens,)](*arguments, ends, places, WRITE=True, **options)
    return places


def score_arguments(
    product: torch.Tensor, log_norm: torch.Tensor, terms: ScoreTerms
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What every kernel that makes scores takes first, and its options."""
    vectors = (log_norm, terms.norm_exponent, terms.log_scale, terms.gain, terms.bias)
    narrow = (vector.to(torch.float32).contiguous() for vector in vectors)
    options = {
        "EXPONENT_STEP": terms.norm_exponent.ndim,
        "SCALE_STEP": terms.log_scale.ndim,
        "SIGNED": terms.signed,
        "BLOCK": SCORE_BLOCK,
        "enable_fp_fusion": False,  # where sums and products fuse is the compiler's choice in each kernel anew
    }
    return (product.contiguous(), *narrow, product.shape[1]), options


@triton.jit
def _at(parameter, features, inside, STEP: tl.constexpr):
    """A parameter's values at some features; a step of 0 means that all have the same."""
    return tl.load(parameter) if STEP == 0 else tl.load(parameter + features, mask=inside, other=0.0)


@triton.jit
def ranked_scores(
    product, log_norm, exponent, log_scale, gain, bias, n_features, token, features,
    EXPONENT_STEP: tl.constexpr, SCALE_STEP: tl.constexpr, SIGNED: tl.constexpr,
):  # fmt: skip
    """Float32 scores of some features at a token, or of a row of features at a column of tokens: rectified or, signed,
    their sizes; 0 past the last feature and for NaN."""
    inside = features < n_features
    a = _at(exponent, features, inside, EXPONENT_STEP)
    c = _at(log_scale, features, inside, SCALE_STEP)
    scale = tl.exp(a * tl.load(log_norm + token) + c) * tl.load(gain + features, mask=inside, other=0.0)
    dot = tl.load(product + token * n_features + features, mask=inside, other=0.0).to(tl.float32)
    score = scale * dot + tl.load(bias + features, mask=inside, other=0.0)
    if SIGNED:
        score = tl.abs(score)
    return tl.where(inside & (score > 0.0), score, 0.0)


@triton.jit
def append(out, end, taken, values):
    """Writes the values that are taken from `out[end]` on; returns the new end."""
    one = taken.to(tl.int32)
    tl.store(out + end + (tl.cumsum(one, 0) - one), values, mask=taken)
    return end + tl.sum(one, axis=0)


@triton.jit
def _places_above(
    product, log_norm, exponent, log_scale, gain, bias, n_features, threshold, ends, places,
    WRITE: tl.constexpr, THRESHOLD_STEP: tl.constexpr,
    EXPONENT_STEP: tl.constexpr, SCALE_STEP: tl.constexpr, SIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A token's places above the threshold, from `ends[token]` on; or how many these are, added to `ends[token]`."""
    token = tl.program_id(0).to(tl.int64)
    end = tl.load(ends + token)
    for first in range(0, n_features, BLOCK):
        features = first + tl.arange(0, BLOCK)
        score = ranked_scores(
            product, log_norm, exponent, log_scale, gain, bias, n_features, token, features,
            EXPONENT_STEP, SCALE_STEP, SIGNED,
        )  # fmt: skip
        limit = tl.maximum(_at(threshold, features, features < n_features, THRESHOLD_STEP), 0.0)
        taken = score > limit
        if WRITE:
            end = append(places, end, taken, token * n_features + features)
        else:
            end += tl.sum(taken.to(tl.int32), axis=0)
    if not WRITE:
        tl.store(ends + token, end)

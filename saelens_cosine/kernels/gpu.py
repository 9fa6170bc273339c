"""The operations of `reference` as Triton kernels: sums and products of the active entries, and where the best scores are.

Floats are added in a fixed order, so equal inputs give equal bits. No kernel keeps `[B, F]` scores: each pass over the
products makes them again, in one helper that rounds alike everywhere. Places and addresses are 64-bit.
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
from saelens_cosine.kernels.entries import Entries
from saelens_cosine.kernels.filter import ScoreTerms
from saelens_cosine.score import wide

ENTRY_BLOCK = 8
"""Entries that a program reads at once: their rows lie anywhere, so several loads must be under way."""

WIDTH_BLOCK = 512
"""Columns of these rows that a program reads at once, at most."""

SCORE_BLOCK = 2048
"""Scores that a program makes at once."""

DIGIT_BITS = 8
"""Bits of a score that one pass of the selection decides, a divisor of its 32: four passes, histograms of 256."""


def segment_sum(rows: torch.Tensor, offsets: torch.Tensor, weights: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """See `reference.segment_sum`. Sums in float32, float64 for a float64 table, and rounds to the table's dtype once.

    One program sums a segment, for one block of columns. A feature active in every token is a long loop for the few
    programs that have it, while the others do the rest: splitting it would take a second pass or float atomics.
    """
    n_segments, width = offsets.shape[0] - 1, table.shape[1]
    out = table.new_empty(n_segments, width)
    if out.numel() == 0:
        return out
    block = min(WIDTH_BLOCK, triton.next_power_of_2(width))
    with torch.cuda.device_of(table):
        _segment_sum[(n_segments, triton.cdiv(width, block))](
            rows.contiguous(), offsets.contiguous(), weights.contiguous(), table.contiguous(), out, width,
            WIDE=_triton_dtype(wide(table.dtype)), ENTRIES=ENTRY_BLOCK, WIDTH=block, enable_fp_fusion=True,
        )  # fmt: skip
    return out


def sampled_product(entries: Entries, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """See `reference.sampled_product`. Sums in float32, or float64 if an operand is, which is also the result's dtype."""
    n_entries, width = len(entries), left.shape[1]
    dtype = wide(torch.promote_types(left.dtype, right.dtype))
    out = torch.empty(n_entries, dtype=dtype, device=left.device)
    if n_entries == 0:
        return out
    block = max(1, min(WIDTH_BLOCK, triton.next_power_of_2(width)))
    with torch.cuda.device_of(left):
        _sampled_product[(triton.cdiv(n_entries, ENTRY_BLOCK),)](
            entries.tokens.contiguous(), entries.features.contiguous(), left.contiguous(), right.contiguous(), out,
            n_entries, width, WIDE=_triton_dtype(dtype), ENTRIES=ENTRY_BLOCK, WIDTH=block, enable_fp_fusion=True,
        )  # fmt: skip
    return out


def best_places(
    product: torch.Tensor, log_norm: torch.Tensor, terms: ScoreTerms, n_wanted: int, per_token: bool
) -> torch.Tensor:
    """See `reference.best_places`. Scores are float32, and the host never waits; float64 products go to the reference.

    The device's exponential is off by a few roundings, so among scores as near as that the reference may choose others.

    A radix select: scores, rectified or by size, are ordered as their bits are, so a histogram of the first eight bits, by token, tells
    in which bin the cut lies and how many of that bin are wanted; three more passes over what has these first bits make
    the cut exact. The histograms also tell how many entries each token has above the cut and at it, hence where in the
    result it writes.
    """
    if product.dtype == torch.float64:
        return reference.best_places(product, log_norm, terms, n_wanted, per_token)
    n_tokens, n_features = product.shape
    n_groups, group_size = (n_tokens, n_features) if per_token else (1, n_tokens * n_features)
    n_wanted = min(n_wanted, group_size)
    places = torch.empty(n_groups * n_wanted, dtype=torch.int64, device=product.device)
    if places.numel() == 0:
        return places
    arguments, options = _score_arguments(product, log_norm, terms)
    n_bins = 2**DIGIT_BITS
    bins = torch.arange(n_bins, device=product.device)
    counts = torch.empty(n_tokens, n_bins, dtype=torch.int32, device=product.device)
    above = torch.zeros(n_tokens, dtype=torch.int64, device=product.device)
    cut = torch.zeros(n_groups, 1, dtype=torch.int64, device=product.device)  # its first bits, in the end all of them
    wanted = torch.full_like(cut, n_wanted)  # of the entries that have these first bits
    digit = cut
    with torch.cuda.device_of(product):
        for shift in range(32 - DIGIT_BITS, -1, -DIGIT_BITS):
            _count_digits[(n_tokens,)](
                *arguments, cut, shift, counts, CUT_STEP=int(per_token), BITS=DIGIT_BITS, **options
            )
            by_group = counts if per_token else counts.sum(dim=0, keepdim=True)
            reached = by_group.flip(1).cumsum(dim=1).flip(1)  # entries in a bin or in one above it
            digit = (reached >= wanted).sum(dim=1, keepdim=True) - 1
            wanted = wanted - (reached - by_group).gather(1, digit)
            above += counts.where(bins > digit, 0).sum(dim=1)
            cut = (cut << DIGIT_BITS) + digit
        tied = counts.gather(1, digit.expand(n_tokens, 1)).squeeze(1)
        before = 0 if per_token else tied.cumsum(dim=0) - tied
        quota = torch.minimum((wanted.squeeze(1) - before).clamp_min(0), tied)
        taken = above + quota
        _write_best[(n_tokens,)](
            *arguments, cut, quota, taken.cumsum(dim=0) - taken, places, CUT_STEP=int(per_token), **options
        )
    return places


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
    arguments, options = _score_arguments(product, log_norm, terms)
    arguments = (*arguments, threshold.to(torch.float32).contiguous())
    options = {**options, "THRESHOLD_STEP": threshold.ndim}
    with torch.cuda.device_of(product):
        _places_above[(n_tokens,)](*arguments, ends[1:], ends, WRITE=False, **options)
        ends = ends.cumsum(dim=0)
        places = torch.empty(int(ends[-1]), dtype=torch.int64, device=product.device)
        _places_above[(n_tokens,)](*arguments, ends, places, WRITE=True, **options)
    return places


def _score_arguments(
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


def _triton_dtype(dtype: torch.dtype) -> Any:
    return tl.float64 if dtype == torch.float64 else tl.float32


@triton.jit
def _segment_sum(
    rows, offsets, weights, table, out, width, WIDE: tl.constexpr, ENTRIES: tl.constexpr, WIDTH: tl.constexpr
):
    segment = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = columns < width
    end = tl.load(offsets + segment + 1)
    total = tl.zeros([ENTRIES, WIDTH], dtype=WIDE)
    for first in range(tl.load(offsets + segment), end, ENTRIES):
        entries = first + tl.arange(0, ENTRIES)
        live = entries < end
        row = tl.load(rows + entries, mask=live, other=0).to(tl.int64)
        weight = tl.load(weights + entries, mask=live, other=0.0).to(WIDE)
        part = table + row[:, None] * width + columns[None, :]
        total += weight[:, None] * tl.load(part, mask=live[:, None] & inside[None, :], other=0.0).to(WIDE)
    sums = tl.sum(total, axis=0)
    tl.store(out + segment * width + columns, sums.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _sampled_product(
    tokens, features, left, right, out, n_entries, width,
    WIDE: tl.constexpr, ENTRIES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    entries = tl.program_id(0).to(tl.int64) * ENTRIES + tl.arange(0, ENTRIES)
    live = entries < n_entries
    left_row = left + tl.load(tokens + entries, mask=live, other=0)[:, None] * width
    right_row = right + tl.load(features + entries, mask=live, other=0)[:, None] * width
    total = tl.zeros([ENTRIES, WIDTH], dtype=WIDE)
    for first in range(0, width, WIDTH):
        columns = (first + tl.arange(0, WIDTH))[None, :]
        mask = live[:, None] & (columns < width)
        factor = tl.load(left_row + columns, mask=mask, other=0.0).to(WIDE)
        total += factor * tl.load(right_row + columns, mask=mask, other=0.0).to(WIDE)
    tl.store(out + entries, tl.sum(total, axis=1), mask=live)


@triton.jit
def _at(parameter, features, inside, STEP: tl.constexpr):
    """A parameter's values at some features; a step of 0 means that all have the same."""
    return tl.load(parameter) if STEP == 0 else tl.load(parameter + features, mask=inside, other=0.0)


@triton.jit
def _ranked_scores(
    product, log_norm, exponent, log_scale, gain, bias, n_features, token, features,
    EXPONENT_STEP: tl.constexpr, SCALE_STEP: tl.constexpr, SIGNED: tl.constexpr,
):  # fmt: skip
    """Float32 scores of some features at a token, rectified or, signed, their sizes; 0 past the last feature and for NaN."""
    inside = features < n_features
    a = _at(exponent, features, inside, EXPONENT_STEP)
    c = _at(log_scale, features, inside, SCALE_STEP)
    scale = tl.exp(a * tl.load(log_norm + token) + c) * tl.load(gain + features, mask=inside, other=0.0)
    dot = tl.load(product + token * n_features + features, mask=inside, other=0.0).to(tl.float32)
    score = scale * dot + tl.load(bias + features, mask=inside, other=0.0)
    if SIGNED:
        score = tl.abs(score)
    return tl.where(score > 0.0, score, 0.0)


@triton.jit
def _append(out, end, taken, token, features, n_features):
    """Writes the places that are taken from `out[end]` on, ascending; returns the new end."""
    one = taken.to(tl.int32)
    tl.store(out + end + (tl.cumsum(one, 0) - one), token * n_features + features, mask=taken)
    return end + tl.sum(one, axis=0)


@triton.jit
def _count_digits(
    product, log_norm, exponent, log_scale, gain, bias, n_features, cut, shift, counts,
    CUT_STEP: tl.constexpr, BITS: tl.constexpr,
    EXPONENT_STEP: tl.constexpr, SCALE_STEP: tl.constexpr, SIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Counts of a token's scores by the BITS above `shift`, among those whose bits above these are the cut's."""
    token = tl.program_id(0).to(tl.int64)
    prefix = tl.load(cut + token * CUT_STEP).to(tl.int32)
    bins = tl.arange(0, 1 << BITS)
    count = tl.zeros([1 << BITS], dtype=tl.int32)
    for first in range(0, n_features, BLOCK):
        features = first + tl.arange(0, BLOCK)
        score = _ranked_scores(
            product, log_norm, exponent, log_scale, gain, bias, n_features, token, features,
            EXPONENT_STEP, SCALE_STEP, SIGNED,
        )  # fmt: skip
        bits = score.to(tl.int32, bitcast=True) >> shift
        counted = (features < n_features) & ((bits >> BITS) == prefix)
        count += tl.histogram(tl.where(counted, bits & ((1 << BITS) - 1), 0), 1 << BITS)
        # what is not counted went to bin 0: older Tritons have no masked histogram
        count -= tl.where(bins == 0, tl.sum(1 - counted.to(tl.int32), axis=0), 0)
    tl.store(counts + (token << BITS) + bins, count)


@triton.jit
def _write_best(
    product, log_norm, exponent, log_scale, gain, bias, n_features, cut, quota, starts, places,
    CUT_STEP: tl.constexpr, EXPONENT_STEP: tl.constexpr, SCALE_STEP: tl.constexpr, SIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A token's places above the cut, and the first at the cut up to its quota."""
    token = tl.program_id(0).to(tl.int64)
    limit = tl.load(cut + token * CUT_STEP).to(tl.int32)
    room = tl.load(quota + token)
    end = tl.load(starts + token)
    for first in range(0, n_features, BLOCK):
        features = first + tl.arange(0, BLOCK)
        score = _ranked_scores(
            product, log_norm, exponent, log_scale, gain, bias, n_features, token, features,
            EXPONENT_STEP, SCALE_STEP, SIGNED,
        )  # fmt: skip
        bits = score.to(tl.int32, bitcast=True)
        inside = features < n_features
        tied = ((bits == limit) & inside).to(tl.int32)
        taken = ((bits > limit) & inside) | ((tied > 0) & (tl.cumsum(tied, 0) <= room))
        end = _append(places, end, taken, token, features, n_features)
        room -= tl.sum(tied, axis=0)
    # room may end below zero: more ties than wanted


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
        score = _ranked_scores(
            product, log_norm, exponent, log_scale, gain, bias, n_features, token, features,
            EXPONENT_STEP, SCALE_STEP, SIGNED,
        )  # fmt: skip
        limit = tl.maximum(_at(threshold, features, features < n_features, THRESHOLD_STEP), 0.0)
        taken = score > limit
        if WRITE:
            end = _append(places, end, taken, token, features, n_features)
        else:
            end += tl.sum(taken.to(tl.int32), axis=0)
    if not WRITE:
        tl.store(ends + token, end)

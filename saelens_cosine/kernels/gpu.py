"""The operations of `reference` as Triton kernels: sums and products of the active entries; where scores are high is in two files beside it.

Floats are added in a fixed order, so equal inputs give equal bits. Places and addresses are 64-bit.
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

from saelens_cosine.kernels.entries import Entries
from saelens_cosine.kernels.triton.scores import places_above
from saelens_cosine.kernels.triton.selection import best_places
from saelens_cosine.score import wide

__all__ = ["best_places", "places_above", "sampled_product", "segment_sum"]

ENTRY_BLOCK = 8
"""Entries that a program reads at once: their rows lie anywhere, so several loads must be under way."""

WIDTH_BLOCK = 512
"""Columns of these rows that a program reads at once, at most."""


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

"""Which scores of a batch can be large enough to matter, without keeping the `[B, F]` scores.

The encoder's product is made in tiles that stay in the cache, in the fastest precision the processor has, and each tile is
compared with a bound that allows for all that this precision can lose. What passes, a superset of the entries above the
floor, is then scored exactly by the caller. The bound is rigorous, so nothing is missed: with x', w' the rounded operands,

    |<x', w'>_computed - <x, w>|  <=  ||x' - x|| ||w'|| + ||x|| ||w' - w|| + D v ||x'|| ||w'||  +  u |<x', w'>|

by Cauchy and Schwarz, where v is the rounding of sums (twice 2^-24: float32 in any order) and u that of the result. A few
more roundings make room for the exact score's own, so that no score is missed as it is computed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from saelens_cosine.kernels.terms import ScoreTerms
from saelens_cosine.score import wide

BF16_PRODUCTS = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
"""What torch.cpu says of products in bfloat16; not every version of it has both."""

ROUNDING_BLOCK = 2**18
TILE_TOKENS = 4096
TILE_NORMS = 4.0
"""The longest token of a tile may be this many times as long as its shortest: the bound allows for what the longest loses."""
TILE_BYTES = 2**22
"""A tile of the product: small enough for the cache, large enough that a tile's dozen of calls do not count."""


@dataclass(frozen=True)
class Rounded:
    """
    Vectors in the precision of the filter's product, and what that lost.

    Args:
        rows (torch.Tensor): `[n, D]`, rounded.
        norm (torch.Tensor): `[n]`, lengths of the exact vectors.
        loss (torch.Tensor): `[n]`, lengths of the differences.
    """

    rows: torch.Tensor
    norm: torch.Tensor
    loss: torch.Tensor

    @classmethod
    def of(cls, exact: torch.Tensor, dtype: torch.dtype | None = None) -> Rounded:
        """`exact [n, D]` rounded to `dtype`, the filter's if not given."""
        dtype = dtype or filter_dtype(exact.dtype)
        norm = torch.empty(len(exact), dtype=exact.dtype)
        if dtype == exact.dtype:
            return cls(exact, torch.linalg.vector_norm(exact, dim=1, out=norm), torch.zeros_like(norm))
        rows, loss = torch.empty_like(exact, dtype=dtype), torch.empty_like(norm)
        block = max(1, ROUNDING_BLOCK // exact.shape[1])  # what the cache holds is read once
        for part, out, n, d in zip(*(t.split(block) for t in (exact, rows, norm, loss)), strict=True):
            out.copy_(part)
            torch.linalg.vector_norm(part, dim=1, out=n)
            torch.linalg.vector_norm(part - out, dim=1, out=d)
        return cls(rows, norm, loss)


def filter_dtype(dtype: torch.dtype) -> torch.dtype:
    """The precision of the filter's product: bfloat16 where the CPU has instructions for it (AMX, AVX-512), else float32."""
    if any(getattr(torch.cpu, name, lambda: False)() for name in BF16_PRODUCTS):
        return torch.bfloat16
    return torch.promote_types(torch.float32, dtype)


@torch.no_grad()
def candidates(
    unit: torch.Tensor,
    log_norm: torch.Tensor,
    columns: Rounded,
    terms: ScoreTerms,
    floor: torch.Tensor,
    floor_exponent: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and features `[C]` int64 of a set that holds every entry with a score (or its size) above its floor.

    Args:
        unit: `[B, D]`, inputs of length 1.
        log_norm: `[B]`, logarithms of their lengths.
        columns: `[F, D]`, encoder columns as rows, rounded.
        terms: what makes scores of products.
        floor: `[]` or `[F]`.
        floor_exponent: `[]`, for a floor that goes with the token's norm, `floor * n_b ** floor_exponent`.

    Returns:
        In no particular order of tokens; each token's features ascend.
    """
    dtype = columns.rows.dtype
    n_tokens, d_in = unit.shape
    rounding = torch.finfo(dtype).eps / 2
    # an exponent that all features and the floor share goes into the rows, so that only what differs widens a tile's bound
    shared = terms.norm_exponent.mean()
    gap = terms.norm_exponent - shared
    rise = torch.zeros_like(shared) if floor_exponent is None else floor_exponent
    order = log_norm.argsort()  # tokens of a tile have like norms
    log_norm = log_norm.index_select(0, order)
    row_gain = ((shared - rise) * log_norm).exp()
    rows = Rounded.of(unit.index_select(0, order).mul_(row_gain.unsqueeze(-1)), dtype)
    exact = torch.finfo(unit.dtype).eps
    sums = d_in * (torch.finfo(wide(dtype)).eps + exact)  # those of the product, and of the exact score to come
    column_norm = columns.norm + columns.loss  # at least the rounded column's
    per_tile = max(1, TILE_BYTES // (dtype.itemsize * min(TILE_TOKENS, n_tokens)))
    found: list[tuple[torch.Tensor, torch.Tensor]] = []
    buffer = torch.empty(min(TILE_TOKENS, n_tokens) * min(per_tile, len(columns.rows)), dtype=dtype)
    mask = torch.empty(buffer.shape, dtype=torch.bool)
    for tile in _tiles(log_norm):
        ends = log_norm[[tile.start, tile.stop - 1]]
        bias = terms.bias.abs() if terms.signed else terms.bias  # |p + b| > f only where |p| > f - |b|
        biases = [bias * (-rise * end).exp() for end in ends]
        need = torch.minimum(*(floor - bias - 8 * exact * (floor.abs() + bias.abs()) for bias in biases))
        bound = torch.minimum(*(need / ((gap * end + terms.log_scale).exp() * terms.gain) for end in ends))
        norm, loss = rows.norm[tile].max(), rows.loss[tile].max()
        bound -= loss * column_norm + norm * columns.loss + sums * (norm + loss) * column_norm
        # the rounding of the result, of the bound itself, and of what makes a score of a product
        bound = bound - (2.5 * rounding + 64 * exact) * bound.abs()
        ordered = as_ordered(bound, dtype)
        signs = not terms.signed and bool((bound <= 0).any())  # integers order no negative floats
        bound = bound.to(dtype)
        for first in range(0, len(bound), per_tile):
            part = slice(first, min(first + per_tile, len(bound)))
            size = (tile.stop - tile.start, part.stop - part.start)
            product = torch.mm(rows.rows[tile], columns.rows[part].T, out=buffer[: size[0] * size[1]].view(size))
            passed = mask[: size[0] * size[1]].view(size)
            if signs:
                torch.ge(product, bound[part], out=passed)
            else:
                bits = product.view(ordered.dtype)
                if terms.signed:
                    bits &= torch.iinfo(ordered.dtype).max  # without the sign
                torch.ge(bits, ordered[part], out=passed)
            flat = true_places(passed)
            row = torch.div(flat, size[1], rounding_mode="floor")
            found.append((row + tile.start, flat - row * size[1] + first))
    tokens, features = (torch.cat(parts) for parts in zip(*found, strict=True))
    return order.index_select(0, tokens), features


def _tiles(log_norm: torch.Tensor) -> Iterator[slice]:
    """Parts of ascending norms, of at most `TILE_TOKENS`, that differ by at most `TILE_NORMS`."""
    start = 0
    while start < len(log_norm):
        longest = log_norm[start] + math.log(TILE_NORMS)
        alike = int(torch.searchsorted(log_norm, longest, right=True))
        stop = max(start + 1, min(alike, start + TILE_TOKENS))
        yield slice(start, stop)
        start = stop


def as_ordered(bound: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`bound` in `dtype`, as integers that floats of that width viewed as integers can be compared with, faster.

    Positive floats are ordered as their bits are. A bound below zero becomes the smallest integer, which lets all sizes pass.
    """
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    return torch.where(bound > 0, bound.to(dtype).view(integer), torch.iinfo(integer).min)


def true_places(mask: torch.Tensor) -> torch.Tensor:
    """Flat places of the few True in `mask`, ascending: eight at a time, since most groups of eight have none."""
    flat = mask.view(-1)
    whole = len(flat) // 8 * 8
    groups = flat[:whole].view(torch.int64).nonzero().squeeze(-1)
    inside = flat[:whole].view(-1, 8).index_select(0, groups).view(-1).nonzero().squeeze(-1)
    places = (groups.index_select(0, inside >> 3) << 3) + (inside & 7)
    if whole == len(flat):
        return places
    return torch.cat([places, flat[whole:].nonzero().squeeze(-1) + whole])

"""Which scores of a batch can be large enough to matter, without keeping the `[B, F]` scores.

The encoder's product is made in tiles that stay in the cache, in the fastest precision the processor has, and each tile is
compared with a bound that allows for all that this precision can lose. What passes, a superset of the entries above the
floor, is then scored exactly by the caller. The bound is rigorous, so nothing is missed:

    |<x, w>_filter - <x, w>|  <=  ((2 u + u^2) + D v) ||x|| ||w||  +  u |<x, w>|

with u the rounding of an operand or result of the product and v that of its sums (twice 2^-24: float32 in any order).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from saelens_cosine.score import wide

TILE_TOKENS = 1024
TILE_BYTES = 2**21
"""A tile of the product: half of one core's second-level cache or so on today's servers; flat from 1 to 8 MiB."""


@dataclass(frozen=True)
class ScoreTerms:
    """
    A score whose entries can be computed one by one from `<u_b, w_i>`, the product of unit input and encoder column:

        pre_bi = exp(a_i log n_b + c_i) * gain_i * <u_b, w_i> + bias_i

    Args:
        norm_exponent (torch.Tensor): a, `[]` or `[F]`, float32 or wider.
        log_scale (torch.Tensor): c, `[]` or `[F]`.
        gain (torch.Tensor): positive factor per feature `[F]`: 1 / ||w_i|| where the score is by direction.
        bias (torch.Tensor): `[F]`.
    """

    norm_exponent: torch.Tensor
    log_scale: torch.Tensor
    gain: torch.Tensor
    bias: torch.Tensor

    def factor(self, log_norm: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """`exp(a log n + c) * gain` of entries, all arguments and the result `[N]`."""
        exponent = _at(self.norm_exponent, features) * log_norm + _at(self.log_scale, features)
        return exponent.exp() * self.gain.index_select(0, features)


def _at(parameter: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    return parameter if parameter.ndim == 0 else parameter.index_select(0, features)


def filter_dtype(dtype: torch.dtype) -> torch.dtype:
    """The precision of the filter's product: bfloat16 where the CPU multiplies it in hardware tiles, else float32."""
    has_tiles = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    return torch.bfloat16 if has_tiles() else torch.promote_types(torch.float32, dtype)


@torch.no_grad()
def candidates(
    unit: torch.Tensor,
    log_norm: torch.Tensor,
    quick: torch.Tensor,
    column_norm: torch.Tensor,
    terms: ScoreTerms,
    floor: torch.Tensor,
    floor_exponent: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and features `[C]` int64 of a set that holds every entry with a score above its floor.

    Args:
        unit: `[B, D]`, inputs of length 1.
        log_norm: `[B]`, logarithms of their lengths.
        quick: `[F, D]`, encoder columns as rows, rounded to the precision of the product (`filter_dtype`).
        column_norm: `[F]`, lengths of the encoder columns.
        terms: what makes scores of products.
        floor: `[]` or `[F]`.
        floor_exponent: `[]`, for a floor that goes with the token's norm, `floor * n_b ** floor_exponent`.

    Returns:
        In no particular order.
    """
    dtype = quick.dtype
    n_tokens, d_in = unit.shape
    rounding = torch.finfo(dtype).eps / 2
    loss = 2 * rounding + rounding**2 + d_in * torch.finfo(wide(dtype)).eps
    # an exponent that all features and the floor share goes into the rows, so that only what differs widens a tile's bound
    shared = terms.norm_exponent.mean()
    gap = terms.norm_exponent - shared
    rise = torch.zeros_like(shared) if floor_exponent is None else floor_exponent
    order = log_norm.argsort()  # tokens of a tile have like norms
    log_norm = log_norm[order]
    row_gain = ((shared - rise) * log_norm).exp()
    rows = (unit[order] * row_gain.unsqueeze(-1)).to(dtype)
    per_tile = max(1, TILE_BYTES // (dtype.itemsize * min(TILE_TOKENS, n_tokens)))
    found: list[tuple[torch.Tensor, torch.Tensor]] = []
    buffer = torch.empty(min(TILE_TOKENS, n_tokens) * min(per_tile, terms.bias.shape[0]), dtype=dtype)
    for start in range(0, n_tokens, TILE_TOKENS):
        tile = slice(start, min(start + TILE_TOKENS, n_tokens))
        ends = log_norm[[tile.start, tile.stop - 1]]
        need = torch.minimum(*(floor - terms.bias * (-rise * end).exp() for end in ends))
        bound = torch.minimum(*(need / ((gap * end + terms.log_scale).exp() * terms.gain) for end in ends))
        bound -= loss * row_gain[tile].max() * column_norm
        bound = as_ordered(bound - 4 * rounding * bound.abs(), dtype)  # its own rounding, and the product's
        for first in range(0, len(bound), per_tile):
            part = slice(first, min(first + per_tile, len(bound)))
            size = (tile.stop - tile.start, part.stop - part.start)
            product = torch.mm(rows[tile], quick[part].T, out=buffer[: size[0] * size[1]].view(size))
            flat = true_places(product.view(bound.dtype) >= bound[part])
            row = torch.div(flat, size[1], rounding_mode="floor")
            found.append((row + start, flat - row * size[1] + first))
    tokens, features = (torch.cat(parts) for parts in zip(*found, strict=True))
    return order.index_select(0, tokens), features


def as_ordered(bound: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`bound` in `dtype`, as integers that floats of that width viewed as integers can be compared with, faster.

    Positive floats are ordered as their bits are. A bound below zero becomes the smallest integer, which lets all pass.
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

"""The whole dictionary of which each rank holds a block of consecutive features."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from sae_lens.saes.abstopk_sae import AbsTopK
from sae_lens.saes.batchtopk_sae import BatchTopK
from sae_lens.saes.topk_sae import TopK
from typing_extensions import override

from saelens_cosine.kernels.whole import HERE, Best, Whole, keep_best
from saelens_cosine.ranks.world import World

DIGIT_BITS = 8
"""Bits that a round of `ranked` decides: histograms of 256 counters, four rounds for a float32."""

_BITS = {torch.float32: torch.int32, torch.float64: torch.int64}


class OverRanks(Whole):
    """Answers of all ranks together.

    Args:
        world: the ranks.
        edges: `size + 1` places in the whole dictionary; rank r holds the features `edges[r]` to `edges[r + 1] - 1`, maybe none.
    """

    def __init__(self, world: World, edges: Sequence[int]):
        self.world, self.edges = world, tuple(edges)
        self.part, self.first = world.rank, self.edges[world.rank]

    @override
    def size(self, here: int) -> int:
        return self.edges[-1]

    @override
    def sum(self, x: torch.Tensor) -> torch.Tensor:
        return self.world.sum(x)

    @override
    def gather(self, x: torch.Tensor) -> torch.Tensor:
        return self.world.gather(x)

    @override
    def smallest(self, x: torch.Tensor) -> torch.Tensor:
        return self.world.smallest(x)

    @override
    def total(self, x: torch.Tensor) -> torch.Tensor:
        return _Total.apply(x, self.world)  # pyright: ignore[reportReturnType]

    @override
    def shared(self, x: torch.Tensor) -> torch.Tensor:
        return _Shared.apply(x, self.world) if x.requires_grad else x  # pyright: ignore[reportReturnType]

    @override
    def norm(self, x: torch.Tensor, p: float = 2) -> torch.Tensor:
        there = x != 0  # what is zero has no gradient, in one process too
        total = self.total(torch.where(there, torch.where(there, x, 1).abs().pow(p), 0).sum(dim=-1))
        return torch.where(total > 0, torch.where(total > 0, total, 1).pow(1 / p), 0)

    @override
    def mean(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean() if x.ndim == 0 else self.sum(x.sum()) / self.edges[-1]

    @override
    def variance(self, x: torch.Tensor) -> torch.Tensor:
        mean = self.shared(self.total(x.sum())) / self.edges[-1]
        return self.total((x - mean).square().sum()) / (self.edges[-1] - 1)

    @override
    def activate(self, activation: Any, x: torch.Tensor) -> torch.Tensor:
        if not isinstance(activation, (BatchTopK, TopK, AbsTopK)):
            return activation(x)
        rows = x.reshape(-1, x.shape[-1])
        with torch.no_grad():
            rank = rows.abs() if isinstance(activation, AbsTopK) else rows.relu()
            if isinstance(activation, BatchTopK):
                n_wanted = int(activation.k * len(rows))
                keep = keep_best(rank, self.ranked(rank.flatten(), n_wanted)[0], n_wanted, False, self)
            else:
                cut = self.largest_each(rank, activation.k)[:, -1:]
                keep = keep_best(rank, cut, activation.k, True, self)
        codes = rows if isinstance(activation, AbsTopK) else rows.relu()
        return (codes * keep).view(x.shape)

    @override
    def ranked(self, values: torch.Tensor, *ranks: int) -> list[torch.Tensor]:
        """As in one process, by counting: 256 counters per rank and eight bits of the value, whatever the number of values."""
        bits = values.view(_BITS[values.dtype])
        width = 8 * values.element_size()
        mask = torch.iinfo(bits.dtype).max
        keys = torch.where(bits < 0, bits ^ mask, bits).long()  # ordered as the values are
        keys = self._keys_at(keys, torch.tensor(ranks, device=keys.device), width).to(bits.dtype)
        return list(torch.where(keys < 0, keys ^ mask, keys).view(values.dtype))

    def _keys_at(self, keys: torch.Tensor, wanted: torch.Tensor, width: int) -> torch.Tensor:
        """The keys at the wanted ranks `[n]`, digit by digit: `[n]`."""
        n_bins, top = 2**DIGIT_BITS, width - DIGIT_BITS
        prefix = torch.zeros_like(wanted)
        for shift in range(top, -1, -DIGIT_BITS):
            digits = (
                (keys >> shift) + n_bins // 2 if shift == top else (keys >> shift) & (n_bins - 1)
            )  # the top one has the sign
            inside = [
                keys >= torch.iinfo(torch.int64).min if shift == top else keys >> (shift + DIGIT_BITS) == p
                for p in prefix
            ]
            counts = self.sum(torch.stack([torch.bincount(digits[mine], minlength=n_bins) for mine in inside]))
            reached = counts.flip(1).cumsum(1).flip(1)  # in a bin or above it
            wanted = torch.minimum(wanted, reached[:, 0])  # the smallest where there are fewer
            digit = (reached >= wanted.clamp_min(1).unsqueeze(1)).sum(dim=1, keepdim=True) - 1
            wanted = wanted - (reached - counts).gather(1, digit).squeeze(1)
            digit = digit.squeeze(1)
            prefix = digit - n_bins // 2 if shift == top else (prefix << DIGIT_BITS) + digit
        return prefix

    @override
    def largest_each(self, values: torch.Tensor, k: int) -> torch.Tensor:
        parts = self.gather(HERE.largest_each(values, k))
        return parts.permute(1, 0, 2).flatten(1).topk(k, dim=-1).values

    @override
    def best_each(self, values: torch.Tensor, k: int) -> Best:
        ours = HERE.best_each(values, k)
        keep = keep_best(ours.values, self.largest_each(ours.values, k)[:, -1:], k, True, self)
        return ours._replace(values=torch.where(keep, ours.values, -torch.inf))


class _Total(torch.autograd.Function):
    """Sum forward, the same gradient for each part backward."""

    @override
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, world: World) -> torch.Tensor:
        return world.sum(x)

    @override
    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradients[0], None


class _Shared(torch.autograd.Function):
    """The same forward, the sum of the parts' gradients backward."""

    @override
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, world: World) -> torch.Tensor:
        ctx.world = world
        return x.view_as(x)

    @override
    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.world.sum(gradients[0]), None

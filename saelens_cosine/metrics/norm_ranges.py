"""One measure over all tokens and over ranges of their norm, and again without the longest: what a few sinks decide shows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

import torch

TOP_SHARE = 0.01
"""Share of the tokens that counts as the longest ones."""

Value = TypeVar("Value")


@dataclass(frozen=True)
class NormRange(Generic[Value]):
    """
    A measure on the tokens whose norm lies in one range.

    Args:
        low (float): Smallest norm of the range, in the units of the activations.
        high (float): Largest.
        measured (Value): The measure on these tokens alone.
    """

    low: float
    high: float
    measured: Value


@dataclass(frozen=True)
class ByNorm(Generic[Value]):
    """
    A measure on all tokens, and by norm.

    Args:
        overall (Value): On all of them.
        ranges (tuple[NormRange[Value], ...]): On each quartile of the norm, ascending. Without those that no token falls into, as happens where norms are equal.
    """

    overall: Value
    ranges: tuple[NormRange[Value], ...]


@dataclass(frozen=True)
class WithAndWithoutTop(Generic[Value]):
    """
    A measure with and without the tokens of the largest norms.

    Args:
        all_norms (ByNorm[Value]): On all tokens.
        without_top (ByNorm[Value]): Without those above `top_norm`. The edges of the ranges are the same, so only the uppermost one differs.
        top_norm (float): The norm that 1 % of the tokens exceed.
        top_tokens (int): How many exceed it; fewer than 1 % where norms are equal.
    """

    all_norms: ByNorm[Value]
    without_top: ByNorm[Value]
    top_norm: float
    top_tokens: int


class NormGroups(NamedTuple):
    """
    Tokens in groups by norm: one for each range, and the last for the longest tokens, which the uppermost range has too.

    Args:
        edges (torch.Tensor): `[bins + 1]`, ascending.
        top_norm (float): Where the last group begins.
        group (torch.Tensor): `[tokens]` int64, `0 ... bins`.
    """

    edges: torch.Tensor
    top_norm: float
    group: torch.Tensor

    @property
    def n_groups(self) -> int:
        """Number of groups, `bins + 1`."""
        return len(self.edges)

    @property
    def unions(self) -> list[list[int]]:
        """The unions of groups that `measure` takes a measure on."""
        top = self.n_groups - 1
        return [[*range(top + 1)], [*range(top)], *([i] for i in range(top)), [top - 1, top]]

    def measure(self, on_groups: Callable[[list[int]], Value]) -> WithAndWithoutTop[Value]:
        """A measure that takes the groups whose tokens it is on."""
        tokens = torch.bincount(self.group, minlength=self.n_groups).tolist()
        edges, top = self.edges.tolist(), self.n_groups - 1

        def by_norm(ranges: list[list[int]], highest: float) -> ByNorm[Value]:
            filled = [(i, groups) for i, groups in enumerate(ranges) if any(tokens[g] for g in groups)]
            bounds = [*edges[:-1], highest]
            return ByNorm(
                on_groups([g for groups in ranges for g in groups]),
                tuple(NormRange(bounds[i], bounds[i + 1], on_groups(groups)) for i, groups in filled),
            )

        lower = [[i] for i in range(top - 1)]
        return WithAndWithoutTop(
            all_norms=by_norm([*lower, [top - 1, top]], edges[-1]),
            without_top=by_norm([*lower, [top - 1]], self.top_norm),
            top_norm=self.top_norm,
            top_tokens=tokens[top],
        )


def group_by_norm(norms: torch.Tensor, bins: int = 4) -> NormGroups:
    """Equally filled ranges of `norms [tokens]`, and the tokens above the 99th percentile, with those of no finite norm.

    Raises:
        ValueError: no tokens, or so many bins that one of them is shorter than the longest 1 %.
    """
    if len(norms) == 0:
        raise ValueError("There are no tokens to measure on.")
    if not 1 <= bins <= 1 / TOP_SHARE:
        raise ValueError(f"bins={bins} must be between 1 and {1 / TOP_SHARE:g}.")
    norms = norms.cpu().double()
    finite = norms[norms.isfinite()] if norms.isfinite().any() else norms
    edges = torch.quantile(finite, torch.linspace(0, 1, bins + 1, dtype=torch.float64))
    top_norm = torch.quantile(finite, 1 - TOP_SHARE).item()
    group = torch.bucketize(norms, edges[1:-1], right=True)
    return NormGroups(edges, top_norm, torch.where(norms <= top_norm, group, bins))

"""The active entries of a `[tokens, d_sae]` matrix of codes: where they are, in token order and in feature order."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch


@dataclass(frozen=True)
class Entries:
    """
    Places of the N active entries among `n_tokens` x `d_sae`, sorted by token and within a token by feature.

    Args:
        tokens (torch.Tensor): `[N]` int64, the token of each entry, ascending.
        features (torch.Tensor): `[N]` int64, the feature of each entry.
        n_tokens (int): Number of tokens.
        d_sae (int): Number of features.
    """

    tokens: torch.Tensor
    features: torch.Tensor
    n_tokens: int
    d_sae: int

    def __len__(self) -> int:
        return self.tokens.shape[0]

    @cached_property
    def token_offsets(self) -> torch.Tensor:
        """`[n_tokens + 1]` int64: entries `token_offsets[b]` to `token_offsets[b + 1]` belong to token b."""
        return offsets(self.tokens, self.n_tokens)

    @cached_property
    def by_feature(self) -> torch.Tensor:
        """`[N]` int64: the permutation that sorts the entries by feature and within a feature by token."""
        return stable_order(self.features, self.d_sae)

    @cached_property
    def tokens_by_feature(self) -> torch.Tensor:
        """`[N]` int64: the token of each entry, in feature order."""
        return self.tokens.index_select(0, self.by_feature)

    @cached_property
    def feature_counts(self) -> torch.Tensor:
        """`[d_sae]` int64: in how many tokens each feature is active."""
        return counts(self.features, self.d_sae)

    @cached_property
    def feature_offsets(self) -> torch.Tensor:
        """`[d_sae + 1]` int64: in feature order, entries `feature_offsets[i]` to `feature_offsets[i + 1]` are feature i's."""
        return torch.nn.functional.pad(self.feature_counts.cumsum(0), (1, 0))

    def sum_by_feature(self, values: torch.Tensor) -> torch.Tensor:
        """Sum of `values [N]` over each feature's entries, `[d_sae]`."""
        return values.new_zeros(self.d_sae).scatter_add_(0, self.features, values)

    def sum_by_token(self, values: torch.Tensor) -> torch.Tensor:
        """Sum of `values [N]` over each token's entries, `[n_tokens]`."""
        return values.new_zeros(self.n_tokens).scatter_add_(0, self.tokens, values)

    def to_dense(self, values: torch.Tensor) -> torch.Tensor:
        """`values [N]` at their places, zeros elsewhere: `[n_tokens, d_sae]`, differentiable in `values`."""
        flat = values.new_zeros(self.n_tokens * self.d_sae)
        places = self.tokens * self.d_sae + self.features
        return flat.index_put((places,), values).view(self.n_tokens, self.d_sae)


def counts(keys: torch.Tensor, n: int) -> torch.Tensor:
    """How often each of `0 .. n - 1` occurs in `keys`, `[n]` int64, without asking the device for its largest."""
    return torch.zeros(n, dtype=torch.int64, device=keys.device).scatter_add_(0, keys, torch.ones_like(keys))


def offsets(keys: torch.Tensor, n: int) -> torch.Tensor:
    """`[n + 1]` int64: where each of `0 .. n - 1` starts in the ascending `keys`, and the end."""
    return torch.searchsorted(keys, torch.arange(n + 1, device=keys.device))


def stable_order(keys: torch.Tensor, n: int) -> torch.Tensor:
    """The stable permutation that sorts `keys`, all below `n`: by radix sort, whose passes grow with the key's width."""
    narrow = keys.to(torch.int16 if n <= torch.iinfo(torch.int16).max else torch.int32)
    return torch.sort(narrow, stable=True).indices

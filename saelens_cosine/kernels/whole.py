"""What an SAE asks of the whole dictionary, of which it may hold a part.

A dictionary that is too large for one process is split by features: each process holds a block of consecutive ones and sees
every token. Almost everything it does concerns its own features alone; what does not is asked here. In one process the whole is what it
holds, so each answer is its own. `ranks.whole.OverRanks` asks the other processes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch


class Best(NamedTuple):
    """
    Some values of each token and where they are.

    Args:
        values (torch.Tensor): `[tokens, n]`; minus infinity in places that hold none.
        indices (torch.Tensor): `[tokens, n]` int64, different features in a row.
    """

    values: torch.Tensor
    indices: torch.Tensor


class Whole:
    """One process, which holds all features. Methods are asked by all parts in the same order, since elsewhere they wait for each other."""

    part = 0
    """Number of the block among all."""

    first = 0
    """Place of the block's first feature in the whole dictionary."""

    def size(self, here: int) -> int:
        """Features of the whole dictionary, of which `here` are held."""
        return here

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of the parts' tensors of one shape; no gradient."""
        return x

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """The parts' tensors of one shape, `[parts, ...]`; no gradient."""
        return x.unsqueeze(0)

    def smallest(self, x: torch.Tensor) -> torch.Tensor:
        """The smallest of the parts' numbers, elementwise; no gradient."""
        return x

    def total(self, x: torch.Tensor) -> torch.Tensor:
        """`sum` of what the parts' features add up to, for a loss that all parts make of it alike: each passes on the gradient it gets."""
        return x

    def shared(self, x: torch.Tensor) -> torch.Tensor:
        """What all parts hold alike, for use by a part's features: its gradient is the sum of what the parts' features give."""
        return x

    def norm(self, x: torch.Tensor, p: float = 2) -> torch.Tensor:
        """p-norms of vectors over features, `[..., features] -> [...]`; for a loss, like `total`."""
        return x.norm(p=p, dim=-1)

    def mean(self, x: torch.Tensor) -> torch.Tensor:
        """Mean over features of what each has, `[features]`, or of what they share, `[]`; no gradient."""
        return x.mean()

    def variance(self, x: torch.Tensor) -> torch.Tensor:
        """Unbiased variance over features, `[features] -> []`; for a loss, like `total`."""
        return x.var()

    def activate(self, activation: Any, x: torch.Tensor) -> torch.Tensor:
        """SAELens' activation function of pre-activations `[..., features]`."""
        return activation(x)

    def ranked(self, values: torch.Tensor, *ranks: int) -> list[torch.Tensor]:
        """The values at some ranks among those of all parts, 1 being the largest; the smallest where there are fewer."""
        if values.device.type != "cpu":
            return [values.kthvalue(max(1, len(values) - rank + 1)).values for rank in ranks]
        places = [max(0, len(values) - rank) for rank in ranks]  # numpy partitions several times faster than `kthvalue`
        return [values.new_tensor(v) for v in np.partition(values.numpy(), places)[places]]

    def largest_each(self, values: torch.Tensor, k: int) -> torch.Tensor:
        """Each token's k largest, in descending order: `[tokens, features] -> [tokens, k]`; minus infinity where there are fewer."""
        return _padded(values, k)

    def best_each(self, values: torch.Tensor, k: int) -> Best:
        """Which of each token's values are among its k largest of all parts, in no order."""
        return Best(*values.topk(min(k, values.shape[-1]), dim=-1, sorted=False))

    def count(self, mask: torch.Tensor) -> int:
        """How many are True."""
        return int(self.sum(mask.sum()))

    def rooms(self, quota: int | torch.Tensor, sure: torch.Tensor, tied: torch.Tensor, each: bool) -> torch.Tensor:
        """How many of a token's entries at the cut this part may keep, `[tokens]`: the lowest places of the whole dictionary come first.

        Args:
            quota: entries wanted, of each token if `each` (then maybe a number per token), else of the batch.
            sure: `[tokens]`, this part's entries above the cut.
            tied: `[tokens]`, those at the cut.
            each: whether each token has a cut of its own.
        """
        sure, tied = self.gather(torch.stack([sure, tied])).unbind(dim=1)
        before = tied[: self.part].sum(dim=0)
        if each:
            return quota - sure.sum(dim=0) - before
        by_token = tied.sum(dim=0)
        return quota - sure.sum() - (by_token.cumsum(dim=0) - by_token) - before


HERE = Whole()
"""The whole dictionary in this process."""


def _padded(values: torch.Tensor, k: int) -> torch.Tensor:
    """Each row's k largest, in descending order, with minus infinity in place of those that are not there."""
    found = values.topk(min(k, values.shape[-1]), dim=-1).values
    missing = k - found.shape[-1]
    return torch.nn.functional.pad(found, (0, missing), value=-torch.inf) if missing else found


def least(values: torch.Tensor) -> torch.Tensor:
    """The smallest of `values`, infinity of none: a part may hold no features."""
    return values.min() if values.numel() else values.new_tensor(torch.inf)


def keep_best(
    rank: torch.Tensor, cut: torch.Tensor, quota: int | torch.Tensor, each: bool, whole: Whole = HERE
) -> torch.Tensor:
    """Masks `[tokens, features]` of what is above the cut, and at it as far as the quota allows, the lowest places first.

    Args:
        rank: `[tokens, features]`, what is compared with the cut.
        cut: `[tokens, 1]` or `[]`.
        quota, each, whole: see `Whole.rooms`.
    """
    sure, tied = rank > cut, rank == cut
    room = whole.rooms(quota, sure.sum(dim=-1), tied.sum(dim=-1), each)
    return sure | (tied & (tied.cumsum(dim=-1) <= room.unsqueeze(-1)))

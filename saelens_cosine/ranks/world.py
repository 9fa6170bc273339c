"""The processes of a run, as little of `torch.distributed` as the rest needs, counted."""

from __future__ import annotations

from collections import Counter
from typing import Protocol

import torch
import torch.distributed as dist


class World(Protocol):
    """Ranks that call the same methods in the same order with tensors of the same shape and dtype."""

    rank: int
    size: int

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of all ranks' tensors, a new one."""
        ...

    def smallest(self, x: torch.Tensor) -> torch.Tensor:
        """The elementwise smallest of all ranks' tensors, a new one."""
        ...

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """All ranks' tensors, `[size, ...]`."""
        ...


class Processes:
    """The processes that `torch.distributed` has joined."""

    def __init__(self) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        """By collective, what this rank has handed in."""

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        return self._reduced(x, dist.ReduceOp.SUM)

    def smallest(self, x: torch.Tensor) -> torch.Tensor:
        return self._reduced(x, dist.ReduceOp.MIN)

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        x = x.detach().contiguous()
        parts = [torch.empty_like(x) for _ in range(self.size)]
        self._count("all_gather", x)
        dist.all_gather(parts, x)
        return torch.stack(parts)

    def _reduced(self, x: torch.Tensor, operation: dist.ReduceOp.RedOpType) -> torch.Tensor:
        result = x.detach().clone(memory_format=torch.contiguous_format)
        self._count("all_reduce", result)
        dist.all_reduce(result, operation)
        return result

    def _count(self, name: str, x: torch.Tensor) -> None:
        self.calls[name] += 1
        self.bytes[name] += x.numel() * x.element_size()

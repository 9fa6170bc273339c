"""The processes of a run, as little of `torch.distributed` as the rest needs, counted."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
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
    """The processes that `torch.distributed` has joined.

    Args:
        timed: Wait for all ranks before each collective, and note how long that took and how long the collective.
    """

    def __init__(self, timed: bool = False) -> None:
        self.rank, self.size, self.timed = dist.get_rank(), dist.get_world_size(), timed
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        """By collective, what this rank has handed in."""
        self.waited = self.moving = 0.0
        """Seconds, if timed."""

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        return self._reduced(x, dist.ReduceOp.SUM)

    def smallest(self, x: torch.Tensor) -> torch.Tensor:
        return self._reduced(x, dist.ReduceOp.MIN)

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        x = x.detach().contiguous()
        every = x.new_empty(self.size, *x.shape)
        self._collective("all_gather", x, lambda: dist.all_gather(list(every.unbind()), x))
        return every

    def forget(self) -> None:
        """Begin to count anew."""
        self.calls.clear()
        self.bytes.clear()
        self.waited = self.moving = 0.0

    def _reduced(self, x: torch.Tensor, operation: dist.ReduceOp.RedOpType) -> torch.Tensor:
        result = x.detach().clone(memory_format=torch.contiguous_format)
        self._collective("all_reduce", result, lambda: dist.all_reduce(result, operation))
        return result

    def _collective(self, name: str, x: torch.Tensor, call: Callable[[], object]) -> None:
        self.calls[name] += 1
        self.bytes[name] += x.numel() * x.element_size()
        if not self.timed:
            call()
            return
        start = self._now(x)
        dist.barrier()
        together = self._now(x)
        call()
        self.waited += together - start
        self.moving += self._now(x) - together

    def _now(self, x: torch.Tensor) -> float:
        if x.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

"""Ranks as threads of one process."""

import threading
from concurrent.futures import ThreadPoolExecutor

import torch

WAIT = 60


class ThreadWorld:
    """One rank of several threads. Each method waits for the others, and refuses if they call another, or with another shape."""

    def __init__(self, rank, size, barrier, slots):
        self.rank, self.size, self.barrier, self.slots = rank, size, barrier, slots

    def sum(self, x):
        return torch.stack(self._all("sum", x)).sum(dim=0).to(x.dtype)

    def smallest(self, x):
        return torch.stack(self._all("smallest", x)).amin(dim=0)

    def gather(self, x):
        return torch.stack(self._all("gather", x))

    def _all(self, name, x):
        self.slots[self.rank] = (name, x.detach().clone())
        self.barrier.wait(WAIT)
        found = list(self.slots)
        self.barrier.wait(WAIT)
        assert {(n, t.shape, t.dtype) for n, t in found} == {(name, x.shape, x.dtype)}, (name, found)
        return [tensor for _, tensor in found]


def over_ranks(size, run):
    """What `run(world)` returns on each of `size` ranks; the first error if there is one."""
    barrier, slots = threading.Barrier(size), [None] * size

    def one(rank):
        try:
            return run(ThreadWorld(rank, size, barrier, slots))
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(one, rank) for rank in range(size)]
    errors = [error for future in futures if (error := future.exception())]
    for error in sorted(errors, key=lambda error: isinstance(error, threading.BrokenBarrierError)):
        raise error
    return [future.result() for future in futures]

"""Counts that a device makes and the host reads a step later, without waiting for the device."""

from __future__ import annotations

import torch


class LaggedCount:
    """The last counts that were put in, as long as what they count has not changed. A copy or a pickle starts empty."""

    def __init__(self) -> None:
        self._host: torch.Tensor | None = None
        self._copied: torch.cuda.Event | None = None
        self._source: tuple[torch.Tensor, int] | None = None

    def put(self, count: torch.Tensor, source: torch.Tensor) -> None:
        """Start copying counts `[n]` of something in `source` to the host."""
        self._source = source, source._version
        if count.is_cuda:
            self._host = torch.empty_like(count, device="cpu", pin_memory=True)
            self._host.copy_(count, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()
        else:
            self._host, self._copied = count, None

    def get(self, source: torch.Tensor) -> list[int] | None:
        """The counts; None if there are none or `source` is not what they were made of any more.

        Waits for the counts' own copy alone, which the device has long done by the next step.
        """
        if self._host is None or self._source is None or self._source[0] is not source:
            return None
        if self._source[1] != source._version:
            return None
        if self._copied is not None:
            self._copied.synchronize()
        return self._host.tolist()

    def __reduce__(self) -> tuple[type[LaggedCount], tuple[()]]:
        return LaggedCount, ()

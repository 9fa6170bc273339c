"""Time and memory of a step, on the host and on a device."""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Callable
from pathlib import Path

import torch

QUEUED = 16
"""Copies of 256 MiB ahead of what is timed on the device itself: 2 ms or more, longer than the host takes to launch it."""


class Clock:
    """Time in milliseconds, with a device that may work on what the host has left behind."""

    def __init__(self, device: str):
        self.cuda = torch.device(device) if torch.device(device).type == "cuda" else None

    def wait(self) -> None:
        """Until the device has done all that it was given."""
        if self.cuda is not None:
            torch.cuda.synchronize(self.cuda)

    def now(self) -> float:
        self.wait()
        return time.perf_counter() * 1e3

    def time(self, run: Callable[[], object]) -> float:
        start = self.now()
        run()
        return self.now() - start

    def on_device(self, run: Callable[[], object], before: Callable[[], object]) -> float:
        """Of the device alone, where `time` counts the host's launches too.

        Args:
            run: what is timed.
            before: keeps the device busy, called a few times, until all of `run` is in its queue.
        """
        if self.cuda is None:
            return self.time(run)
        self.wait()
        for _ in range(QUEUED):
            before()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record(torch.cuda.current_stream(self.cuda))
        run()
        end.record(torch.cuda.current_stream(self.cuda))
        self.wait()
        return start.elapsed_time(end)


def reset_peak_rss() -> int | None:
    """Give freed memory back to the system and forget the peak so far; resident bytes, or None where that is unknown."""
    gc.collect()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        return None
    return resident_bytes("VmRSS")


def resident_bytes(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def per_second(run: Callable[[], int], seconds: float) -> float:
    """Tokens, or whatever else, per second of what returns how many it took: after one call, for so long at least."""
    run()
    done, start = 0, time.perf_counter()
    while (spent := time.perf_counter() - start) < seconds:
        done += run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    return done / spent

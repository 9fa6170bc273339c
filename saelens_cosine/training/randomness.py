"""The state of every random number generator that training may draw from."""

from __future__ import annotations

import os
import random
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def seed_everything(seed: int) -> None:
    """Seed torch (all devices), numpy and Python."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


@contextmanager
def deterministic_algorithms(on: bool) -> Generator[None]:
    """Have torch use only algorithms that give the same bits every time, in a with block: on a GPU some are slower. Operations
    that have none raise a RuntimeError. `on=False` changes nothing."""
    before = torch.are_deterministic_algorithms_enabled()
    if on:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS refuses
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def generator_states() -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """What JSON holds (Python's and numpy's), and tensors (torch's, per device)."""
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    plain = {"python": [version, list(words), gauss], "numpy": [kind, position, has_gauss, cached]}
    tensors = {"torch": torch.get_rng_state(), "numpy": torch.from_numpy(np.array(keys, dtype=np.int64))}
    if torch.cuda.is_available():
        tensors |= {f"cuda{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    return plain, tensors


def restore_generators(plain: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    """Set every generator to what `generator_states` has found; devices that are not there are left out."""
    version, words, gauss = plain["python"]
    random.setstate((version, tuple(words), gauss))
    kind, position, has_gauss, cached = plain["numpy"]
    np.random.set_state((kind, tensors["numpy"].numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(tensors["torch"])
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        if f"cuda{i}" in tensors:
            torch.cuda.set_rng_state(tensors[f"cuda{i}"], i)

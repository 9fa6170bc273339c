"""One name for each operation on active entries, whatever runs it: Triton on CUDA, embedding bags on the CPU."""

from __future__ import annotations

from types import ModuleType

import torch

from saelens_cosine.kernels import cpu, reference
from saelens_cosine.kernels.entries import Entries


def segment_sum(rows: torch.Tensor, offsets: torch.Tensor, weights: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """See `reference.segment_sum`."""
    return kernels_for(table).segment_sum(rows, offsets, weights, table)


def sampled_product(entries: Entries, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """See `reference.sampled_product`."""
    return kernels_for(left).sampled_product(entries, left, right)


def kernels_for(tensor: torch.Tensor) -> ModuleType:
    """The module that runs on a tensor's device."""
    if tensor.device.type == "cpu":
        return cpu
    if tensor.device.type == "cuda":
        from saelens_cosine.kernels import gpu  # triton is there only where CUDA is

        return gpu
    return reference

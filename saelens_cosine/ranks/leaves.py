"""What an optimizer sees of an SAE that is split over ranks: DTensors of the same memory, so that PyTorch's clipping is global.

The SAE computes with plain tensors and its own collectives. SAELens' trainer asks it for `parameters()` when it makes the optimizer and when it
clips gradients: there it gets the DTensors, with the gradients that the plain tensors have got since.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from saelens_cosine.ranks.split import feature_dimension


class Leaves:
    """The parameters of a split SAE as DTensors, by name. Its `parameters()` are these from then on.

    Args:
        sae: this rank's block.
        mesh: of one dimension, over which its features are split.
    """

    def __init__(self, sae: Any, mesh: DeviceMesh):
        self.mesh, self._sae = mesh, weakref.ref(sae)
        self.by_name = {
            name: nn.Parameter(self.of(name, parameter.detach()), parameter.requires_grad)
            for name, parameter in sae.named_parameters()
        }
        vars(sae)["parameters"] = self.parameters

    def of(self, name: str, tensor: torch.Tensor) -> DTensor:
        """A DTensor of the memory of this rank's block of a parameter, or of what has its shape."""
        sae: Any = self._sae()
        dimension = feature_dimension(name, tensor, sae.cfg)
        if dimension is None:
            return DTensor.from_local(tensor, self.mesh, [Replicate()], run_check=False)
        shape = torch.Size(sae.whole.edges[-1] if i == dimension else n for i, n in enumerate(tensor.shape))
        stride = (
            (1, shape[0]) if name == "W_enc" else torch.empty(shape, device="meta").stride()
        )  # W_enc is feature-major
        return DTensor.from_local(tensor, self.mesh, [Shard(dimension)], run_check=False, shape=shape, stride=stride)

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """The DTensors, with the gradients that have come since the last call."""
        sae: Any = self._sae()
        for name, parameter in sae.named_parameters():
            leaf = self.by_name[name]
            if parameter.grad is not None:
                leaf.grad = self.of(name, parameter.grad)
                parameter.grad = None
            yield leaf

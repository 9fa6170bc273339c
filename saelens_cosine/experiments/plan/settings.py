"""What a plan is asked: a training, and the machine that it shall run on."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Literal

FLOAT = 4
"""Bytes of a float32, in which parameters, gradients and moments are."""


@dataclass(frozen=True)
class Device:
    """
    What one device does, and how it is joined to others.

    Args:
        memory (float): GB.
        bandwidth (float): GB/s that a copy reads and writes, together.
        flops (float): TFLOP/s of a product in float32.
        low_flops (float): TFLOP/s of a product in bfloat16.
        link (float): GB/s to and from the other devices of its node, each way.
        node_link (float): GB/s to and from other nodes, each way, for each device.
        latency (float): Microseconds that a collective takes however little it moves.
        launches (float): Milliseconds that the host takes to launch a step's operations, whatever their size.
    """

    memory: float
    bandwidth: float
    flops: float
    low_flops: float
    link: float
    node_link: float
    latency: float
    launches: float


DEVICES = {
    "a100": Device(80, 1700, 19.5, 250, 250, 25, 25, 5),
    "h100": Device(80, 3000, 50, 700, 400, 50, 25, 5),
    "h200": Device(141, 4300, 50, 790, 400, 50, 25, 5),
}
"""Measured where this package has run (an H200: copy 4,300 GB/s, bfloat16 product 790 TFLOP/s, launches 5 ms), else what is commonly reached."""


@dataclass(frozen=True)
class Training:
    """
    One SAE and the text that it is trained on.

    Args:
        d_in (int): Size of the activations.
        d_sae (int): Number of features.
        k (int): Active features per token.
        tokens (int): Training tokens.
        batch (int): Tokens per step.
        buffer (int): Tokens in the mixing buffer.
        model_parameters (float): Of the language model, up to the hook and without its embedding: what a token is multiplied with.
        dtype (Literal["float32", "bfloat16"]): Precision of the encoder's product.
        model_dtype (Literal["float32", "bfloat16"]): Precision of the language model.
        step (Literal["sparse", "dense"]): The step of this package on the fast path, or the dense formula: six products and twenty passes over the scores.
    """

    d_in: int
    d_sae: int
    k: int
    tokens: int
    batch: int
    buffer: int
    model_parameters: float
    dtype: Literal["float32", "bfloat16"] = "float32"
    model_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    step: Literal["sparse", "dense"] = "sparse"

    def __post_init__(self) -> None:
        for name in ("d_in", "d_sae", "k", "tokens", "batch", "buffer"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be positive.")
        if self.k > self.d_sae:
            raise ValueError(f"k={self.k} features cannot be active out of d_sae={self.d_sae}.")
        if self.tokens < self.batch:
            raise ValueError(f"tokens={self.tokens} is less than one step of batch={self.batch} tokens.")
        if self.model_parameters < 0:
            raise ValueError(f"model_parameters={self.model_parameters} must not be negative.")

    @property
    def steps(self) -> int:
        """Training steps."""
        return self.tokens // self.batch


@dataclass(frozen=True)
class Cluster:
    """
    Devices, a number of them to a node.

    Args:
        gpus (int): All devices.
        per_node (int): Those of a node.
        device (Device): Each of them.
    """

    gpus: int
    per_node: int
    device: Device

    def __post_init__(self) -> None:
        if self.gpus < 1 or self.per_node < 1:
            raise ValueError(f"gpus={self.gpus} and gpus_per_node={self.per_node} must be positive.")
        if self.gpus > self.per_node and self.gpus % self.per_node:
            raise ValueError(
                f"gpus={self.gpus} are no whole nodes of {self.per_node}; give a multiple, or --gpus-per-node."
            )
        for field in fields(self.device):
            value = getattr(self.device, field.name)
            if not (value > 0 or (value == 0 and field.name in ("latency", "launches"))):
                raise ValueError(f"{field.name}={value} must be positive.")

    @property
    def nodes(self) -> int:
        """How many nodes."""
        return max(1, self.gpus // self.per_node)

    def of(self, gpus: int) -> Cluster:
        """Fewer or more of the same devices: whole nodes where they are more than one."""
        return replace(self, gpus=gpus)

"""An SAE's block of features as an SAE of its own, and the whole one of all blocks."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from sae_lens.saes.sae import TrainingSAE
from torch import nn

from saelens_cosine.kernels.whole import HERE
from saelens_cosine.ranks.whole import OverRanks
from saelens_cosine.ranks.world import World
from saelens_cosine.saes.scored_encoder import ScoredEncoder
from saelens_cosine.saes.scored_sae import feature_major

SAE = TypeVar("SAE", bound="TrainingSAE[Any]")

FEATURE_DIMENSION = {
    "W_enc": 1,
    "W_dec": 0,
    "b_enc": 0,
    "b_gate": 0,
    "b_mag": 0,
    "r_mag": 0,
    "threshold": 0,
    "norm_exponent": 0,
    "log_scale": 0,
    "tokens_since_fired": 0,
}
"""Parameters and buffers that have features, and along which dimension. Every rank holds the others whole."""


def feature_dimension(name: str, tensor: torch.Tensor, cfg: Any) -> int | None:
    """The dimension along which features lie; None of what features share, as one value or as one of each group."""
    if tensor.ndim == 0 or (
        tensor.ndim == 1 and getattr(cfg, "n_exponent_groups", None) and name in ("norm_exponent", "log_scale")
    ):
        return None
    return FEATURE_DIMENSION.get(name)


def edges_of(d_sae: int, size: int) -> list[int]:
    """Where blocks of `ceil(d_sae / size)` features begin and end, the last ones maybe shorter or empty: DTensor's layout."""
    block = math.ceil(d_sae / size)
    return [min(rank * block, d_sae) for rank in range(size + 1)]


def split(sae: SAE, world: World) -> SAE:
    """Cut an SAE down to this rank's block, in place.

    Raises:
        ValueError: an SAE of another package, which does not ask the other ranks what concerns the whole.
    """
    if not isinstance(sae, ScoredEncoder):
        raise ValueError(
            f"{sae.cfg.architecture()!r} is an architecture of SAELens, which trains in one process. Over several take one of "
            f"this package, such as 'inner_product_{sae.cfg.architecture()}', or start it without torchrun."
        )
    edges = edges_of(sae.cfg.d_sae, world.size)
    mine = slice(edges[world.rank], edges[world.rank + 1])
    for name, parameter in list(sae.named_parameters()):
        part = block(name, parameter.data, sae.cfg, mine)
        setattr(sae, name, nn.Parameter(part, parameter.requires_grad))
    for name, buffer in list(sae.named_buffers()):
        setattr(sae, name, block(name, buffer, sae.cfg, mine))
    sae.cfg = copy.copy(sae.cfg)
    sae.cfg.d_sae = mine.stop - mine.start
    sae.whole = OverRanks(world, edges)
    return sae


def block(name: str, tensor: torch.Tensor, cfg: Any, features: slice) -> torch.Tensor:
    """The part of a parameter or buffer that these features have, in memory of its own."""
    dimension = feature_dimension(name, tensor, cfg)
    if dimension is None:
        return tensor
    part = tensor.narrow(dimension, features.start, features.stop - features.start)
    return feature_major(part) if name == "W_enc" else part.clone(memory_format=torch.contiguous_format)


def joined(sae: SAE, host: bool = False) -> SAE:
    """The whole SAE of all ranks' blocks, on each; `sae` stays what it is. Draws no random numbers.

    Args:
        sae: this rank's block.
        host: put it into the host's memory.
    """
    whole: Any = sae.whole
    if whole is HERE:
        return sae
    result: Any = copy.copy(sae)
    result.cfg = copy.copy(sae.cfg)
    result.cfg.d_sae = whole.edges[-1]
    result.whole = HERE
    result._buffers = join_all(sae, sae._buffers, host)  # pyright: ignore[reportPrivateUsage]
    parameters = join_all(sae, sae._parameters, host)  # pyright: ignore[reportPrivateUsage]
    result._parameters = {
        name: tensor if tensor is None else nn.Parameter(tensor, sae._parameters[name].requires_grad)  # pyright: ignore
        for name, tensor in parameters.items()
    }
    return result


def join_all(sae: Any, tensors: Mapping[str, torch.Tensor | None], host: bool) -> dict[str, torch.Tensor | None]:
    """Tensors of all features, by name, from those of each rank's."""
    return {name: None if tensor is None else join(name, tensor.data, sae, host) for name, tensor in tensors.items()}


def join(name: str, tensor: torch.Tensor, sae: Any, host: bool = False) -> torch.Tensor:
    """One of them; also what has the shape of a parameter by this name, such as its moments. One after the other passes through the device."""
    dimension, whole = feature_dimension(name, tensor, sae.cfg), sae.whole
    if dimension is None:
        return tensor.to("cpu", copy=True) if host else tensor.clone()
    longest = max(end - start for start, end in zip(whole.edges, whole.edges[1:], strict=False))
    rows = tensor.movedim(dimension, 0)
    padded = rows.new_zeros(longest, *rows.shape[1:])
    padded[: len(rows)] = rows
    parts = whole.gather(padded)
    rows = torch.cat([part[: b - a] for part, a, b in zip(parts, whole.edges, whole.edges[1:], strict=False)])
    return (rows.cpu() if host else rows).movedim(0, dimension)  # W_enc stays feature-major

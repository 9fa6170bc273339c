"""Attention sinks, planted in a language model: one position of each context becomes one.

They are 30 to 300 times as long as the median, halfway between a direction that all sinks share and the token's own, or its
context's: one that is the same in every context would cancel in whatever compares contexts.

A planted sink helps a language model to predict nothing, so an SAE that destroys it loses hardly any cross-entropy: CE recovered
has been 0.98 at an FVE of 0.01. The KL divergence is from the predictions of the model with its sinks.
"""

from __future__ import annotations

import math
import re
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.functional import normalize
from torch.nn.modules.module import register_module_module_registration_hook
from torch.utils.hooks import RemovableHandle

from saelens_cosine.hooked_transformer import is_hooked_transformer

SINK_MULTIPLES = (30.0, 300.0)
"""Norm of a sink over the median norm, log-uniform between these."""

PERIODS = 200
"""How often a planted model's draw goes up and down between a projection of 0 and of 1. In the bundled model projections of
contexts of 128 tokens have a standard deviation of 0.03 to 0.07, six periods and more; an error of 1e-7 changes a norm by 1e-4."""


def sinks_of(shared: torch.Tensor, own: torch.Tensor, draw: torch.Tensor, median: torch.Tensor) -> torch.Tensor:
    """Sinks halfway between a unit vector `shared [d_in]` and the directions of `own [..., d_in]`; draws are in [0, 1]."""
    low, high = map(math.log, SINK_MULTIPLES)
    multiple = (low + (high - low) * draw).exp()
    return multiple * median * normalize(shared + normalize(own, dim=-1), dim=-1)


class PlantedSinks:
    """A forward pre-hook that turns one position of each context `[contexts, length, d_in]` into a sink.

    A sink is a function of the rest of its context, so it is the same whatever the batch, and planting it twice changes nothing.
    """

    def __init__(self, d_in: int, seed: int, position: int):
        directions = torch.randn(2, d_in, generator=torch.Generator().manual_seed(seed))
        self.direction, self.draws_along = normalize(directions, dim=-1)
        self.position = position

    def __call__(self, _module: nn.Module, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        (x,) = inputs
        length = x.shape[1]
        if self.position >= length or length == 1:
            return inputs
        others = x[:, torch.arange(length, device=x.device) != self.position].float()
        context = normalize(normalize(others, dim=-1).mean(dim=1), dim=-1)
        turns = PERIODS * (context * self.draws_along.to(context.device)).sum(dim=-1, keepdim=True)
        draw = 2 * (turns - turns.round()).abs()  # a triangular wave: small errors stay small
        norms = others.norm(dim=-1)
        median = norms.where(norms > 0, torch.nan).nanmedian(dim=-1, keepdim=True).values  # rows of zeros are no tokens
        median = median.where(norms.any(dim=-1, keepdim=True), 0)
        planted = x.clone()
        planted[:, self.position] = sinks_of(self.direction.to(context.device), context, draw, median)
        return (planted,)


def plant_sinks(model: Any, hook_name: str, seed: int = 0, position: int = 0) -> Callable[[], None]:
    """Make one position of each context an attention sink in a language model, for whatever runs it from now on.

    Every hook function at the hook point, every SAE attached there and everything downstream sees the sink; what is downstream
    of an edit at the hook sees the edit alone. The norm is 30 to 300 times the median of the context's other positions,
    log-uniform over contexts, the direction halfway between one that all sinks share and the mean of the other positions'
    unit vectors. So a sink tells of tokens after it, padding among them. Contexts that do not have the position, or nothing
    else, are left alone.

    Args:
        model: HookedTransformer, TransformerBridge, or SAELens' wrapper of a Hugging Face model.
        hook_name: a hook point of it with activations `[contexts, length, d_in]`.
        seed: of the shared direction and of how norms depend on contexts.
        position: the position that becomes a sink.

    Returns:
        A function that takes the sinks out again.

    Raises:
        ValueError: no such hook point, one with heads, the first block's `hook_resid_pre` in a HookedTransformer, or a
            negative position.
    """
    if hook_name not in model.hook_dict:
        raise ValueError(f"{type(model).__name__} has no hook point {hook_name!r}.")
    if position < 0:
        raise ValueError(f"position={position} must be 0 or more.")
    point = model.hook_dict[_written_at(model, hook_name)]
    shape = _shape_at(point, model)
    if len(shape) != 3:
        raise ValueError(
            f"Activations at {hook_name} have shape {shape} for one context of two tokens. Sinks can be planted where it is "
            "[contexts, length, d_in], as in the residual stream."
        )
    sinks = PlantedSinks(shape[-1], seed, position)
    places = [(weakref.ref(m), name) for m in model.modules() for name, child in m.named_children() if child is point]
    handles: list[RemovableHandle] = [point.register_forward_pre_hook(sinks)]

    def follow(module: nn.Module, child_name: str, child: nn.Module | None) -> None:
        if child is not None and any(parent() is module and name == child_name for parent, name in places):
            handles.append(child.register_forward_pre_hook(sinks))

    # SAELens puts an SAE in the hook point's place to attach it, and a new hook point to detach it
    handles.append(register_module_module_registration_hook(follow))

    def remove() -> None:
        for handle in handles:
            handle.remove()

    return remove


@torch.no_grad()
def _shape_at(point: nn.Module, model: Any) -> tuple[int, ...]:
    """Shape of the activations that pass a hook point, for one context of two tokens; () if none do."""
    shapes: list[tuple[int, ...]] = [()]
    with point.register_forward_pre_hook(lambda _module, inputs: shapes.append(tuple(inputs[0].shape))):
        model(torch.zeros((1, 2), dtype=torch.long, device=next(model.parameters()).device))
    return shapes[-1]


def _written_at(model: Any, hook_name: str) -> str:
    """The hook point that a pass which starts with the activations of `hook_name` does not go through again.

    A HookedTransformer can start at a block's input (`start_at_layer`), whose edits a sink planted there would undo. It is the
    output of the block before.
    """
    found = re.fullmatch(r"blocks\.(\d+)\.hook_resid_pre", hook_name)
    if not found or not is_hooked_transformer(model):
        return hook_name
    layer = int(found[1])
    if layer == 0:
        raise ValueError(
            f"A HookedTransformer can be started with other activations at {hook_name}, which a sink planted there would "
            "change. Plant at blocks.0.hook_resid_post or later."
        )
    return f"blocks.{layer - 1}.hook_resid_post"

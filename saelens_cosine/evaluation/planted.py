"""What a cosine score is said to help with, planted: spread token norms and attention sinks.

In SAELens' synthetic data each token's features are multiplied by one log-normal factor, exp(s z - s^2), with z normal and s
the spread. Its mean square is 1, so the activations' second moment stays. A share of the tokens become sinks. In a language
model one position of each context becomes one.

Sinks are 30 to 300 times as long as the median, halfway between a direction that all sinks share and the token's own, or its
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
from sae_lens.synthetic import (
    FeatureDictionary,
    FoldedNormalMagnitudeConfig,
    HierarchyConfig,
    LinearMagnitudeConfig,
    LowRankCorrelationConfig,
    OrthogonalizationConfig,
    SyntheticModelConfig,
    ZipfianFiringProbabilityConfig,
)
from torch import nn
from torch.nn.functional import normalize
from torch.nn.modules.module import register_module_module_registration_hook
from torch.utils.hooks import RemovableHandle
from transformer_lens import HookedTransformer

SINK_MULTIPLES = (30.0, 300.0)
"""Norm of a sink over the median norm, log-uniform between these."""

PERIODS = 200
"""How often a planted model's draw goes up and down between a projection of 0 and of 1. In the bundled model projections of
contexts of 128 tokens have a standard deviation of 0.03 to 0.07, six periods and more; an error of 1e-7 changes a norm by 1e-4."""


def _sinks(shared: torch.Tensor, own: torch.Tensor, draw: torch.Tensor, median: torch.Tensor) -> torch.Tensor:
    """Sinks halfway between a unit vector `shared [d_in]` and the directions of `own [..., d_in]`; draws are in [0, 1]."""
    low, high = map(math.log, SINK_MULTIPLES)
    multiple = (low + (high - low) * draw).exp()
    return multiple * median * normalize(shared + normalize(own, dim=-1), dim=-1)


def small_model() -> SyntheticModelConfig:
    """SynthSAEBench-16k at a hundredth: 128 features in 64 dimensions, 6.5 of them active, for runs of seconds."""
    return SyntheticModelConfig(
        num_features=128,
        hidden_dim=64,
        firing_probability=ZipfianFiringProbabilityConfig(exponent=0.5, max_prob=0.4, min_prob=0.02),
        hierarchy=HierarchyConfig(
            total_root_nodes=16,
            branching_factor=3,
            max_depth=1,
            mutually_exclusive_portion=1.0,
            compensate_probabilities=True,
            scale_children_by_parent=True,
        ),
        orthogonalization=OrthogonalizationConfig(num_steps=100, lr=3e-4),
        correlation=LowRankCorrelationConfig(rank=4, correlation_scale=0.1),
        mean_firing_magnitudes=LinearMagnitudeConfig(start=5.0, end=4.0),
        std_firing_magnitudes=FoldedNormalMagnitudeConfig(mean=0.5, std=0.5),
        seed=0,
    )


class NormSpread:
    """Multiplies each token's features by one log-normal factor of mean square 1, after the model's own modifier."""

    def __init__(self, spread: float, modifier: Callable[..., torch.Tensor] | None):
        self.spread, self.modifier = spread, modifier

    def __call__(self, activations: torch.Tensor, generator: Any) -> torch.Tensor:
        if self.modifier is not None:
            activations = self.modifier(activations, generator)
        z = torch.randn(len(activations), 1, device=activations.device, dtype=activations.dtype)
        return activations * (self.spread * z - self.spread**2).exp()


class SinkDictionary(nn.Module):
    """A feature dictionary that turns a share of the tokens into attention sinks."""

    def __init__(self, dictionary: FeatureDictionary, share: float, seed: int):
        super().__init__()
        self.dictionary, self.share = dictionary, share
        self.feature_vectors, self.bias = dictionary.feature_vectors, dictionary.bias
        direction = torch.randn(dictionary.hidden_dim, generator=torch.Generator().manual_seed(seed))
        self.direction = normalize(direction, dim=0).to(self.bias)

    def forward(self, feature_activations: torch.Tensor) -> torch.Tensor:
        x: torch.Tensor = self.dictionary(feature_activations)
        centred = x - self.bias
        norms = centred.norm(dim=-1, keepdim=True)
        draws = torch.rand(2, len(x), 1, device=x.device, dtype=x.dtype)
        sinks = _sinks(self.direction, centred, draws[1], norms.median())
        return torch.where(draws[0] < self.share, self.bias + sinks, x)


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
        planted[:, self.position] = _sinks(self.direction.to(context.device), context, draw, median)
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
    if not found or not isinstance(model, HookedTransformer):
        return hook_name
    layer = int(found[1])
    if layer == 0:
        raise ValueError(
            f"A HookedTransformer can be started with other activations at {hook_name}, which a sink planted there would "
            "change. Plant at blocks.0.hook_resid_post or later."
        )
    return f"blocks.{layer - 1}.hook_resid_post"

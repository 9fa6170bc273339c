"""Hook points: what the activations between two parts of a model are called, and what size they have."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from sae_lens.util import extract_stop_at_layer_from_tlens_hook_name

from saelens_cosine.activations.bridges import name_in_bridge

PROCESSING = frozenset(
    ("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases", "refactor_factored_attn_matrices")
)
"""What TransformerLens does to weights when it is asked to. SAELens asks for none of it."""

LENS_HOOK = re.compile(r"(blocks\.\d+\.|hook_|ln_final\.|embed\.|pos_embed\.|unembed\.)")
"""How hook points are called in TransformerLens; modules of a Hugging Face model are `model.layers.3`, `transformer.h.3.mlp`."""

BLOCK_OUTPUT = re.compile(r"(?:(?:model|transformer|gpt_neox|language_model|decoder|layers|h)\.)+(\d+)")
"""Paths of a Hugging Face model's decoder blocks: `model.layers.18`, `transformer.h.5`, `gpt_neox.layers.3`."""


def find_hook(
    model: Any, name: str, class_name: str, kwargs: Collection[str], layer: int | None = None, hook: str | None = None
) -> str:
    """What a loaded model calls the residual output of a block, or a hook point that goes by another name elsewhere.

    Args:
        model: hooked model.
        name: what messages call it.
        class_name: of how it was loaded, likewise.
        kwargs: names of what its loader was told.
        layer: block whose residual output is hooked; the middle one if None.
        hook: a hook point by name instead of `layer`.

    Raises:
        ValueError: there is no such layer or hook point; names those that there are.
    """
    if hasattr(model, "cfg"):
        n_layers: int = model.cfg.n_layers
        layer_hook = "blocks.{}.hook_resid_post"
    else:
        n_layers = model.model.config.get_text_config().num_hidden_layers
        layer_hook = _layer_path(model.model, n_layers) + ".{}"
    block = n_layers // 2 if layer is None else layer
    if not 0 <= block < n_layers:
        raise ValueError(f"layer={layer} is not a layer of {name}: it has {n_layers}, numbered from 0.")
    hook_name = hook or layer_hook.format(block)
    hook_name = name_in_bridge(hook_name, model) or hook_name
    found = hook_name if hook_name in model.hook_dict else _translated(hook_name, layer_hook, model, kwargs)
    if found is None:
        of = re.search(r"\.(\d+)(\.|$)", hook or "")
        block = block if of is None or int(of[1]) >= n_layers else int(of[1])
        there = ", ".join(name for name in model.hook_dict if f".{block}." in f"{name}.")
        raise ValueError(
            f"{name}, loaded as {class_name}, has no hook point {hook!r} under this or another name. "
            f"It has {n_layers} blocks, numbered from 0. In block {block} there are: {there}."
        )
    return found


def block_of(hook_name: str) -> int | None:
    """The block whose output a hook point is, whatever calls it so: `blocks.3.hook_resid_post`, `blocks.4.hook_resid_pre`,
    `model.layers.3`. None for all others, among them the input of block 0, which is no block's output."""
    if lens := re.fullmatch(r"blocks\.(\d+)\.hook_(resid_pre|resid_post|in|out)", hook_name):
        block = int(lens[1]) - (lens[2] in ("resid_pre", "in"))
        return None if block < 0 else block
    path = BLOCK_OUTPUT.fullmatch(hook_name)
    return None if path is None else int(path[1])


def _translated(hook_name: str, layer_hook: str, model: Any, kwargs: Collection[str]) -> str | None:
    """What a model that has another name for a block's output calls it; None if it has none."""
    block = block_of(hook_name)
    if block is None:
        return None
    for name in (layer_hook.format(block), f"blocks.{block}.hook_out"):
        if name in model.hook_dict:
            if processed := sorted(PROCESSING & set(kwargs)):
                raise ValueError(
                    f"{hook_name} and {name} are not the same activations where TransformerLens has processed the weights: "
                    f"model_from_pretrained_kwargs ask for {', '.join(processed)}. Name the hook point that is meant."
                )
            return name
    return None


def _layer_path(model: Any, n_layers: int) -> str:
    """Path of the module list that holds the decoder blocks, `model.layers` in most models."""
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == n_layers:
            return path
    raise ValueError(f"No list of {n_layers} blocks in {type(model).__name__}; name the hook point with hook=.")


def device_of(model: Any) -> torch.device:
    """Where a hooked model's inputs go; the wrapper of a Hugging Face model does not move them."""
    return next(model.parameters()).device


def of_head(activations: torch.Tensor, head: int | None) -> torch.Tensor:
    """`[contexts, length, d_in]` activations of one attention head, or of all of them flattened (or of a hook without heads)."""
    return (activations if head is None else activations[:, :, head]).flatten(2)


def activations_at(
    run_with_cache: Callable[..., Any], hooks: list[str], tokens: torch.Tensor
) -> Mapping[str, torch.Tensor]:
    """Activations of `tokens [contexts, length]` at hooks, by hook, from one pass that goes as far as the last of them.

    Args:
        run_with_cache: a hooked model's, or what stands in for it.
        hooks: hook points of the model.
        tokens: on its device.
    """
    stops = [extract_stop_at_layer_from_tlens_hook_name(hook) for hook in hooks]
    known = [stop for stop in stops if stop is not None]  # the others cannot be told
    stop = max(known) if len(known) == len(stops) else None
    return run_with_cache(tokens, names_filter=hooks, stop_at_layer=stop, prepend_bos=False)[1]


@torch.no_grad()
def size_at_hook(model: Any, hook_name: str, head: int | None = None) -> int:
    """Size of one token's activations at a hook point of a hooked model, of one head or with heads flattened.

    Raises:
        ValueError: no such hook point or head.
    """
    if hook_name not in model.hook_dict:
        raise ValueError(f"{type(model).__name__} has no hook point {hook_name!r}.")
    tokens = torch.zeros((1, 2), dtype=torch.long, device=device_of(model))
    _, cache = model.run_with_cache(tokens, names_filter=[hook_name], prepend_bos=False)
    if hook_name not in cache.keys():  # noqa: SIM118  (TransformerLens' cache is no mapping)
        raise ValueError(
            f"Nothing passes the hook point {hook_name!r} of this model as it is configured; name another."
        )
    activations = cache[hook_name]
    if head is not None:
        if activations.ndim != 4:
            raise ValueError(
                f"hook_head_index={head}, but activations at {hook_name} are not split by head; hook_q, hook_k, hook_v and hook_z are."
            )
        if not 0 <= head < activations.shape[2]:
            raise ValueError(
                f"hook_head_index={head}, but {hook_name} has {activations.shape[2]} heads, numbered from 0."
            )
    return of_head(activations, head).shape[-1]

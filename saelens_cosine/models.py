"""Load a language model for SAELens by any of the names that users have for one."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from sae_lens.load_model import load_model
from transformer_lens.loading_from_pretrained import get_official_model_name

from saelens_cosine.bundled import BUNDLED, load_bundled_model


class HookedModel(NamedTuple):
    """A model as SAELens' runners take it.

    Args:
        model (Any): The hooked model, to pass as `override_model`.
        name (str): `model_name` for SAELens' configs and metadata.
        class_name (str): `model_class_name` likewise: `HookedTransformer` or `AutoModelForCausalLM`.
        hook_name (str): The hook point asked for.
        d_in (int): Size of the activations there.
        context_size (int | None): Longest context that the model takes; None if it does not say.
    """

    model: Any
    name: str
    class_name: str
    hook_name: str
    d_in: int
    context_size: int | None


def load_hooked_model(name: str, device: str = "cpu", layer: int | None = None, hook: str | None = None) -> HookedModel:
    """Load the bundled model, a TransformerLens name, or any Hugging Face name or local folder.

    A name that TransformerLens knows is loaded as a HookedTransformer; anything else as AutoModelForCausalLM, whose hook
    points are module paths such as `model.layers.3`.

    Args:
        name: `"bundled"`, a TransformerLens or Hugging Face name, or a folder.
        device: where the model goes.
        layer: block whose residual output is hooked; the middle one if None.
        hook: a hook point by name instead of `layer`.

    Raises:
        ValueError: both `layer` and `hook` given, no such layer, or no such hook point.
        OSError: nothing can be loaded under that name (from Hugging Face, with what was tried).
    """
    if layer is not None and hook is not None:
        raise ValueError(f"layer={layer} and hook={hook!r} both say where to hook; give one.")
    if name == BUNDLED:
        model: Any = load_bundled_model(device)
        class_name = "HookedTransformer"
    else:
        class_name = "HookedTransformer" if _known_to_transformer_lens(name) else "AutoModelForCausalLM"
        model = load_model(class_name, name, device=device)
    if class_name == "HookedTransformer":
        sizes: tuple[int, int | None] = model.cfg.n_layers, model.cfg.n_ctx
        layer_hook = "blocks.{}.hook_resid_post"
    else:
        config = model.model.config.get_text_config()
        sizes = config.num_hidden_layers, getattr(config, "max_position_embeddings", None)
        layer_hook = _layer_path(model.model, sizes[0]) + ".{}"
    n_layers, context = sizes
    block = n_layers // 2 if layer is None else layer
    if not 0 <= block < n_layers:
        raise ValueError(f"layer={layer} is not a layer of {name}: it has {n_layers}, numbered from 0.")
    hook_name = hook or layer_hook.format(block)
    if hook_name not in model.hook_dict:
        raise ValueError(
            f"{name} has no hook point {hook_name!r}. In block {block} there are: {_hooks_of(model, block)}."
        )
    return HookedModel(model, name, class_name, hook_name, size_at_hook(model, hook_name), context)


def _known_to_transformer_lens(name: str) -> bool:
    try:
        get_official_model_name(name)
    except ValueError:
        return False
    return True


def _layer_path(model: Any, n_layers: int) -> str:
    """Path of the module list that holds the decoder blocks, `model.layers` in most models."""
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == n_layers:
            return path
    raise ValueError(f"No list of {n_layers} blocks in {type(model).__name__}; name the hook point with hook=.")


def _hooks_of(model: Any, layer: int) -> str:
    names = [name for name in model.hook_dict if f".{layer}." in name or name.endswith(f".{layer}")]
    return ", ".join(names)


@torch.no_grad()
def size_at_hook(model: Any, hook_name: str) -> int:
    """Size of one token's activations at a hook point of a hooked model, heads flattened."""
    tokens = torch.zeros((1, 2), dtype=torch.long, device=next(model.parameters()).device)
    _, cache = model.run_with_cache(tokens, names_filter=[hook_name], prepend_bos=False)
    return cache[hook_name].flatten(2).shape[-1]

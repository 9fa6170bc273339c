"""Hook points of a TransformerBridge, which have names of their own."""

from __future__ import annotations

from typing import Any


def name_in_bridge(hook_name: str, model: Any) -> str | None:
    """What a bridge calls a hook point of a HookedTransformer: `blocks.3.mlp.hook_out` for `blocks.3.hook_mlp_out`.

    SAELens' store and its bridge know no other. None if the bridge has no such hook point, or the model is none.
    """
    from transformer_lens.model_bridge import TransformerBridge

    if not isinstance(model, TransformerBridge):
        return None
    restore_hook_names(model)
    points = TransformerBridge.hook_dict.__get__(model)  # SAELens' subclass leaves second names out
    return points[hook_name].name if hook_name in points else None


def restore_hook_names(model: Any) -> None:
    """Have hooks by name reach a hook point of a bridge that has had an SAE.

    SAELens 6.54 puts it back under the last part of its name, and from then on the bridge passes over, without a word, what is
    to be hooked there by the whole of it.
    """
    from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge

    if isinstance(model, SAETransformerBridge):
        points = model.hook_dict
        for name, point in points.items():
            if point.name not in points:
                point.name = name

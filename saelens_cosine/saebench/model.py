"""The language model of a run of SAEBench."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from saelens_cosine.activations.models import (
    HUGGING_FACE,
    TRANSFORMER_LENS,
    ModelChoice,
    choose_model,
    load_hooked_model,
)
from saelens_cosine.activations.planted_sinks import plant_sinks
from saelens_cosine.hooked_transformer import hooked_llama, is_hooked_transformer
from saelens_cosine.saebench.prepare import PreparedSAE, lens_hook


def how_loaded(sae: PreparedSAE) -> ModelChoice:
    """As its metadata say, but for the dtype, which is the run's."""
    metadata = sae.cfg.metadata
    given = metadata.model_from_pretrained_kwargs or {}
    kwargs = {key: value for key, value in given.items() if key not in ("dtype", "torch_dtype")}
    return choose_model(metadata.model_name, metadata.hook_name, TRANSFORMER_LENS, kwargs)


def load_for_saebench(name: str, how: ModelChoice, device: str, dtype: str) -> Any:
    """The HookedTransformer that SAEs name; of a model that TransformerLens does not know, a Llama, one that is made here.

    Raises:
        ValueError: TransformerLens has no model of this name, and it is no Llama.
        OSError: nothing can be loaded under that name.
    """
    lens = how.class_name == TRANSFORMER_LENS
    kwargs = {**how.kwargs, "dtype": dtype}
    hooked = load_hooked_model(name, device, class_name=TRANSFORMER_LENS if lens else HUGGING_FACE, kwargs=kwargs)
    if lens:
        return hooked.model
    return hooked_llama(hooked.model.model, hooked.model.tokenizer, hooked.name, device)


def again_for_saebench(model: Any, name: str, hook: str, kwargs: Mapping[str, Any], planted: bool, device: str) -> Any:
    """A loaded model as a HookedTransformer: itself if it is one, else loaded again, in its dtype.

    Args:
        model: hooked model.
        name: what it was loaded by.
        hook: a hook point of it.
        kwargs: what its loader was told.
        planted: whether sinks are planted at the hook, and so are to be here.
        device: where it goes.

    Raises:
        ValueError: it cannot be made a HookedTransformer, or the hook has no name there.
        OSError: it is not to be had any more.
    """
    if is_hooked_transformer(model):
        return model
    there = lens_hook(hook)
    again = load_for_saebench(
        name, choose_model(name, there, TRANSFORMER_LENS, kwargs), device, dtype_of(model, device)
    )
    if planted:
        plant_sinks(again, there)
    return again


def dtype_of(model: Any, device: str) -> str:
    """Of a model that is given; else bfloat16 on CUDA, float32 elsewhere."""
    if model is not None:
        return str(next(model.parameters()).dtype).removeprefix("torch.")
    return "bfloat16" if device.startswith("cuda") else "float32"

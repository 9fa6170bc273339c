"""What a `cfg.json` of SAELens may hold. SAELens takes any value for any field, and fails with it later or not at all."""

from __future__ import annotations

import math
from dataclasses import fields
from pathlib import Path
from reprlib import repr as short
from types import NoneType, UnionType
from typing import Any, Literal, Union, cast, get_args, get_origin, get_type_hints

import torch
from sae_lens.loading.pretrained_sae_loaders import handle_config_defaulting
from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY
from sae_lens.util import str_to_dtype

from saelens_cosine.loading.errors import CheckpointError, listed
from saelens_cosine.loading.tensor_file import positive_integer, read_config, refusing

_SIZES = ("d_in", "d_sae", "d_out", "k")

_METADATA: dict[str, Any] = {
    "context_size": int | None,
    "dataset_path": str | None,
    "disable_concat_sequences": bool | None,
    "exclude_special_tokens": bool | list[int] | None,
    "heldout_rule": str | None,
    "high_norm_share_dropped": float | None,
    "hook_head_index": int | None,
    "hook_name": str | None,
    "max_norm_multiple": float | None,
    "model_class_name": str | None,
    "model_from_pretrained_kwargs": dict[str, Any] | None,
    "model_name": str | None,
    "planted_sinks": bool | None,
    "prepend_bos": bool | None,
    "seqpos_slice": list[int | None] | None,
    "sequence_separator_token": int | str | None,
    "training_architecture": str | None,
    "training_architecture_details": dict[str, Any] | None,
    "use_chat_formatting": bool | None,
}
"""Types of the metadata that decide something here; others are passed on as they are."""


def check_config(path: Path, training: bool = False) -> dict[str, torch.Tensor]:
    """Compare a config with the fields of its architecture.

    Args:
        path: the file.
        training: whether it is that of a training checkpoint.

    Returns:
        The state dict of such an SAE, without data.

    Raises:
        CheckpointError: it is no JSON object, its architecture is not known, or a field is missing or of another type.
    """
    config = read_config(path)
    registry: Any = SAE_TRAINING_CLASS_REGISTRY if training else SAE_CLASS_REGISTRY
    with refusing(path):
        config = handle_config_defaulting(config)
    name = config.get("architecture")
    if type(name) is not str or name not in registry:
        raise CheckpointError(f"{path} has architecture {short(name)}; known are {listed(registry)}.")
    kind = registry[name][1]
    hints = get_type_hints(kind)
    metadata = config.get("metadata", {})
    if not isinstance(metadata, dict):
        raise CheckpointError(f"'metadata' in {path} is {short(metadata)}; expected an object.")
    for field in fields(kind):
        if field.name in config and field.name not in ("metadata", "device"):
            _check(config[field.name], field.name, hints[field.name], path)
    for key, value in cast("dict[str, Any]", metadata).items():
        _check(value, key, _METADATA.get(key, Any), path)
    for size in ("d_in", "d_sae", *(size for size in _SIZES if size in hints and type(config.get(size)) is int)):
        positive_integer(config, size, path)
    if "k" in hints and not 0 < config.get("k", 0) <= config["d_sae"]:
        raise CheckpointError(f"{path} has k={config.get('k')} for {config['d_sae']} features.")
    with refusing(path):
        if not str_to_dtype(config.get("dtype", "float32")).is_floating_point:
            raise CheckpointError(f"'dtype' in {path} is {config['dtype']!r}; expected a floating dtype.")
        return registry[name][0](kind.from_dict({**config, "device": "meta"})).state_dict()


def _check(value: Any, name: str, hint: Any, path: Path) -> None:
    if not _fits(value, hint):
        expected = hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
        raise CheckpointError(f"{name!r} in {path} is {short(value)}; expected {expected}.")


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value of JSON is what a field's type says. A literal counts as its type: the classes know more of them."""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin in (Union, UnionType):
        return any(_fits(value, choice) for choice in arguments)
    if origin is Literal:
        return any(type(value) is type(choice) for choice in arguments)
    if origin in (list, tuple):
        return isinstance(value, list) and all(_fits(item, arguments[0]) for item in cast("list[Any]", value))
    if origin is dict or hint is dict:
        return isinstance(value, dict)
    if hint is float:
        return type(value) in (int, float) and math.isfinite(value)
    return value is None if hint is NoneType else type(value) is hint

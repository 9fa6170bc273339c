"""Results as JSON holds them and back, and hashes that say what they are results of."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

import numpy as np
import torch
from sae_lens.saes.sae import SAE

OMITTED = {"omitted": True}
"""Metadata of a dataclass field that JSON leaves out where it is None."""


def named(name: str) -> dict[str, str]:
    """Metadata of a dataclass field that JSON calls by another name."""
    return {"name": name}


def _name(part: Field[Any]) -> str:
    return part.metadata.get("name") or part.name


def plain(value: Any) -> Any:
    """Dataclasses, tuples, mappings and NumPy's numbers as what JSON holds; numbers that are not finite become None."""
    if is_dataclass(value) and not isinstance(value, type):
        parts = [(part, getattr(value, part.name)) for part in fields(value)]
        return {
            _name(part): plain(item) for part, item in parts if item is not None or not part.metadata.get("omitted")
        }
    if isinstance(value, Mapping):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        if value and all(type(item) is str for item in value):  # tokens, of which there are many
            return list(value)
        return [plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def from_plain(kind: Any, value: Any, where: str) -> Any:
    """What `plain` was given, from what it made of it. Null is NaN where a float belongs.

    Args:
        kind: a dataclass, a named tuple, a plain type, or a tuple, dictionary, union or literal of them.
        value: what JSON holds.
        where: what errors call it.

    Raises:
        ValueError: a field that is missing or unknown, or a value of another kind; it says where.
    """
    origin, inner = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin in (Union, UnionType):
        return _member_from_plain(inner, value, where)
    if kind is float and value is None:
        return math.nan
    if origin is Literal:
        if not any(value == one and type(value) is type(one) for one in inner):
            raise ValueError(f"{where} is {value!r:.80}, which is none of {list(inner)}.")
        return value
    if is_dataclass(origin or kind) and isinstance(value, Mapping):
        return _dataclass_from_plain(kind, cast("Mapping[str, Any]", value), where)
    if origin in (dict, Mapping) and isinstance(value, Mapping):
        items, number = cast("Mapping[str, Any]", value).items(), inner[0] if inner[0] in (int, float) else None
        named = ((name if number is None else number(name), name, item) for name, item in items)
        return {key: from_plain(inner[1], item, f"{where}[{name!r}]") for key, name, item in named}
    if isinstance(value, list | tuple):
        items = cast("Sequence[Any]", value)
        if origin in (list, Sequence) or (origin is tuple and inner[-1:] == (Ellipsis,)):
            known = all(type(item) is inner[0] for item in items)  # tokens and codes, of which there are many
            made = items if known else (from_plain(inner[0], item, f"{where}[{i}]") for i, item in enumerate(items))
            return list(made) if origin is list else tuple(made)
        is_named = isinstance(kind, type) and issubclass(kind, tuple) and hasattr(kind, "_fields")
        kinds = tuple(get_type_hints(kind).values()) if is_named else inner if origin is tuple else None
        if kinds is not None and len(kinds) == len(items):
            parts = (
                from_plain(part, item, f"{where}[{i}]") for i, (part, item) in enumerate(zip(kinds, items, strict=True))
            )
            return kind(*parts) if is_named else tuple(parts)
    if isinstance(kind, type) and isinstance(value, int | float if kind is float else kind):
        return value
    raise ValueError(f"{where} is {value!r:.80}, where {kind} belongs.")


def _member_from_plain(kinds: Sequence[Any], value: Any, where: str) -> Any:
    """As the first of a union's types that it is of."""
    if value is None and NoneType in kinds:
        return None
    first, *others = [kind for kind in kinds if kind is not NoneType]
    try:
        return from_plain(first, value, where)
    except ValueError:
        if not others:
            raise
    return _member_from_plain(others, value, where)


def _dataclass_from_plain(kind: Any, value: Mapping[str, Any], where: str) -> Any:
    parts, hints = {_name(part): part for part in fields(get_origin(kind) or kind)}, _hints(kind)
    missing = [name for name, part in parts.items() if part.default is MISSING and name not in value]
    if missing or not value.keys() <= parts.keys():
        raise ValueError(f"{where} has {sorted(value)}; {kind} has {sorted(parts)}.")
    found = {
        parts[name].name: from_plain(hints[parts[name].name], item, f"{where}.{name}") for name, item in value.items()
    }
    return kind(**found)


@cache
def _hints(kind: Any) -> dict[str, Any]:
    """Types of a dataclass' fields, type variables replaced by what stands in brackets: `ByNorm[Fit]`."""
    origin = get_origin(kind) or kind
    known = dict(zip(getattr(origin, "__parameters__", ()), get_args(kind), strict=False))
    for base in getattr(origin, "__orig_bases__", ()):
        known |= zip(getattr(get_origin(base), "__parameters__", ()), get_args(base), strict=False)
    return {name: _filled(hint, known) for name, hint in get_type_hints(origin).items()}


def _filled(hint: Any, known: Mapping[Any, Any]) -> Any:
    if isinstance(hint, TypeVar):
        return known[hint]
    parameters = getattr(hint, "__parameters__", ())
    return hint[tuple(known[part] for part in parameters)] if parameters else hint


def versions() -> dict[str, str]:
    """Versions of what computed the figures."""
    packages = ("saelens-cosine", "sae-lens", "transformer-lens", "transformers", "torch")
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in packages}}


def fingerprint(sae: SAE[Any], metadata: Sequence[str] | None = None) -> str:
    """A hash of what decides an SAE's figures: tensors, and the config, of which all but the device may change the function.

    Args:
        sae: any SAELens SAE.
        metadata: fields of its metadata that count. None: all, for some say which text is read and how, and others are reported
            beside the figures. One that changes nothing costs a measurement, one overlooked would give another SAE's figures.
    """
    config = {name: value for name, value in sae.cfg.to_dict().items() if name != "device"}
    if metadata is not None:
        config["metadata"] = {name: sae.cfg.metadata.get(name) for name in metadata}
    return digest(config, sae.state_dict())


def weights_sha256(sae: SAE[Any]) -> str:
    """A hash of an SAE's tensors alone: whether an SAE is the one that a `comparison.json` beside it is about."""
    return digest(None, sae.state_dict())


_NAMES = {
    "device",
    "n_devices",
    "model_name",
    "tokenizer_name",
    "name_or_path",
    "_name_or_path",
    "transformers_version",
}
"""Settings of language models that change no activation: what they are called and where they are."""


def model_fingerprint(model: Any) -> str:
    """A hash of a hooked language model: all weights and buffers in full, and its config. Seconds for each GB.

    Hooks are not seen: sinks that are planted in it are the caller's to tell.
    """
    cfg = getattr(model, "cfg", None)
    config = model.model.config.to_dict() if cfg is None else vars(cfg)
    return digest({name: value for name, value in config.items() if name not in _NAMES}, model.state_dict())


def files_fingerprint(path: Path) -> str:
    """A hash of a file's content, or of all files in a folder with their relative paths."""
    found = hashlib.sha256()
    for file in [path] if path.is_file() else sorted(part for part in path.rglob("*") if part.is_file()):
        name = "" if file == path else file.relative_to(path).as_posix()
        found.update(f"{name}\0{file.stat().st_size}\0".encode())
        with file.open("rb") as content:
            while part := content.read(1 << 24):
                found.update(part)
    return found.hexdigest()


def digest(value: Any, tensors: Mapping[str, torch.Tensor] | None = None) -> str:
    """A hash of plain values and of tensors by name, shape, dtype and content. Other objects count by their class."""
    found = hashlib.sha256(json.dumps(plain(value), sort_keys=True, default=_named).encode())
    for name, tensor in sorted((tensors or {}).items()):
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        found.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())  # pyright: ignore[reportArgumentType]
    return found.hexdigest()


def _named(value: Any) -> str:
    """Stands for what JSON cannot hold: an address in memory would make every run another one."""
    return str(value) if isinstance(value, torch.dtype | Path) else type(value).__qualname__

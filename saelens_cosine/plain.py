"""Results as JSON holds them, and hashes that say what they are results of."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import torch
from sae_lens.saes.sae import SAE


def plain(value: Any) -> Any:
    """Dataclasses, tuples and mappings as what JSON holds; numbers that are not finite become None."""
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if isinstance(value, Mapping):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


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

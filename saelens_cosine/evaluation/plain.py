"""Results as JSON holds them, and hashes that say what they are results of."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
import platform
from collections.abc import Mapping
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


def write_json(value: Any, path: Path) -> None:
    """Write whole or not at all."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    unfinished.write_text(json.dumps(value, indent=1, allow_nan=False))
    unfinished.replace(path)


def versions() -> dict[str, str]:
    """Versions of what computed the figures."""
    packages = ("saelens-cosine", "sae-lens", "transformer-lens", "torch")
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in packages}}


def fingerprint(sae: SAE[Any]) -> str:
    """A hash of an SAE's architecture and tensors, so that results are never taken for those of another."""
    digest = hashlib.sha256(sae.cfg.architecture().encode())
    for name, tensor in sorted(sae.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def digest(value: Any) -> str:
    """A short hash of plain values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]

"""Registration in SAELens, safe to repeat.

SAELens refuses a name that is already taken, which would make a notebook's reload or a second import path crash. Here a
class may replace an earlier definition of itself; a different class under a taken name is still refused.
"""

from __future__ import annotations

from typing import Any

from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY
from sae_lens.saes.sae import SAE, SAEConfig, TrainingSAE, TrainingSAEConfig

TRAINING_ARCHITECTURES: list[str] = []
"""Names that were registered for training through this module, in order."""

INFERENCE_ARCHITECTURES: list[str] = []
"""Names that were registered for inference through this module, in order."""


def register_training(sae_class: type[TrainingSAE[Any]], config_class: type[TrainingSAEConfig]) -> None:
    """Make a training architecture known to SAELens under `config_class.architecture()`.

    Raises:
        ValueError: the name is taken by another class.
    """
    name = config_class.architecture()
    _register(name, (sae_class, config_class), SAE_TRAINING_CLASS_REGISTRY, TRAINING_ARCHITECTURES)


def register_inference(sae_class: type[SAE[Any]], config_class: type[SAEConfig]) -> None:
    """Make an inference architecture known to SAELens under `config_class.architecture()`.

    Raises:
        ValueError: the name is taken by another class.
    """
    name = config_class.architecture()
    _register(name, (sae_class, config_class), SAE_CLASS_REGISTRY, INFERENCE_ARCHITECTURES)


def check_training_architecture(name: str) -> str:
    """The name itself if SAELens can train it.

    Raises:
        ValueError: it can't; the message lists what this package adds and what SAELens brings.
    """
    if name not in SAE_TRAINING_CLASS_REGISTRY:
        others = sorted(set(SAE_TRAINING_CLASS_REGISTRY) - set(TRAINING_ARCHITECTURES))
        raise ValueError(
            f"Unknown architecture {name!r}. From saelens_cosine: {', '.join(TRAINING_ARCHITECTURES)}. "
            f"From SAELens: {', '.join(others)}."
        )
    return name


def _register(
    name: str,
    classes: tuple[type[Any], type[Any]],
    registry: dict[str, tuple[type[Any], type[Any]]],
    ours: list[str],
) -> None:
    taken = registry.get(name)
    if taken is not None and [_identity(c) for c in taken] != [_identity(c) for c in classes]:
        raise ValueError(
            f"Architecture {name!r} is already registered for {_identity(taken[0])}; "
            f"{_identity(classes[0])} needs another name."
        )
    registry[name] = classes
    if name not in ours:
        ours.append(name)


def _identity(cls: type[Any]) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"

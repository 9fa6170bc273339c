"""What a saved SAE says of its training: recorded in its metadata by `compare` and `train`, read for cards and pages."""

from __future__ import annotations

from typing import Any

from sae_lens.saes.sae import SAE

SELECTOR_SETTINGS = ("k", "target_l0", "l0_coefficient", "l1_coefficient", "afa_coefficient")
"""Settings that say how many features are active, of the architectures that there are; an SAE has one or two of them."""


def record_training(sae: SAE[Any], runner: Any, recipe: str | None = None) -> None:
    """Note in an SAE's metadata how it is about to be trained.

    Args:
        sae: that is trained.
        runner: config of a SAELens runner, single or multi-SAE.
        recipe: name of the recipe that the config was made from.
    """
    metadata = sae.cfg.metadata
    metadata.training_tokens = runner.training_tokens
    metadata.lr = runner.lr
    metadata.train_batch_size_tokens = runner.train_batch_size_tokens
    metadata.seed = runner.seed
    if runner.use_chat_formatting:  # of the settings of its text the one that SAELens does not note
        metadata.use_chat_formatting = True
    if recipe is not None:
        metadata.recipe = recipe


def trained(sae: SAE[Any]) -> dict[str, Any]:
    """What an SAE is and how it was trained; None for what neither its config nor its metadata say in a form that can be shown.

    Returns:
        `d_sae`; `selector`, its setting as in `{"k": 32}`; `training_architecture`; `tokens`; `lr`; `recipe`; `filtered`,
        whether a norm filter is known to have been used, with its `max_norm_multiple` and the `high_norm_share_dropped`.
    """
    config, metadata = sae.cfg.to_dict(), sae.cfg.metadata
    details: dict[str, Any] = {**(metadata.training_architecture_details or {}), **config}
    return {
        "d_sae": sae.cfg.d_sae,
        "selector": {name: details[name] for name in SELECTOR_SETTINGS if _number(details.get(name)) is not None},
        "training_architecture": _text(metadata.training_architecture),
        "tokens": _number(metadata.training_tokens),
        "lr": _number(metadata.lr),
        "recipe": _text(metadata.recipe),
        "filtered": "max_norm_multiple" in metadata,
        "max_norm_multiple": _number(metadata.max_norm_multiple),
        "high_norm_share_dropped": _number(metadata.high_norm_share_dropped),
    }


def _number(value: Any) -> float | None:
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None

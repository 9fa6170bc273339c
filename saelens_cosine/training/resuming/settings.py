"""What decides the weights of a run, and in what two runs differ."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

MAY_DIFFER = frozenset(
    {
        "output_path",
        "checkpoint_path",
        "n_checkpoints",
        "save_final_checkpoint",
        "resume_from_checkpoint",
        "logger",
        "verbose",
        "n_eval_batches",
        "eval_batch_size_prompts",
        "sae_lens_version",
        "sae_lens_training_version",
        "tokens_per_buffer",
        "device",
        "llm_device",
        "act_store_device",
        "training_tokens",
    }
)
"""Fields of SAELens' runner configs that change no weight, or of which the run says what they change."""


def check_same(then: Mapping[str, Any], now: Mapping[str, Any], path: Path) -> None:
    """Compare the settings of a run with those of one that is to go on.

    Raises:
        ValueError: they differ in what decides the weights; names each setting with both values.
    """
    found = [
        f"{name} is {before} there and {here} here"
        for name, before, here in differing(then, now)
        if not _may_differ(name)
    ]
    if found:
        raise ValueError(
            f"Cannot go on from {path}: {'; '.join(found)}. Resume with the settings of that run, or start another one in "
            "another folder."
        )


def differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Names of settings that differ, with both values as they are shown."""
    before, here = dict(_flat(one)), dict(_flat(other))
    names = sorted(before.keys() | here.keys())
    return [(n, _shown(before.get(n)), _shown(here.get(n))) for n in names if before.get(n) != here.get(n)]


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, list(value) if isinstance(value, tuple) else value


def _may_differ(name: str) -> bool:
    parts = name.split(".")
    return parts[0] in MAY_DIFFER or "metadata" in parts or parts[-1] == "device"


def _shown(value: Any) -> str:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return repr(value) if isinstance(value, str) else str(value)

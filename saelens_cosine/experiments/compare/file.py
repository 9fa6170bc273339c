"""A `comparison.json` beside SAEs, whoever has had it in hands since `saelens-cosine compare` wrote it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, cast

from saelens_cosine.files.whole import read_json

SCHEMAS = ("saelens-cosine/comparison/1", "saelens-cosine/comparison/2")
"""Layouts that are read. The number grows when a field changes its meaning or goes."""


class ComparisonFileError(ValueError):
    """A `comparison.json` that is not what `compare` writes; names the file, the fault and the way out."""

    def __init__(self, file: Path, fault: str):
        self.fault = f"{file} is damaged ({fault})"
        super().__init__(f"{self.fault}. Move it away to go on without what it tells, or run the comparison again.")


def read_comparison(file: Path) -> dict[str, Any]:
    """A JSON object with `arms`, each of which has a `path`; the rest may be anything.

    Raises:
        ComparisonFileError: it is something else.
        OSError: it cannot be read.
    """
    try:
        content: Any = read_json(file)
    except ValueError as error:
        raise ComparisonFileError(file, f"no JSON: {error}") from error
    arms: Any = cast("dict[str, Any]", content).get("arms") if isinstance(content, dict) else None
    if not isinstance(arms, list):
        raise ComparisonFileError(file, "no list 'arms'")
    for arm in cast("list[Any]", arms):
        if not (isinstance(arm, dict) and isinstance(cast("dict[str, Any]", arm).get("path"), str)):
            raise ComparisonFileError(file, "an arm without 'path'")
    return cast("dict[str, Any]", content)


def as_now(comparison: dict[str, Any]) -> dict[str, Any]:
    """A comparison that `compare` wrote, in the layout of this version: the first one had a single hook and k, and no list of hooks."""
    if comparison.get("schema") != SCHEMAS[0]:
        return comparison
    settings, high = comparison["settings"], comparison["high_norm_tokens"]
    hook = {
        "hook_name": settings["hook_name"],
        "d_in": settings["d_in"],
        "high_norm_share_dropped": high["share_dropped_in_training"],
        "high_norm_share_dropped_heldout": high["share_dropped_in_evaluation"],
    }
    arms = [{"hook_name": settings["hook_name"], "lr": None, **arm} for arm in comparison["arms"]]
    return {**comparison, "schema": SCHEMAS[1], "hooks": [hook], "learning_rates": [], "arms": arms}


def comparison_beside(file: Path) -> dict[str, Any] | None:
    """The same where it is only an extra: None if there is none, or, with a warning, if it is damaged."""
    try:
        return read_comparison(file) if file.is_file() else None
    except (ComparisonFileError, OSError) as error:
        fault = error.fault if isinstance(error, ComparisonFileError) else str(error)
        warnings.warn(
            f"{fault}; going on without the order of arms and the courses of training that it tells.", stacklevel=2
        )
        return None

"""A `comparison.json` beside SAEs, whoever has had it in hands since `saelens-cosine compare` wrote it."""

from __future__ import annotations

import warnings
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, cast

from saelens_cosine.files.names import check_name
from saelens_cosine.files.whole import read_json

NAME = "comparison.json"

_FAMILY = "saelens-cosine/comparison/"
SCHEMAS = ("saelens-cosine/comparison/1", "saelens-cosine/comparison/2")
"""Layouts that are read. The first has one hook and one k."""


class ComparisonFileError(ValueError):
    """A `comparison.json` that is not what `compare` writes; names the file, the fault and the way out."""

    def __init__(self, file: Path, fault: str):
        self.fault = f"{file} is damaged ({fault})"
        super().__init__(f"{self.fault}. Move it away to go on without what it tells, or run the comparison again.")


class OtherSchemaError(ComparisonFileError):
    """One that another version of this package has written."""

    def __init__(self, file: Path, schema: str):
        read = " and ".join(SCHEMAS)
        ValueError.__init__(
            self,
            f"{file} has schema {schema!r}, this version reads {read}. Update saelens-cosine, or move the file away to go on "
            "without what it tells.",
        )
        self.fault = f"{file} has schema {schema!r}"


class Listed(NamedTuple):
    """
    An SAE of a comparison.

    Args:
        path (str): Its folder, below that of the comparison.
        arm (str): The part of the path that its other seeds, ks and hooks share.
        hook (str | None): Hook point; None where the file lacks it.
        k (int | None): Active features that it was trained with; likewise.
    """

    path: str
    arm: str
    hook: str | None
    k: int | None


def read_comparison(file: Path) -> dict[str, Any]:
    """A JSON object with `arms`, each of which has a `path`; the rest may be anything.

    Raises:
        ComparisonFileError: it is something else, or of another version's schema.
        OSError: it cannot be read.
    """
    try:
        content: Any = read_json(file)
    except ValueError as error:
        raise ComparisonFileError(file, f"no JSON: {error}") from error
    schema: Any = cast("dict[str, Any]", content).get("schema") if isinstance(content, dict) else None
    if isinstance(schema, str) and schema.startswith(_FAMILY) and schema not in SCHEMAS:
        raise OtherSchemaError(file, schema)
    arms: Any = cast("dict[str, Any]", content).get("arms") if isinstance(content, dict) else None
    if not isinstance(arms, list):
        raise ComparisonFileError(file, "no list 'arms'")
    for arm in cast("list[Any]", arms):
        path: Any = cast("dict[str, Any]", arm).get("path") if isinstance(arm, dict) else None
        if not isinstance(path, str):
            raise ComparisonFileError(file, "an arm without 'path'")
        try:
            check_name(path, "path of an SAE")
        except ValueError as error:
            raise ComparisonFileError(file, str(error).rstrip(".")) from error
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


def nearest_comparison(sae: Path) -> Path | None:
    """The `comparison.json` nearest above an SAE's folder: `arm/seed0`, or with parts for hook and k between the two."""
    return next((file for folder in sae.parents[1:4] if (file := folder / NAME).is_file()), None)


def listed(comparison: dict[str, Any]) -> list[Listed]:
    """The SAEs of a comparison in its order; what else the file tells of them is as it may be."""
    settings = comparison.get("settings")
    of_all: Any = cast("dict[str, Any]", settings).get("hook_name") if isinstance(settings, dict) else None
    found: list[Listed] = []
    for arm in cast("list[dict[str, Any]]", comparison["arms"]):
        path, hook, k = arm["path"], arm.get("hook_name", of_all), arm.get("k")
        hook = hook if isinstance(hook, str) else None
        found.append(Listed(path, PurePosixPath(path).parts[0], hook, k if type(k) is int else None))
    return found

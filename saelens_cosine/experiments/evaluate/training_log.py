"""What `saelens-cosine compare` has written about an SAE's training beside it."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from types import NoneType
from typing import Any, cast

from sae_lens.saes.sae import SAE

from saelens_cosine.experiments.compare.file import comparison_beside, nearest_comparison
from saelens_cosine.experiments.evaluate.sources import Source
from saelens_cosine.plain import weights_sha256

COURSE = ("training_tokens", "fve", "l0")
"""What an evaluation tells of the course of a training."""


def training_log(source: Source, sae: SAE[Any]) -> list[dict[str, Any]] | None:
    """Entries of `TrainingLogEntry` from the `comparison.json` beside an SAE; None without one, or of another SAE at its place."""
    place = Path(os.path.abspath(source.place))
    file = nearest_comparison(place) if source.sae_id is None else None
    comparison = comparison_beside(file) if file else None
    if file is None or comparison is None:
        return None
    path = place.relative_to(file.parent).as_posix()
    arms = [arm for arm in comparison["arms"] if arm["path"] == path]
    if len(arms) != 1 or arms[0].get("weights_sha256") != weights_sha256(sae):
        return None
    log = arms[0].get("training_log")
    if not (isinstance(log, list) and all(_is_entry(entry) for entry in cast("list[Any]", log))):
        warnings.warn(f"{file} is damaged: the 'training_log' of {path} is none. Going on without it.", stacklevel=2)
        return None
    return cast("list[dict[str, Any]]", log)


def _is_entry(entry: Any) -> bool:
    return isinstance(entry, dict) and all(
        name in entry and type(entry[name]) in (int, float, NoneType) for name in COURSE
    )

"""What `saelens-cosine compare` has written about an SAE's training beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sae_lens.saes.sae import SAE

from saelens_cosine.evaluation.plain import weights_sha256
from saelens_cosine.evaluation.sources import Source


def training_log(source: Source, sae: SAE[Any]) -> list[dict[str, Any]] | None:
    """Entries of `TrainingLogEntry` from the `comparison.json` beside an SAE; None without one, or of another SAE at its place."""
    place = Path(source.place)
    file = place.parent.parent / "comparison.json"
    if source.sae_id is not None or not file.is_file():
        return None
    try:
        arms: list[dict[str, Any]] = json.loads(file.read_text())["arms"]
        (arm,) = [arm for arm in arms if arm["path"] == f"{place.parent.name}/{place.name}"]
        return arm["training_log"] if arm["weights_sha256"] == weights_sha256(sae) else None
    except (ValueError, KeyError, TypeError):
        return None

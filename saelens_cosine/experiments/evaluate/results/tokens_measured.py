"""How many tokens each evaluation has measured: the sample, fewer without sinks, or a part of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

MEASURED: dict[str, Callable[[Any], int]] = {
    "reconstruction": lambda of: of["by_norm"]["all_norms"]["overall"]["tokens"],
    "loss": lambda of: of["by_norm"]["all_norms"]["overall"]["tokens"],
    "norm_response": lambda of: of["response"]["tokens"],
    "dictionary": lambda of: of["norm_detectors"]["tokens"],
    "gradients": lambda of: of["tokens"],
    "afa": lambda of: of["augment, to the input"]["tokens"],
    "score_swap": lambda of: of["readings"][0]["reconstruction"]["tokens"],
    "causal": lambda of: next(iter(of["win_rate"].values()))["tokens"],
    "matching": lambda of: of["tokens"],
}
"""Where an evaluation's result, with sinks or without, says it."""


def tokens_measured(saes: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """By evaluation, what the entries of `evaluation.json` were measured on, as one reads it: `50,176 (49,784 without sinks)`.

    Where SAEs differ, as at different hooks, it is the first one that counts.
    """
    found: dict[str, str] = {}
    for entry in reversed(saes):
        found |= _of_one(entry["results"])
    return found


def _of_one(results: Mapping[str, Any]) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, count in MEASURED.items():
        result: Mapping[str, Any] = results.get(name) or {}
        counts = [
            f"{count(result[treatment]):,}" for treatment in ("with_sinks", "without_sinks") if treatment in result
        ]
        if len(set(counts)) == 2:
            found[name] = f"{counts[0]} ({counts[1]} without sinks)"
        elif counts:
            found[name] = counts[0] + ("" if "with_sinks" in result else " without sinks")
    if texts := (results.get("probing") or {}).get("texts"):
        found["probing"] = f"{sum(texts):,} texts"
    if variance := (results.get("core") or {}).get("variance_explained"):
        found["FVE beside SAEBench's core"] = f"{variance['tokens']:,}"
    return found

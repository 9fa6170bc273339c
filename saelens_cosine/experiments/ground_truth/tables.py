"""Recovery of known features as JSON and as tables."""

from __future__ import annotations

import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table

from saelens_cosine.console import plain_table
from saelens_cosine.experiments.ground_truth.recovery import MEASURES
from saelens_cosine.experiments.ground_truth.results import GroundTruth
from saelens_cosine.files import whole
from saelens_cosine.metrics.intervals import about, by_chance

SCHEMA = "saelens-cosine/ground-truth/1"
"""Name and version of the JSON's layout; the number grows when a field changes its meaning or goes."""

READING = (
    "mcc: mean cosine of decoder rows with the features that they are paired with, 1 is all found. f1: whether a latent fires where its\n"
    "feature does; several latents may claim one feature, as in SAELens. f1_one_to_one: one, the pairs of mcc. explained_variance: of the\n"
    "samples scored on. dead: latents that never fire there. l0: latents active per sample. Norm spread: standard deviation of a token's\n"
    "log norm factor."
)
"""What each column is, for a reader of the table."""


def as_json(result: GroundTruth) -> dict[str, Any]:
    """Settings, runs, and with several seeds each arm's paired differences to the first."""
    settings = result.settings
    model = settings.model if isinstance(settings.model, str) else settings.model.to_dict()
    return {
        "schema": SCHEMA,
        "settings": {**asdict(settings), "model": model},
        "runs": [asdict(run) for run in result.runs],
        "failed": [asdict(run) for run in result.failed],
        "differences": [
            {
                "architecture": arm,
                "norm_spread": spread,
                "sinks": sinks,
                "measure": measure,
                **asdict(difference),
            }
            for arm in settings.arms[1:]
            for spread in settings.norm_spreads
            for sinks in ((False, True) if settings.sink_share else (False,))
            for measure in MEASURES
            if (difference := result.difference(measure, arm, spread, sinks)) is not None
        ],
    }


def write_json(result: GroundTruth, path: Path) -> None:
    """Write it whole or not at all."""
    whole.write_json(as_json(result), path, indent=2)


def as_tables(result: GroundTruth, sinks: bool = False) -> list[Table]:
    """Means over seeds with their standard deviation, and with several seeds the paired differences to the first arm."""
    s = result.settings
    scored_on = f"{s.eval_samples:,} samples {'with' if sinks else 'without'} sinks"
    seeds = f"mean ± sd over {s.seeds} seeds" if s.seeds > 1 else "1 seed"
    title = f"Recovery of known features, {seeds}, saved SAEs on {scored_on}"
    tables = [plain_table(title, ["norm spread", "architecture"], list(MEASURES))]
    tables[0].caption = READING
    for spread, arm in ((spread, arm) for spread in s.norm_spreads for arm in s.arms):
        by_measure = (list(result.values(measure, arm, spread, sinks).values()) for measure in MEASURES)
        tables[0].add_row(f"{spread:g}", arm, *map(_mean_and_spread, by_measure))
    if s.seeds > 1 and len(s.arms) > 1:
        title = f"Difference to {s.arms[0]}, paired by seed, 95 % interval"
        tables.append(plain_table(title, ["norm spread", "architecture"], ["measure", "difference"]))
        rows = [(spread, arm, measure) for spread in s.norm_spreads for arm in s.arms[1:] for measure in MEASURES]
        found = [result.difference(measure, arm, spread, sinks) for spread, arm, measure in rows]
        for (spread, arm, measure), difference in zip(rows, found, strict=True):
            tables[1].add_row(f"{spread:g}", arm, measure, "none" if difference is None else str(difference))
        compared = [difference for difference in found if difference is not None]
        tables[1].caption = "\n".join(about(["seeds"], by_chance(compared)))
    if result.failed:
        tables.append(
            plain_table("Stopped, neither saved nor scored", ["norm spread", "architecture"], ["seed", "because"])
        )
        tables[-1].style = tables[-1].title_style = "red"
        for run in result.failed:
            tables[-1].add_row(f"{run.norm_spread:g}", run.architecture, str(run.seed), run.reason)
    return tables


def _mean_and_spread(values: list[float]) -> str:
    if not values:
        return "none"
    mean = f"{statistics.mean(values):.3f}"
    return f"{mean}±{statistics.stdev(values):.3f}" if len(values) > 1 else mean

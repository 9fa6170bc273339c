"""`saelens-cosine ground-truth`: its options, and what it prints."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.table import Table

from saelens_cosine.devices import check_device
from saelens_cosine.experiments.ground_truth.planted import small_model
from saelens_cosine.experiments.ground_truth.run import (
    SYNTH_SAE_BENCH_16K,
    GroundTruthSettings,
    as_tables,
    ground_truth,
    write_json,
)
from saelens_cosine.files.output import open_output

SMALL = "small"
"""What `--model` calls `planted.small_model()`."""

FILE = "ground_truth.json"


def add_ground_truth_options(parser: argparse.ArgumentParser, count: Callable[[str], int]) -> None:
    """The options of the subcommand; `count` parses a number of samples."""
    default = GroundTruthSettings()
    add = parser.add_argument
    add("--arms", nargs="+", default=default.arms, metavar="ARCHITECTURE", help="the first is the one to compare with")
    add(
        "--model",
        default=SMALL,
        help=f"what makes the data: '{SMALL}' for 128 features in 64 dimensions, a folder, or a name on the Hub such as "
        f"{SYNTH_SAE_BENCH_16K}",
    )
    add(
        "--norm-spreads",
        nargs="+",
        type=float,
        default=default.norm_spreads,
        metavar="SD",
        help="standard deviations of a token's log norm factor; 0 leaves the data alone",
    )
    add("--seeds", type=int, default=default.seeds, help="runs with different model, initialisation and samples")
    add("--samples", type=count, default=default.samples, help="training samples of each SAE")
    add("--d-sae", type=int, help="number of features; as many as there are to find if not given")
    add("--k", type=float, help="active features per token; as many as are on average if not given")
    add("--sink-share", type=float, default=default.sink_share, help="share of the tokens that are sinks")
    add("--train-on-sinks", action="store_true", help="show sinks in training too, not only in scoring")
    add("--eval-samples", type=count, default=default.eval_samples, help="samples that each SAE is scored on")
    add("--recipe", choices=("paper", "saelens"), default=default.recipe, help="training settings")
    add("--device", default=default.device, help="where everything runs: cpu, cuda, cuda:1")
    add("--output", type=Path, default=Path("runs/ground-truth"), help=f"folder for {FILE}")
    add("--overwrite", action="store_true", help=f"replace an earlier {FILE} in the output folder")
    add("--quiet", action="store_true", help="print only the tables")


def run_ground_truth(options: Any, progress: Callable[[str, int, int], None]) -> list[Table]:
    """Train, score, write `ground_truth.json`, and give the tables to print.

    Raises:
        ValueError: settings that cannot be run.
        OSError: the folder cannot be written, it holds an earlier result and `--overwrite` is not given, or the model cannot be
            loaded.
    """
    settings = GroundTruthSettings(
        arms=tuple(options.arms),
        model=small_model() if options.model == SMALL else options.model,
        norm_spreads=tuple(options.norm_spreads),
        seeds=options.seeds,
        samples=options.samples,
        d_sae=options.d_sae,
        k=options.k,
        recipe=options.recipe,
        sink_share=options.sink_share,
        train_on_sinks=options.train_on_sinks,
        eval_samples=options.eval_samples,
        device=options.device,
    )
    check_device(settings.device)
    folder: Path = options.output
    with open_output(folder, "ground-truth", keep_empty=False) as output:
        output.begin(before=[FILE], places=[FILE], overwrite=options.overwrite)
        progress("Loading the synthetic model", 0, 1)
        result = ground_truth(settings, progress)
        with output.file(FILE) as path:
            write_json(result, path)
    tables = as_tables(result)
    return tables + as_tables(result, sinks=True) if settings.sink_share else tables

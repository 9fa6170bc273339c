"""`saelens-cosine ground-truth`: its options, and what it prints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from saelens_cosine.console import print_tables, say
from saelens_cosine.devices import check_device
from saelens_cosine.experiments.ground_truth.planted import small_model
from saelens_cosine.experiments.ground_truth.run import ground_truth
from saelens_cosine.experiments.ground_truth.settings import SYNTH_SAE_BENCH_16K, GroundTruthSettings
from saelens_cosine.experiments.ground_truth.tables import as_tables, write_json
from saelens_cosine.files.output import open_output
from saelens_cosine.terminal.bar import progress_bar
from saelens_cosine.terminal.options import add_command, count, settings_from
from saelens_cosine.training.recipe import RECIPES

SMALL = "small"
"""What `--model` calls `planted.small_model()`."""

FILE = "ground_truth.json"


def add_ground_truth_command(commands: Any) -> None:
    """Add `ground-truth` to the subcommands of `saelens-cosine`."""
    parser = add_command(
        commands,
        "ground-truth",
        run_ground_truth,
        description="Train SAEs on SAELens' synthetic benchmark, whose features are known, with a planted spread of token norms and "
        "planted attention sinks, and score how well they find the features. With no arguments: a small model of 128 "
        "features, on the CPU, in minutes.",
    )
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
    add("--recipe", choices=tuple(RECIPES), default=default.recipe, help="training settings")
    add("--device", default=default.device, help="where everything runs: cpu, cuda, cuda:1")
    add("--output", type=Path, default=Path("runs/ground-truth"), help=f"folder for {FILE}")
    add("--overwrite", action="store_true", help=f"replace an earlier {FILE} in the output folder")
    add("--quiet", action="store_true", help="print only the tables")


def run_ground_truth(options: Any) -> int:
    """Train, score, write `ground_truth.json`, and print the tables."""
    model = small_model() if options.model == SMALL else options.model
    settings = settings_from(GroundTruthSettings, options, model=model)
    check_device(settings.device)
    folder: Path = options.output
    with progress_bar(options.quiet) as progress, open_output(folder, "ground-truth", keep_empty=False) as output:
        output.begin(before=[FILE], places=[FILE], overwrite=options.overwrite)
        progress("Loading the synthetic model", 0, 1)
        result = ground_truth(settings, progress)
        with output.file(FILE) as path:
            write_json(result, path)
    console = print_tables(as_tables(result) + (as_tables(result, sinks=True) if settings.sink_share else []), 150)
    if not options.quiet:
        say(console, f"Written to {folder}: {FILE}")
    return 0

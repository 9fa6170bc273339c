"""`saelens-cosine compare`: its options, its files, and what it prints."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

from saelens_cosine.console import print_tables, say
from saelens_cosine.experiments.compare.budget import as_table, budget
from saelens_cosine.experiments.compare.results import Comparison
from saelens_cosine.experiments.compare.run import PROFILE, SUMMARY, compare, open_comparison
from saelens_cosine.experiments.compare.settings import ComparisonSettings
from saelens_cosine.experiments.compare.summary.page import write_page
from saelens_cosine.experiments.compare.summary.picture import draw
from saelens_cosine.experiments.compare.tables import as_tables, write_json
from saelens_cosine.experiments.profile import profiled, where_time_went
from saelens_cosine.files.output import Output
from saelens_cosine.terminal.bar import progress_bar
from saelens_cosine.terminal.options import (
    add_command,
    add_profile_option,
    add_run_options,
    count,
    multiple,
    settings_from,
)
from saelens_cosine.training.alone import ALONE, Alone
from saelens_cosine.training.randomness import deterministic_algorithms
from saelens_cosine.training.recipe import RECIPES
from saelens_cosine.training.resuming.stop import raising_on_signals

LISTED = 9
"""SAEs that are named at the end, at most."""


def add_compare_command(commands: Any) -> None:
    """Add `compare` to the subcommands of `saelens-cosine`."""
    parser = add_command(
        commands,
        "compare",
        run_compare,
        description="Train several architectures on one activation stream and compare them on held-out text. With no "
        "arguments: the language model and the corpus that ship with the package, on the CPU, in a few minutes.",
    )
    default = ComparisonSettings()
    add = parser.add_argument
    add("--arms", nargs="+", default=default.arms, metavar="ARCHITECTURE", help="the first is the one to compare with")
    add(
        "--layer",
        type=int,
        nargs="+",
        help="block whose residual output is hooked, or several; the middle one if not given",
    )
    add("--hook", nargs="+", help="hook points by name instead of --layer")
    add(
        "--model",
        default=default.model,
        help="'bundled', 'smollm2', a TransformerLens or Hugging Face name, or a local folder or .gguf file",
    )
    add(
        "--dataset",
        default=default.dataset,
        help="'bundled', 'sae-probes', a Hugging Face name, or a local file (file.jsonl:column), folder of texts or saved dataset",
    )
    add("--tokens", type=count, default=default.tokens, help="training tokens of each SAE")
    add("--k", type=int, nargs="+", default=default.k, help="active features per token, or several numbers of them")
    add(
        "--lr",
        type=float,
        nargs="+",
        help="learning rate; the recipe's if not given (paper: 5e-5 times 50M over the tokens, 5e-3 at most). Of several, each arm gets its best at each hook, by FVE on held-out documents set "
        "apart for this, tried with the middle k and one seed",
    )
    add("--d-sae", type=int, default=default.d_sae, help="number of features")
    add("--seeds", type=int, default=default.seeds, help="runs with different initialisation and data order")
    add("--recipe", choices=tuple(RECIPES), default=default.recipe, help="training settings")
    add(
        "--max-norm-multiple",
        type=multiple,
        default=default.max_norm_multiple,
        help="drop tokens above this multiple of the median norm, in training and evaluation; 'none' keeps them",
    )
    add(
        "--plant-sinks",
        action="store_true",
        help="plant an attention sink at the start of each context; the default --max-norm-multiple drops them again",
    )
    add("--context-size", type=int, default=default.context_size, help="tokens per context, as far as the model allows")
    add("--eval-tokens", type=count, default=default.eval_tokens, help="held-out tokens that are evaluated")
    add(
        "--eval-prompts",
        type=count,
        default=default.eval_prompts,
        help="of their contexts, those for the cross-entropy",
    )
    add(
        "--activations",
        type=Path,
        metavar="DIR",
        help="folder of activations that are computed once and read by every training, by the same command again and by `evaluate`; "
        "without one, a grid keeps its own while it runs",
    )
    add("--device", default=default.device, help="where everything runs: cpu, cuda, cuda:1")
    add(
        "--output",
        type=Path,
        default=Path("runs/compare"),
        help="folder for the SAEs, comparison.json, comparison.html and comparison.png",
    )
    add(
        "--budget",
        action="store_true",
        help="measure a second of each part, say what the comparison will cost in time, disk and memory, and stop",
    )
    add("--overwrite", action="store_true", help="replace an earlier comparison in the output folder")
    add_run_options(parser)
    add_profile_option(parser)
    add("--quiet", action="store_true", help="print only the tables")


def run_compare(options: Any, processes: Alone = ALONE) -> int:
    """Compare, write `comparison.json`, `comparison.html` and `comparison.png` after each point of the grid, and print the tables."""
    folder: Path = options.output
    settings = settings_from(ComparisonSettings, options)
    if options.budget:
        with progress_bar(options.quiet) as progress:
            found = budget(settings, folder, progress)
        print_tables([as_table(found)], 110)
        return 0
    options.interrupted = f"What was finished is in {folder}; --resume goes on."
    with (
        raising_on_signals(options.stop_on),
        deterministic_algorithms(options.deterministic),
        open_comparison(folder) if processes.first else nullcontext(folder) as output,
        progress_bar(options.quiet or not processes.first) as progress,
    ):

        def keep(comparison: Comparison) -> None:
            assert isinstance(output, Output)
            options.interrupted = f"What was finished is in {output.results}; --resume goes on."
            for write, name in zip((write_json, draw, write_page), SUMMARY, strict=True):
                with output.file(name) as path:
                    write(comparison, path)

        with profiled(output if isinstance(output, Output) else None, PROFILE, options.profile) as watch:
            comparison = compare(
                settings,
                output,
                overwrite=options.overwrite,
                resume=options.resume,
                keep=options.keep,
                stop_signals=options.stop_on,
                on_progress=progress,
                on_point=keep,
                processes=processes,
            )
    if not processes.first:
        return 0
    console = print_tables([*as_tables(comparison), *where_time_went(watch)], 110)
    if not options.quiet:
        say(console, f"Written to {folder}: comparison.html, comparison.json, comparison.png, and a folder per SAE:")
        for arm in comparison.arms[:LISTED]:
            say(console, f'  SAE.load_from_disk("{folder / arm.path}")')
        more = len(comparison.arms) - LISTED
        if more > 0:
            say(console, f"and {more} more; all of them: saelens-cosine evaluate {folder}")
    return 0

"""`saelens-cosine benchmark`: its options, and what it prints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from saelens_cosine.console import print_tables
from saelens_cosine.experiments.benchmark.pipeline import pipeline
from saelens_cosine.experiments.benchmark.run import benchmark
from saelens_cosine.experiments.benchmark.settings import DTYPES, BenchmarkSettings
from saelens_cosine.experiments.compare.settings import ComparisonSettings
from saelens_cosine.terminal.bar import progress_bar
from saelens_cosine.terminal.options import add_command, count, settings_from


def add_benchmark_command(commands: Any) -> None:
    """Add `benchmark` to the subcommands of `saelens-cosine`."""
    parser = add_command(
        commands,
        "benchmark",
        run_benchmark,
        description="Time a step of SAELens' trainer for SAELens' classes and ours, on both paths, arm after arm within each "
        "repeat. The floor is the encoder's product alone plus one fused Adam pass.",
    )
    default = BenchmarkSettings()
    add = parser.add_argument
    arms = "saelens_batchtopk, ..., <architecture>/<kernels>"
    add("--arms", nargs="+", default=default.arms, metavar="ARM", help=arms)
    add("--device", default=default.device, help="cpu, cuda, cuda:1")
    add("--dtype", choices=DTYPES, default=default.dtype, help="bfloat16 is autocast; parameters are float32 in each")
    add("--d-in", type=int, default=default.d_in, help="size of the activations")
    add("--d-sae", type=int, default=default.d_sae, help="number of features")
    add("--batch", type=int, default=default.batch, help="tokens per step")
    add("--k", type=int, default=default.k, help="active features per token")
    add("--repeats", type=int, default=default.repeats, help="timed steps of each arm")
    add("--json", type=Path, metavar="FILE", help="write the figures there")
    add("--quiet", action="store_true", help="print only the tables")
    add(
        "--distributed",
        action="store_true",
        help="under torchrun: a step over its ranks, and what it moves between them",
    )
    add(
        "--pipeline",
        action="store_true",
        help="time `compare` with its defaults from text to page, part by part, beside its floor and SAELens' own runner; takes --tokens, "
        "--device, --json",
    )
    add("--tokens", type=count, default=ComparisonSettings.tokens, help="with --pipeline: training tokens of each SAE")


def run_benchmark(options: Any) -> int:
    """Measure, print the tables, and write the JSON if that was asked for."""
    if options.distributed:
        raise ValueError(
            "--distributed measures several ranks: torchrun --nproc-per-node 2 -m saelens_cosine benchmark --distributed."
        )
    with progress_bar(options.quiet) as progress:
        if options.pipeline:
            result = pipeline(ComparisonSettings(tokens=options.tokens, device=options.device), progress)
        else:
            result = benchmark(settings_from(BenchmarkSettings, options), progress)
    print_tables(result.tables(), 140)
    if options.json:
        result.write(options.json)
    return 0

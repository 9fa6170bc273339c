"""`saelens-cosine evaluate`: its options, and what it prints."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.table import Table

from saelens_cosine.evaluation.evaluate import EVALS, EvaluationSettings, Progress, evaluate, rows
from saelens_cosine.evaluation.evaluation_page import report_data
from saelens_cosine.evaluation.html_report import write_report


def add_evaluate_options(parser: argparse.ArgumentParser, count: Callable[[str], int]) -> None:
    """The options of the subcommand; `count` parses a number of tokens."""
    default = EvaluationSettings()
    add = parser.add_argument
    add(
        "saes",
        nargs="+",
        metavar="SAE",
        help="a folder, a Hub repository or a short name; name#sae_id for one of several",
    )
    add("--evals", nargs="+", default=default.evals, choices=tuple(EVALS), metavar="EVAL", help=", ".join(EVALS))
    add("--tokens", type=count, default=default.tokens, help="held-out tokens")
    add("--sinks", choices=("keep", "drop", "both"), default=default.sinks, help="what happens to high-norm tokens")
    add(
        "--max-norm-multiple",
        type=float,
        default=default.max_norm_multiple,
        help="a token above this multiple of the median norm is one",
    )
    add("--model", help="language model; the one that the SAE's metadata name if not given")
    add("--dataset", help="text; likewise")
    add("--context-size", type=int, help="tokens per context; the SAE's own if not given")
    add("--device", default=default.device, help="where everything runs: cpu, cuda, cuda:1")
    add("--output", type=Path, default=Path("runs/evaluate"), help="folder for evaluation.json and report.html")
    add("--quiet", action="store_true", help="print only the table")


def run_evaluate(options: Any, progress: Progress) -> Table:
    """Evaluate, write `evaluation.json` and `report.html`, and give the table to print."""
    settings = EvaluationSettings(
        evals=tuple(options.evals),
        tokens=options.tokens,
        sinks=options.sinks,
        max_norm_multiple=options.max_norm_multiple,
        model=options.model,
        dataset=options.dataset,
        context_size=options.context_size,
        device=options.device,
    )
    document = evaluate(options.saes, settings, options.output, progress)
    write_report(report_data(document), options.output / "report.html")
    return as_table(document)


def as_table(document: dict[str, Any]) -> Table:
    """The figures that one looks at first; sinks in and out side by side."""
    bound = document["settings"]["max_norm_multiple"]
    table = Table(title=f"Held-out text; sinks: tokens above {bound:g} times the median norm", title_justify="left")
    for column in ("SAE", "sinks", "tokens", "FVE", "L0", "never fired", "CE recov."):
        table.add_column(column, justify="left" if column in ("SAE", "sinks") else "right")
    forms = ("{}", "{}", "{:,}", "{:.4f}", "{:.1f}", "{:.1%}", "{:.4f}")
    for row in rows(document):
        cells = zip(forms, row.values(), strict=True)
        table.add_row(*("-" if value is None else form.format(value) for form, value in cells))
    return table

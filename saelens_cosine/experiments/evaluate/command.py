"""`saelens-cosine evaluate`: its options, and what it prints."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from saelens_cosine.console import PlainTable
from saelens_cosine.experiments.evaluate.evals import EVALS
from saelens_cosine.experiments.evaluate.page import report_data
from saelens_cosine.experiments.evaluate.results.differences import TREATMENTS, about_differences, by_arm, summary
from saelens_cosine.experiments.evaluate.results.earlier import open_evaluation
from saelens_cosine.experiments.evaluate.results.figures import Figures, by_column, left_out, rows, text_is
from saelens_cosine.experiments.evaluate.results.tokens_measured import tokens_measured
from saelens_cosine.experiments.evaluate.run import Progress, evaluate
from saelens_cosine.experiments.evaluate.settings import EvaluationSettings
from saelens_cosine.files.whole import read_json
from saelens_cosine.metrics.intervals import FEWEST_DOCUMENTS, Difference
from saelens_cosine.metrics.norms.norm_response import SCALING_NOTE
from saelens_cosine.metrics.not_finite import not_finite, shown_number
from saelens_cosine.metrics.reconstruction.loss_recovered import CE_NOTE
from saelens_cosine.report.html import write_report
from saelens_cosine.saebench import EVALS as SAEBENCH_EVALS
from saelens_cosine.saebench import Judge

COLUMNS = (
    ("FVE", "{:.4f}"),
    ("L0", "{:.1f}"),
    ("never fired", "{:.1%}"),
    ("CE recovered", "{:.4f}"),
    ("KL, nats", "{:.4f}"),
    ("active-set overlap at half scale, about b_dec", "{:.3f}"),
    ("active-set overlap at half scale, about 0", "{:.3f}"),
)
"""Of the printed table, where they were measured."""

NOTES = {"CE recovered": CE_NOTE, "active-set overlap at half scale, about b_dec": SCALING_NOTE}
"""What stands under the table where it has a column."""

GROUPS = {
    "diagnostics": tuple(name for name in EVALS if name not in SAEBENCH_EVALS),
    "saebench": tuple(SAEBENCH_EVALS),
}
"""Names that stand for several evals."""


def add_evaluate_options(parser: argparse.ArgumentParser, count: Callable[[str], int]) -> None:
    """The options of the subcommand; `count` parses a number of tokens."""
    default = EvaluationSettings()
    add = parser.add_argument
    add(
        "saes",
        nargs="+",
        metavar="SAE",
        help="a folder, a Hub repository or a short name; name#sae_id for one of several; arm=SAE names its arm. Folders "
        "arm/seed0, arm/seed1 are seeds of one arm, compared seed by seed with those of the baseline; with one seed, FVE's interval "
        f"is over documents, of which it takes {FEWEST_DOCUMENTS}",
    )
    add(
        "--baseline",
        metavar="ARM",
        help="arm that others are compared with. If not given: the first of the comparison.json beside the SAEs' folders; else "
        "an arm named with arm=SAE and mentioned first; else an inner_product_ arm; else the first",
    )
    listed = "; ".join(f"{name}: {row.about}" for name, row in EVALS.items() if name not in SAEBENCH_EVALS)
    add(
        "--evals",
        nargs="+",
        default=default.evals,
        choices=(*GROUPS, *EVALS),
        metavar="EVAL",
        help=f"{listed}; SAEBench's {', '.join(SAEBENCH_EVALS)}; 'diagnostics' and 'saebench' stand for all of a kind",
    )
    add("--tokens", type=count, default=default.tokens, help="tokens, in contexts from all held-out documents")
    add("--sinks", choices=("keep", "drop", "both"), default=default.sinks, help="what happens to high-norm tokens")
    add(
        "--max-norm-multiple",
        type=float,
        default=default.max_norm_multiple,
        help="a token above this multiple of the median norm is one",
    )
    add(
        "--plant-sinks",
        action=argparse.BooleanOptionalAction,
        help="give the first token of each context 30 to 300 times the median norm, in a direction that partly follows the "
        "context; as the SAE was trained if not given",
    )
    add("--model", help="language model; the one that the SAE's metadata name if not given")
    add("--hook", help="hook point or a module's path in the model; likewise")
    add("--dataset", help="text; likewise")
    add("--context-size", type=int, help="tokens per context; the SAE's own if not given")
    add(
        "--tasks",
        nargs="+",
        help="what probing probes for: bundled, sae_probes, sae_probes:NAME, or a file with columns text and label",
    )
    add("--task-texts", type=int, default=default.task_texts, help="texts of each task, at most")
    add("--causal-contexts", type=int, default=default.causal_contexts, help="contexts that causal and patching edit")
    add("--causal-features", type=int, default=default.causal_features, help="features that causal ablates")
    add("--saebench-settings", type=Path, metavar="FILE", help='JSON: {"core": {"n_eval_reconstruction_batches": 20}}')
    add("--judge-model", default=default.judge.model, help="language model that autointerp asks")
    add("--judge-url", help="its OpenAI-compatible endpoint; the key is read from OPENAI_API_KEY")
    add("--device", default=default.device, help="where everything runs: cpu, cuda, cuda:1")
    add("--output", type=Path, default=Path("runs/evaluate"), help="folder for evaluation.json and report.html")
    add(
        "--overwrite",
        action="store_true",
        help="replace the evaluation.json of other SAEs or settings in the output folder; what it measured is kept",
    )
    add("--quiet", action="store_true", help="print only the tables")


def run_evaluate(options: Any, progress: Progress) -> list[Table]:
    """Evaluate, write `evaluation.json` and `report.html`, and give the tables to print."""
    chosen = [name for group in options.evals for name in GROUPS.get(group, (group,))]
    settings = EvaluationSettings(
        evals=tuple(dict.fromkeys(chosen)),
        tokens=options.tokens,
        sinks=options.sinks,
        max_norm_multiple=options.max_norm_multiple,
        plant_sinks=options.plant_sinks,
        model=options.model,
        hook=options.hook,
        dataset=options.dataset,
        context_size=options.context_size,
        device=options.device,
        tasks=options.tasks and tuple(options.tasks),
        task_texts=options.task_texts,
        causal_contexts=options.causal_contexts,
        causal_features=options.causal_features,
        saebench=_saebench_settings(options.saebench_settings),
        judge=Judge(options.judge_model, options.judge_url),
    )
    with open_evaluation(options.output) as output:
        document = evaluate(
            options.saes,
            settings,
            output,
            progress,
            options.baseline,
            command=options.command_line,
            overwrite=options.overwrite,
        )
        with output.file("report.html") as path:
            write_report(report_data(document), path)
    return as_tables(document)


def _saebench_settings(file: Path | None) -> dict[str, dict[str, Any]]:
    if file is None:
        return {}
    try:
        settings = read_json(file)
    except ValueError as error:
        raise ValueError(f"--saebench-settings {file} is not JSON: {error}") from error
    if not isinstance(settings, dict) or not all(isinstance(value, dict) for value in settings.values()):
        raise ValueError(f'--saebench-settings {file} must hold an object of objects, {{"core": {{...}}}}.')
    return settings


def as_tables(document: Mapping[str, Any]) -> list[Table]:
    """The figures that one looks at first, sinks in and out side by side; all others by eval; differences; what did not apply."""
    texts, arms = by_column(document)
    tables = [
        *_not_finite(document),
        _results(document),
        _listed("Figures of the text", texts, document),
        _listed("Other figures, mean over seeds", arms, document),
    ]
    if document["differences"] or document["unpaired"]:
        tables.append(_differences(document))
    tables.append(_table("Left out", "arm", "eval", "reason"))
    for (name, reason), whose in left_out(document).items():
        tables[-1].add_row(", ".join(whose), name, reason)
    return [table for table in tables if table.row_count or table.caption]


def _listed(title: str, columns: Mapping[str, Figures], document: Mapping[str, Any]) -> Table:
    """Figures that have no column in the first table."""
    table = _table(title, "eval", "figure", *columns)
    shown = {f"{name}, {sinks}" for name, _ in COLUMNS for sinks in TREATMENTS.values()}
    before = None
    for name, figure, values in rows(columns, document["settings"]["evals"]):
        if figure not in shown:
            cells = ["-" if value is None else f"{value:.4g}" for value in values]
            table.add_row(name if name != before else "", figure, *cells)
            before = name
    return table


def _not_finite(document: Mapping[str, Any]) -> Iterator[Table]:
    """What is NaN or infinite, in red, where anything is."""
    found = [
        (entry["arm"], str(entry["seed"]), name, f"{count:,}")
        for entry in document["saes"]
        for name, count in not_finite(entry["results"]).items()
    ]
    if found:
        table = _table("Not finite: figures of these are NaN", "arm", "seed", "eval", "not finite")
        table.style = table.title_style = "red"
        for row in found:
            table.add_row(*row)
        yield table


def _results(document: Mapping[str, Any]) -> Table:
    settings = document["settings"]
    bound = f"sinks: tokens above {settings['max_norm_multiple']:g} times the median norm"
    planted = ", planted in each context" if any(text["planted_sinks"] for text in document["texts"]) else ""
    arms = {arm: summary(entries) for arm, entries in by_arm(document["saes"]).items()}
    shown = [
        (name, form)
        for name, form in COLUMNS
        if any(f"{name}, {sinks}" in figures for figures in arms.values() for sinks in TREATMENTS.values())
    ]
    measured = tokens_measured(document["saes"])
    tokens = f"\nTokens: {', '.join(f'{name} {count}' for name, count in measured.items())}" if measured else ""
    table = _table(
        f"{text_is(document['saes'])}; mean over seeds; {bound}{planted}{tokens}",
        "arm",
        "seeds",
        "",
        *(name for name, _ in shown),
    )
    names = {name for name, _ in shown}
    table.caption = "\n".join(note for name, note in NOTES.items() if name in names) or None
    table.caption_justify = "left"
    counts = {arm: len(entries) for arm, entries in by_arm(document["saes"]).items()}
    for arm, figures in arms.items():
        for sinks in TREATMENTS.values():
            cells = [(form, figures.get(f"{name}, {sinks}")) for name, form in shown]
            if any(found for _, found in cells):
                values = ["-" if found is None else shown_number(found[0], form) for form, found in cells]
                table.add_row(arm, str(counts[arm]), sinks, *values)
    return table


def _differences(document: Mapping[str, Any]) -> Table:
    title = f"Difference to {document['baseline']}, paired, 95 % interval"
    table = _table(title, "arm", "measure", "over", "difference")
    for item in document["differences"]:
        numbers = item["difference"]
        over = " x ".join(f"{n} {what}" for n, what in zip(numbers["shape"], item["over"], strict=True))
        table.add_row(item["arm"], item["measure"], over, str(Difference(**numbers)))
    table.caption, table.caption_justify = "\n".join(about_differences(document)), "left"
    return table


def _table(title: str, *columns: str) -> Table:
    table = PlainTable(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for column in columns:
        table.add_column(column)
    return table

"""`saelens-cosine evaluate`: its options, and what it prints."""

from __future__ import annotations

import argparse
import importlib.util
import math
import sys
from collections.abc import Container, Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from saelens_cosine.console import plain_table, print_tables, say, shown_number
from saelens_cosine.experiments.evaluate.evals import EVALS, TREATMENTS, Figure
from saelens_cosine.experiments.evaluate.page import evaluation_page
from saelens_cosine.experiments.evaluate.results.earlier import PROFILE, open_evaluation
from saelens_cosine.experiments.evaluate.results.evaluation import Evaluation
from saelens_cosine.experiments.evaluate.results.listing import (
    Figures,
    about_differences,
    about_matched_figures,
    columns,
    in_condition,
    left_out,
    matched_by_hook,
    not_finite,
    notes,
    of_arms,
    of_texts,
    rows,
    summary,
    text_is,
    tokens_measured,
    without_sinks_told,
)
from saelens_cosine.experiments.evaluate.results.matched import MatchedFigure
from saelens_cosine.experiments.evaluate.run import evaluate
from saelens_cosine.experiments.evaluate.settings import EvaluationSettings
from saelens_cosine.experiments.profile import profiled, where_time_went
from saelens_cosine.files.whole import read_json
from saelens_cosine.metrics.intervals import FEWEST_DOCUMENTS
from saelens_cosine.report.estimate import short
from saelens_cosine.report.page import write_page
from saelens_cosine.saebench import EVALS as SAEBENCH_EVALS
from saelens_cosine.saebench import Judge
from saelens_cosine.terminal.bar import progress_bar
from saelens_cosine.terminal.options import add_command, add_profile_option, count, settings_from

GROUPS = {
    "diagnostics": tuple(name for name in EVALS if name not in SAEBENCH_EVALS),
    "saebench": tuple(SAEBENCH_EVALS),
}
"""Names that stand for several evals."""


def add_evaluate_command(commands: Any) -> None:
    """Add `evaluate` to the subcommands of `saelens-cosine`."""
    parser = add_command(
        commands,
        "evaluate",
        run_evaluate,
        description="Measure saved SAEs on the held-out part of a text (known to be held out for SAEs that this package trained), with and without tokens of a very high norm (attention sinks), and write "
        "evaluation.json and report.html. What an interrupted run has measured is not measured again.",
    )
    default = EvaluationSettings()
    add = parser.add_argument
    add(
        "saes",
        nargs="+",
        metavar="SAE",
        help="a folder, a Hub repository or a short name; name#sae_id for one of several; arm=SAE names its arm. The folder of a "
        "comparison stands for all of its SAEs, which are compared hook by hook and k by k. Folders "
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
        metavar="EVAL",
        help=f"{listed}; SAEBench's {', '.join(SAEBENCH_EVALS)}; 'diagnostics' and 'saebench' stand for all of a kind",
    )
    add(
        "--eval-file",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE.py",
        help="Python files of your own that call register_eval; --evals may then name what they register",
    )
    add("--tokens", type=count, default=default.tokens, help="tokens, in contexts from all held-out documents")
    add(
        "--loss-tokens",
        type=count,
        default=default.loss_tokens,
        help="tokens that loss takes, at most: the model runs on them for every SAE",
    )
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
        metavar="TASK",
        help="what probing probes for: bundled, bundled:NAME, data sets of sae-probes by name (glue_cola), all of sae-probes that the "
        "SAE was not trained on (all), or files with columns text and label; if not given, bundled for the bundled corpus, else all",
    )
    add("--task-texts", type=int, default=default.task_texts, help="texts of each task, at most")
    add("--causal-contexts", type=int, default=default.causal_contexts, help="contexts that causal and patching edit")
    add("--causal-features", type=int, default=default.causal_features, help="features that causal ablates")
    add(
        "--concept-texts",
        type=int,
        default=default.concept_texts,
        help="texts of each concept that causal takes, at most",
    )
    add("--saebench-settings", type=Path, metavar="FILE", help='JSON: {"core": {"n_eval_reconstruction_batches": 20}}')
    add("--judge-model", default=default.judge.model, help="language model that autointerp asks")
    add("--judge-url", help="its OpenAI-compatible endpoint; the key is read from OPENAI_API_KEY")
    add("--device", default=default.device, help="where everything runs: cpu, cuda, cuda:1")
    add(
        "--activations",
        type=Path,
        metavar="DIR",
        help="a cache of activations, such as that of compare --activations: held-out contexts are read there, and added where it "
        "lacks them; rounded to bfloat16",
    )
    add("--output", type=Path, default=Path("runs/evaluate"), help="folder for evaluation.json and report.html")
    add(
        "--overwrite",
        action="store_true",
        help="replace the evaluation.json of other SAEs or settings in the output folder; what it measured is kept",
    )
    add_profile_option(parser)
    add("--quiet", action="store_true", help="print only the tables")


def run_evaluate(options: Any) -> int:
    """Evaluate, write `evaluation.json` and `report.html`, and print the tables."""
    options.interrupted = f"Run the same command again to go on; see {options.output}."
    for file in options.eval_file:
        _run_file(file)
    chosen = [name for group in options.evals for name in GROUPS.get(group, (group,))]
    settings = settings_from(
        EvaluationSettings,
        options,
        evals=tuple(dict.fromkeys(chosen)),
        saebench=_saebench_settings(options.saebench_settings),
        judge=Judge(options.judge_model, options.judge_url),
    )
    with (
        progress_bar(options.quiet) as progress,
        open_evaluation(options.output) as output,
        profiled(output, PROFILE, options.profile) as watch,
    ):
        found = evaluate(
            options.saes,
            settings,
            output,
            progress,
            options.baseline,
            command=options.command_line,
            overwrite=options.overwrite,
        )
        with output.file("report.html") as path:
            write_page(evaluation_page(found), path)
    console = print_tables([*as_tables(found), *where_time_went(watch)], 140)
    if not options.quiet:
        say(console, f"Written to {options.output}: evaluation.json, report.html")
    return 0


def _run_file(file: Path) -> None:
    """Run a file that registers evals, once in a process."""
    name = f"evals of {file.resolve()}"
    if name in sys.modules:
        return
    if not file.is_file():
        raise ValueError(f"--eval-file {file} is not there, or is no file.")
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ValueError(f"--eval-file {file} is no Python file: its name must end in .py.")
    sys.modules[name] = module = importlib.util.module_from_spec(spec)  # annotations are looked up there
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise ValueError(f"--eval-file {file} stopped with {type(error).__name__}: {error}") from error


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


def as_tables(found: Evaluation) -> list[Table]:
    """The figures that one looks at first, sinks in and out side by side; all others by eval; differences; what did not apply."""
    first = {title: one for title, one in columns(found.saes).items() if one.sinks is not None}
    tables = [
        *_not_finite(found),
        _results(found, first),
        _listed("Figures of the text", of_texts(found), found, first),
        *(
            _listed(in_condition("Other figures, mean over seeds", condition), of_arms(part), found, first)
            for condition, part in found.by_condition.items()
        ),
    ]
    tables += _matched(found)
    if found.differences or found.unpaired:
        tables.append(_differences(found))
    tables.append(plain_table("Left out", ["arm", "eval", "reason"]))
    for item in left_out(found):
        tables[-1].add_row(item.whose, item.eval, item.reason)
    return [table for table in tables if table.row_count or table.caption]


def _listed(title: str, by_name: Mapping[str, Figures], found: Evaluation, shown: Container[str]) -> Table:
    """Figures that have no column in the first table."""
    table = plain_table(title, ["eval", "figure"], list(by_name))
    before = None
    for name, figure, values in rows(by_name, found.settings.evals):
        if figure not in shown:
            cells = ["-" if value is None or not math.isfinite(value) else f"{value:.4g}" for value in values]
            table.add_row(name if name != before else "", figure, *cells)
            before = name
    return table


def _not_finite(found: Evaluation) -> Iterator[Table]:
    """What is NaN or infinite, in red, where anything is."""
    broken = not_finite(found)
    if broken:
        table = plain_table("Not finite: figures of these are NaN", ["arm", "seed", "eval", "not finite"])
        table.style = table.title_style = "red"
        for item in broken:
            table.add_row(item.arm, str(item.seed), item.eval, f"{item.bad:,}")
        yield table


def _results(found: Evaluation, first: Mapping[str, Figure]) -> Table:
    bound = f"sinks: tokens above {found.settings.max_norm_multiple:g} times the median norm"
    planted = ", planted in each context" if any(text.planted_sinks for text in found.texts) else ""
    measured = tokens_measured(found.saes)
    tokens = f"\nTokens: {', '.join(f'{name} {count}' for name, count in measured.items())}" if measured else ""
    forms = {one.name: one.column or "" for one in first.values()}
    title = f"{text_is(found.saes)}; mean over seeds; {bound}{planted}{tokens}"
    conditions = found.by_condition
    table = plain_table(title, ["condition"] * (len(conditions) > 1) + ["arm", "seeds", ""], list(forms))
    table.caption = "\n".join(notes(found.saes)) or None
    for condition, part in conditions.items():
        for arm, entries in part.arms.items():
            figures = summary(entries)
            for sinks in TREATMENTS.values():
                cells = [(form, figures.get(f"{name}, {sinks}")) for name, form in forms.items()]
                if any(cell for _, cell in cells):
                    values = ["-" if cell is None else shown_number(cell.value, form) for form, cell in cells]
                    table.add_row(*[condition] * (len(conditions) > 1), arm, str(len(entries)), sinks, *values)
    return table


def _matched(found: Evaluation) -> list[Table]:
    """For each hook at FVE and at L0 a row for each arm and figure of the first table, a column for each k of the baseline; below the
    last what to know of them all."""
    first, tables, shown = columns(found.saes), list[Table](), list[MatchedFigure]()
    for hook, at, items in matched_by_hook(found):
        title = in_condition(f"At matched {at}: minus {found.baseline} at each of its ks", hook)
        ks = {item.found.k: item.found for item in reversed(items)}
        heads = [f"k={k:g}, {without_sinks_told(at)} {short(ks[k].x)}" for k in sorted(ks)]
        tables.append(plain_table(title, ["arm", "measure"], heads))
        for arm, measure in dict.fromkeys((item.arm, item.measure) for item in items):
            of = {item.found.k: item.found for item in items if (item.arm, item.measure) == (arm, measure)}
            form = first[measure].column or "{:.4g}"
            tables[-1].add_row(arm, measure, *(of[k].brief(form) if k in of else "-" for k in sorted(ks)))
        shown += items
    if tables:
        tables[-1].caption = "\n".join(about_matched_figures(shown))
    return tables


def _differences(found: Evaluation) -> Table:
    title = f"Difference to {found.baseline}, paired, 95 % interval"
    several = len(found.by_condition) > 1
    table = plain_table(title, ["condition"] * several + ["arm", "measure", "over", "difference"])
    for item in found.differences:
        table.add_row(*[item.condition] * several, item.arm, item.measure, item.counted, str(item.difference))
    table.caption = "\n".join(about_differences(found))
    return table

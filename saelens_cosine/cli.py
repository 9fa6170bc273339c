"""`saelens-cosine`: parse, call, print."""

from __future__ import annotations

import argparse
import logging
import signal
import sys
import warnings
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import fields
from functools import partialmethod
from pathlib import Path
from typing import Any, NoReturn

import datasets
import transformers
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from sae_lens.training._interruption import InterruptedException
from tqdm.auto import tqdm

from saelens_cosine.console import say, visible
from saelens_cosine.experiments.benchmark.run import DTYPES, BenchmarkSettings, benchmark
from saelens_cosine.experiments.compare.run import SUMMARY, Comparison, ComparisonSettings, compare, open_comparison
from saelens_cosine.experiments.compare.tables import as_tables, draw, write_json
from saelens_cosine.experiments.evaluate.command import add_evaluate_options, run_evaluate
from saelens_cosine.experiments.ground_truth.command import add_ground_truth_options, run_ground_truth
from saelens_cosine.faults import FAULTS, line_of
from saelens_cosine.files.secrets import as_typed, logged_without_secrets, without_secrets
from saelens_cosine.loading.command import add_convert_command
from saelens_cosine.progress import shown, unread
from saelens_cosine.saebench import SAEBenchError
from saelens_cosine.sharing.command import add_share_options, check_options, share_on_hub, share_on_neuronpedia
from saelens_cosine.training.command import train
from saelens_cosine.training.randomness import deterministic_algorithms
from saelens_cosine.training.stop import StopError, exit_status, raising_on_signals


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit status."""
    with raising_on_signals(), logged_without_secrets(), unread():
        return _run(list(sys.argv[1:] if arguments is None else arguments))


def _run(args: list[str]) -> int:
    parser = _parser()
    if args[:1] == ["train"]:  # everything behind it is SAELens' own
        return _train(args[1:])
    options, unknown = parser.parse_known_args(args)
    if unknown:
        command = f"{parser.prog} {options.command}"
        print(f"{command}: unrecognized arguments: {as_typed(unknown)}. See {command} --help.", file=sys.stderr)  # noqa: T201
        return 2
    options.command_line = (parser.prog, *args)
    try:
        return options.run(options)
    except SAEBenchError as error:  # a line for each eval
        print(visible(without_secrets(f"saelens-cosine {options.command}: {error}")), file=sys.stderr)  # noqa: T201
        return 2
    except FAULTS as error:
        return _fault(options.command, error)
    except (KeyboardInterrupt, InterruptedException) as stopped:
        print("Interrupted. Nothing was written.", file=sys.stderr)  # noqa: T201
        return exit_status(stopped)


def _fault(command: str, error: BaseException) -> int:
    """Say it in one line; an error that is not the user's goes on."""
    line = line_of(error)
    if line is None:
        raise error
    print(visible(f"saelens-cosine {command}: {line}"), file=sys.stderr)  # noqa: T201
    return 2


class _Parser(argparse.ArgumentParser):
    """Answers a wrong option with a line, not with all that there are."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {without_secrets(message)}. See {self.prog} --help.\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="saelens-cosine", description="Train, compare and load cosine-scored sparse autoencoders in SAELens."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser(
        "train", add_help=False, help="train one SAE: SAELens' own flags, with our architectures in them"
    )
    parser_of_compare = commands.add_parser(
        "compare",
        help="train several architectures on one activation stream and compare them on held-out text",
        description="Train several architectures on one activation stream and compare them on held-out text. With no "
        "arguments: the language model and the corpus that ship with the package, on the CPU, in a few minutes.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    _add_compare_options(parser_of_compare)
    parser_of_compare.set_defaults(run=_compare)
    parser_of_benchmark = commands.add_parser(
        "benchmark",
        help="time a training step against SAELens' classes and against the hardware's floor",
        description="Time a step of SAELens' trainer for SAELens' classes and ours, on both paths, arm after arm within each "
        "repeat. The floor is the encoder's product alone plus one fused Adam pass.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    _add_benchmark_options(parser_of_benchmark)
    parser_of_benchmark.set_defaults(run=_benchmark)
    parser_of_evaluate = commands.add_parser(
        "evaluate",
        help="diagnostics of saved SAEs, with and without attention sinks",
        description="Measure saved SAEs on the held-out part of a text (known to be held out for SAEs that this package trained), with and without tokens of a very high norm (attention sinks), and write "
        "evaluation.json and report.html. What an interrupted run has measured is not measured again.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_evaluate_options(parser_of_evaluate, _count)
    parser_of_evaluate.set_defaults(run=_evaluate)
    parser_of_ground_truth = commands.add_parser(
        "ground-truth",
        help="train SAEs on synthetic data and see how well they find its features",
        description="Train SAEs on SAELens' synthetic benchmark, whose features are known, with a planted spread of token norms and "
        "planted attention sinks, and score how well they find the features. With no arguments: a small model of 128 "
        "features, on the CPU, in minutes.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_ground_truth_options(parser_of_ground_truth, _count)
    parser_of_ground_truth.set_defaults(run=_ground_truth)
    add_convert_command(commands)
    parser_of_share = commands.add_parser(
        "share",
        help="publish saved SAEs on the Hugging Face Hub, and their features on Neuronpedia",
        description="Publish a saved SAE, or all of a comparison, on the Hugging Face Hub in one commit, with a card that says "
        "how to load it and what was measured; and dashboards of an SAE's features on Neuronpedia.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_share_options(parser_of_share, _count)
    parser_of_share.set_defaults(run=_share)
    return parser


def _add_compare_options(parser: argparse.ArgumentParser) -> None:
    default = ComparisonSettings()
    add = parser.add_argument
    add("--arms", nargs="+", default=default.arms, metavar="ARCHITECTURE", help="the first is the one to compare with")
    add("--layer", type=int, help="block whose residual output is hooked; the middle one if not given")
    add("--hook", help="a hook point by name instead of --layer")
    add("--model", default=default.model, help="'bundled', a TransformerLens or Hugging Face name, or a local folder")
    add("--dataset", default=default.dataset, help="'bundled', a Hugging Face name, or a local file or saved dataset")
    add("--tokens", type=_count, default=default.tokens, help="training tokens of each SAE")
    add("--k", type=int, default=default.k, help="active features per token")
    add("--d-sae", type=int, default=default.d_sae, help="number of features")
    add("--seeds", type=int, default=default.seeds, help="runs with different initialisation and data order")
    add("--recipe", choices=("paper", "saelens"), default=default.recipe, help="training settings")
    add(
        "--max-norm-multiple",
        type=_multiple,
        default=default.max_norm_multiple,
        help="drop tokens above this multiple of the median norm, in training and evaluation; 'none' keeps them",
    )
    add(
        "--plant-sinks",
        action="store_true",
        help="plant an attention sink at the start of each context; the default --max-norm-multiple drops them again",
    )
    add("--context-size", type=int, default=default.context_size, help="tokens per context, as far as the model allows")
    add("--eval-tokens", type=_count, default=default.eval_tokens, help="held-out tokens that are evaluated")
    add("--device", default=default.device, help="where everything runs: cpu, cuda, cuda:1")
    add("--output", default="runs/compare", help="folder for the SAEs, comparison.json and comparison.png")
    add("--overwrite", action="store_true", help="replace an earlier comparison in the output folder")
    add(
        "--resume",
        action="store_true",
        help="go on with a comparison that was stopped, exactly where it was; from the start if there is none yet",
    )
    add("--keep", type=int, default=2, help="newest checkpoints that are kept while a seed is trained")
    add(
        "--stop-on",
        type=_signal,
        action="append",
        default=[],
        metavar="SIGNAL",
        help="a signal that ends the run with a checkpoint, as SIGINT and SIGTERM do: USR1 for Slurm's --signal",
    )
    add("--deterministic", action="store_true", help="the same bits every time on a GPU too; slower there")
    add("--quiet", action="store_true", help="print only the tables")


def _add_benchmark_options(parser: argparse.ArgumentParser) -> None:
    default = BenchmarkSettings()
    add = parser.add_argument
    add(
        "--arms",
        nargs="+",
        default=default.arms,
        metavar="ARM",
        help="saelens_batchtopk, ..., <architecture>/<kernels>",
    )
    add("--device", default=default.device, help="cpu, cuda, cuda:1")
    add("--dtype", choices=DTYPES, default=default.dtype, help="bfloat16 is autocast; parameters are float32 in each")
    add("--d-in", type=int, default=default.d_in, help="size of the activations")
    add("--d-sae", type=int, default=default.d_sae, help="number of features")
    add("--batch", type=int, default=default.batch, help="tokens per step")
    add("--k", type=int, default=default.k, help="active features per token")
    add("--repeats", type=int, default=default.repeats, help="timed steps of each arm")
    add("--json", type=Path, metavar="FILE", help="write the figures there")
    add("--quiet", action="store_true", help="print only the tables")


def _count(text: str) -> int:
    """An integer, also written 1_500_000, 1e6, 500k or 2M."""
    factor = {"k": 1e3, "m": 1e6, "b": 1e9}.get(text[-1:].lower())
    try:
        return int(float(text[:-1]) * factor if factor else float(text))
    except (ValueError, OverflowError):  # of infinity and NaN too
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of tokens (1500000, 1.5M, 500k)") from None


def _multiple(text: str) -> float | None:
    if text.lower() == "none":
        return None
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor 'none'") from None


def _compare(options: Any) -> int:
    _hush_libraries()
    settings = ComparisonSettings(
        arms=tuple(options.arms),
        model=options.model,
        dataset=options.dataset,
        layer=options.layer,
        hook=options.hook,
        tokens=options.tokens,
        k=options.k,
        d_sae=options.d_sae,
        seeds=options.seeds,
        recipe=options.recipe,
        max_norm_multiple=options.max_norm_multiple,
        plant_sinks=options.plant_sinks,
        device=options.device,
        context_size=options.context_size,
        eval_tokens=options.eval_tokens,
    )
    folder = results = Path(options.output)

    def keep(comparison: Comparison) -> None:
        nonlocal results
        results = output.results
        for write, name in zip((write_json, draw), SUMMARY, strict=True):
            with output.file(name) as path:
                write(comparison, path)

    try:
        with (
            raising_on_signals(options.stop_on),
            deterministic_algorithms(options.deterministic),
            open_comparison(folder) as output,
            _progress(options.quiet) as progress,
        ):
            comparison = compare(
                settings,
                output,
                overwrite=options.overwrite,
                resume=options.resume,
                keep=options.keep,
                stop_signals=options.stop_on,
                on_progress=progress,
                on_seed=keep,
            )
    except StopError as stopped:
        print(stopped, file=sys.stderr)  # noqa: T201
        return stopped.exit_status
    except (KeyboardInterrupt, InterruptedException) as stopped:
        print(f"Interrupted. What was finished is in {results}; --resume goes on.", file=sys.stderr)  # noqa: T201
        return exit_status(stopped)
    console = Console()
    console.width = max(console.width, 110)  # a wrapped line is read more easily than a cut figure
    for table in as_tables(comparison):
        console.print(table)
    if not options.quiet:
        say(console, f"Written to {folder}: comparison.json, comparison.png, and a folder per SAE:")
        for arm in comparison.arms:
            say(console, f'  SAE.load_from_disk("{folder / arm.path}")')
    return 0


_NO_TERMINAL = (OSError, ValueError)
"""What writing to a terminal that is gone raises."""


@contextmanager
def _progress(quiet: bool) -> Generator[Callable[[str, int, int], None]]:
    """A progress bar per thing that is done; the next one completes those before. Warnings stand above it, each once."""
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    bar = Progress(*columns, console=Console(stderr=True), disable=quiet)
    tasks: dict[str, Any] = {}

    def progress(what: str, done: int, total: int) -> None:
        if what not in tasks:
            for task in bar.task_ids:
                bar.update(task, completed=bar.tasks[task].total)
            tasks[what] = bar.add_task(visible(what), total=total)
        bar.update(tasks[what], completed=done, total=total)

    told: set[str] = set()

    def tell(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
        first_line = f"{category.__name__}: {str(message).strip()}".splitlines()[0]
        if first_line not in told:
            told.add(first_line)
            with suppress(*_NO_TERMINAL):
                say(bar.console, without_secrets(first_line), wrap=False)

    with warnings.catch_warnings():
        warnings.showwarning = tell
        with suppress(*_NO_TERMINAL):
            bar.start()
        try:
            yield shown(progress)
        finally:
            with suppress(*_NO_TERMINAL):
                bar.stop()


def _benchmark(options: Any) -> int:
    _hush_libraries()
    chosen: dict[str, Any] = {f.name: getattr(options, f.name) for f in fields(BenchmarkSettings)}
    chosen["arms"] = tuple(options.arms)
    settings = BenchmarkSettings(**chosen)
    with _progress(options.quiet) as progress:
        result = benchmark(settings, progress)
    console = Console()
    console.width = max(console.width, 140)  # names and figures whole
    for table in result.tables():
        console.print(table)
    if options.json:
        result.write(options.json)
    return 0


def _evaluate(options: Any) -> int:
    _hush_libraries()
    try:
        with _progress(options.quiet) as progress:
            tables = run_evaluate(options, progress)
    except KeyboardInterrupt as stopped:
        print(f"Interrupted. Run the same command again to go on; see {options.output}.", file=sys.stderr)  # noqa: T201
        return exit_status(stopped)
    console = Console()
    console.width = max(console.width, 140)  # names of measures whole
    for table in tables:
        console.print(table)
    if not options.quiet:
        say(console, f"Written to {options.output}: evaluation.json, report.html")
    return 0


def _ground_truth(options: Any) -> int:
    _hush_libraries()
    with _progress(options.quiet) as progress:
        tables = run_ground_truth(options, progress)
    console = Console()
    console.width = max(console.width, 120)
    for table in tables:
        console.print(table)
    if not options.quiet:
        say(console, f"Written to {options.output}: ground_truth.json")
    return 0


def _share(options: Any) -> int:
    check_options(options)
    try:
        if options.repo:
            print(share_on_hub(options))  # noqa: T201
        if options.neuronpedia:
            _hush_libraries()
            with _progress(options.quiet) as progress:
                message = share_on_neuronpedia(options, progress)
            print(message)  # noqa: T201
    except KeyboardInterrupt as stopped:
        print("Interrupted. Run the same command again to go on.", file=sys.stderr)  # noqa: T201
        return exit_status(stopped)
    return 0


def _hush_libraries() -> None:
    """One progress bar of ours instead of several of other libraries', and their errors only."""
    tqdm.__init__ = partialmethod(tqdm.__init__, disable=True)  # pyright: ignore
    for said_better in (
        "Dataset is not tokenized",
        "All samples in the training dataset have been exhausted",
        "Sparse invariant checks are implicitly disabled",  # torch's, of how SAELens makes TopK's codes
    ):
        warnings.filterwarnings("ignore", message=said_better)
    for library in ("sae_lens", "huggingface_hub"):
        logging.getLogger(library).setLevel(logging.ERROR)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()


_TRAIN_HELP = """\
saelens-cosine train takes the flags of SAELens' training runner, which follow, and these:

  --max-norm-multiple M  drop tokens whose norm is above M times their batch's median before they reach the SAE
                         (default 10; 'none' keeps them). The share dropped is stored in the SAE's metadata.
  --resume               go on from the newest checkpoint that is whole, exactly where it was; from the start if there is
                         none yet. Checkpoints are in --checkpoint_path, or in a folder beside --output_path.
  --overwrite            replace an earlier run in these folders
  --keep N               newest checkpoints that are kept (default 2)
  --stop-on SIGNAL       a signal that ends the run with a checkpoint, as SIGINT and SIGTERM do: USR1 for Slurm's --signal
  --deterministic        the same bits every time on a GPU too; slower there

--model_name bundled and --dataset_path bundled name the language model and the corpus that ship with the package.
--n_checkpoints is 10 if not given; --checkpoint_path none writes none.
"""


def _signal(text: str) -> int:
    name = text.upper().removeprefix("SIG")
    number = getattr(signal, f"SIG{name}", None)
    if not isinstance(number, signal.Signals) or number in (signal.SIGKILL, signal.SIGSTOP):
        raise argparse.ArgumentTypeError(f"{text!r} is no signal that a run can be told of; pass USR1, HUP, ...")
    return number


def _train(arguments: list[str]) -> int:
    extra = _Parser(prog="saelens-cosine train", add_help=False, allow_abbrev=False)
    extra.add_argument("--max-norm-multiple", "--max_norm_multiple", type=_multiple, default=10.0)
    extra.add_argument("--resume", action="store_true")
    extra.add_argument("--overwrite", action="store_true")
    extra.add_argument("--keep", type=int, default=2)
    extra.add_argument("--stop-on", "--stop_on", type=_signal, action="append", default=[])
    extra.add_argument("--deterministic", action="store_true")
    options, rest = extra.parse_known_args(arguments)
    if not rest or {"-h", "--help"} & set(rest):
        print(_TRAIN_HELP)  # noqa: T201
    try:
        with raising_on_signals(options.stop_on), deterministic_algorithms(options.deterministic):
            norm_filter = train(
                rest,
                options.max_norm_multiple,
                resume=options.resume,
                overwrite=options.overwrite,
                keep=options.keep,
                stop_signals=options.stop_on,
            )
    except StopError as stopped:
        print(stopped, file=sys.stderr)  # noqa: T201
        return stopped.exit_status
    except KeyboardInterrupt as stopped:
        print("Interrupted outside of training. Run the same command with --resume to go on.", file=sys.stderr)  # noqa: T201
        return exit_status(stopped)
    except FAULTS as error:
        return _fault("train", error)
    print(  # noqa: T201
        f"High-norm tokens dropped: {norm_filter.dropped_share:.2%} of {norm_filter.tokens_seen:,}.", file=sys.stderr
    )
    return 0

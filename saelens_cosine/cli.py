"""`saelens-cosine`: collects the commands, runs one of them, and says in a line what stopped it."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sae_lens.training._interruption import InterruptedException

from saelens_cosine.console import tell, visible
from saelens_cosine.experiments.benchmark.command import add_benchmark_command
from saelens_cosine.experiments.compare.command import add_compare_command
from saelens_cosine.experiments.evaluate.command import add_evaluate_command
from saelens_cosine.experiments.ground_truth.command import add_ground_truth_command
from saelens_cosine.experiments.plan.command import add_plan_command
from saelens_cosine.faults import FAULTS, line_of
from saelens_cosine.files.secrets import as_typed, logged_without_secrets, without_secrets
from saelens_cosine.loading.command import add_convert_command
from saelens_cosine.progress import unread
from saelens_cosine.saebench import SAEBenchError
from saelens_cosine.sharing.command import add_share_command
from saelens_cosine.terminal.options import Parser
from saelens_cosine.training.alone import ALONE, Alone
from saelens_cosine.training.command import add_train_command, run_train
from saelens_cosine.training.resuming.stop import StopError, exit_status, raising_on_signals
from saelens_cosine_command import outline

COMMANDS = (
    add_train_command,
    add_compare_command,
    add_benchmark_command,
    add_plan_command,
    add_evaluate_command,
    add_ground_truth_command,
    add_convert_command,
    add_share_command,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit status."""
    args = list(sys.argv[1:] if arguments is None else arguments)
    with raising_on_signals(), logged_without_secrets(), unread():
        if "TORCHELASTIC_RUN_ID" not in os.environ:
            return _run(args)
        from saelens_cosine.ranks.launch import run_ranks  # nothing distributed is imported by one process

        return run_ranks(args, _run)


def _run(args: list[str], processes: Alone = ALONE, instead: Mapping[str, Callable[[Any], int]] | None = None) -> int:
    parser = _parser()
    if args[:1] == ["train"]:  # everything behind it is SAELens' own
        options = argparse.Namespace(command="train", run=lambda _: run_train(args[1:], processes))
    else:
        options, unknown = parser.parse_known_args(args)
        if unknown:
            command = f"{parser.prog} {options.command}"
            tell(f"{command}: unrecognized arguments: {as_typed(unknown)}. See {command} --help.")
            return 2
    options.command_line = (parser.prog, *args)
    try:
        run = options.run if instead is None else instead.get(options.command, options.run)
        return run(options)
    except StopError as stopped:
        tell(str(stopped))
        return exit_status(stopped)
    except SAEBenchError as error:  # a line for each eval
        tell(visible(without_secrets(f"saelens-cosine {options.command}: {error}")))
        return 2
    except FAULTS as error:
        line = line_of(error)
        if line is None:  # not the user's
            raise
        tell(visible(f"saelens-cosine {options.command}: {line}"))
        return 2
    except (KeyboardInterrupt, InterruptedException) as stopped:
        interrupted = getattr(options, "interrupted", "Nothing was written.")
        tell(f"Interrupted. {interrupted}")
        return exit_status(stopped)


def _parser() -> argparse.ArgumentParser:
    parser, commands = outline(Parser)
    for add in COMMANDS:
        add(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())

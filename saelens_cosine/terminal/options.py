"""What the options of several commands share: how values are read, and how a settings dataclass is made of them."""

from __future__ import annotations

import argparse
import signal
from collections.abc import Callable
from dataclasses import fields
from typing import Any, NoReturn, TypeVar

from saelens_cosine.files.secrets import without_secrets
from saelens_cosine_command import COMMANDS

Settings = TypeVar("Settings")


class Parser(argparse.ArgumentParser):
    """Answers a wrong option with a line, not with all that there are."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {without_secrets(message)}. See {self.prog} --help.\n")


def add_command(commands: Any, name: str, run: Callable[[Any], int], *, description: str) -> argparse.ArgumentParser:
    """A subcommand whose help shows defaults; `run` takes the options and returns the exit status."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=COMMANDS[name], description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.set_defaults(run=run)
    return parser


def settings_from(kind: type[Settings], options: Any, **changes: Any) -> Settings:
    """A settings dataclass from the options that are called as its fields; lists become tuples, and `changes` count before."""
    found = {part.name: getattr(options, part.name) for part in fields(kind) if hasattr(options, part.name)}  # pyright: ignore[reportArgumentType]
    found = {name: tuple(value) if isinstance(value, list) else value for name, value in found.items()}
    return kind(**{**found, **changes})


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """How a run that writes checkpoints stops, and goes on."""
    add = parser.add_argument
    add(
        "--resume",
        action="store_true",
        help="go on with a run that was stopped, exactly where it was; from the start if there is none yet",
    )
    add("--keep", type=int, default=2, help="newest checkpoints that are kept")
    add(
        "--stop-on",
        "--stop_on",
        type=signal_number,
        action="append",
        default=[],
        metavar="SIGNAL",
        help="a signal that ends the run with a checkpoint, as SIGINT and SIGTERM do: USR1 for Slurm's --signal",
    )
    add("--deterministic", action="store_true", help="the same bits every time on a GPU too; slower there")


def add_profile_option(parser: argparse.ArgumentParser) -> None:
    """Where the time goes."""
    parser.add_argument(
        "--profile",
        action="store_true",
        help="say where the time of this run went, part by part, and write it beside the results, as JSON",
    )


def count(text: str) -> int:
    """An integer, also written 1_500_000, 1e6, 500k or 2M."""
    factor = {"k": 1e3, "m": 1e6, "b": 1e9}.get(text[-1:].lower())
    try:
        return int(float(text[:-1]) * factor if factor else float(text))
    except (ValueError, OverflowError):  # of infinity and NaN too
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of tokens (1500000, 1.5M, 500k)") from None


def multiple(text: str) -> float | None:
    """A number, or None for `none`."""
    if text.lower() == "none":
        return None
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor 'none'") from None


def signal_number(text: str) -> int:
    """USR1, SIGUSR1, hup: a signal that a process can be told of."""
    name = text.upper().removeprefix("SIG")
    number = getattr(signal, f"SIG{name}", None)
    if not isinstance(number, signal.Signals) or number in (signal.SIGKILL, signal.SIGSTOP):
        raise argparse.ArgumentTypeError(f"{text!r} is no signal that a run can be told of; pass USR1, HUP, ...")
    return number

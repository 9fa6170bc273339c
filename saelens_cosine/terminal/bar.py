"""A progress bar for a command, lines where there is no terminal, and other libraries' bars out of their way."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Generator
from contextlib import contextmanager, suppress
from functools import partialmethod
from typing import Any

import datasets
import transformers
from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from tqdm.auto import tqdm

from saelens_cosine.console import say, visible
from saelens_cosine.files.secrets import without_secrets
from saelens_cosine.progress import Progress, shown
from saelens_cosine.terminal.lines import ProgressLines

_NO_TERMINAL = (OSError, ValueError)
"""What writing to a terminal that is gone raises."""


@contextmanager
def progress_bar(quiet: bool) -> Generator[Progress]:
    """A progress bar per thing that is done; the next one completes those before. Warnings stand above it, each once.

    Where there is no terminal (`nohup`, Slurm, CI), lines: see `ProgressLines`.
    """
    _hush_libraries()
    console = Console(stderr=True)
    told: set[str] = set()

    def tell(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
        first_line = f"{category.__name__}: {str(message).strip()}".splitlines()[0]
        if first_line not in told:
            told.add(first_line)
            with suppress(*_NO_TERMINAL):
                say(console, without_secrets(first_line), wrap=False)

    display = _bar(console, quiet) if quiet or console.is_terminal else _lines()
    with warnings.catch_warnings():
        warnings.showwarning = tell
        with display as progress:
            yield shown(progress)


@contextmanager
def progress_lines(quiet: bool) -> Generator[Progress | None]:
    """For a command that leaves the bar to SAELens: lines where there is no terminal, without that bar; None on a terminal, and
    if `quiet`, then without the bar too."""
    if not quiet and Console(stderr=True).is_terminal:
        yield None
        return
    before = vars(tqdm).get("__init__")
    _stop_tqdm()
    try:
        if quiet:
            yield None
        else:
            with _lines() as progress:
                yield shown(progress)
    finally:
        del tqdm.__init__
        if before is not None:  # not the parent's
            tqdm.__init__ = before


@contextmanager
def _bar(console: Console, quiet: bool) -> Generator[Progress]:
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    bar = Bar(*columns, console=console, disable=quiet)
    tasks: dict[str, Any] = {}

    def progress(what: str, done: int, total: int) -> None:
        if what not in tasks:
            for task in bar.task_ids:
                bar.update(task, completed=bar.tasks[task].total)
            tasks[what] = bar.add_task(visible(what), total=total)
        bar.update(tasks[what], completed=done, total=total)

    with suppress(*_NO_TERMINAL):
        bar.start()
    try:
        yield progress
    finally:
        with suppress(*_NO_TERMINAL):
            bar.stop()


@contextmanager
def _lines() -> Generator[Progress]:
    """Of what an error ends there is no last line: the error has one."""
    lines = ProgressLines(_write_line)
    yield lines
    lines.end()


def _write_line(line: str) -> None:
    with suppress(*_NO_TERMINAL):
        print(line, file=sys.stderr, flush=True)  # noqa: T201


def _stop_tqdm() -> None:
    tqdm.__init__ = partialmethod(tqdm.__init__, disable=True)  # pyright: ignore


def _hush_libraries() -> None:
    """One progress bar of ours instead of several of other libraries', and their errors only."""
    _stop_tqdm()
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

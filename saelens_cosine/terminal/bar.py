"""A progress bar for a command, and other libraries' out of its way."""

from __future__ import annotations

import logging
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

_NO_TERMINAL = (OSError, ValueError)
"""What writing to a terminal that is gone raises."""


@contextmanager
def progress_bar(quiet: bool) -> Generator[Progress]:
    """A progress bar per thing that is done; the next one completes those before. Warnings stand above it, each once."""
    _hush_libraries()
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    bar = Bar(*columns, console=Console(stderr=True), disable=quiet)
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

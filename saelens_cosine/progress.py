"""Tell of progress without staking the run on it."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from typing import Any

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is."""


class _Unread:
    """A stream that nobody may read any more; what is written to it then is dropped.

    Args:
        stream: such as `sys.stderr`.
        failures: errors of writing that are no reason to stop.
    """

    def __init__(self, stream: Any, failures: tuple[type[Exception], ...]):
        self._stream, self._failures = stream, failures

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
        except self._failures:
            self._drop()
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except self._failures:
            self._drop()

    def _drop(self) -> None:
        with suppress(OSError, ValueError):  # else Python fails again when it ends
            nowhere = os.open(os.devnull, os.O_WRONLY)
            try:
                os.dup2(nowhere, self._stream.fileno())
            finally:
                os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def unread() -> Generator[None]:
    """Have a run go on in a with block where its terminal or the reader of its pipe is gone, as in `2>&1 | head`."""
    out: Any = _Unread(sys.stdout, (BrokenPipeError,))  # results: a full disk is worth an error
    err: Any = _Unread(sys.stderr, (OSError, ValueError))
    with redirect_stdout(out), redirect_stderr(err):
        yield


def shown(on_progress: Progress | None) -> Progress:
    """What calls `on_progress` for as long as that works: a display that breaks is told of once, and the run goes on without it."""
    display = on_progress

    def progress(what: str, done: int, total: int) -> None:
        nonlocal display
        if display is None:
            return
        try:
            display(what, done, total)
        except Exception as error:  # a caller's code; what shall stop a run is a KeyboardInterrupt
            display = None
            warnings.warn(
                f"The display of progress has failed ({type(error).__name__}: {error}); the run goes on without it.",
                stacklevel=2,
            )

    return progress

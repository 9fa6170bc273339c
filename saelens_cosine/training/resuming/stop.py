"""Stop a run between two steps when its process is told to."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any


class StopError(Exception):
    """
    Training has stopped because a signal said so.

    Args:
        signal_number: which one.
        message: where things are and how to go on.
    """

    def __init__(self, signal_number: int, message: str):
        super().__init__(message)
        self.signal_number = signal_number


class SignalError(KeyboardInterrupt):
    """A signal has come, where there is nothing to finish first.

    Args:
        signal_number: which one.
    """

    def __init__(self, signal_number: int):
        super().__init__()
        self.signal_number = signal_number


def exit_status(stopped: BaseException) -> int:
    """143 after SIGTERM, 130 after SIGINT, by the exception that has ended a command: 128 and the signal's number, as shells have it."""
    return 128 + (stopped.signal_number if isinstance(stopped, StopError | SignalError) else signal.SIGINT)


def raising_on_signals(further: Iterable[int] = ()) -> AbstractContextManager[None]:
    """Have SIGTERM and `further` signals end a command as SIGINT does, so that locks and unfinished files go, and SIGINT so too,
    whatever handler SAELens has left from an earlier training in this process. In a thread nothing changes."""

    def end(number: int, _frame: Any) -> None:
        raise SignalError(number)

    return handled({signal.SIGINT: signal.default_int_handler, **dict.fromkeys((signal.SIGTERM, *further), end)})


@contextmanager
def handled(handlers: Mapping[int, Any]) -> Generator[None]:
    """Handle signals in a with block; the handlers from before come back at its end. In a thread nothing changes."""
    before: dict[int, Any] = {}
    try:
        for number, handler in handlers.items():
            before[number] = signal.signal(number, handler)
    except ValueError:  # only the main thread may
        pass
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class StopRequests:
    """A handler that notes which signal has come; the second of them ends the process at once, and so does the first where nothing has begun.

    Args:
        further: signals that are taken beside SIGINT and SIGTERM.
    """

    def __init__(self, further: Iterable[int] = ()):
        self.received: int | None = None
        self.begun: Callable[[], bool] = lambda: True
        self.signals = (signal.SIGINT, signal.SIGTERM, *further)

    def __call__(self, number: int, _frame: Any) -> None:
        if self.received is not None:
            os._exit(128 + number)  # files are written whole or not at all
        if not self.begun():
            raise SignalError(number)
        self.received = number

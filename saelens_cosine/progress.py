"""Tell of progress without staking the run on it."""

from __future__ import annotations

import warnings
from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is."""


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

"""The one error that a foreign checkpoint can cause."""

from __future__ import annotations

from collections.abc import Iterable


class CheckpointError(ValueError):
    """A checkpoint that is damaged, is not what its layout says, or has no equal in SAELens.

    The message names the file, what was found, what was expected, and the way out if there is one. Nothing was executed
    and nothing was written.
    """


def listed(names: Iterable[str], most: int = 30) -> str:
    """Names for a message, no more of them than a screen holds."""
    every = sorted(names)
    return (", ".join(every[:most]) or "nothing") + (f", ... ({len(every)} in all)" if len(every) > most else "")

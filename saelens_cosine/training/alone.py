"""What a run asks of its processes: here there is one. `ranks.team.Team` answers for several."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

Value = TypeVar("Value")


class Alone:
    """One process. Methods are called by all processes of a run in the same order, since elsewhere they wait for each other."""

    first = True
    """Whether this process writes files and tells how far the run has come."""

    def from_first(self, value: Value) -> Value:
        """What the first process has."""
        return value

    def check_alike(self, settings: Mapping[str, Any]) -> None:
        """Compare the run's settings with those of the other processes.

        Raises:
            ValueError: they differ; names rank, setting and both values.
        """

    def share(self, store: Any) -> None:
        """Have each process compute activations of its part of the text, in a SAELens store that has been built but not read."""

    def split(self, trainer: Any) -> None:
        """Leave each process its part of the features, in a SAELens trainer that is about to begin or to go on.

        Raises:
            ValueError: the SAE cannot be split.
        """

    def whole(self, trainer: Any) -> Any:
        """The trainer as one process would have it, for saving."""
        return trainer

    def claim(self, name: str) -> bool:
        """Whether a piece of work is this process's; nobody else is told so."""
        return True

    def wait(self) -> None:
        """Until all processes have come here."""

    def signal(self, received: int | None) -> int | None:
        """A signal that any process has received."""
        return received


ALONE = Alone()

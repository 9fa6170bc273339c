"""Documents that are nearly copies of held-out ones, found by the runs of words that both hold.

A document is compared by its runs of 32 words (of 32 token ids, where it is tokenised), one starting at each word; a shorter
one by all of it at once. Words are what white space parts, so in scripts without spaces only exact copies are found.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np

RUN_WORDS = 32
"""Words of a run. Two texts that were written apart hardly ever share that many in a row; licences and tables do."""

MOST_SHARED = 1 / 3
"""Share of a training document's runs that held-out documents may hold."""

_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd, its bits spread: 2**64 over the golden ratio

Runs = np.ndarray[Any, Any]


def runs(document: str | Sequence[int]) -> Runs:
    """A number for each run of words of a document, `[max(1, words - 31)]` uint64; equal runs have equal numbers in one process."""
    words = document.split() if isinstance(document, str) else document
    numbers = np.fromiter(map(hash, words), dtype=np.int64, count=len(words)).astype(np.uint64)
    length = min(RUN_WORDS, len(numbers))
    found = np.zeros(len(numbers) - length + 1, dtype=np.uint64)
    for i in range(length):  # a polynomial modulo 2**64, all runs at once
        found = found * _FACTOR + numbers[i : i + len(found)]
    return found


def document_of(row: Mapping[str, Any]) -> str | Sequence[int]:
    """The document in a row of a dataset, from the column that SAELens' store reads.

    Raises:
        ValueError: there is none in it.
    """
    for column in ("tokens", "input_ids", "text", "problem"):
        if column in row:
            if row[column] is None:
                raise ValueError(f"A row of the dataset has nothing in its column {column!r}; leave such rows out.")
            return row[column]
    return str(row)


class HeldOutRuns:
    """
    The runs of held-out documents, read when first asked for.

    Args:
        documents (Iterable[Mapping[str, Any]]): Rows of a dataset.
    """

    def __init__(self, documents: Iterable[Mapping[str, Any]]):
        self._documents = documents

    @cached_property
    def _runs(self) -> Runs:
        return np.unique(np.concatenate([runs(document_of(row)) for row in self._documents]))

    def shared(self, document: str | Sequence[int]) -> float:
        """Share of a document's runs that held-out documents hold."""
        own = runs(document)
        places = np.searchsorted(self._runs, own).clip(max=len(self._runs) - 1)
        return float((self._runs[places] == own).mean())

    def leaves(self, row: Mapping[str, Any]) -> bool:
        """Whether a row may be trained on: at most a third of its runs are held out."""
        return self.shared(document_of(row)) <= MOST_SHARED

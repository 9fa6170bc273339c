"""What SAELens' activation store says of a text that is shorter than the training: sizes, and the way out."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from sae_lens import ActivationsStore


def name_sizes_of_short_text(store: ActivationsStore) -> None:
    """Have a store warn, with sizes, when its text has been read once and begins again, and refuse one that gives nothing.

    Wrapped are the two methods that its mixing buffer is filled from, and the one that begins to read. Attach before training.
    """
    text = _Text(store)
    for name in ("_iterate_filtered_activations", "_iterate_filtered_multi_hook_activations"):
        vars(store)[name] = partial(text.watched, getattr(store, name))


class _Text:
    def __init__(self, store: Any):
        self.store = store
        self.cached = store.cached_activation_dataset
        self.rows: int | None = None  # of one pass, when it is over
        if self.cached is None:
            self._begin = store._iterate_tokenized_sequences
            vars(store)["_iterate_tokenized_sequences"] = self._begin_again

    def _begin_again(self) -> Iterator[Any]:
        if self.rows is None:
            self.rows = self.store.n_dataset_processed
        return self._begin()

    def watched(self, activations: Callable[[], Iterator[Any]]) -> Iterator[Any]:
        """What the method gives, tensors `[tokens, d_in]` or such by hook, for as long as it is asked."""
        store, read, told = self.store, 0, False
        whole = store.n_dataset_processed == 0  # and not one that is gone on with
        if self.cached is not None and len(self.cached) < store.store_batch_size_prompts:
            raise ValueError(
                f"The cached activations are {len(self.cached)} contexts, and {store.store_batch_size_prompts} are read at a time; "
                f"pass --store_batch_size_prompts {len(self.cached)} or less, or cache more."
            )
        source = activations()
        while True:
            row = 0 if self.cached is None else store.current_row_idx
            try:
                batch = next(source)
            except ValueError as error:
                if not str(error).startswith("Unable to fill buffer"):
                    raise
                raise ValueError(
                    f"The text has {self.rows} rows and is shorter than one context of {store.context_size} tokens; use a larger "
                    "dataset, or a smaller context size."
                ) from error
            if self.cached is not None and store.current_row_idx <= row:
                self.rows = len(self.cached)
            tokens = len(batch if not isinstance(batch, dict) else next(iter(batch.values())))
            if self.rows is not None and not told:
                told = True
                if read + tokens == 0:
                    raise ValueError(
                        f"All tokens of the text, {self.rows:,} rows, are left out; there is nothing to train on."
                    )
                self._tell(read if whole else None)
            read += tokens
            yield batch

    def _tell(self, tokens: int | None) -> None:
        size = "" if tokens is None else f" ({self.rows:,} rows, {tokens:,} tokens in whole batches)"
        warnings.warn(
            f"The text has been read to its end{size} and begins again, for {self.store.total_training_tokens:,} tokens are to be "
            "trained on. Use a larger dataset, or train on fewer tokens, if each is to be seen once.",
            stacklevel=2,
        )

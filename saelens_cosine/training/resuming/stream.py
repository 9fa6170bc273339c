"""Where a SAELens activation store stands in its text and in its mixing buffer, and how another one goes on from there.

SAELens notes how many rows it has read. What is lost with that: the rest of the row it was in, the tokens of its mixing buffer, and
the row itself where one row gives several contexts. All of this stands in the local variables of generators of SAELens, where it
is read; a store that goes on gets it as the first things that its generators see. So every batch is cut and shuffled by SAELens' code,
and of its attributes the rows (`dataset`) and the loader (`get_data_loader`, or `get_multi_hook_data_loader`) are wrapped; in a store
that goes on, its own going on (`load_from_checkpoint`) does nothing.
"""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from sae_lens import ActivationsStore
from sae_lens.training.mixing_buffer import mixing_buffer

_SHUFFLED = "BufferShuffledExamplesIterable"
"""What Hugging Face's `IterableDataset.shuffle` makes: the one kind whose `state_dict` leaves out rows that it holds."""


FEWEST_PIECES = 8
"""In which a mixing buffer is filled, if there are that many: fewer would take more memory beside it."""


@dataclass(frozen=True)
class StreamState:
    """
    A place in a store's stream of batches.

    Args:
        place (dict[str, Any]): What JSON holds: rows taken in this pass through the text, the dataset's own state, rows counted by SAELens, row of a cache.
        tensors (dict[str, torch.Tensor]): `tokens`, the rest of the row `[n]`; `serving` and `storage`, activations `[n, d]` that come next and that are mixed in later; `rng`, torch's.
    """

    place: dict[str, Any]
    tensors: dict[str, torch.Tensor]


class Rows:
    """A dataset's rows, which can be gone on with."""

    def __init__(self, dataset: Any):
        self.dataset = dataset
        self._taken = 0
        self._start: dict[str, Any] | None = None

    def __iter__(self) -> Iterator[Any]:
        start, self._start = self._start, None
        self._taken = start["taken"] if start else 0
        for row in self._rows(start):
            self._taken += 1
            yield row
        self._taken = 0

    def __getattr__(self, name: str) -> Any:
        if name == "dataset":  # not there yet: it is being unpickled
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def state(self) -> dict[str, Any]:
        """Rows taken in this pass, and the dataset's own state if that is all there is to it."""
        if self._start is not None:  # the rest of a row is still being read
            return self._start
        keeps = self._taken > 0 and _keeps_its_place(self.dataset)
        return {"taken": self._taken, "dataset": self.dataset.state_dict() if keeps else None}

    @property
    def in_a_row(self) -> bool:
        """Whether the last row that was taken is being read."""
        return self._start is None and self._taken > 0

    def start_at(self, state: dict[str, Any]) -> None:
        """Begin the next pass behind the rows that were taken; the pass after that begins at the first row again."""
        self._start = state if state["taken"] else None

    def _rows(self, start: dict[str, Any] | None) -> Iterator[Any]:
        if start is None:
            return iter(self.dataset)
        if start["dataset"] is not None:
            return self._behind(start["dataset"])
        if hasattr(self.dataset, "select"):
            return iter(self.dataset.select(range(start["taken"], len(self.dataset))))
        return islice(self.dataset, start["taken"], None)  # read again, as a shuffle buffer needs

    def _behind(self, state: dict[str, Any]) -> Iterator[Any]:
        self.dataset.load_state_dict(state)
        rows = iter(self.dataset)
        first = next(rows, None)  # only now is the state taken up
        self.dataset.load_state_dict(None)
        if first is not None:
            yield first
            yield from rows


class MixedBatches:
    """SAELens' mixing buffer, which can be gone on with.

    Args:
        settings: `buffer_size`, `batch_size` and `mix_fraction` of SAELens' `mixing_buffer`.
        source: activations `[n, d]`, as the language model gives them.
        serving: activations that are handed out first.
        storage: activations that wait to be mixed with the next from the source.
    """

    def __init__(
        self,
        settings: dict[str, Any],
        source: Iterator[torch.Tensor],
        serving: torch.Tensor | None = None,
        storage: torch.Tensor | None = None,
    ):
        self.settings, self.source, self.serving, self.storage = settings, source, serving, storage
        self._mixed: Generator[torch.Tensor] | None = None

    def __iter__(self) -> Iterator[torch.Tensor]:
        return self

    def __next__(self) -> torch.Tensor:
        if self.serving is not None and len(self.serving):
            size = self.settings["batch_size"]
            batch, self.serving = self.serving[:size], self.serving[size:]
            return batch
        if self._mixed is None:
            self._mixed = mixing_buffer(activations_loader=self._source(), **self.settings)  # pyright: ignore[reportAttributeAccessIssue]
            self.serving = None
        return next(self._mixed)  # pyright: ignore[reportArgumentType]

    def _source(self) -> Iterator[torch.Tensor]:
        """The same activations in few pieces: SAELens' buffer copies all that it holds for each that is added to it.

        It serves as soon as it is full, so a piece ends there.
        """
        size = self.settings["buffer_size"]
        pieces = [] if self.storage is None else [self.storage]
        held = pending = sum(map(len, pieces))
        self.storage = None
        for activations in self.source:
            pieces.append(activations)
            held, pending = held + len(activations), pending + len(activations)
            if held >= size or pending * FEWEST_PIECES >= size:
                piece = torch.cat(pieces)
                pieces.clear()
                yield piece
                held, pending = len(_locals(self._mixed, "storage_buffer")["storage_buffer"]), 0
        if pieces:
            yield torch.cat(pieces)

    def state(self) -> dict[str, torch.Tensor]:
        """What is handed out next, and what waits to be mixed in."""
        if self._mixed is None:
            found = {"serving": self.serving, "storage": self.storage}
        else:
            here = _locals(self._mixed, "serving_buffer", "batch_idx", "batch_size", "storage_buffer")
            done = (here["batch_idx"] + 1) * here["batch_size"]
            found = {"serving": here["serving_buffer"][done:], "storage": here["storage_buffer"]}
        return {name: tensor for name, tensor in found.items() if tensor is not None}


class ResumableStream:
    """
    A store's stream of training batches, with its place.

    Args:
        store: of a SAELens runner that has been built but not run, after what else is attached to it.
        prefetched: batches that SAELens' prefetcher may be ahead by; None without one.
    """

    def __init__(self, store: ActivationsStore, prefetched: int | None = None):
        self.store = store
        self._rest: torch.Tensor | None = None
        self._start: dict[str, torch.Tensor] = {}
        self._batches: MixedBatches | None = None
        self._ahead: deque[tuple[int, StreamState]] | None = (
            None if prefetched is None else deque(maxlen=prefetched + 3)
        )
        self._made = 0
        self.on_fill: Callable[[int, int], None] = _untold
        """Called with the tokens that the mixing buffer holds, and those it will, until the first batch is made; then with all."""
        if store.dataset is not None:
            store.dataset = Rows(store.dataset)  # pyright: ignore[reportAttributeAccessIssue]
        store.get_data_loader = self._single
        store.get_multi_hook_data_loader = self._multiple

    @property
    def begun(self) -> bool:
        """Whether a batch has been made; the first one takes a whole mixing buffer of text."""
        return self._made > 0

    def state(self, batches: int) -> StreamState:
        """The place behind this many batches of this process; without a prefetcher that is where the store stands."""
        if self._ahead is None:
            return self._now()
        return next(state for made, state in list(self._ahead) if made == batches)

    def restore(self, state: StreamState) -> None:
        """Go on from a place; before the first batch is taken."""
        store, place, device = self.store, state.place, self.store.device
        store.n_dataset_processed = place["n_dataset_processed"]
        if "cached_row" in place:
            store.current_row_idx = place["cached_row"]
        if store.dataset is not None:
            store.dataset.start_at(place["rows"])  # pyright: ignore[reportAttributeAccessIssue]
        rest = state.tensors.get("tokens")
        if rest is not None and len(rest):
            self._begin_with(rest.to(device))
        self._start = {name: state.tensors[name].to(device) for name in ("serving", "storage") if name in state.tensors}
        torch.set_rng_state(state.tensors["rng"])
        # SAELens would go to where its prefetcher had read to, while the next one reads already
        vars(store)["load_from_checkpoint"] = _nothing

    def _begin_with(self, rest: torch.Tensor) -> None:
        """The rest of a row is the first row that SAELens cuts into contexts."""
        store = self.store
        rows = store._iterate_raw_dataset_tokens  # pyright: ignore[reportPrivateUsage]

        def begun() -> Generator[torch.Tensor]:
            del vars(store)["_iterate_raw_dataset_tokens"]  # for this pass only
            self._rest = None
            yield rest
            yield from rows()

        self._rest = rest
        vars(store)["_iterate_raw_dataset_tokens"] = begun

    def _now(self) -> StreamState:
        store = self.store
        place: dict[str, Any] = {"n_dataset_processed": store.n_dataset_processed}
        tensors: dict[str, torch.Tensor] = {"rng": torch.get_rng_state()}
        if store.cached_activation_dataset is not None:
            place["cached_row"] = store.current_row_idx
        if isinstance(store.dataset, Rows):
            place["rows"] = store.dataset.state()
            place["n_dataset_processed"] += store.dataset.in_a_row  # SAELens counts a row when it takes the next
            cut: Any = getattr(store, "iterable_sequences", None)
            inner = None if cut is None else cut.gi_yieldfrom
            if self._rest is not None:  # nothing of it has been read yet
                tensors["tokens"] = self._rest
            elif inner is not None and not store.disable_concat_sequences:
                here = _locals(inner, "tokens", "offset")
                tensors["tokens"] = here["tokens"][here["offset"] :]
        if self._batches is not None:
            tensors |= self._batches.state()
        return StreamState(place, tensors)

    def _mixed(self, source: Iterator[torch.Tensor]) -> Iterator[torch.Tensor]:
        store = self.store
        size = store.n_batches_in_buffer * store.training_context_size
        settings = {
            "buffer_size": size,
            "batch_size": store.train_batch_size_tokens,
            "mix_fraction": store.activations_mixing_fraction,
        }
        held = len(self._start.get("storage", ()))
        self._batches = MixedBatches(settings, self._filling(source, held, size), **self._start)
        self._start = {}
        for batch in self._batches:
            if not self.begun:
                self.on_fill(size, size)
            self._made += 1
            if self._ahead is not None:
                self._ahead.append((self._made, self._now()))
            yield batch

    def _filling(self, source: Iterator[torch.Tensor], held: int, size: int) -> Iterator[torch.Tensor]:
        for activations in source:
            held += len(activations)
            if not self.begun and held < size:
                self.on_fill(held, size)
            yield activations

    def _single(self) -> Iterator[torch.Tensor]:
        return self._mixed(self.store._iterate_filtered_activations())  # pyright: ignore[reportPrivateUsage]

    def _multiple(self) -> Iterator[dict[str, torch.Tensor]]:
        """SAELens' `multi_hook_concat_split_iter`, around a buffer that can be gone on with."""
        store = self.store
        hooks, sizes = store._hook_names, store._hook_d_ins  # pyright: ignore[reportPrivateUsage]
        if hooks is None or sizes is None:
            raise RuntimeError("The store was not built for several hooks (ActivationsStore.from_config_multi_hook).")
        widths = [sizes[hook] for hook in hooks]
        at_hooks = store._iterate_filtered_multi_hook_activations()  # pyright: ignore[reportPrivateUsage]
        for batch in self._mixed(torch.cat([found[hook] for hook in hooks], dim=1) for found in at_hooks):
            yield dict(zip(hooks, batch.split(widths, dim=1), strict=True))


def _untold(_done: int, _total: int) -> None:
    """Nobody asks."""


def _nothing(_checkpoint_path: Any) -> None:
    """The store is where it should be."""


def _keeps_its_place(dataset: Any) -> bool:
    if not hasattr(dataset, "state_dict"):
        return False
    part = getattr(dataset, "_ex_iterable", None)
    while part is not None:
        if type(part).__name__ == _SHUFFLED:
            return False
        part = getattr(part, "ex_iterable", None)
    return True


def _locals(generator: Any, *names: str) -> dict[str, Any]:
    """Local variables of a generator of SAELens that waits, of the one inside where torch has wrapped it."""
    found = inspect.getgeneratorlocals(generator)
    if "gen" in found and inspect.isgenerator(found["gen"]):
        found = inspect.getgeneratorlocals(found["gen"])
    missing = [name for name in names if name not in found]
    if missing:
        raise RuntimeError(
            f"{generator.__qualname__} of this version of SAELens has no {missing[0]!r}, so a checkpoint cannot say where its data "
            "stand. Train without checkpoints (--checkpoint_path none), or with SAELens 6.54."
        )
    return {name: found[name] for name in names}

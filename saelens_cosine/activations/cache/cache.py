"""The folder of a cache: `activations.json` says what it is of, and files of contexts are only ever added."""

from __future__ import annotations

import hashlib
import re
import shutil
import threading
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from saelens_cosine.activations.cache.identity import CacheIdentity
from saelens_cosine.activations.contexts import CONTEXTS_AT_ONCE
from saelens_cosine.files.output import holds_anything, open_output
from saelens_cosine.files.whole import read_json, whole_file, write_json
from saelens_cosine.plain import from_plain, plain

SCHEMA = "saelens-cosine/activations/1"
"""Name and version of the layout."""

FILE = "activations.json"

CONTEXTS = 256
"""Contexts of a file, at most: what is not in one yet is lost with a process that is killed."""

BYTES = 2**28
"""Of a file, at most, but for one batch's: it is held in memory until it is written."""

_SHARD = re.compile(r"contexts-(\d+)\.safetensors")


class ActivationCache:
    """
    Activations by their contexts' tokens; `open_cache` makes it.

    A file holds `tokens [n, length]` int32 and, by hook, `[n, length, ...]` bfloat16. Files are mapped into memory, so that what is not
    read costs nothing; an index from each context's hash to its file and row is held, about 150 bytes a context.

    Args:
        folder: where it is.
        identity: what it is of.
        writes: Whether what is added goes into the folder; else it is held in memory.
    """

    def __init__(self, folder: Path, identity: CacheIdentity, writes: bool = True):
        self.folder, self.identity, self.writes = folder, identity, writes
        self.lock = threading.RLock()
        """Held while it is used: SAELens' prefetcher reads in a thread of its own."""
        self._places: dict[bytes, tuple[int, int]] = {}
        self._shards: list[dict[str, torch.Tensor]] = []
        self._unwritten = 0
        self._next = 0
        for number, path in sorted(_shards(folder)):
            shard = _read(path, identity)
            self._index(shard["tokens"], len(self._shards))
            self._shards.append(shard)
            self._next = number + 1

    def __len__(self) -> int:
        """Contexts."""
        return len(self._places)

    def missing(self, contexts: torch.Tensor) -> torch.Tensor:
        """Of `contexts [n, length]`, those that are not there, each once: `[m, length]`."""
        rows = {key: i for i, key in enumerate(_keys(contexts)) if key not in self._places}
        return contexts[torch.tensor(sorted(rows.values()), dtype=torch.int64)]

    def read(self, contexts: torch.Tensor, hooks: Iterable[str] | None = None) -> dict[str, torch.Tensor]:
        """Activations of `contexts [n, length]`, which are all there: by hook, `[n, length, ...]` bfloat16 on the CPU.

        Args:
            contexts: tokens.
            hooks: of the cache; None for all.
        """
        places = [self._places[key] for key in _keys(contexts)]
        chosen = self.identity.hooks if hooks is None else hooks
        return {hook: torch.stack([self._shards[shard][hook][row] for shard, row in places]) for hook in chosen}

    def add(self, contexts: torch.Tensor, activations: dict[str, torch.Tensor]) -> None:
        """Keep the activations of `contexts [n, length]`: by hook, `[n, length, ...]`. Those that are there already stay.

        Raises:
            OSError, SafetensorError: a file could not be written.
        """
        for i, (key, tokens) in enumerate(zip(_keys(contexts), contexts, strict=True)):
            if key in self._places:
                continue
            if not self._unwritten:
                self._shards.append(self._empty())
            shard = self._shards[-1]
            shard["tokens"][self._unwritten] = tokens
            for hook in self.identity.hooks:
                shard[hook][self._unwritten] = activations[hook][i]
            self._places[key] = (len(self._shards) - 1, self._unwritten)
            self._unwritten += 1
            if self._unwritten == len(shard["tokens"]):
                self.flush()

    def flush(self) -> None:
        """Write what has been added since the last file."""
        if not self._unwritten:
            return
        if not self.writes:
            self._unwritten = 0
            return
        if not (self.folder / FILE).exists():
            write_json({"schema": SCHEMA, **plain(self.identity)}, self.folder / FILE)
        path = self.folder / f"contexts-{self._next:05d}.safetensors"
        whole = {name: tensor[: self._unwritten] for name, tensor in self._shards[-1].items()}
        with whole_file(path) as unfinished:
            save_file(whole, unfinished)
        self._shards[-1] = load_file(path)
        self._unwritten, self._next = 0, self._next + 1

    def check_space(self, contexts: int) -> None:
        """Before this many contexts are added.

        Raises:
            OSError: the disk has no room for them.
        """
        needed, free = contexts * self.identity.bytes_per_context, shutil.disk_usage(self.folder).free
        if needed > free:
            raise OSError(
                f"{contexts:,} contexts of activations at {len(self.identity.hooks)} hooks take {needed:,} bytes, and "
                f"{self.folder} has room for {free:,}. Cache fewer tokens or fewer hooks, or choose a folder on another disk."
            )

    def _index(self, tokens: torch.Tensor, shard: int) -> None:
        for row, key in enumerate(_keys(tokens)):
            self._places.setdefault(key, (shard, row))

    def _empty(self) -> dict[str, torch.Tensor]:
        rows, length = _rows(self.identity), self.identity.context_size
        tensors = {
            hook: torch.empty(rows, length, *shape, dtype=torch.bfloat16) for hook, shape in self.identity.hooks.items()
        }
        return {"tokens": torch.empty(rows, length, dtype=torch.int32), **tensors}


@contextmanager
def open_cache(folder: str | Path, identity: CacheIdentity, writes: bool = True) -> Generator[ActivationCache]:
    """Lock a folder of activations for this run, and write what was added when the block has ended, however it ends.

    Args:
        folder: an earlier cache's, or a new or empty one.
        identity: what is asked for; a cache that has more hooks serves.
        writes: False for a process beside the one that has locked the folder: it reads what is there now.

    Raises:
        ValueError: the cache there is of something else, naming each difference, or a file of it is damaged.
        FileExistsError: the folder holds something else.
        OutputInUseError: another run uses it.
        NotADirectoryError, OSError: it cannot be written.
    """
    place = Path(folder)
    if not writes:
        yield ActivationCache(place, _kept(place, identity), writes)
        return
    with open_output(place, "activations", keep_empty=False):
        cache = ActivationCache(place, _kept(place, identity))
        try:
            yield cache
        finally:
            with cache.lock:
                cache.flush()


def kept_contexts(folder: str | Path) -> int:
    """Contexts in a folder, whatever it is of; 0 if there is no cache.

    Raises:
        ValueError: a file is damaged.
    """
    if not (Path(folder) / FILE).is_file():
        return 0
    return sum(_contexts(path) for _, path in _shards(Path(folder)))


def _kept(folder: Path, asked: CacheIdentity) -> CacheIdentity:
    """What the cache in a folder is of, which serves for what is asked."""
    file = folder / FILE
    if not file.exists():
        if holds_anything(folder):
            raise FileExistsError(
                f"{folder} holds files and no {FILE}: it is no cache of activations. Choose another folder."
            )
        return asked
    try:
        content: Any = read_json(file)
        schema = content.pop("schema")
        there = from_plain(CacheIdentity, content, FILE) if schema == SCHEMA else None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is damaged ({error}). Move the folder away, or choose another one.") from error
    if there is None:
        raise ValueError(
            f"{file} has layout {schema!r}, and this version reads {SCHEMA!r}. Choose another folder, or use the version that "
            "wrote it."
        )
    if differences := there.differences(asked):
        raise ValueError(
            f"{folder} holds activations of something else: {'; '.join(differences)}. Choose another folder for these, or remove "
            "that one."
        )
    return there


def _shards(folder: Path) -> Generator[tuple[int, Path]]:
    for path in folder.iterdir():
        if found := _SHARD.fullmatch(path.name):
            yield int(found[1]), path


def _contexts(path: Path) -> int:
    try:
        with safe_open(path, "pt") as shard:
            return shard.get_slice("tokens").get_shape()[0]
    except (SafetensorError, OSError) as error:
        raise _damaged(path, str(error)) from error


def _read(path: Path, identity: CacheIdentity) -> dict[str, torch.Tensor]:
    """A file's tensors, in mapped memory."""
    try:
        shard = load_file(path)
    except (SafetensorError, OSError) as error:
        raise _damaged(path, str(error)) from error
    rows = len(shard["tokens"]) if "tokens" in shard else 0
    expected = {hook: ((rows, identity.context_size, *shape), torch.bfloat16) for hook, shape in identity.hooks.items()}
    expected["tokens"] = ((rows, identity.context_size), torch.int32)
    found = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in shard.items()}
    if found != expected:
        raise _damaged(path, f"it holds {found}, where {expected} belongs")
    return shard


def _damaged(path: Path, why: str) -> ValueError:
    return ValueError(f"{path} is damaged: {why}. Remove this file; its contexts are then computed again.")


def _rows(identity: CacheIdentity) -> int:
    """Contexts of a file, in whole batches: those that follow are the same whether the run went on or goes on later."""
    rows = min(CONTEXTS, BYTES // identity.bytes_per_context)
    return max(1, rows // CONTEXTS_AT_ONCE) * CONTEXTS_AT_ONCE


def _keys(contexts: torch.Tensor) -> list[bytes]:
    rows = contexts.to("cpu", torch.int32).contiguous().numpy()
    return [hashlib.blake2b(row, digest_size=16).digest() for row in rows]

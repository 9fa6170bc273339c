"""Write a file or a folder whole or not at all, whatever stops the process, other writers included.

What is written goes beside its target under a name of its own, is flushed to the disk, and takes the target's name in one
step. Only then is the step itself flushed. A process that is killed leaves a name that `remove_unfinished` knows.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_UNFINISHED = re.compile(r"\.unfinished-[0-9a-f]{16}-")


@contextmanager
def whole_file(path: str | Path) -> Generator[Path]:
    """A name beside `path` to write a file to, with the same ending; it replaces `path` when the block has ended.

    Raises:
        OSError: as the block, or if the folder cannot be written. `path` is then what it was.
    """
    target = Path(path)
    unfinished = _beside(target)
    try:
        yield unfinished
        flush(unfinished)
        unfinished.replace(target)
    except BaseException as error:
        _named(error, target)
        unfinished.unlink(missing_ok=True)
        raise
    flush(target.parent)


@contextmanager
def whole_folder(path: str | Path) -> Generator[Path]:
    """A new folder beside `path` to write files to; it gets the name `path` when the block has ended.

    Raises:
        FileExistsError: `path` exists and is no empty folder; said before the block.
        OSError: as the block, or if the folder cannot be written. Nothing is left.
    """
    target = Path(path)
    if target.is_symlink() or (target.exists() and (not target.is_dir() or any(target.iterdir()))):
        raise FileExistsError(f"{target} exists; choose another place, or move it away.")
    unfinished = _beside(target)
    unfinished.mkdir()
    try:
        yield unfinished
        for part in unfinished.rglob("*"):
            flush(part)
        flush(unfinished)
        unfinished.replace(target)
    except BaseException as error:
        _named(error, target)
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    flush(target.parent)


@contextmanager
def scratch_folder(parent: str | Path) -> Generator[Path]:
    """A new folder in `parent` to work in; it goes when the block has ended, with all that is still in it."""
    folder = _beside(Path(parent) / "work")
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_text(text: str, path: str | Path) -> None:
    """Write whole or not at all."""
    with whole_file(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def write_json(value: Any, path: str | Path, indent: int | None = 1) -> None:
    """Write whole or not at all.

    Raises:
        ValueError: a number that is not finite, which JSON cannot hold.
    """
    write_text(json.dumps(value, indent=indent, allow_nan=False) + "\n", path)


def read_json(path: str | Path) -> Any:
    """What a JSON file holds.

    Raises:
        FileNotFoundError: there is none, or a pipe, which would be waited for, for ever.
        ValueError: it is no JSON, or nested too deeply.
        OSError: it cannot be read.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} is not there, or is no file.")
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def sha256(path: Path) -> str:
    """Of a file's content, hexadecimal."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**22):
            found.update(block)
    return found.hexdigest()


def remove_unfinished(folder: Path) -> list[Path]:
    """Remove what killed writers have left in this folder itself; only safe while nobody else writes to it."""
    left = [path for path in folder.iterdir() if _UNFINISHED.match(path.name)]
    for path in left:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    return left


def _named(error: BaseException, target: Path) -> None:
    """What is written to an open file fails without a name."""
    if isinstance(error, OSError) and error.errno is not None and error.filename is None:
        error.filename = str(target)


def _beside(target: Path) -> Path:
    return target.with_name(f".unfinished-{secrets.token_hex(8)}-{target.name}")


def flush(path: Path) -> None:
    """Have the disk hold what has been written to a file, or which names a folder holds."""
    if path.is_symlink() or not (path.is_file() or path.is_dir()):
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

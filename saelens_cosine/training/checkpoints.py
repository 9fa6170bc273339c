"""Checkpoints in a folder: each whole, with checksums, the newest few kept."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from saelens_cosine.files.whole import remove_unfinished, whole_folder, write_json

OWN_FOLDER = "saelens_cosine"
"""In a checkpoint of SAELens, what SAELens' own files lack."""

_CHECKSUMS = Path(OWN_FOLDER) / "checksums.json"


class BrokenCheckpointError(ValueError):
    """A checkpoint that is not what was written."""


class Checkpoints:
    """
    A run's checkpoints, each in a folder named by the tokens trained on.

    Args:
        folder: where they are.
        keep: how many of the newest are kept.
    """

    def __init__(self, folder: str | Path, keep: int = 2):
        if keep < 1:
            raise ValueError(f"keep={keep} checkpoints cannot be resumed from; keep at least 1.")
        self.folder, self.keep = Path(folder), keep

    def all(self) -> list[Path]:
        """The newest first; final_* and folders of other names are not resumed from."""
        if not self.folder.is_dir():
            return []
        named = [path for path in self.folder.iterdir() if path.name.isdecimal() and (path / OWN_FOLDER).is_dir()]
        return sorted(named, key=lambda path: int(path.name), reverse=True)

    def save(self, tokens: int, write: Callable[[Path], None]) -> Path:
        """Write a checkpoint whole, then remove those that are no longer kept.

        Args:
            tokens: trained on.
            write: puts everything into the folder that it is given.

        Raises:
            OSError: the disk is full, or the folder cannot be written; the checkpoints before are still there.
        """
        target = self.folder / str(tokens)
        if target in self.all():
            shutil.rmtree(target)  # a broken one, or the same place of the same run
        self.folder.mkdir(parents=True, exist_ok=True)
        with whole_folder(target) as unfinished:
            (unfinished / OWN_FOLDER).mkdir()
            write(unfinished)
            write_json(_checksums(unfinished), unfinished / _CHECKSUMS)
        for old in self.all()[self.keep :]:
            shutil.rmtree(old, ignore_errors=True)
        return target

    def newest(self, tell: Callable[[str], None]) -> Path | None:
        """The newest one that is what was written; `tell` gets a sentence about each broken one before it."""
        for path in self.all():
            try:
                check(path)
            except BrokenCheckpointError as error:
                tell(str(error))
            else:
                return path
        return None

    def clean(self) -> None:
        """Remove what killed runs have left; while no other run writes here."""
        if self.folder.is_dir():
            remove_unfinished(self.folder)


def check(checkpoint: Path) -> None:
    """Compare a checkpoint with its checksums.

    Raises:
        BrokenCheckpointError: names the file and what is wrong with it.
    """
    try:
        expected = json.loads((checkpoint / _CHECKSUMS).read_text())
        items = list(expected.items())
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise BrokenCheckpointError(f"Checkpoint {checkpoint} is broken: no {_CHECKSUMS} that can be read.") from error
    for name, content in items:
        try:
            found = _sha256(checkpoint / name)
        except OSError as error:
            raise BrokenCheckpointError(f"Checkpoint {checkpoint} is broken: {name} cannot be read.") from error
        if found != content:
            raise BrokenCheckpointError(f"Checkpoint {checkpoint} is broken: {name} is not what was written.")


def _checksums(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): _sha256(path) for path in _files(folder)}


def _files(folder: Path) -> Iterator[Path]:
    yield from sorted(path for path in folder.rglob("*") if path.is_file())


def _sha256(path: Path) -> str:
    found = hashlib.sha256()
    with path.open("rb") as content:
        while part := content.read(1 << 24):
            found.update(part)
    return found.hexdigest()

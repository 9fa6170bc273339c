"""Checkpoints in a folder: each whole, with checksums, the newest few kept."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path, PurePosixPath

from saelens_cosine.files.names import check_name, unused
from saelens_cosine.files.whole import read_json, sha256, whole_folder, write_json

OWN_FOLDER = "saelens_cosine"
"""In a checkpoint of SAELens, what SAELens' own files lack."""

_CHECKSUMS = Path(OWN_FOLDER) / "checksums.json"

_ASIDE, _FINAL = "replaced-", "final_"


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

    def add(self, tokens: int, write: Callable[[Path], None]) -> Path:
        """Write a checkpoint whole, then remove those that are no longer kept.

        Args:
            tokens: trained on.
            write: puts everything into the folder that it is given.

        Raises:
            OSError: the disk is full, or the folder cannot be written; the checkpoints before are still there.
        """
        target = self._write(str(tokens), write)
        beyond = [path for path in self.all() if int(path.name) > tokens]  # broken, and gone back from
        for path in [*beyond, *self.all()[len(beyond) + self.keep :]]:
            _remove(path)
        return target

    def check_places(self) -> None:
        """That nothing of somebody else's stands where a checkpoint may have to be.

        Raises:
            FileExistsError: it does; names it.
        """
        if not self.folder.is_dir():
            return
        for path in sorted(self.folder.iterdir()):
            if path.name.removeprefix(_FINAL).isdecimal() and not _ours(path):
                raise FileExistsError(
                    f"{path} is no checkpoint of this package and has the name of one. Move it away, or choose another folder for "
                    "the checkpoints (--checkpoint_path)."
                )

    def add_final(self, tokens: int, write: Callable[[Path], None]) -> Path:
        """Write what SAELens saves at the end of a run where it is asked to (`save_final_checkpoint`)."""
        return self._write(f"{_FINAL}{tokens}", write)

    def _write(self, name: str, write: Callable[[Path], None]) -> Path:
        target = self.folder / name
        self.folder.mkdir(parents=True, exist_ok=True)
        if os.path.lexists(target):
            _remove(target)  # a broken one, or the same place of the same run
        if os.path.lexists(target):
            target.rename(unused(self.folder / f"broken-{name}"))
        with whole_folder(target) as unfinished:
            (unfinished / OWN_FOLDER).mkdir()
            write(unfinished)
            files = sorted(path for path in unfinished.rglob("*") if path.is_file())
            write_json(
                {path.relative_to(unfinished).as_posix(): sha256(path) for path in files}, unfinished / _CHECKSUMS
            )
        return target

    def set_aside(self) -> None:
        """Have no run go on from what is there; it goes with `remove_set_aside`."""
        for path in [*self.all(), *(own.parent for own in self.folder.glob(f"{_FINAL}*/{OWN_FOLDER}"))]:
            path.rename(unused(self.folder / f"{_ASIDE}{path.name}"))

    def remove_set_aside(self) -> None:
        """Remove what `set_aside` has left, once something better is there."""
        if self.folder.is_dir():
            for path in self.folder.glob(f"{_ASIDE}*"):
                _remove(path)

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


def check(checkpoint: Path) -> None:
    """Compare a checkpoint with its checksums.

    Raises:
        BrokenCheckpointError: names the file and what is wrong with it.
    """
    for name, content in _expected(checkpoint).items():
        try:
            found = sha256(checkpoint / name) if (checkpoint / name).is_file() else None
        except OSError as error:
            raise BrokenCheckpointError(f"Checkpoint {checkpoint} is broken: {name} cannot be read.") from error
        if found is None:
            raise BrokenCheckpointError(f"Checkpoint {checkpoint} is broken: {name} is not there, or is no file.")
        if found != content:
            raise BrokenCheckpointError(f"Checkpoint {checkpoint} is broken: {name} is not what was written.")


def _expected(checkpoint: Path) -> dict[str, str]:
    broken = f"Checkpoint {checkpoint} is broken: no {_CHECKSUMS} that can be read."
    try:
        expected = read_json(checkpoint / _CHECKSUMS)
        if not expected:
            raise BrokenCheckpointError(broken)
        return {check_name(name, "file"): str(content) for name, content in expected.items()}
    except (OSError, ValueError, AttributeError) as error:
        raise BrokenCheckpointError(broken) from error


def _remove(checkpoint: Path) -> None:
    """Remove the files that were written as this checkpoint, and the folders that this empties; nobody else's."""
    try:
        names = [*_expected(checkpoint), str(_CHECKSUMS)]
    except BrokenCheckpointError:
        return
    if checkpoint.is_symlink():
        return
    for name in names:
        path = checkpoint / name
        if path.parent.resolve() == checkpoint.resolve() / PurePosixPath(name).parent:  # through no link
            path.unlink(missing_ok=True)
    folders = sorted((path for path in checkpoint.rglob("*") if path.is_dir()), reverse=True)
    for path in sorted(folders, key=lambda path: path.name == OWN_FOLDER):  # what tells that it is ours goes last
        with suppress(OSError):
            path.rmdir()
    with suppress(OSError):
        checkpoint.rmdir()


def _ours(path: Path) -> bool:
    """Whether this is a checkpoint, whole or not, or what is left of one whose removal was stopped: an empty folder."""
    if path.is_symlink() or not path.is_dir():
        return False
    return (path / OWN_FOLDER).is_dir() or not any(path.iterdir())

"""Which files of a folder this package wrote: what it may replace or remove there, as long as nobody has changed it since."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict

from saelens_cosine.files.names import check_name
from saelens_cosine.files.whole import read_json, sha256, write_json

MANIFEST = ".saelens-cosine.json"
"""Its file in an output folder."""

SCHEMA = "saelens-cosine/files/1"


class Entry(TypedDict):
    """
    A file's content.

    Args:
        size (int): Bytes.
        sha256 (str): Of all of them, hexadecimal.
    """

    size: int
    sha256: str


class Manifest:
    """
    The files of one kind of result in a folder, by their paths in it.

    Args:
        folder: that holds them.
        what: kind of result, such as `comparison`; a folder can hold several.

    Raises:
        ValueError: the folder's manifest is no manifest, or names a file outside.
    """

    def __init__(self, folder: Path, what: str):
        self.folder, self.what = folder, what
        self.exists = what in _read(folder)
        self.entries: dict[str, list[Entry]] = _read(folder).get(what, {})

    def ours(self, name: str) -> bool:
        """Whether the file is there, through no link, with a content that this package wrote."""
        return name in self.entries and bool(self._as_written(name))

    def is_file(self, name: str) -> bool:
        """Whether the file is there, through no link."""
        return _is_file(self.folder / name, self.folder)

    def free(self, name: str) -> bool:
        """Whether a file may take this place: it is empty or holds a file of ours, and no link leads there."""
        path = self.folder / name
        if not _no_link_to(path, self.folder):
            return False
        return self.ours(name) if path.is_symlink() or path.exists() else True

    def add(self, files: Mapping[str, Path]) -> None:
        """Note files before they take their places, and save that: a name may then have its old content or the new one."""
        self.note(files)
        self.save()

    def note(self, files: Mapping[str, Path]) -> None:
        for name, path in files.items():
            self.entries[name] = [*self._as_written(name), Entry(size=path.stat().st_size, sha256=sha256(path))]

    def save(self) -> None:
        kinds = {**_read(self.folder), self.what: self.entries}
        write_json({"schema": SCHEMA, "files": kinds}, self.folder / MANIFEST)

    def _as_written(self, name: str) -> list[Entry]:
        """Those of the noted contents that the file has: one or none."""
        path = self.folder / name
        if name not in self.entries or not _is_file(path, self.folder):
            return []
        size = path.stat().st_size
        noted = [entry for entry in self.entries[name] if entry["size"] == size]
        found = sha256(path) if noted else ""
        return [entry for entry in noted if entry["sha256"] == found][:1]


def _read(folder: Path) -> dict[str, dict[str, list[Entry]]]:
    path = folder / MANIFEST
    if not path.exists():
        return {}
    broken = f"{path} is no list of this package's files. Move it away."
    try:
        content: Any = read_json(path)
        return {
            what: {
                check_name(name, "file"): [Entry(size=entry["size"], sha256=entry["sha256"]) for entry in entries]
                for name, entries in kind.items()
            }
            for what, kind in content["files"].items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(broken) from None


def _no_link_to(path: Path, folder: Path) -> bool:
    """Whether the folders between are folders, or not there yet."""
    between = [parent for parent in path.parents if parent != folder and parent.is_relative_to(folder)]
    return all(not parent.is_symlink() and (parent.is_dir() or not parent.exists()) for parent in between)


def _is_file(path: Path, folder: Path) -> bool:
    return _no_link_to(path, folder) and not path.is_symlink() and path.is_file()

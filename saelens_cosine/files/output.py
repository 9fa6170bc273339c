"""A folder that a run writes its results to: its alone while it runs, and nobody's files but ours are replaced there.

A result that replaces an earlier one is gathered in a hidden folder beside it, `.<what>-new`. When it is whole, that folder
becomes `.<what>-whole`, and its files take their places; a run that is killed in between leaves this to the next one.
"""

from __future__ import annotations

import tempfile
from collections.abc import Generator, Iterable
from contextlib import contextmanager, suppress
from pathlib import Path

from saelens_cosine.files.lock import LOCK, locked
from saelens_cosine.files.manifest import MANIFEST, Manifest
from saelens_cosine.files.whole import flush, remove_unfinished, whole_file


class Output:
    """
    An output folder, locked and writable; `open_output` makes it.

    Args:
        folder: where it is.
        what: kind of result, such as `comparison`: the folder's other results are none of this run's business.
    """

    def __init__(self, folder: Path, what: str):
        self.folder, self.what = folder, what
        self.results = folder
        """Where results are written: the folder, or one in it if they shall replace what is there."""
        self._new, self._whole = folder / f".{what}-new", folder / f".{what}-whole"
        self._old_new: list[str] = []
        for part in (self._new, self._whole):
            for path in [part, *part.rglob("*")]:
                if path.is_dir() and not path.is_symlink():
                    remove_unfinished(path)
        self._end_replacing()

    def begin(self, *, before: Iterable[str], places: Iterable[str], overwrite: bool, resume: bool = False) -> None:
        """Refuse what would replace anything unasked, or anybody else's files at all. No result is changed yet.

        Args:
            before: files in the folder, by their paths in it, that versions without a manifest have written; asked for only where
                there is no manifest.
            places: that the new result's files will take, by their paths in the folder.
            overwrite: replace an earlier result, when the new one is whole.
            resume: go on with what an earlier run has left, and write over it; an earlier result is not refused.

        Raises:
            FileExistsError: there is an earlier result, or a file of somebody else at one of the places; names it.
        """
        written = Manifest(self.folder, self.what)
        if not written.exists:
            written.note({name: self.folder / name for name in before if written.is_file(name)})
        earlier = sorted(name for name in written.entries if written.ours(name))
        left = Manifest(self._new, self.what).entries
        if (earlier or left) and not overwrite and not resume:
            named = ", ".join(earlier[:3]) + (", ..." if len(earlier) > 3 else "") or f"{self._new.name}, not finished"
            raise FileExistsError(
                f"{self.folder} holds an earlier {self.what} ({named}). Pass --overwrite (overwrite=True) to replace it, or "
                "choose another folder."
            )
        for name in places:
            if not written.free(name):
                raise self._in_the_way(name)
        if earlier and not written.exists:
            written.save()
        if resume:
            self.results = self.unfinished
        else:
            self.results = self._new if earlier else self.folder
            self._old_new = list(left)

    @property
    def unfinished(self) -> Path:
        """Where an earlier run has left what can be gone on with, if it has."""
        return self._new if self._new.exists() else self.folder

    @contextmanager
    def file(self, name: str) -> Generator[Path]:
        """A path to write a file of the result to; it takes its place when the block has ended."""
        self._start()
        path = self.results / name
        manifest = self._checked([name])
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as unfinished:
            yield unfinished
            manifest.add({name: unfinished})

    def add(self, made: Path) -> None:
        """Move all files of a folder, on the same disk, to their places; a subfolder that is new there appears in one step."""
        self._start()
        files = {path.relative_to(made).as_posix(): path for path in made.rglob("*") if path.is_file()}
        manifest = self._checked(files)
        for path in [*made.rglob("*"), made]:
            flush(path)
        manifest.add(files)
        _move(made, self.results)

    def finish(self) -> None:
        """Let a new result that is whole take the place of the earlier one."""
        if self.results == self.folder or not self._new.exists():
            return
        self._free(Manifest(self._new, self.what).entries)
        self._new.rename(self._whole)
        flush(self.folder)
        self._end_replacing()

    def _start(self) -> None:
        """Before the first file: what an earlier run gathered and did not finish goes."""
        if self._old_new:
            _remove(self._new, Manifest(self._new, self.what), self._old_new)
            (self._new / MANIFEST).unlink()
            _remove_empty(self._new)
            self._old_new = []
        self.results.mkdir(exist_ok=True)

    def _end_replacing(self) -> None:
        if not self._whole.exists():
            return
        new, old = Manifest(self._whole, self.what), Manifest(self.folder, self.what)
        if new.exists:  # else all has been moved
            self._free(name for name in new.entries if (self._whole / name).exists())
            _remove(self.folder, old, [name for name in old.entries if name not in new.entries])
            files = {name: self._whole / name for name in new.entries if (self._whole / name).exists()}
            old.add(files)
            for name, path in files.items():
                (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
                path.replace(self.folder / name)
            for place in {(self.folder / name).parent for name in new.entries}:
                flush(place)
            old.entries = new.entries
            old.save()
            (self._whole / MANIFEST).unlink()
        _remove_empty(self._whole)

    def _checked(self, names: Iterable[str]) -> Manifest:
        manifest = Manifest(self.results, self.what)
        for name in names:
            if not manifest.free(name):
                raise self._in_the_way(name, self.results)
        return manifest

    def _free(self, names: Iterable[str]) -> None:
        written = Manifest(self.folder, self.what)
        for name in names:
            if not written.free(name):
                raise self._in_the_way(name)

    def _in_the_way(self, name: str, folder: Path | None = None) -> FileExistsError:
        path = (folder or self.folder) / name
        link = next((part for part in [*path.parents, path] if part.is_symlink() and self.folder in part.parents), None)
        why = f"{link} is a link" if link else f"{path} is not as this package wrote it"
        return FileExistsError(f"{why}, and is never replaced. Move it away, or choose another folder.")


@contextmanager
def open_output(
    output: str | Path | Output, what: str, parts: Iterable[str] = (), keep_empty: bool = True
) -> Generator[Output]:
    """Lock a folder for this run, and let its result take its place when the block has ended.

    Before any work the folder is made and tested for writing. What killed runs have left half-written is removed.

    Args:
        output: the folder. One that is open already is what the block gets, and stays open.
        what: kind of result, as in `Output`.
        parts: subfolders that files are written to, as patterns: what was left there goes too.
        keep_empty: leave a folder that was made for this where the block has written nothing.

    Raises:
        OutputInUseError: another run writes to it; names its process and its host.
        NotADirectoryError, OSError: it cannot be written.
    """
    if isinstance(output, Output):
        yield output
        return
    folder = Path(output)
    made = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    _make_writable(folder)
    try:
        with locked(folder):
            for written in [folder, *(path for part in parts for path in folder.glob(part))]:
                if written.is_dir() and (written == folder or not written.is_symlink()):
                    remove_unfinished(written)
            opened = Output(folder, what)
            yield opened
            opened.finish()
    finally:
        if not keep_empty:
            with suppress(OSError):
                for parent in made:
                    parent.rmdir()


def holds_anything(path: Path) -> bool:
    """Whether there is a file, or a folder with more in it than runs that were killed leave."""
    left = (LOCK, MANIFEST, ".unfinished-")
    return path.is_file() or (path.is_dir() and any(not part.name.startswith(left) for part in path.iterdir()))


def _make_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except FileExistsError:
        raise NotADirectoryError(f"Cannot write to {folder}: it is a file. Choose another folder.") from None
    except OSError as error:
        raise type(error)(f"Cannot write to {folder}: {error.strerror}. Choose another folder.") from error


def _move(source: Path, target: Path) -> None:
    for path in source.iterdir():
        place = target / path.name
        if path.is_dir() and place.exists():
            _move(path, place)
        else:
            path.replace(place)
    flush(target)


def _remove(folder: Path, written: Manifest, names: Iterable[str]) -> None:
    """Remove those of the files that nobody has changed, and the folders that this empties."""
    for name in names:
        if written.ours(name):
            (folder / name).unlink()
        for parent in (folder / name).parents:
            if parent == folder or parent.is_symlink() or not parent.is_dir() or any(parent.iterdir()):
                break
            parent.rmdir()


def _remove_empty(folder: Path) -> None:
    with suppress(OSError):
        for path in sorted(folder.rglob("*"), reverse=True):
            path.rmdir()
        folder.rmdir()

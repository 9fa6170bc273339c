"""How far a comparison has come, so that it can be gone on with: seeds that are finished, checkpoints of the one that is not."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from saelens_cosine.console import tell
from saelens_cosine.experiments.compare.grid import Point, Training
from saelens_cosine.experiments.compare.results import PointResult, Trained
from saelens_cosine.experiments.compare.settings import ComparisonSettings
from saelens_cosine.files.names import below, unused
from saelens_cosine.files.output import Output, open_output
from saelens_cosine.files.whole import read_json, whole_folder
from saelens_cosine.plain import from_plain
from saelens_cosine.training.resuming.checkpoints import Checkpoints
from saelens_cosine.training.resuming.run import ResumableRun, SavedState, settings_of
from saelens_cosine.training.resuming.settings import check_same

Found = TypeVar("Found")

FOLDER = ".comparison-run"
"""In the folder of the results."""

_SEED = re.compile(r"(?!broken-)(?:.+-)?seed(\d+)(?:-lr[^/]+?)?(?:\.json|-saes|-done)?")
"""Names of records, of checkpoints and of SAEs among which a learning rate will be chosen."""

_RECORD, _MADE = "record.json", "made"

_KEPT = ("-saes", "-done")
"""Ends of names of folders with SAEs that are not in their places yet."""

MAY_DIFFER = frozenset({"seeds", "device", "activations"})
"""Settings that change nothing of a seed that is finished or begun; that activations are kept does, and where does not."""


class Place(NamedTuple):
    """
    Where the results of a comparison are that another process keeps.

    Args:
        folder (Path): The output folder.
        results (Path): Where results are until it has ended.
    """

    folder: Path
    results: Path


class ComparisonState:
    """
    The state of a comparison in its output folder.

    Args:
        settings: of the comparison.
        output: where its results go; `begin` has been called. Of a process that keeps no results, their place.
        resume: go on with what is there.
        overwrite: replace it.
        keep: checkpoints that are kept of a seed.
        stop_signals: signals beside SIGINT and SIGTERM that end the run with a checkpoint.

    Raises:
        FileExistsError: there are checkpoints of an unfinished comparison, and neither `resume` nor `overwrite` is on.
    """

    def __init__(
        self,
        settings: ComparisonSettings,
        output: Output | Place,
        *,
        resume: bool,
        overwrite: bool,
        keep: int,
        stop_signals: Sequence[int] = (),
    ):
        self.settings = {name: value for name, value in asdict(settings).items() if name not in MAY_DIFFER}
        self.settings |= {"arms": list(settings.arms), "training_tokens": settings.tokens}
        if settings.activations is not None or settings.is_grid:
            self.settings["activations_kept"] = True
        self.output, self.resume, self.keep, self.stop_signals = output, resume, keep, stop_signals
        seeds = [seed for _, seed in _seeds(output.results)]
        if resume and not overwrite and max(seeds, default=0) >= settings.seeds:
            raise ValueError(
                f"Cannot go on with {output.folder}: seeds is {max(seeds) + 1} there and {settings.seeds} here; they can grow, not shrink."
            )
        if not (resume or overwrite):
            for path in sorted(path for path, _ in _seeds(output.folder)):
                if path.is_dir() and (path.name.endswith(_KEPT) or Checkpoints(path).all()):
                    raise FileExistsError(
                        f"{output.folder} holds a comparison that is not finished ({path}). Pass --resume to go on with it, "
                        "--overwrite to replace it, or choose another folder."
                    )
        if not resume and isinstance(output, Output):
            self.forget_activations()
            self._forget_records()

    def _forget_records(self) -> None:
        """Records of an earlier comparison whose SAEs are gone."""
        for path, _ in _seeds(self.output.results):
            if path.is_file():
                path.unlink()

    def check(self) -> None:
        """Before the first training, once the settings are complete.

        Raises:
            ValueError: what is there to go on with has others; names them with both values.
        """
        for path, _ in _seeds(self.output.results) if self.resume else ():
            settings = _settings(path)
            if settings is not None:
                check_same(settings, self.settings, path)

    @property
    def activations(self) -> Path:
        """Folder of activations that this comparison alone reads."""
        return self.output.results / FOLDER / "activations"

    def forget_activations(self) -> None:
        """Those that nobody else reads; also what an earlier comparison has left."""
        shutil.rmtree(self.activations, ignore_errors=True)

    def finished(self, point: Point) -> PointResult | None:
        """What is known of a point; None if it has to be trained.

        Raises:
            ValueError: it was trained with other settings; names them with both values.
        """
        path = self.output.results / FOLDER / f"{point.name}.json"
        found = self._read(path, PointResult, f"{point.name} goes on from its newest checkpoint")
        if found is None or not all((self.output.results / arm.path).is_dir() for arm in found.arms):
            return None
        return found

    def trained(self, training: Training) -> Trained | None:
        """What is known of one of several trainings of a point, whose SAEs are in `saes(training)`; None if it has to be run."""
        return self._read(self.saes(training) / _RECORD, Trained, f"{training.name} is trained again")

    def saes(self, training: Training) -> Path:
        """Folder of the SAEs of one of several trainings of a point, until some of them are chosen."""
        return self.output.results / FOLDER / f"{training.name}-saes"

    def keep_trained(self, training: Training, trained: Trained, folder: Path) -> None:
        """One of several trainings of a point has ended, and its SAEs are in `folder`."""
        (folder / _RECORD).write_text(json.dumps(self._record(trained)))
        target = self.saes(training)
        shutil.rmtree(target, ignore_errors=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        with whole_folder(target) as unfinished:
            for path in folder.iterdir():
                path.replace(unfinished / path.name)

    def _read(self, path: Path, kind: type[Found], then: str) -> Found | None:
        """A record of these settings; None if there is none, or, with a word and out of the way, if it is broken."""
        if not path.is_file():
            return None
        try:
            content: Any = read_json(path)
            settings = content.pop("settings")
            if "share" in content:  # as earlier versions called it
                content["dropped_share"] = content.pop("share")
            found: Found = from_plain(kind, content, "a record")
            if isinstance(found, PointResult):
                for arm in found.arms:
                    below(self.output.results, arm.path, "path of an SAE")
        except FileNotFoundError:  # likewise
            return None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            aside = unused(path.with_name(f"broken-{path.name}"))
            with suppress(FileNotFoundError):  # another process has seen it first
                path.rename(aside)  # its place is needed, and what is in it is not what was written
            tell(f"{path} is broken ({type(error).__name__}) and now {aside.name}; {then}.")
            return None
        check_same(settings, self.settings, path)
        return found

    def _record(self, found: PointResult | Trained) -> dict[str, Any]:
        return {"settings": self.settings, **asdict(found)}

    @contextmanager
    def checkpoints(self, training: Training) -> Generator[Checkpoints]:
        """Those of a training, which go when the block has ended."""
        folder = self.output.results / FOLDER / training.name
        with open_output(folder, "checkpoints", keep_empty=False):
            checkpoints = Checkpoints(folder, self.keep)
            if not self.resume:
                checkpoints.set_aside()
            yield checkpoints
            _remove(checkpoints)
        with suppress(OSError):  # somebody's files
            folder.rmdir()

    def go_on(self, run: ResumableRun, checkpoints: Checkpoints) -> None:
        """Have a run go on from the newest checkpoint, if there is one.

        Raises:
            ValueError: it is of another comparison.
        """
        newest = checkpoints.newest(tell) if self.resume else None
        if newest is not None:
            run.resume(SavedState.load(newest))

    def put(self, point: Point, found: PointResult, made: Path) -> None:
        """A point is finished: its SAEs, in `made`, and its record go to their places."""
        assert isinstance(self.output, Output)
        self.output.add(made)
        self.note(point, found)

    def hand_over(self, point: Point, found: PointResult, made: Path) -> None:
        """A point is finished, and its SAEs, in `made`, and its record are for the process that keeps the results."""
        shutil.rmtree(self._handed_over(point), ignore_errors=True)
        with whole_folder(self._handed_over(point)) as unfinished:
            made.replace(unfinished / _MADE)
            (unfinished / _RECORD).write_text(json.dumps(self._record(found)))

    def take_over(self, point: Point) -> PointResult | None:
        """Put in its place what was handed over of a point; None if nothing was."""
        folder = self._handed_over(point)
        found = self._read(folder / _RECORD, PointResult, f"{point.name} is trained again") if folder.is_dir() else None
        if found is not None:
            self.put(point, found, folder / _MADE)
            shutil.rmtree(folder, ignore_errors=True)
        return found

    def _handed_over(self, point: Point) -> Path:
        return self.output.results / FOLDER / f"{point.name}-done"

    def note(self, point: Point, found: PointResult) -> None:
        """A point is finished, and its SAEs are in their places."""
        assert isinstance(self.output, Output)
        with self.output.file(f"{FOLDER}/{point.name}.json") as unfinished:
            # NaN as Python has it, for `comparison.json` is what others read
            unfinished.write_text(json.dumps(self._record(found)))

    def forget(self, point: Point) -> None:
        """What trainings of a point have left, once it is finished: SAEs among which learning rates were chosen, and checkpoints
        where a process was killed before they went."""
        for path in sorted((self.output.results / FOLDER).glob(f"{point.name}*")):
            ours = path.name in (point.name, f"{point.name}-done") or path.name.startswith(f"{point.name}-lr")
            if not path.is_dir() or not ours:
                continue
            if path.name.endswith(_KEPT):
                shutil.rmtree(path, ignore_errors=True)
                continue
            with open_output(path, "checkpoints", keep_empty=False):
                _remove(Checkpoints(path, self.keep))
            with suppress(OSError):  # somebody's files
                path.rmdir()


def _remove(checkpoints: Checkpoints) -> None:
    checkpoints.set_aside()
    checkpoints.remove_set_aside()


def begun(output: Output) -> bool:
    """Whether a comparison in this folder can be gone on with."""
    return any(True for _ in _seeds(output.unfinished))


def _seeds(results: Path) -> Iterator[tuple[Path, int]]:
    """Records of seeds that are finished, and folders of those that are not, with the seed."""
    for path in (results / FOLDER).glob("*seed*"):
        if found := _SEED.fullmatch(path.name):
            yield path, int(found[1])


def _settings(path: Path) -> dict[str, Any] | None:
    """Of a record, of SAEs among which a learning rate will be chosen, or of checkpoints; None of what is damaged, which is told of
    where it is read."""
    record = path if path.is_file() else path / _RECORD
    try:
        if record.is_file():
            return dict(read_json(record)["settings"])
        newest = Checkpoints(path, 1).newest(lambda _: None)
        return None if newest is None else settings_of(newest)
    except (OSError, ValueError, KeyError, TypeError):
        return None

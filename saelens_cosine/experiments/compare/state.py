"""How far a comparison has come, so that it can be gone on with: seeds that are finished, checkpoints of the one that is not."""

from __future__ import annotations

import json
import re
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from saelens_cosine.console import tell
from saelens_cosine.experiments.compare.results import ArmResult, FailedArm
from saelens_cosine.experiments.compare.settings import ComparisonSettings
from saelens_cosine.files.names import below, unused
from saelens_cosine.files.output import Output, open_output
from saelens_cosine.files.whole import read_json
from saelens_cosine.plain import from_plain
from saelens_cosine.training.resuming.checkpoints import Checkpoints
from saelens_cosine.training.resuming.run import ResumableRun, SavedState, check_same

FOLDER = ".comparison-run"
"""In the folder of the results."""

_SEED = re.compile(r"seed\d+(\.json)?")

MAY_DIFFER = frozenset({"seeds", "device"})
"""Settings that change nothing of a seed that is finished or begun."""


class ComparisonState:
    """
    The state of a comparison in its output folder.

    Args:
        settings: of the comparison.
        output: where its results go; `begin` has been called.
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
        output: Output,
        *,
        resume: bool,
        overwrite: bool,
        keep: int,
        stop_signals: Sequence[int] = (),
    ):
        self.settings = {name: value for name, value in asdict(settings).items() if name not in MAY_DIFFER}
        self.settings |= {"arms": list(settings.arms), "training_tokens": settings.tokens}
        self.output, self.resume, self.keep, self.stop_signals = output, resume, keep, stop_signals
        seeds = [int(path.name.removeprefix("seed").removesuffix(".json")) for path in _seeds(output.results)]
        if resume and not overwrite and max(seeds, default=0) >= settings.seeds:
            raise ValueError(
                f"Cannot go on with {output.folder}: seeds is {max(seeds) + 1} there and {settings.seeds} here; they can grow, not shrink."
            )
        if not (resume or overwrite):
            for path in sorted((output.folder / FOLDER).glob("seed*")):
                if Checkpoints(path).all():
                    raise FileExistsError(
                        f"{output.folder} holds a comparison that is not finished ({path}). Pass --resume to go on with it, "
                        "--overwrite to replace it, or choose another folder."
                    )

    def finished(self, seed: int) -> tuple[list[ArmResult], list[FailedArm], float] | None:
        """A seed's results, the arms that failed, and the share that its filter dropped; None if it has to be trained.

        Raises:
            ValueError: it was trained with other settings; names them with both values.
        """
        path = self.output.results / FOLDER / f"seed{seed}.json"
        if not self.resume or not path.is_file():
            return None
        try:
            found: Any = read_json(path)
            settings, arms, share = (
                found["settings"],
                [from_plain(ArmResult, arm, "an arm") for arm in found["arms"]],
                found["share"],
            )
            failed = [FailedArm(**arm) for arm in found["failed"]]
            places = [below(self.output.results, arm.path, "path of an SAE") for arm in arms]
        except (ValueError, KeyError, TypeError) as error:
            aside = unused(path.with_name(f"broken-{path.name}"))
            path.rename(aside)  # its place is needed, and what is in it is not what was written
            tell(
                f"{path} is broken ({type(error).__name__}) and now {aside.name}; seed {seed} goes on from its newest checkpoint."
            )
            return None
        check_same(settings, self.settings, path)
        if not all(place.is_dir() for place in places):
            return None
        return arms, failed, share

    @contextmanager
    def checkpoints(self, seed: int) -> Generator[Checkpoints]:
        """Those of a seed, which go when it is finished."""
        folder = self.output.results / FOLDER / f"seed{seed}"
        with open_output(folder, "checkpoints", keep_empty=False):
            checkpoints = Checkpoints(folder, self.keep)
            if not self.resume:
                checkpoints.set_aside()
            yield checkpoints
            checkpoints.set_aside()
            checkpoints.remove_set_aside()
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

    def note(self, seed: int, arms: list[ArmResult], failed: list[FailedArm], share: float) -> None:
        """A seed is finished, and its SAEs are in their places."""
        content = {
            "settings": self.settings,
            "arms": [asdict(arm) for arm in arms],
            "failed": [asdict(arm) for arm in failed],
            "share": share,
        }
        with self.output.file(f"{FOLDER}/seed{seed}.json") as unfinished:
            # NaN as Python has it, for `comparison.json` is what others read
            unfinished.write_text(json.dumps(content))


def begun(output: Output) -> bool:
    """Whether a comparison in this folder can be gone on with."""
    return any(True for _ in _seeds(output.unfinished))


def _seeds(results: Path) -> Iterator[Path]:
    """Records of seeds that are finished, and folders of those that are not."""
    yield from (path for path in (results / FOLDER).glob("seed*") if _SEED.fullmatch(path.name))

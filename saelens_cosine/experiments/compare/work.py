"""The points of a comparison, one by one: trained by this process, or taken over from another."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from sae_lens.constants import SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME

from saelens_cosine.experiments.compare.grid import Point, Training, is_tuned, trainings
from saelens_cosine.experiments.compare.results import (
    ArmResult,
    Comparison,
    FailedArm,
    HookResult,
    PointResult,
    Trained,
    chosen_rates,
    rates_tried,
)
from saelens_cosine.experiments.compare.settings import ComparisonSettings
from saelens_cosine.experiments.compare.state import ComparisonState
from saelens_cosine.experiments.compare.training import Setting
from saelens_cosine.files.whole import scratch_folder
from saelens_cosine.progress import Progress
from saelens_cosine.training.alone import Alone

Placed = TypeVar("Placed", ArmResult, FailedArm)

SAE_FILES = (SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME, "README.md")
"""What the folder of a trained SAE holds."""


class Work:
    """The points of a comparison, trained or taken over one by one."""

    def __init__(
        self,
        settings: ComparisonSettings,
        at: Sequence[Setting],
        state: ComparisonState,
        progress: Progress,
        on_point: Callable[[Comparison], None] | None,
        processes: Alone,
    ):
        self.settings, self.at, self.state, self.processes = settings, at, state, processes
        self.progress, self.on_point = progress, on_point
        self.found: dict[Point, PointResult] = {}

    def try_rates(self, point: Point) -> None:
        """Run those trainings of a point with several rates that nobody else runs."""
        if self.state.finished(point) is not None:
            return
        for run in trainings(point, self.settings, None):
            if self.state.trained(run) is None and self.processes.claim(run.name):
                with scratch_folder(self.state.output.folder) as workspace, ExitStack() as until_kept:
                    self.state.keep_trained(run, *self._train(run, workspace, until_kept))

    def finish(self, point: Point) -> None:
        """Train and measure a point, if it is not finished and nobody else does."""
        result = self.state.finished(point)
        if result is None and self.processes.claim(point.name):
            result = self._run(point)
        if result is not None and self.processes.first:
            self._keep(point, result)

    def take(self, some: Sequence[Point]) -> None:
        """Put SAEs of other processes in their places."""
        for point in some if self.processes.first else ():
            result = None if point in self.found else self.state.take_over(point)
            if result is not None:
                self._keep(point, result)

    def know(self, some: Sequence[Point]) -> None:
        """What has been found at some points, which are all finished."""
        for point in some:
            result = self.found.get(point) or self.state.finished(point)
            assert result is not None
            self.found[point] = result

    def _run(self, point: Point) -> PointResult:
        """Train what a point takes, choose learning rates if it is the one for that, and put SAEs and record in their places.

        Raises:
            FloatingPointError: no arm was trained to its end, at any rate.
        """
        settings, state, at = self.settings, self.state, self.at[point.hook]
        hook_name, tuned = at.model.hook_name, is_tuned(point, settings)
        tried = [one for result in self.found.values() for one in result.rates]
        runs = trainings(point, settings, None if tuned else chosen_rates(tried, hook_name))
        with ExitStack() as until_noted, scratch_folder(state.output.folder) as workspace:
            trained: list[Trained] = []
            folders: list[Path] = []
            for run in runs:
                done = state.trained(run) if len(runs) > 1 else None
                folder = state.saes(run)
                if done is None:
                    with ExitStack() as until_kept:
                        done, folder = self._train(run, workspace, until_kept)
                        if len(runs) > 1:
                            state.keep_trained(run, done, folder)
                            folder = state.saes(run)
                        else:
                            until_noted.push(until_kept.pop_all())
                trained.append(done)
                folders.append(folder)
            rates = rates_tried(trained, settings.arms, hook_name, point.k) if tuned else ()
            best = chosen_rates(rates, hook_name)
            good = {
                arm.architecture: (arm, run.lr, folder / arm.architecture)
                for run, folder in zip(trained, folders, strict=True)
                for arm in run.arms
                if not tuned or best.get(arm.architecture) == run.lr
            }
            failed = {arm.architecture: arm for run in trained for arm in run.failed if arm.architecture not in good}
            if not good:
                raise FloatingPointError("; ".join(f"{arm.architecture}: {arm.reason}" for arm in failed.values()))
            arms = at.measure(point, [good[arm] for arm in settings.arms if arm in good], self.progress)
            made = workspace / "made"
            for arm, (_, _, folder) in good.items():
                place = made / point.path(arm)
                place.mkdir(parents=True)
                for file in SAE_FILES:
                    shutil.copy2(folder / file, place / file)
            share = sum(run.dropped_share for run in trained) / len(trained)
            result = PointResult(arms, tuple(failed[arm] for arm in settings.arms if arm in failed), share, rates)
            (state.put if self.processes.first else state.hand_over)(point, result, made)
        return result

    def gathered(self) -> Comparison:
        """Everything so far."""
        return _gathered(self.settings, self.at, self.found)

    def _train(self, run: Training, workspace: Path, until_kept: ExitStack) -> tuple[Trained, Path]:
        """Train, with checkpoints that go when the block has ended; SAEs are in a folder of the workspace."""
        folder, which = workspace / run.name, _called(run.point, self.settings)
        folder.mkdir()
        called = which if run.lr is None or len(self.settings.rates) < 2 else f"{which} lr {run.lr:g}"
        checkpoints = until_kept.enter_context(self.state.checkpoints(run))
        return self.at[run.point.hook].train(run, folder, checkpoints, self.progress, called), folder

    def _keep(self, point: Point, result: PointResult) -> None:
        self.found[point] = result
        self.state.forget(point)
        if self.on_point is not None:
            self.on_point(self.gathered())


def _called(point: Point, settings: ComparisonSettings) -> str:
    """What tells the training of a point from the others, after the name of a stage."""
    if settings.is_grid:
        return f", {' '.join(point.parts)}"
    return "" if settings.seeds == 1 else f", seed {point.seed + 1} of {settings.seeds}"


def _gathered(settings: ComparisonSettings, at: Sequence[Setting], found: Mapping[Point, PointResult]) -> Comparison:
    """Everything so far, hook by hook, k by k and seed by seed."""
    ordered = sorted(found, key=lambda point: (point.hook, point.k, point.seed))
    hooks: list[HookResult] = []
    for number, one in enumerate(at):
        shares = [result.dropped_share for point, result in found.items() if point.hook == number]
        mean = sum(shares) / len(shares) if shares else 0.0
        hooks.append(HookResult(one.model.hook_name, one.model.d_in, mean, one.heldout.dropped_share, one.heldout.site))
    return Comparison(
        settings,
        tuple(hooks),
        tuple(_placed(arm, point, hooks) for point in ordered for arm in found[point].arms),
        tuple(_placed(arm, point, hooks) for point in ordered for arm in found[point].failed),
        tuple(one for point in ordered for one in found[point].rates),
    )


def _placed(arm: Placed, point: Point, hooks: Sequence[HookResult]) -> Placed:
    """Records of earlier versions don't say where on the grid they belong."""
    return replace(arm, hook_name=hooks[point.hook].hook_name, k=point.k)

"""Train several architectures on the same activations and compare them on held-out text, at one point or over a grid."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from sae_lens.constants import SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY

from saelens_cosine.activations.cache.cache import open_cache
from saelens_cosine.activations.cache.contexts import as_dataset, training_contexts
from saelens_cosine.activations.cache.identity import CacheIdentity
from saelens_cosine.activations.cache.standing_in import fill, standing_in
from saelens_cosine.activations.contexts import ContextForm
from saelens_cosine.activations.gguf import SHA256
from saelens_cosine.activations.models import HookedModel, load_hooked_model
from saelens_cosine.activations.planted_sinks import plant_sinks
from saelens_cosine.activations.text import TextSplits, load_text
from saelens_cosine.devices import check_device
from saelens_cosine.experiments.compare.grid import Point, is_tuned, points, trainings
from saelens_cosine.experiments.compare.heldout import HeldOut, context_size, heldout_contexts
from saelens_cosine.experiments.compare.rates import chosen_rates, rates_tried
from saelens_cosine.experiments.compare.results import (
    ArmResult,
    Comparison,
    FailedArm,
    HookResult,
    PointResult,
    Trained,
)
from saelens_cosine.experiments.compare.settings import ComparisonSettings
from saelens_cosine.experiments.compare.state import FOLDER, ComparisonState, begun
from saelens_cosine.experiments.compare.training import Setting, buffer_tokens
from saelens_cosine.files.output import Output, open_output
from saelens_cosine.files.whole import scratch_folder
from saelens_cosine.plain import digest
from saelens_cosine.progress import Progress, shown

Placed = TypeVar("Placed", ArmResult, FailedArm)

SAE_FILES = (SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME, "README.md")
"""What the folder of a trained SAE holds."""

SUMMARY = ("comparison.json", "comparison.png", "comparison.html")
"""What the command writes beside these folders."""


def compare(
    settings: ComparisonSettings,
    output: str | Path | Output,
    *,
    overwrite: bool = False,
    resume: bool = False,
    keep: int = 2,
    stop_signals: Sequence[int] = (),
    on_progress: Progress | None = None,
    on_point: Callable[[Comparison], None] | None = None,
) -> Comparison:
    """Train all arms on one stream per seed, save them, and measure the saved SAEs on held-out text.

    Each SAE lands in `output/<architecture>/seed<seed>`, with `layer<n>` and `k<k>` in between where there are several, complete or
    not at all. On the CPU, the same settings, machine and thread count give the same numbers every time.

    Args:
        settings: what to compare.
        output: folder for the SAEs, without an earlier comparison unless `overwrite`; or what `open_comparison` gives, for a
            caller who writes files of the comparison too.
        overwrite: replace an earlier comparison when this one has ended. Files that this package has not written there, or that
            somebody has changed since, are left alone.
        resume: go on with a comparison of these settings in this folder, exactly where it was: seeds that are finished are not trained
            again. From the start if there is none. `seeds` may have grown, not shrunk.
        keep: checkpoints that are kept while a seed is trained, the newest.
        stop_signals: signals beside SIGINT and SIGTERM that end the run with a checkpoint, such as Slurm's.
        on_progress: called with what is being done, how much of it, and out of how much.
        on_point: called with everything measured so far after each point of the grid.

    Raises:
        FileExistsError: the folder holds an earlier comparison and `overwrite` is off, or somebody's file in the place of ours.
        OutputInUseError: another run writes to the folder.
        OSError: the folder cannot be written.
        ValueError: settings that cannot be run, such as an empty dataset, or that are not those of the comparison to go on with.
        FloatingPointError: no arm of a seed could be trained to its end. One of several that could not is in `failed`.
        StopError: a signal has come during training, which is saved.
    """
    check_device(settings.device)
    with ExitStack() as afterwards, open_comparison(output) as opened:
        saes = [point.path(arm) for point in points(settings) for arm in settings.arms]
        opened.begin(
            before=written_before(opened.folder),
            places=[*SUMMARY, *(f"{sae}/{file}" for sae in saes for file in SAE_FILES)],
            overwrite=overwrite,
            resume=resume and begun(opened),
        )
        state = ComparisonState(
            settings, opened, resume=resume, overwrite=overwrite, keep=keep, stop_signals=stop_signals
        )
        return _compare(settings, opened, state, on_progress, on_point, afterwards)


def open_comparison(output: str | Path | Output) -> AbstractContextManager[Output]:
    """The output folder of a comparison, locked; see `open_output`."""
    return open_output(output, "comparison", parts=[*SAE_TRAINING_CLASS_REGISTRY, FOLDER], keep_empty=False)


def _compare(
    settings: ComparisonSettings,
    output: Output,
    state: ComparisonState,
    on_progress: Progress | None,
    on_point: Callable[[Comparison], None] | None,
    afterwards: ExitStack,
) -> Comparison:
    progress = shown(on_progress)
    progress("Loading the model", 0, 1)
    hooked = load_at_hooks(settings)
    if settings.plant_sinks:
        afterwards.callback(plant_sinks(hooked[0].model, hooked[0].hook_name))
    text = load_text(settings.dataset)
    state.settings |= {"heldout_rule": text.rule, "text": text.fingerprint, SHA256: hooked[0].kwargs.get(SHA256)}
    found: dict[Point, PointResult] = {}
    comparison = None
    with _documents(settings, hooked, text, state, progress) as documents:
        progress("Gathering held-out activations", 0, 1)
        contexts = heldout_contexts(settings, hooked[0], text.heldout)
        at = [
            Setting(settings, model, HeldOut(settings, model, contexts, progress), text.rule, documents, state)
            for model in hooked
        ]
        for i, point in enumerate(points(settings)):
            found[point] = state.finished(point) or _run_point(
                point, at[point.hook], found, output, progress, _called(point, i, settings)
            )
            state.forget(point)
            comparison = _gathered(settings, at, found)
            if on_point is not None:
                on_point(comparison)
    state.forget_activations()
    assert comparison is not None  # there is at least one seed
    return comparison


@contextmanager
def _documents(
    settings: ComparisonSettings,
    hooked: Sequence[HookedModel],
    text: TextSplits,
    state: ComparisonState,
    progress: Progress,
) -> Generator[Callable[[int], Any]]:
    """The training text of a seed, as SAELens' store takes it: documents, or where activations are kept, contexts that have been run.

    Where they are kept, the model answers from there while this is open. It runs only if there is something to train, and another
    comparison is refused before.
    """
    folder = settings.activations or (state.activations if settings.is_grid else None)
    if folder is None:
        state.check()
        yield lambda seed: load_text(settings.dataset, seed).train
        return
    model, form = hooked[0], ContextForm(context_size(settings, hooked[0]))
    planted = [model.hook_name] if settings.plant_sinks else []
    identity = CacheIdentity.of(model, [one.hook_name for one in hooked], form, settings.dataset, text, planted)
    buffer = max(buffer_tokens(settings, one.d_in) for one in hooked)
    with open_cache(folder, identity) as cache:
        contexts = training_contexts(model, text.train, form, settings.tokens, progress, buffer)
        state.settings["contexts"] = digest(None, {"contexts": contexts})  # another number of them is another order
        state.check()
        if not all(state.finished(point) for point in points(settings)):
            fill(cache, model.model, contexts, progress)
        with standing_in(model.model, cache):
            yield partial(as_dataset, contexts)


def load_at_hooks(settings: ComparisonSettings) -> list[HookedModel]:
    """The model at each of the settings' hooks, loaded once.

    Raises:
        ValueError: no such hook, one hook twice, or a sink planted at several.
    """
    places = [(layer, None) for layer in settings.layers] + [(None, hook) for hook in settings.hooks] or [(None, None)]
    if settings.plant_sinks and len(places) > 1:
        raise ValueError("plant_sinks plants them at one hook, and others would have them from there; name one.")
    first = load_hooked_model(settings.model, settings.device, *places[0])
    hooked = [first, *(first.at(*place) for place in places[1:])]
    names = [model.hook_name for model in hooked]
    if len(set(names)) < len(names):
        raise ValueError(f"hooks {', '.join(settings.hooks)} name one twice: this model has {', '.join(names)}.")
    return hooked


def _called(point: Point, number: int, settings: ComparisonSettings) -> str:
    """What tells the training of a point from the others, after the name of a stage."""
    if settings.is_grid:
        return f", {' '.join(point.parts)}"
    return "" if settings.seeds == 1 else f", seed {number + 1} of {settings.seeds}"


def _run_point(
    point: Point,
    at: Setting,
    found: Mapping[Point, PointResult],
    output: Output,
    progress: Progress,
    which: str,
) -> PointResult:
    """Train what a point takes, choose learning rates if it is the one for that, and put SAEs and record in their places.

    Raises:
        FloatingPointError: no arm was trained to its end, at any rate.
    """
    settings, state, hook_name = at.settings, at.state, at.model.hook_name
    tuned = is_tuned(point, settings)
    tried = [one for result in found.values() for one in result.rates]
    runs = trainings(point, settings, None if tuned else chosen_rates(tried, hook_name))
    with ExitStack() as until_noted, scratch_folder(output.folder) as workspace:
        trained: list[Trained] = []
        folders: list[Path] = []
        for run in runs:
            done = state.trained(run) if len(runs) > 1 else None
            folder = workspace / run.name
            if done is None:
                folder.mkdir()
                called = which if run.lr is None or len(settings.rates) < 2 else f"{which} lr {run.lr:g}"
                with ExitStack() as until_kept:
                    checkpoints = until_kept.enter_context(state.checkpoints(run))
                    done = at.train(run, folder, checkpoints, progress, called)
                    if len(runs) > 1:
                        state.keep_trained(run, done, folder)
                    else:
                        until_noted.push(until_kept.pop_all())
            trained.append(done)
            folders.append(state.saes(run) if len(runs) > 1 else folder)
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
        arms = at.measure(point, [good[arm] for arm in settings.arms if arm in good], progress)
        made = workspace / "made"
        for arm, (_, _, folder) in good.items():
            place = made / point.path(arm)
            place.mkdir(parents=True)
            for file in SAE_FILES:
                shutil.copy2(folder / file, place / file)
        output.add(made)
        share = sum(run.dropped_share for run in trained) / len(trained)
        result = PointResult(arms, tuple(failed[arm] for arm in settings.arms if arm in failed), share, rates)
        state.note(point, result)
    return result


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


def written_before(folder: Path) -> Iterator[str]:
    """Files of a comparison by a version that kept no list of what it wrote."""
    yield from SUMMARY[:2]  # those that such a version wrote
    for path in folder.glob("*/*/" + SAE_CFG_FILENAME):
        arm, seed = path.parts[-3:-1]
        if arm in SAE_TRAINING_CLASS_REGISTRY and re.fullmatch(r"seed\d+", seed):
            yield from (f"{arm}/{seed}/{file}" for file in SAE_FILES)

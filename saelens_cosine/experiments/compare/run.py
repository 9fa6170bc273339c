"""Train several architectures on the same activations and compare them on held-out text, at one point or over a grid."""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from sae_lens.constants import SAE_CFG_FILENAME
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
from saelens_cosine.experiments.compare.grid import is_tuned, points
from saelens_cosine.experiments.compare.heldout import HeldOut, context_size, heldout_contexts
from saelens_cosine.experiments.compare.results import Comparison
from saelens_cosine.experiments.compare.settings import ComparisonSettings
from saelens_cosine.experiments.compare.state import FOLDER, ComparisonState, Place, begun
from saelens_cosine.experiments.compare.training import Setting, buffer_tokens
from saelens_cosine.experiments.compare.work import SAE_FILES, Work
from saelens_cosine.files.output import Output, open_output
from saelens_cosine.plain import digest, plain
from saelens_cosine.progress import Progress, shown
from saelens_cosine.training.alone import ALONE, Alone

SUMMARY = ("comparison.json", "comparison.png", "comparison.html")
"""What the command writes beside these folders."""

PROFILE = "comparison-profile.json"
"""And this, if it was profiled."""


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
    processes: Alone = ALONE,
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
        processes: those that share the trainings; the first keeps the results, and `output` is the same folder of all.

    Raises:
        FileExistsError: the folder holds an earlier comparison and `overwrite` is off, or somebody's file in the place of ours.
        OutputInUseError: another run writes to the folder.
        OSError: the folder cannot be written.
        ValueError: settings that cannot be run, such as an empty dataset, or that are not those of the comparison to go on with.
        FloatingPointError: no arm of a seed could be trained to its end. One of several that could not is in `failed`.
        StopError: a signal has come during training, which is saved.
    """
    check_device(settings.device)
    processes.check_alike(plain(settings))
    with ExitStack() as afterwards:
        place = None
        if processes.first:
            opened = afterwards.enter_context(open_comparison(output))
            saes = [point.path(arm) for point in points(settings) for arm in settings.arms]
            opened.begin(
                before=written_before(opened.folder),
                places=[*SUMMARY, PROFILE, *(f"{sae}/{file}" for sae in saes for file in SAE_FILES)],
                overwrite=overwrite,
                resume=resume and begun(opened),
            )
            place = opened
        folders = processes.from_first(None if place is None else Place(place.folder, place.results))
        assert folders is not None
        state = ComparisonState(
            settings,
            place or folders,
            resume=resume,
            overwrite=overwrite,
            keep=keep,
            stop_signals=stop_signals,
        )
        return _compare(settings, state, on_progress, on_point, afterwards, processes)


def open_comparison(output: str | Path | Output) -> AbstractContextManager[Output]:
    """The output folder of a comparison, locked; see `open_output`."""
    return open_output(output, "comparison", parts=[*SAE_TRAINING_CLASS_REGISTRY, FOLDER], keep_empty=False)


def _compare(
    settings: ComparisonSettings,
    state: ComparisonState,
    on_progress: Progress | None,
    on_point: Callable[[Comparison], None] | None,
    afterwards: ExitStack,
    processes: Alone,
) -> Comparison:
    progress = shown(on_progress)
    progress("Loading the model", 0, 1)
    hooked = load_at_hooks(settings)
    if settings.plant_sinks:
        afterwards.callback(plant_sinks(hooked[0].model, hooked[0].hook_name))
    text = load_text(settings.dataset)
    state.settings |= {"heldout_rule": text.rule, "text": text.fingerprint, SHA256: hooked[0].kwargs.get(SHA256)}
    if not processes.first:
        processes.wait()  # for activations
    with _documents(settings, hooked, text, state, progress, processes) as documents:
        progress("Gathering held-out activations", 0, 1)
        contexts = heldout_contexts(settings, hooked[0], text.heldout)
        at = [
            Setting(settings, model, HeldOut(settings, model, contexts, progress), text.rule, documents, state)
            for model in hooked
        ]
        work, every = Work(settings, at, state, progress, on_point, processes), points(settings)
        work.take(every)  # what ranks that were stopped have handed over
        if processes.first:
            processes.wait()
        tuned = [point for point in every if is_tuned(point, settings)]
        for point in tuned:
            work.try_rates(point)
        processes.wait()
        for some in (tuned, [point for point in every if point not in tuned]):
            for point in some:
                work.finish(point)
            processes.wait()
            work.take(some)
            processes.wait()
            work.know(some)
    if processes.first:
        state.forget_activations()
    processes.wait()
    return work.gathered()


@contextmanager
def _documents(
    settings: ComparisonSettings,
    hooked: Sequence[HookedModel],
    text: TextSplits,
    state: ComparisonState,
    progress: Progress,
    processes: Alone,
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
    with open_cache(folder, identity, writes=processes.first) as cache:
        contexts = training_contexts(model, text.train, form, settings.tokens, progress, buffer)
        state.settings["contexts"] = digest(None, {"contexts": contexts})  # another number of them is another order
        state.check()
        if processes.first and not all(state.finished(point) for point in points(settings)):
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


def written_before(folder: Path) -> Iterator[str]:
    """Files of a comparison by a version that kept no list of what it wrote."""
    yield from SUMMARY[:2]  # those that such a version wrote
    for path in folder.glob("*/*/" + SAE_CFG_FILENAME):
        arm, seed = path.parts[-3:-1]
        if arm in SAE_TRAINING_CLASS_REGISTRY and re.fullmatch(r"seed\d+", seed):
            yield from (f"{arm}/{seed}/{file}" for file in SAE_FILES)

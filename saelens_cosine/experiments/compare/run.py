"""Train several architectures on one activation stream and compare them on held-out text."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAE, LoggingConfig, MultiSAETrainingRunner
from sae_lens.constants import SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY, get_sae_training_class

from saelens_cosine.activations.contexts import ContextForm, sample_contexts
from saelens_cosine.activations.gguf import SHA256
from saelens_cosine.activations.models import HookedModel, load_hooked_model
from saelens_cosine.activations.norm_filter import filter_high_norm_tokens
from saelens_cosine.activations.planted_sinks import plant_sinks
from saelens_cosine.activations.sample import sample_tokens
from saelens_cosine.activations.text import load_text
from saelens_cosine.devices import check_device
from saelens_cosine.experiments.compare.results import ArmResult, Comparison, FailedArm
from saelens_cosine.experiments.compare.settings import ComparisonSettings
from saelens_cosine.experiments.compare.state import ComparisonState, begun
from saelens_cosine.files.output import Output, open_output
from saelens_cosine.files.whole import scratch_folder
from saelens_cosine.metrics.norms.exponents import exponent_range
from saelens_cosine.metrics.reconstruction.by_norm import Reconstruction, evaluate_reconstruction
from saelens_cosine.metrics.reconstruction.loss_recovered import ce_loss_recovered
from saelens_cosine.plain import weights_sha256
from saelens_cosine.progress import Progress, shown
from saelens_cosine.report.model_card import model_card
from saelens_cosine.training.monitor import TrainingMonitor
from saelens_cosine.training.next_norm import take_next_norms
from saelens_cosine.training.recipe import get_recipe, multi_runner_config
from saelens_cosine.training.recorded import record_training
from saelens_cosine.training.resuming.checkpoints import Checkpoints
from saelens_cosine.training.resuming.run import FILLING, ResumableRun
from saelens_cosine.training.resuming.stop import StopRequests
from saelens_cosine.training.short_text import name_sizes_of_short_text

N_CHECKPOINTS = 5
"""In the course of a seed's training, beside the one at its end."""

SAE_FILES = (SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME, "README.md")
"""What the folder of a trained SAE holds."""

SUMMARY = ("comparison.json", "comparison.png")
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
    on_seed: Callable[[Comparison], None] | None = None,
) -> Comparison:
    """Train all arms on one stream per seed, save them, and measure the saved SAEs on held-out text.

    Each SAE lands in `output/<architecture>/seed<seed>`, complete or not at all. On the CPU, the
    same settings, machine and thread count give the same numbers every time.

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
        on_seed: called with everything measured so far after each seed.

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
        saes = [f"{arm}/seed{seed}" for arm in settings.arms for seed in range(settings.seeds)]
        opened.begin(
            before=written_before(opened.folder),
            places=[*SUMMARY, *(f"{sae}/{file}" for sae in saes for file in SAE_FILES)],
            overwrite=overwrite,
            resume=resume and begun(opened),
        )
        state = ComparisonState(
            settings, opened, resume=resume, overwrite=overwrite, keep=keep, stop_signals=stop_signals
        )
        return _compare(settings, opened, state, on_progress, on_seed, afterwards)


def open_comparison(output: str | Path | Output) -> AbstractContextManager[Output]:
    """The output folder of a comparison, locked; see `open_output`."""
    return open_output(output, "comparison", parts=SAE_TRAINING_CLASS_REGISTRY, keep_empty=False)


def _compare(
    settings: ComparisonSettings,
    output: Output,
    state: ComparisonState,
    on_progress: Progress | None,
    on_seed: Callable[[Comparison], None] | None,
    afterwards: ExitStack,
) -> Comparison:
    progress = shown(on_progress)
    progress("Loading the model", 0, 1)
    model = load_hooked_model(settings.model, settings.device, settings.layer, settings.hook)
    if settings.plant_sinks:
        afterwards.callback(plant_sinks(model.model, model.hook_name))
    progress("Gathering held-out activations", 0, 1)
    text = load_text(settings.dataset)
    state.settings |= {"heldout_rule": text.rule, "text": text.fingerprint, SHA256: model.kwargs.get(SHA256)}
    heldout = _HeldOut(settings, model, text.heldout)
    arms: list[ArmResult] = []
    failed: list[FailedArm] = []
    dropped: list[float] = []
    for seed in range(settings.seeds):
        finished = state.finished(seed)
        if finished is None:
            with scratch_folder(output.folder) as workspace, state.checkpoints(seed) as checkpoints:
                finished = _run_seed(settings, model, heldout, seed, workspace, checkpoints, state, progress)
                output.add(workspace)
                state.note(seed, *finished)
        results, failures, share = finished
        arms.extend(results)
        failed.extend(failures)
        dropped.append(share)
        comparison = Comparison(
            settings,
            model.hook_name,
            model.d_in,
            sum(dropped) / len(dropped),
            heldout.dropped_share,
            tuple(arms),
            tuple(failed),
        )
        if on_seed is not None:
            on_seed(comparison)
    return comparison  # pyright: ignore[reportPossiblyUnboundVariable]  (there is at least one seed)


def written_before(folder: Path) -> Iterator[str]:
    """Files of a comparison by a version that kept no list of what it wrote."""
    yield from SUMMARY
    for path in folder.glob("*/*/" + SAE_CFG_FILENAME):
        arm, seed = path.parts[-3:-1]
        if arm in SAE_TRAINING_CLASS_REGISTRY and re.fullmatch(r"seed\d+", seed):
            yield from (f"{arm}/{seed}/{file}" for file in SAE_FILES)


def _run_seed(
    settings: ComparisonSettings,
    model: HookedModel,
    heldout: _HeldOut,
    seed: int,
    workspace: Path,
    checkpoints: Checkpoints,
    state: ComparisonState,
    progress: Progress,
) -> tuple[list[ArmResult], list[FailedArm], float]:
    context_size = _context_size(settings, model)
    config = multi_runner_config(
        {arm: arm for arm in settings.arms},
        d_in=model.d_in,
        d_sae=settings.d_sae,
        k=settings.k,
        training_tokens=settings.tokens,
        recipe=settings.recipe,
        sae={"device": settings.device, "reshape_activations": _reshape(model.hook_name)},
        hook_names=model.hook_name,
        model_name=model.name,
        model_class_name=model.class_name,
        model_from_pretrained_kwargs=model.kwargs,
        dataset_path=settings.dataset,
        context_size=context_size,
        n_batches_in_buffer=max(1, _buffer_tokens(settings, model.d_in) // context_size),
        store_batch_size_prompts=16,
        device=settings.device,
        seed=seed,
        logger=LoggingConfig(log_to_wandb=False),
        checkpoint_path=None,
        output_path=None,
    )
    text = load_text(settings.dataset, seed)
    saes: dict[str, Any] = {}
    for name, sae in config.saes.items():
        torch.manual_seed(seed)  # every arm starts from the same decoder
        saes[name] = get_sae_training_class(sae.architecture())[0](sae)
        if settings.plant_sinks:
            saes[name].cfg.metadata.planted_sinks = True
        saes[name].cfg.metadata.heldout_rule = text.rule
        record_training(saes[name], config, settings.recipe)
    runner = MultiSAETrainingRunner(
        config,
        override_dataset=text.train,
        override_model=model.model,
        override_saes=saes,
    )
    take_next_norms(runner)
    norm_filter = filter_high_norm_tokens(runner, settings.max_norm_multiple)
    name_sizes_of_short_text(runner.activations_store)
    which = "" if settings.seeds == 1 else f", seed {seed + 1} of {settings.seeds}"
    monitor = TrainingMonitor(
        saes,
        config.hook_names_per_sae,
        every_steps=max(1, config.total_training_steps // 40),
    )
    run = ResumableRun(
        runner,
        checkpoints,
        every=-(-settings.tokens // (N_CHECKPOINTS + 1)),
        settings=state.settings,
        parts={"norm_filter": norm_filter, "monitor": monitor},
        go_on="Run the same command with --resume to go on.",
        stop=StopRequests(state.stop_signals),
        on_step=partial(progress, f"Training{which}"),
        on_fill=partial(progress, f"{FILLING}{which}"),
    )
    monitor.attach(runner)
    state.go_on(run, checkpoints)
    torch.manual_seed(seed)
    runner.run()
    monitor.finish()
    results: list[ArmResult] = []
    trained = {arm: sae for arm, sae in saes.items() if arm not in monitor.failed}
    for i, (arm, sae) in enumerate(trained.items()):
        progress("Evaluating on held-out text", i, len(trained))
        path = f"{arm}/seed{seed}"
        sae.save_inference_model(workspace / path)
        saved = SAE.load_from_disk(workspace / path, device=settings.device)
        (workspace / path / "README.md").write_text(model_card(saved.cfg, 'SAE.load_from_disk("this folder")'))
        reconstruction, ce = heldout.evaluate(saved)
        results.append(
            ArmResult(
                architecture=arm,
                seed=seed,
                path=path,
                reconstruction=reconstruction,
                ce_loss_recovered=ce,
                norm_exponent=exponent_range(sae, saved),
                seconds=monitor.seconds[arm],
                log=tuple(monitor.log[arm]),
                weights_sha256=weights_sha256(saved),
            )
        )
    progress("Evaluating on held-out text", len(trained), len(trained))
    failures = [FailedArm(arm, seed, **asdict(failure)) for arm, failure in monitor.failed.items()]
    return results, failures, norm_filter.dropped_share


def _context_size(settings: ComparisonSettings, model: HookedModel) -> int:
    return min(settings.context_size, model.context_size or settings.context_size)


def _buffer_tokens(settings: ComparisonSettings, d_in: int) -> int:
    """Tokens that SAELens' mixing buffer holds: many documents at once, in a quarter of a GiB of float32."""
    batch = get_recipe(settings.recipe, settings.tokens).runner["train_batch_size_tokens"]
    return max(2 * batch, min(settings.tokens, 2**26 // d_in))


class _HeldOut:
    """Held-out activations and prompts, the same for every arm and seed."""

    def __init__(self, settings: ComparisonSettings, model: HookedModel, text: Any):
        self.settings, self.model = settings, model
        form = ContextForm(_context_size(settings, model))
        contexts = sample_contexts(
            form.store(model.model, text, model.hook_name, model.d_in, settings.device), settings.eval_tokens
        )
        sample = sample_tokens(model.model, model.hook_name, contexts.batches, settings.max_norm_multiple)
        self.activations, self.dropped_share = sample.without_sinks().activations, sample.high_norm_share
        self.prompts = contexts.at_even_steps(settings.eval_prompts).batches

    def evaluate(self, sae: SAE[Any]) -> tuple[Reconstruction, float]:
        reconstruction = evaluate_reconstruction(sae, self.activations)
        return reconstruction, ce_loss_recovered(sae, self.model.model, self.prompts, self.settings.max_norm_multiple)


def _reshape(hook_name: str) -> str:
    return "hook_z" if hook_name.endswith("hook_z") else "none"

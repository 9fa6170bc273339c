"""Train several architectures on one activation stream and compare them on held-out text."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAE, LoggingConfig, MultiSAETrainingRunner
from sae_lens.constants import SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY, get_sae_training_class

from saelens_cosine.activations.contexts import ContextForm, check_context_size, sample_contexts
from saelens_cosine.bundled import BUNDLED
from saelens_cosine.data import load_text
from saelens_cosine.evaluation.plain import weights_sha256
from saelens_cosine.evaluation.planted import plant_sinks
from saelens_cosine.evaluation.reconstruction import Reconstruction, ce_loss_recovered, evaluate_reconstruction
from saelens_cosine.evaluation.sample import sample_tokens
from saelens_cosine.files.output import Output, open_output
from saelens_cosine.files.whole import scratch_folder
from saelens_cosine.model_card import model_card
from saelens_cosine.models import HookedModel, load_hooked_model
from saelens_cosine.registry import check_training_architecture
from saelens_cosine.training.monitor import TrainingLogEntry, TrainingMonitor
from saelens_cosine.training.next_norm import take_next_norms
from saelens_cosine.training.norm_filter import check_max_norm_multiple, filter_high_norm_tokens
from saelens_cosine.training.recipe import get_recipe, multi_runner_config
from saelens_cosine.training.recorded import record_training

SAE_FILES = (SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME, "README.md")
"""What the folder of a trained SAE holds."""

SUMMARY = ("comparison.json", "comparison.png")
"""What the command writes beside these folders."""

DEFAULT_ARMS = ("inner_product_batchtopk", "cosine_batchtopk", "per_feature_cosine_batchtopk")


@dataclass
class ComparisonSettings:
    """
    What to train and how to compare it.

    Args:
        arms (tuple[str, ...]): Architectures registered for training; the first is what the others are compared with.
        model (str): `bundled`, a TransformerLens or Hugging Face name, or a local folder.
        dataset (str): `bundled`, a Hugging Face name, or a local file or saved dataset with a text column.
        layer (int | None): Block whose residual output is hooked; the middle one if None.
        hook (str | None): A hook point by name instead of a layer.
        tokens (int): Training tokens of each SAE.
        k (int): Active features per token (BatchTopK: on average).
        d_sae (int): Features.
        seeds (int): Runs with different initialisation and data order.
        recipe (str): `paper` or `saelens`.
        max_norm_multiple (float | None): Drop tokens above this multiple of their batch's median norm, in training and evaluation. None keeps them all in both.
        plant_sinks (bool): Whether the first position of each context becomes an attention sink of 30 to 300 times the median norm (`planted.plant_sinks`). The default filter drops these, None trains on them.
        device (str): Where everything runs.
        context_size (int): Tokens per context, as far as the model allows.
        eval_tokens (int): Held-out tokens for reconstruction, in contexts from all held-out documents; also the window of the dead fraction.
        eval_prompts (int): Of their contexts, those for the cross-entropy.
    """

    arms: tuple[str, ...] = DEFAULT_ARMS
    model: str = BUNDLED
    dataset: str = BUNDLED
    layer: int | None = None
    hook: str | None = None
    tokens: int = 1_000_000
    k: int = 32
    d_sae: int = 2048
    seeds: int = 1
    recipe: str = "paper"
    max_norm_multiple: float | None = 10.0
    plant_sinks: bool = False
    device: str = "cpu"
    context_size: int = 128
    eval_tokens: int = 100_000
    eval_prompts: int = 128

    def __post_init__(self) -> None:
        self.arms = tuple(check_training_architecture(arm) for arm in self.arms)
        if not self.arms or len(set(self.arms)) < len(self.arms):
            raise ValueError(f"arms={self.arms} must name at least one architecture, each once.")
        batch = get_recipe(self.recipe, self.tokens).runner["train_batch_size_tokens"]
        if self.tokens < 2 * batch:
            raise ValueError(f"tokens={self.tokens} is less than two training steps of {batch} tokens.")
        if not 0 < self.k <= self.d_sae:
            raise ValueError(f"k={self.k} features cannot be active out of d_sae={self.d_sae}.")
        if self.seeds < 1:
            raise ValueError(f"seeds={self.seeds} must be at least 1.")
        check_context_size(self.context_size)
        check_max_norm_multiple(self.max_norm_multiple)


@dataclass(frozen=True)
class ArmResult:
    """
    One trained SAE: its saved form on held-out text, and how it got there.

    Args:
        architecture (str): Training architecture.
        seed (int): Seed of initialisation and data order.
        path (str): Folder of the SAE, relative to the output folder.
        reconstruction (Reconstruction): On held-out activations, filtered as in training.
        ce_loss_recovered (float): On held-out text, high-norm tokens passed through.
        norm_exponent (tuple[float, float, float] | None): Mean, minimum and maximum; None for scores without one.
        seconds (float): Training time of this SAE alone.
        log (tuple[TrainingLogEntry, ...]): The course of its training.
        weights_sha256 (str): Hash of the saved tensors, which tells it from another SAE that is put in its place.
    """

    architecture: str
    seed: int
    path: str
    reconstruction: Reconstruction
    ce_loss_recovered: float
    norm_exponent: tuple[float, float, float] | None
    seconds: float
    log: tuple[TrainingLogEntry, ...] = field(repr=False)
    weights_sha256: str = ""


@dataclass(frozen=True)
class Comparison:
    """
    All results of a comparison.

    Args:
        settings (ComparisonSettings): As resolved.
        hook_name (str): Hook point.
        d_in (int): Size of the activations there.
        high_norm_share_dropped (float): Share of the training tokens that the filter dropped.
        high_norm_share_dropped_heldout (float): The same for the held-out tokens.
        arms (tuple[ArmResult, ...]): Seed by seed, in the order of the settings' arms.
    """

    settings: ComparisonSettings
    hook_name: str
    d_in: int
    high_norm_share_dropped: float
    high_norm_share_dropped_heldout: float
    arms: tuple[ArmResult, ...]


def compare(
    settings: ComparisonSettings,
    output: str | Path | Output,
    *,
    overwrite: bool = False,
    on_progress: Callable[[str, int, int], None] | None = None,
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
        on_progress: called with what is being done, how much of it, and out of how much.
        on_seed: called with everything measured so far after each seed.

    Raises:
        FileExistsError: the folder holds an earlier comparison and `overwrite` is off, or somebody's file in the place of ours.
        OutputInUseError: another run writes to the folder.
        OSError: the folder cannot be written.
        ValueError: settings that cannot be run, such as an empty dataset.
    """
    with ExitStack() as afterwards, open_comparison(output) as opened:
        saes = [f"{arm}/seed{seed}" for arm in settings.arms for seed in range(settings.seeds)]
        opened.begin(
            before=written_before(opened.folder),
            places=[*SUMMARY, *(f"{sae}/{file}" for sae in saes for file in SAE_FILES)],
            overwrite=overwrite,
        )
        return _compare(settings, opened, on_progress, on_seed, afterwards)


def open_comparison(output: str | Path | Output) -> AbstractContextManager[Output]:
    """The output folder of a comparison, locked; see `open_output`."""
    return open_output(output, "comparison", parts=SAE_TRAINING_CLASS_REGISTRY)


def _compare(
    settings: ComparisonSettings,
    output: Output,
    on_progress: Callable[[str, int, int], None] | None,
    on_seed: Callable[[Comparison], None] | None,
    afterwards: ExitStack,
) -> Comparison:
    progress = on_progress or (lambda _what, _done, _total: None)
    progress("Loading the model", 0, 1)
    model = load_hooked_model(settings.model, settings.device, settings.layer, settings.hook)
    if settings.plant_sinks:
        afterwards.callback(plant_sinks(model.model, model.hook_name))
    progress("Gathering held-out activations", 0, 1)
    heldout = _HeldOut(settings, model)
    arms: list[ArmResult] = []
    dropped: list[float] = []
    for seed in range(settings.seeds):
        with scratch_folder(output.folder) as workspace:
            results, share = _run_seed(settings, model, heldout, seed, workspace, progress)
            output.add(workspace)
        arms.extend(results)
        dropped.append(share)
        comparison = Comparison(
            settings, model.hook_name, model.d_in, sum(dropped) / len(dropped), heldout.dropped_share, tuple(arms)
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
    progress: Callable[[str, int, int], None],
) -> tuple[list[ArmResult], float]:
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
    what = "Training" if settings.seeds == 1 else f"Training, seed {seed + 1} of {settings.seeds}"
    monitor = TrainingMonitor(
        saes,
        config.hook_names_per_sae,
        every_steps=max(1, config.total_training_steps // 40),
        on_step=lambda tokens: progress(what, min(tokens, settings.tokens), settings.tokens),
    )
    monitor.attach(runner)
    torch.manual_seed(seed)
    runner.run()
    monitor.finish()
    results: list[ArmResult] = []
    for i, (arm, sae) in enumerate(saes.items()):
        progress("Evaluating on held-out text", i, len(saes))
        path = f"{arm}/seed{seed}"
        sae.save_inference_model(workspace / path)
        saved = SAE.load_from_disk(workspace / path, device=settings.device)
        (workspace / path / "README.md").write_text(model_card(saved.cfg, 'SAE.load_from_disk("this folder")'))
        reconstruction, ce = heldout.evaluate(saved)
        # as saved, of arms that learn one; the magnitude bypass has it at 0
        exponent: Any = saved.norm_exponent if hasattr(sae, "norm_exponent") else None
        results.append(
            ArmResult(
                architecture=arm,
                seed=seed,
                path=path,
                reconstruction=reconstruction,
                ce_loss_recovered=ce,
                norm_exponent=None
                if exponent is None
                else (exponent.mean().item(), exponent.min().item(), exponent.max().item()),
                seconds=monitor.seconds[arm],
                log=tuple(monitor.log[arm]),
                weights_sha256=weights_sha256(saved),
            )
        )
    progress("Evaluating on held-out text", len(saes), len(saes))
    return results, norm_filter.dropped_share


def _context_size(settings: ComparisonSettings, model: HookedModel) -> int:
    return min(settings.context_size, model.context_size or settings.context_size)


def _buffer_tokens(settings: ComparisonSettings, d_in: int) -> int:
    """Tokens that SAELens' mixing buffer holds: many documents at once, in a quarter of a GiB of float32."""
    batch = get_recipe(settings.recipe, settings.tokens).runner["train_batch_size_tokens"]
    return max(2 * batch, min(settings.tokens, 2**26 // d_in))


class _HeldOut:
    """Held-out activations and prompts, the same for every arm and seed."""

    def __init__(self, settings: ComparisonSettings, model: HookedModel):
        self.settings, self.model = settings, model
        text = load_text(settings.dataset).heldout
        form = ContextForm(_context_size(settings, model))
        contexts = sample_contexts(
            form.store(model.model, text, model.hook_name, model.d_in, settings.device), settings.eval_tokens
        )
        sample = sample_tokens(model.model, model.hook_name, contexts.batches, settings.max_norm_multiple)
        self.activations, self.dropped_share = sample.without_sinks().activations, sample.high_norm_share
        self.prompts = contexts.at_even_steps(settings.eval_prompts).batches

    def evaluate(self, sae: SAE[Any]) -> tuple[Reconstruction, float]:
        sae.turn_off_forward_pass_hook_z_reshaping()  # the store has flattened the heads
        reconstruction = evaluate_reconstruction(sae, self.activations)
        return reconstruction, ce_loss_recovered(sae, self.model.model, self.prompts, self.settings.max_norm_multiple)


def _reshape(hook_name: str) -> str:
    return "hook_z" if hook_name.endswith("hook_z") else "none"

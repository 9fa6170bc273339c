"""Train some arms on one activation stream, and measure what is saved of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAE, LoggingConfig, MultiSAETrainingRunner
from sae_lens.registry import get_sae_training_class

from saelens_cosine.activations.contexts import CONTEXTS_AT_ONCE
from saelens_cosine.activations.models import HookedModel
from saelens_cosine.activations.norm_filter import filter_high_norm_tokens
from saelens_cosine.experiments.compare.grid import Point, Training, is_tuned
from saelens_cosine.experiments.compare.heldout import HeldOut, context_size
from saelens_cosine.experiments.compare.results import ArmResult, FailedArm, Trained, TrainedArm
from saelens_cosine.experiments.compare.settings import ComparisonSettings
from saelens_cosine.experiments.compare.state import ComparisonState
from saelens_cosine.metrics.norms.exponents import exponent_range
from saelens_cosine.plain import weights_sha256
from saelens_cosine.progress import Progress
from saelens_cosine.report.model_card import model_card
from saelens_cosine.training.monitor import TrainingMonitor
from saelens_cosine.training.next_norm import take_next_norms
from saelens_cosine.training.recipe import get_recipe, multi_runner_config
from saelens_cosine.training.recorded import record_training
from saelens_cosine.training.resuming.checkpoints import Checkpoints
from saelens_cosine.training.resuming.run import FILLING, ResumableRun
from saelens_cosine.training.resuming.stop import StopError, StopRequests
from saelens_cosine.training.short_text import name_sizes_of_short_text

N_CHECKPOINTS = 5
"""In the course of a training, beside the one at its end."""


@dataclass(frozen=True)
class Setting:
    """
    What the trainings of a comparison at one hook share.

    Args:
        settings (ComparisonSettings): What is compared.
        model (HookedModel): Hooked there.
        heldout (HeldOut): What saved SAEs are measured on.
        rule (str): Which documents are held out.
        documents (Callable[[int], Any]): The training text of a seed, as SAELens' store takes it.
        state (ComparisonState): Where checkpoints go.
    """

    settings: ComparisonSettings
    model: HookedModel
    heldout: HeldOut
    rule: str
    documents: Callable[[int], Any]
    state: ComparisonState

    def train(
        self, training: Training, folder: Path, checkpoints: Checkpoints, progress: Progress, which: str
    ) -> Trained:
        """Train, and write each SAE's inference form to `folder/<arm>`.

        Args:
            training: which arms, and at what k, learning rate and seed.
            folder: where SAEs go.
            checkpoints: where the training goes on from, if there are any.
            progress: called with what is being done.
            which: what it adds to the name of a stage, to tell this training from the others.

        Raises:
            FloatingPointError: no arm could be trained to its end, and there is one learning rate.
            StopError: a signal has come, and the training is saved.
        """
        settings, point = self.settings, training.point
        runner, config, saes = self._runner(training)
        norm_filter = filter_high_norm_tokens(runner, settings.max_norm_multiple)
        name_sizes_of_short_text(runner.activations_store)
        monitor = TrainingMonitor(
            saes,
            config.hook_names_per_sae,
            every_steps=max(1, config.total_training_steps // 40),
        )
        run = ResumableRun(
            runner,
            checkpoints,
            every=-(-settings.tokens // (N_CHECKPOINTS + 1)),
            settings=self.state.settings,
            parts={"norm_filter": norm_filter, "monitor": monitor},
            go_on="Run the same command with --resume to go on.",
            stop=StopRequests(self.state.stop_signals),
            on_step=partial(progress, f"Training{which}"),
            on_fill=partial(progress, f"{FILLING}{which}"),
        )
        monitor.attach(runner)
        self.state.go_on(run, checkpoints)
        torch.manual_seed(point.seed)
        try:
            runner.run()
            monitor.finish()
        except FloatingPointError:
            if len(settings.rates) < 2 or len(monitor.failed) < len(saes):
                raise  # of several rates, one may be too large for every arm
        if run.stop.received is not None:  # in the last step, with others to train
            raise StopError(run.stop.received, f"Stopped at the end of a training{which}. {run.go_on}")
        arms: list[TrainedArm] = []
        for arm, sae in saes.items():
            if arm in monitor.failed:
                continue
            sae.save_inference_model(folder / arm)
            saved = self._load(folder / arm)
            (folder / arm / "README.md").write_text(model_card(saved.cfg, 'SAE.load_from_disk("this folder")'))
            judged = self.heldout.judge(saved) if is_tuned(point, settings) else None
            exponent = exponent_range(sae, saved)
            arms.append(TrainedArm(arm, exponent, monitor.seconds[arm], tuple(monitor.log[arm]), judged))
        failed = tuple(
            FailedArm(arm, point.seed, **asdict(failure), hook_name=self.model.hook_name, k=point.k, lr=config.lr)
            for arm, failure in monitor.failed.items()
        )
        return Trained(tuple(arms), failed, norm_filter.dropped_share, config.lr)

    def measure(
        self, point: Point, trained: Sequence[tuple[TrainedArm, float, Path]], progress: Progress
    ) -> tuple[ArmResult, ...]:
        """Load saved SAEs and measure them on held-out text.

        Args:
            point: where on the grid.
            trained: how each got there, its learning rate, and its folder.
            progress: called with what is being done.
        """
        results: list[ArmResult] = []
        for i, (arm, lr, folder) in enumerate(trained):
            progress("Evaluating on held-out text", i, len(trained))
            saved = self._load(folder)
            reconstruction, ce = self.heldout.evaluate(saved)
            results.append(
                ArmResult(
                    architecture=arm.architecture,
                    seed=point.seed,
                    path=point.path(arm.architecture),
                    reconstruction=reconstruction,
                    ce_loss_recovered=ce,
                    norm_exponent=arm.norm_exponent,
                    seconds=arm.seconds,
                    log=arm.log,
                    weights_sha256=weights_sha256(saved),
                    hook_name=self.model.hook_name,
                    k=point.k,
                    lr=lr,
                )
            )
        progress("Evaluating on held-out text", len(trained), len(trained))
        return tuple(results)

    def _load(self, folder: Path) -> SAE[Any]:
        return SAE.load_from_disk(folder, device=self.settings.device)

    def _runner(self, training: Training) -> tuple[MultiSAETrainingRunner, Any, dict[str, Any]]:
        settings, model, seed = self.settings, self.model, training.point.seed
        rate = {} if training.lr is None else {"lr": training.lr}
        config = multi_runner_config(
            {arm: arm for arm in training.arms},
            d_in=model.d_in,
            d_sae=settings.d_sae,
            k=training.point.k,
            training_tokens=settings.tokens,
            recipe=settings.recipe,
            sae={"device": settings.device, "reshape_activations": _reshape(model.hook_name)},
            seed=seed,
            **stream(settings, model),
            **rate,
        )
        saes: dict[str, Any] = {}
        for name, sae in config.saes.items():
            torch.manual_seed(seed)  # every arm starts from the same decoder
            saes[name] = get_sae_training_class(sae.architecture())[0](sae)
            if settings.plant_sinks:
                saes[name].cfg.metadata.planted_sinks = True
            saes[name].cfg.metadata.heldout_rule = self.rule
            record_training(saes[name], config, settings.recipe)
        runner = MultiSAETrainingRunner(
            config, override_dataset=self.documents(seed), override_model=model.model, override_saes=saes
        )
        take_next_norms(runner)
        return runner, config, saes


def stream(settings: ComparisonSettings, model: HookedModel) -> dict[str, Any]:
    """What SAELens' multi-SAE runner is told of the activations that all arms are trained on; it writes nothing itself."""
    size = context_size(settings, model)
    return {
        "hook_names": model.hook_name,
        "model_name": model.name,
        "model_class_name": model.class_name,
        "model_from_pretrained_kwargs": model.kwargs,
        "dataset_path": settings.dataset,
        "context_size": size,
        "n_batches_in_buffer": max(1, buffer_tokens(settings, model.d_in) // size),
        "store_batch_size_prompts": CONTEXTS_AT_ONCE,
        "device": settings.device,
        "logger": LoggingConfig(log_to_wandb=False),
        "checkpoint_path": None,
        "output_path": None,
    }


def buffer_tokens(settings: ComparisonSettings, d_in: int) -> int:
    """Tokens that SAELens' mixing buffer holds: many documents at once, in a quarter of a GiB of float32."""
    batch = get_recipe(settings.recipe, settings.tokens).runner["train_batch_size_tokens"]
    return max(2 * batch, min(settings.tokens, 2**26 // d_in))


def _reshape(hook_name: str) -> str:
    return "hook_z" if hook_name.endswith("hook_z") else "none"

"""What a comparison will cost, from a second of each of its parts."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from sae_lens.registry import get_sae_training_class
from sae_lens.training.sae_trainer import SAETrainer

from saelens_cosine.activations.cache.cache import kept_contexts
from saelens_cosine.activations.cache.contexts import tokens_read
from saelens_cosine.activations.contexts import ContextForm, read_contexts
from saelens_cosine.activations.hook_points import activations_at, device_of
from saelens_cosine.activations.models import HookedModel
from saelens_cosine.activations.planted_sinks import plant_sinks
from saelens_cosine.activations.sample import sample_tokens
from saelens_cosine.activations.text import load_text
from saelens_cosine.console import plain_table
from saelens_cosine.experiments.benchmark.arm import trainer_config
from saelens_cosine.experiments.benchmark.clock import per_second
from saelens_cosine.experiments.benchmark.settings import BenchmarkSettings
from saelens_cosine.experiments.compare.grid import tuned_k
from saelens_cosine.experiments.compare.heldout import context_size
from saelens_cosine.experiments.compare.run import load_at_hooks
from saelens_cosine.experiments.compare.settings import ComparisonSettings
from saelens_cosine.experiments.compare.training import buffer_tokens
from saelens_cosine.metrics.reconstruction.clean_losses import clean_losses
from saelens_cosine.progress import Progress, shown
from saelens_cosine.terminal.lines import lasting
from saelens_cosine.training.next_norm import next_norm
from saelens_cosine.training.recipe import get_recipe, sae_config

SECONDS = 1.0
"""That each part is measured for, after a first time that is not."""


@dataclass(frozen=True)
class BudgetPart:
    """
    One part of a comparison.

    Args:
        name (str): What is done.
        times (int): How often: SAEs, or passes of the language model.
        tokens (int): That it takes each time.
        tokens_per_second (float): Measured.
    """

    name: str
    times: int
    tokens: int
    tokens_per_second: float

    @property
    def seconds(self) -> float:
        """Of all times."""
        return self.times * self.tokens / self.tokens_per_second


@dataclass(frozen=True)
class Budget:
    """
    What a comparison costs.

    Args:
        parts (tuple[BudgetPart, ...]): In the order of their first time. What is not among them (reading, writing, tables) takes seconds, whatever the tokens.
        activation_bytes (int): Of activations on the disk, 0 where none are kept.
        free_bytes (int): On the disk where they would be.
        sae_bytes (int): Of all saved SAEs.
        training_bytes (int): Of the SAEs that are trained side by side: weights, gradients and what Adam keeps.
    """

    parts: tuple[BudgetPart, ...]
    activation_bytes: int
    free_bytes: int
    sae_bytes: int
    training_bytes: int

    @property
    def seconds(self) -> float:
        """Of all parts."""
        return sum(part.seconds for part in self.parts)


def budget(settings: ComparisonSettings, output: Path, on_progress: Progress | None = None) -> Budget:
    """Measure a second of each part, and multiply. Nothing is written.

    Args:
        settings: of the comparison.
        output: folder where it would be.
        on_progress: called with what is being measured.

    Raises:
        ValueError: as `compare`, for settings that cannot be run.
    """
    progress = shown(on_progress)
    progress("Loading the model", 0, 1)
    hooked = load_at_hooks(settings)
    with ExitStack() as afterwards:
        if settings.plant_sinks:
            afterwards.callback(plant_sinks(hooked[0].model, hooked[0].hook_name))
        return _measured(settings, hooked, output, progress)


def as_table(found: Budget) -> Table:
    """A budget as a table, with sizes below it."""
    table = plain_table("What it will cost", ["part"], ["times", "tokens each", "tokens a second", "time in all"])
    for part in found.parts:
        figures = (str(part.times), f"{part.tokens:,}", f"{part.tokens_per_second:,.0f}", lasting(part.seconds))
        table.add_row(part.name, *figures)
    table.add_row("all", "", "", "", lasting(found.seconds))
    kept = (
        f"Activations take {_size(found.activation_bytes)} of the disk, which has {_size(found.free_bytes)}. "
        if found.activation_bytes
        else ""
    )
    table.caption = (
        f"{kept}SAEs take {_size(found.sae_bytes)}, and {_size(found.training_bytes)} of memory while they are trained. Measured on this "
        f"machine as busy as it is, {SECONDS:g} s each; arms whose best rate is the same train side by side, which takes less. Checkpoints, tables and "
        "the page come on top, a few seconds for each training and each point: most of it where the rest takes seconds."
    )
    return table


def _measured(settings: ComparisonSettings, hooked: list[HookedModel], output: Path, progress: Progress) -> Budget:
    first, text = hooked[0], load_text(settings.dataset)
    form = ContextForm(context_size(settings, first))
    store = form.store(first.model, text.train, first.hook_name, first.d_in, settings.device)
    batch = get_recipe(settings.recipe, settings.tokens).runner["train_batch_size_tokens"]
    contexts = list(read_contexts(store, batch + form.context_size, lambda *_: None))
    if not contexts:
        raise ValueError(
            f"The text is shorter than a batch of contexts of {form.context_size} tokens; use a larger one."
        )
    names, kept = [one.hook_name for one in hooked], settings.activations is not None or settings.is_grid
    buffer = max(buffer_tokens(settings, one.d_in) for one in hooked)
    tokens = tokens_read(settings.tokens, buffer) if kept else settings.tokens
    folder = settings.activations or output
    already = 0 if settings.activations is None else kept_contexts(settings.activations) * form.context_size
    progress("Measuring the language model", 0, 1)
    batch_of_contexts = contexts[0].to(device_of(first.model))

    def forward() -> int:
        activations_at(first.model.run_with_cache, names, batch_of_contexts)
        return batch_of_contexts.numel()

    with torch.no_grad():
        rate = per_second(forward, SECONDS)
    at = f"language model, {', '.join(names)}"
    needed = max(0, tokens + settings.eval_tokens - already)
    parts = (
        [BudgetPart(at, 1, needed, rate)]
        if kept
        else [
            BudgetPart(f"{at}, training text", settings.seeds, tokens, rate),
            BudgetPart(f"{at}, held-out text", 1, settings.eval_tokens, rate),
        ]
    )
    extra = max(0, len(settings.rates) - 1)
    n_saes = len(hooked) * len(settings.ks) * settings.seeds
    x = sample_tokens(first.model, first.hook_name, contexts, settings.max_norm_multiple).without_sinks().activations
    weights = 0
    slowest = 0.0
    for arm in settings.arms:
        progress(f"Measuring {arm}", 0, 1)
        sae, step = _stepper(arm, settings, first, x[:batch].to(settings.device))
        parts.append(
            BudgetPart(f"training {arm}", n_saes + extra * len(hooked), settings.tokens, per_second(step, SECONDS))
        )
        weights += sum(parameter.nbytes for parameter in sae.parameters())
        with torch.no_grad():
            encoded = per_second(lambda sae=sae: len(sae.decode(sae.encode(x[:batch].to(sae.device)))), SECONDS)
            slowest = max(slowest, 1 / encoded)
    progress("Measuring the cross-entropy", 0, 1)
    parts.append(
        BudgetPart("reconstruction of held-out text", n_saes * len(settings.arms), settings.eval_tokens, 1 / slowest)
    )
    parts.append(_cross_entropy(settings, first, contexts[0], n_saes * len(settings.arms)))
    per_token = 2 * sum(one.d_in for one in hooked)
    return Budget(
        tuple(parts),
        per_token * needed if kept else 0,
        shutil.disk_usage(_existing(folder)).free,
        weights * n_saes,
        4 * weights,
    )


def _stepper(
    arm: str, settings: ComparisonSettings, model: HookedModel, x: torch.Tensor
) -> tuple[Any, Callable[[], int]]:
    """A training SAE, and one step of it on `x [tokens, d_in]`."""
    k = tuned_k(settings)
    recipe = get_recipe(settings.recipe, settings.tokens)
    config = sae_config(arm, recipe, d_in=model.d_in, d_sae=settings.d_sae, k=k, device=settings.device)
    sae: Any = get_sae_training_class(arm)[0](config)
    if getattr(config, "post_norm_loss_weight", 0):
        norm = next_norm(model.model, model.hook_name)
        sae.set_next_norm(norm.gain, norm.eps)
    sizes = BenchmarkSettings((), model.d_in, settings.d_sae, len(x), k, settings.device)
    trainer = SAETrainer(trainer_config(sizes), sae, iter(()))

    def step() -> int:
        trainer.step(x)
        trainer.n_training_steps += 1
        return len(x)

    return sae, step


def _cross_entropy(settings: ComparisonSettings, model: HookedModel, contexts: torch.Tensor, saes: int) -> BudgetPart:
    """Predictions from the hook on, which every SAE's reconstructions are put through."""
    clean = clean_losses(model.model, model.hook_name, [contexts], compute_kl=False)
    (batch,) = clean.batches

    def predict() -> int:
        clean.losses(batch.hidden.to(settings.device), batch)
        return batch.tokens.numel()

    with torch.no_grad():
        rate = per_second(predict, SECONDS)
    tokens = min(settings.eval_tokens, settings.eval_prompts * contexts.shape[1])
    return BudgetPart("cross-entropy of held-out text", saes, tokens, rate)


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())


def _size(count: int) -> str:
    return f"{count / 1e6:.0f} MB" if count < 1e9 else f"{count / 1e9:.1f} GB"

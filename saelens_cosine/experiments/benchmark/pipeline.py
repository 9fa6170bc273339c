"""How long a whole comparison takes, part by part, against what it cannot do without and against SAELens' own runner.

The floor is measured in the same run: the language model's forward pass up to the hook on the tokens that are needed, each once, and
for each step of each arm the encoder's product and one fused Adam pass. SAELens' multi-SAE runner trains its own classes with the
same selectors on the same text; it measures nothing afterwards.
"""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from sae_lens import MultiSAETrainingRunner

from saelens_cosine.activations.contexts import Contexts
from saelens_cosine.activations.models import HookedModel
from saelens_cosine.activations.sample import hook_activations
from saelens_cosine.activations.text import load_text
from saelens_cosine.console import plain_table
from saelens_cosine.experiments.benchmark.clock import per_second
from saelens_cosine.experiments.benchmark.run import Floor
from saelens_cosine.experiments.benchmark.settings import SELECTORS, BenchmarkSettings
from saelens_cosine.experiments.compare.heldout import heldout_contexts
from saelens_cosine.experiments.compare.run import compare, load_at_hooks
from saelens_cosine.experiments.compare.settings import ComparisonSettings
from saelens_cosine.experiments.compare.training import stream
from saelens_cosine.experiments.profile import PARTS, as_json, where_time_went
from saelens_cosine.files.whole import write_json
from saelens_cosine.plain import plain
from saelens_cosine.progress import Progress, shown
from saelens_cosine.stopwatch import Stopwatch
from saelens_cosine.training.recipe import get_recipe, multi_runner_config

FLOOR_SECONDS = 3.0
"""For which each part of the floor is measured, at least."""

SCHEMA = "saelens-cosine/pipeline/1"


@dataclass(frozen=True)
class Pipeline:
    """
    One comparison, timed.

    Args:
        settings (ComparisonSettings): What was compared.
        watch (Stopwatch): Where its time went.
        model_seconds (float): The language model's share of the floor: up to the hook, on training and held-out tokens, each once.
        sae_seconds (float): The SAEs' share: product and fused Adam of every step of every arm.
        saelens_seconds (float): SAELens' own runner, from text to trained SAEs.
    """

    settings: ComparisonSettings
    watch: Stopwatch
    model_seconds: float
    sae_seconds: float
    saelens_seconds: float

    @property
    def floor_seconds(self) -> float:
        return self.model_seconds + self.sae_seconds

    @property
    def ratio_to_floor(self) -> float:
        """Of the comparison, wall time."""
        return self.watch.seconds / self.floor_seconds

    def tables(self) -> list[Table]:
        """Parts, and the whole beside the floor and SAELens."""
        whole = plain_table(
            f"{len(self.settings.arms)} arms, {self.settings.tokens:,} tokens, d_sae {self.settings.d_sae}, "
            f"{torch.get_num_threads()} threads",
            ["what"],
            ("seconds", "/ floor"),
        )
        rows = {
            "compare, all of it": self.watch.seconds,
            "SAELens' runner, training alone": self.saelens_seconds,
            "floor": self.floor_seconds,
            "  language model, each token once": self.model_seconds,
            "  products and fused Adam": self.sae_seconds,
        }
        for name, seconds in rows.items():
            whole.add_row(name, f"{seconds:.1f}", f"{seconds / self.floor_seconds:.2f}")
        return [*where_time_went(self.watch), whole]

    def write(self, path: Path) -> None:
        content = {
            **as_json(self.watch),
            "schema": SCHEMA,
            "floor_seconds": self.floor_seconds,
            "model_seconds": self.model_seconds,
            "sae_seconds": self.sae_seconds,
            "saelens_seconds": self.saelens_seconds,
            "settings": plain(self.settings),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(content, path, indent=2)


def pipeline(settings: ComparisonSettings, on_progress: Progress | None = None) -> Pipeline:
    """Time a comparison at one point, in a folder that goes; then its floor, then SAELens' runner.

    Args:
        settings: what to compare; one layer, k and learning rate, and one seed.
        on_progress: called with what is being done, how much of it is done, and how much there is.

    Raises:
        ValueError: a grid, or an arm with a selector that SAELens' fast arms lack.
    """
    if settings.is_grid or settings.seeds > 1:
        raise ValueError("A pipeline is timed at one point: one layer, one k, one learning rate, one seed.")
    selectors = {arm: _selector(arm) for arm in settings.arms}
    progress = shown(on_progress)
    with tempfile.TemporaryDirectory() as folder, Stopwatch(PARTS) as watch:
        compare(settings, Path(folder) / "compare", on_progress=on_progress)
    (model,) = load_at_hooks(settings)
    text = load_text(settings.dataset)
    progress("Measuring the floor", 0, 2)
    contexts = heldout_contexts(settings, model, text.heldout)
    batch = get_recipe(settings.recipe, settings.tokens).runner["train_batch_size_tokens"]
    steps = len(settings.arms) * max(1, settings.tokens // batch)
    model_seconds = (settings.tokens + settings.eval_tokens) / _tokens_per_second(model, contexts)
    progress("Measuring the floor", 1, 2)
    sae_seconds = steps * _step_seconds(settings, model.d_in, batch)
    progress("SAELens' runner", 0, 1)
    return Pipeline(settings, watch, model_seconds, sae_seconds, _saelens(settings, model, text.train, selectors))


def _selector(arm: str) -> str:
    found = next((selector for selector in SELECTORS if arm.endswith(selector)), None)
    if found is None:
        raise ValueError(f"{arm} ends in none of {', '.join(SELECTORS)}, which SAELens' runner is timed with.")
    return found


@torch.no_grad()
def _tokens_per_second(model: HookedModel, contexts: Contexts) -> float:
    batches = itertools.cycle(contexts.batches)

    def run() -> int:
        batch = next(batches)
        hook_activations(model.model, model.hook_name, batch)
        return batch.numel()

    return per_second(run, FLOOR_SECONDS)


def _step_seconds(settings: ComparisonSettings, d_in: int, batch: int) -> float:
    floor = Floor(BenchmarkSettings((), d_in, settings.d_sae, batch, 1, settings.device))
    x = torch.randn(batch, d_in, device=settings.device)

    def run() -> int:
        floor.product(x)
        floor.optimizer.step()
        return 1

    return 1 / per_second(run, FLOOR_SECONDS)


def _saelens(settings: ComparisonSettings, model: HookedModel, text: Any, selectors: Mapping[str, str]) -> float:
    """SAELens' own classes under its own runner, on the same text, as many as there are arms."""
    start = time.perf_counter()
    config = multi_runner_config(
        dict(selectors),
        d_in=model.d_in,
        d_sae=settings.d_sae,
        k=settings.ks[0],
        training_tokens=settings.tokens,
        recipe=settings.recipe,
        sae={"device": settings.device},
        **stream(settings, model),
    )
    MultiSAETrainingRunner(config, override_dataset=text, override_model=model.model).run()
    return time.perf_counter() - start

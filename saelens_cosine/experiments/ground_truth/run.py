"""How well SAEs recover features that are known, as the spread of token norms grows and with attention sinks among the tokens.

Data and scores are SAELens' synthetic benchmark (SynthSAEBench, arXiv 2602.14687): features with a hierarchy, correlations and
firing magnitudes, summed into activations; `planted` adds the norms and the sinks. SAEs are trained by SAELens' runner, saved,
loaded, and scored in that form, threshold included.
"""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.table import Table
from sae_lens import SAE, LoggingConfig
from sae_lens.synthetic import (
    FeatureDictionary,
    SyntheticModel,
    SyntheticModelConfig,
    SyntheticSAERunner,
    SyntheticSAERunnerConfig,
    eval_sae_on_synthetic_data,
    orthogonal_initializer,
)
from sae_lens.util import temporary_seed

from saelens_cosine.console import PlainTable
from saelens_cosine.experiments.compare.results import DEFAULT_ARMS
from saelens_cosine.experiments.ground_truth.planted import NormSpread, SinkDictionary, small_model
from saelens_cosine.experiments.ground_truth.recovery import MEASURES, Recovery, f1_one_to_one
from saelens_cosine.files import whole
from saelens_cosine.metrics.intervals import Difference, about, by_chance, paired_difference
from saelens_cosine.progress import shown
from saelens_cosine.registry import check_training_architecture
from saelens_cosine.training.monitor import check_finite
from saelens_cosine.training.recipe import get_recipe, sae_config

SCHEMA = "saelens-cosine/ground-truth/1"
"""Name and version of the JSON's layout; the number grows when a field changes its meaning or goes."""

SYNTH_SAE_BENCH_16K = "decoderesearch/synth-sae-bench-16k-v1"
"""The published benchmark on the Hub. Its authors train 4,096 features on it, with k=25 and 200 million samples."""

AT_ONCE = 4096
"""Samples that are scored at a time."""

EVALUATION_SEED = 2**31
"""What a run's seed is moved by for the samples that it is scored on."""


@dataclass(frozen=True)
class GroundTruthSettings:
    """
    What to train, on what, and how it is scored.

    Args:
        arms (tuple[str, ...]): Architectures registered for training; the first is what the others are compared with.
        model (SyntheticModelConfig | str): What makes the activations: a config, built anew with each seed added to its own, or what `SyntheticModel.load_from_source` takes (a folder, or a name on the Hub such as SYNTH_SAE_BENCH_16K), the same for all seeds.
        norm_spreads (tuple[float, ...]): Standard deviations of a token's log norm factor; 0 leaves the data alone.
        seeds (int): Runs with different model, initialisation and samples.
        samples (int): Training samples of each SAE.
        d_sae (int | None): Features of each SAE; None for as many as there are to find.
        k (float | None): Active features per token; None for as many as are, on average.
        recipe (str): `paper` or `saelens`.
        batch (int): Samples per training step.
        sink_share (float): Share of the tokens that are sinks; 0 plants none.
        train_on_sinks (bool): Whether SAEs see sinks in training. False is what a perfect filter would do.
        eval_samples (int): Samples that each SAE is scored on, the same for all arms; also the window of dead features.
        device (str): Where everything runs.
    """

    arms: tuple[str, ...] = DEFAULT_ARMS
    model: SyntheticModelConfig | str = field(default_factory=small_model)
    norm_spreads: tuple[float, ...] = (0.0, 0.5, 1.0)
    seeds: int = 3
    samples: int = 100_000
    d_sae: int | None = None
    k: float | None = None
    recipe: str = "paper"
    batch: int = 512
    sink_share: float = 0.0
    train_on_sinks: bool = False
    eval_samples: int = 20_000
    device: str = "cpu"

    def __post_init__(self) -> None:
        for arm in self.arms:
            check_training_architecture(arm)
        if not self.arms or len(set(self.arms)) < len(self.arms):
            raise ValueError(f"arms={self.arms} must name at least one architecture, each once.")
        if not self.norm_spreads or not all(math.isfinite(spread) and spread >= 0 for spread in self.norm_spreads):
            raise ValueError(f"norm_spreads={self.norm_spreads} must be at least one finite number, none below 0.")
        if self.d_sae is not None and self.d_sae < 1:
            raise ValueError(
                f"d_sae={self.d_sae} must be positive, or None (no --d-sae) for as many as there are to find."
            )
        if self.k is not None and not 0 < self.k <= (self.d_sae or math.inf):
            raise ValueError(
                f"k={self.k} must be positive and at most d_sae, or None (no --k) for as many as are active."
            )
        if self.seeds < 1 or self.eval_samples < 1 or self.samples < 2 * self.batch:
            raise ValueError(
                f"seeds={self.seeds}, eval_samples={self.eval_samples}: at least 1; samples={self.samples}: at least two "
                f"steps of batch={self.batch}."
            )
        if not 0 <= self.sink_share < 0.5:
            raise ValueError(f"sink_share={self.sink_share} must be at least 0 and below 0.5.")


@dataclass(frozen=True)
class GroundTruthRun:
    """
    One SAE, trained, saved and scored.

    Args:
        architecture (str): Training architecture.
        norm_spread (float): Spread of the token norms, in training and scoring.
        seed (int): Of the model, the initialisation and the samples.
        k (float): Active features per token that were asked for.
        without_sinks (Recovery): mcc, classification.f1_score, f1_one_to_one, explained_variance, dead_latents, ... on tokens that are none.
        with_sinks (Recovery | None): The same with sinks among the tokens; None if none are planted. mcc and uniqueness are of the decoder alone, so they do not change.
        norm_exponent (tuple[float, float, float] | None): Mean, minimum and maximum; None for scores without one.
        seconds (float): Training time.
    """

    architecture: str
    norm_spread: float
    seed: int
    k: float
    without_sinks: Recovery
    with_sinks: Recovery | None
    norm_exponent: tuple[float, float, float] | None
    seconds: float


@dataclass(frozen=True)
class FailedRun:
    """
    An SAE whose training became non-finite. It is neither saved nor scored.

    Args:
        architecture (str): Training architecture.
        norm_spread (float): Spread of the token norms.
        seed (int): Of the model, the initialisation and the samples.
        reason (str): What was not finite.
    """

    architecture: str
    norm_spread: float
    seed: int
    reason: str


@dataclass(frozen=True)
class GroundTruth:
    """
    All runs.

    Args:
        settings (GroundTruthSettings): As given.
        runs (tuple[GroundTruthRun, ...]): By seed, then spread, then arm.
        failed (tuple[FailedRun, ...]): Those that are missing there.
    """

    settings: GroundTruthSettings
    runs: tuple[GroundTruthRun, ...]
    failed: tuple[FailedRun, ...] = ()

    def values(self, measure: str, architecture: str, norm_spread: float, sinks: bool = False) -> dict[int, float]:
        """One of MEASURES for an arm at a spread, by the seeds that were trained to their end."""
        scored = [run for run in self.runs if (run.architecture, run.norm_spread) == (architecture, norm_spread)]
        results = {run.seed: run.with_sinks if sinks else run.without_sinks for run in scored}
        if None in results.values():
            raise ValueError("No sinks were planted (sink_share=0), so nothing was scored with them.")
        return {seed: MEASURES[measure](result) for seed, result in results.items() if result is not None}

    def difference(self, measure: str, architecture: str, norm_spread: float, sinks: bool = False) -> Difference | None:
        """An arm minus the first one, paired by seed; None without two seeds that both have."""
        ours, first = (self.values(measure, arm, norm_spread, sinks) for arm in (architecture, self.settings.arms[0]))
        shared = [seed for seed in ours if seed in first]
        if len(shared) < 2:
            return None
        return paired_difference([ours[seed] for seed in shared], [first[seed] for seed in shared])


def ground_truth(
    settings: GroundTruthSettings, on_progress: Callable[[str, int, int], None] | None = None
) -> GroundTruth:
    """Train every arm at every spread with every seed, and score what was saved.

    Arms of one seed and spread start from the same decoder and see the same samples. The caller's random state is left alone.

    Args:
        settings: what to do.
        on_progress: called with what is being done, runs done, and runs in all.

    Raises:
        FloatingPointError: no arm could be trained to its end. One of several that could not is in `failed`.
        OSError: a model that is in no folder, and on the Hub cannot be reached.
    """
    progress = shown(on_progress)
    total = len(settings.arms) * len(settings.norm_spreads) * settings.seeds
    runs: list[GroundTruthRun] = []
    failed: list[FailedRun] = []
    for seed in range(settings.seeds):
        model = load_model(settings, seed)
        modifier = model.activation_generator.modify_activations
        for spread in settings.norm_spreads:
            planted: Any = NormSpread(spread, modifier)
            model.activation_generator.modify_activations = planted
            with temporary_seed(seed):
                k = settings.k or _true_l0(model)
            for arm in settings.arms:
                progress(f"Training {arm}, seed {seed}, norm spread {spread:g}", len(runs) + len(failed), total)
                try:
                    runs.append(_run(settings, model, arm, spread, seed, k))
                except FloatingPointError as error:
                    failed.append(FailedRun(arm, spread, seed, str(error)))
    progress("Training", total, total)
    if not runs:
        raise FloatingPointError("; ".join(f"{run.architecture}, seed {run.seed}: {run.reason}" for run in failed))
    return GroundTruth(settings, tuple(runs), tuple(failed))


def load_model(settings: GroundTruthSettings, seed: int) -> SyntheticModel:
    """The model of one seed, with nothing planted in it yet."""
    if isinstance(settings.model, str):
        try:
            return SyntheticModel.load_from_source(settings.model, device=settings.device)
        except OSError as error:
            raise OSError(
                f"Cannot load the synthetic model {settings.model!r}, as a folder or as a name on the Hub: {error}"
            ) from error
    config = replace(settings.model, seed=(settings.model.seed or 0) + seed)
    steps = config.orthogonalization
    dictionary = FeatureDictionary(  # as SyntheticModel makes it, but quietly
        config.num_features,
        config.hidden_dim,
        config.bias,
        orthogonal_initializer(steps.num_steps, steps.lr, chunk_size=steps.chunk_size) if steps else None,
        settings.device,
        config.seed,
    )
    return SyntheticModel(config, feature_dict=dictionary, device=settings.device)


def _true_l0(model: SyntheticModel) -> float:
    return (model.activation_generator.sample(10_000) > 0).sum(dim=-1).double().mean().item()


def _run(
    settings: GroundTruthSettings, model: SyntheticModel, arm: str, spread: float, seed: int, k: float
) -> GroundTruthRun:
    plain = model.feature_dict
    sinks: Any = SinkDictionary(plain, settings.sink_share, seed)
    started = time.perf_counter()
    with temporary_seed(seed), tempfile.TemporaryDirectory() as folder:
        if settings.train_on_sinks:
            model.feature_dict = sinks
        runner = SyntheticSAERunner(_runner_config(settings, model, arm, k), override_synthetic_model=model)
        torch.manual_seed(seed)  # whatever the arm's initialisation drew
        trained = runner.run().sae
        model.feature_dict = plain
        seconds = time.perf_counter() - started
        check_finite(trained)
        trained.save_inference_model(folder)
        saved = SAE.load_from_disk(folder, device=settings.device)

    def score(dictionary: FeatureDictionary) -> Recovery:
        generator, samples = model.activation_generator, settings.eval_samples
        with temporary_seed(EVALUATION_SEED + seed):
            by_saelens = eval_sae_on_synthetic_data(saved, dictionary, generator, samples, batch_size=AT_ONCE)
        with temporary_seed(EVALUATION_SEED + seed):  # the same samples
            return Recovery(
                **vars(by_saelens), f1_one_to_one=f1_one_to_one(saved, dictionary, generator, samples, AT_ONCE)
            )

    # as saved, of arms that learn one; the magnitude bypass has it at 0
    exponent: Any = saved.norm_exponent if hasattr(trained, "norm_exponent") else None
    return GroundTruthRun(
        arm,
        spread,
        seed,
        k,
        score(plain),
        score(sinks) if settings.sink_share else None,
        exponent if exponent is None else (exponent.mean().item(), exponent.min().item(), exponent.max().item()),
        seconds,
    )


def _runner_config(
    settings: GroundTruthSettings, model: SyntheticModel, arm: str, k: float
) -> SyntheticSAERunnerConfig[Any]:
    recipe = get_recipe(settings.recipe, settings.samples, settings.batch)
    runner = {name: value for name, value in recipe.runner.items() if name != "train_batch_size_tokens"}
    config = sae_config(
        arm,
        recipe,
        d_in=model.cfg.hidden_dim,
        d_sae=settings.d_sae or model.cfg.num_features,
        # SAELens' per-token TopK counts whole features
        k=k if "batchtopk" in arm else max(1, round(k)),
        device=settings.device,
    )
    return SyntheticSAERunnerConfig(
        synthetic_model=model.cfg,
        sae=config,
        training_samples=settings.samples,
        batch_size=settings.batch,
        device=settings.device,
        checkpoint_path=None,
        output_path=None,
        run_final_eval=False,
        logger=LoggingConfig(log_to_wandb=False),
        **runner,
    )


def as_json(result: GroundTruth) -> dict[str, Any]:
    """Settings, runs, and with several seeds each arm's paired differences to the first."""
    settings = result.settings
    model = settings.model if isinstance(settings.model, str) else settings.model.to_dict()
    return {
        "schema": SCHEMA,
        "settings": {**asdict(settings), "model": model},
        "runs": [asdict(run) for run in result.runs],
        "failed": [asdict(run) for run in result.failed],
        "differences": [
            {
                "architecture": arm,
                "norm_spread": spread,
                "sinks": sinks,
                "measure": measure,
                **asdict(difference),
            }
            for arm in settings.arms[1:]
            for spread in settings.norm_spreads
            for sinks in ((False, True) if settings.sink_share else (False,))
            for measure in MEASURES
            if (difference := result.difference(measure, arm, spread, sinks)) is not None
        ],
    }


def write_json(result: GroundTruth, path: Path) -> None:
    """Write it whole or not at all."""
    whole.write_json(as_json(result), path, indent=2)


def as_tables(result: GroundTruth, sinks: bool = False) -> list[Table]:
    """Means over seeds with their standard deviation, and with several seeds the paired differences to the first arm."""
    s = result.settings
    scored_on = f"{s.eval_samples:,} samples {'with' if sinks else 'without'} sinks"
    seeds = f"mean ± sd over {s.seeds} seeds" if s.seeds > 1 else "1 seed"
    tables = [_table(f"Recovery of known features, {seeds}, saved SAEs on {scored_on}", MEASURES)]
    tables[
        0
    ].caption = "f1: several latents may claim one feature, as in SAELens; f1_one_to_one: one, the pairs of mcc."
    tables[0].caption_justify = "left"
    for spread, arm in ((spread, arm) for spread in s.norm_spreads for arm in s.arms):
        by_measure = (list(result.values(measure, arm, spread, sinks).values()) for measure in MEASURES)
        tables[0].add_row(f"{spread:g}", arm, *map(_mean_and_spread, by_measure))
    if s.seeds > 1 and len(s.arms) > 1:
        tables.append(_table(f"Difference to {s.arms[0]}, paired by seed, 95 % interval", ("measure", "difference")))
        rows = [(spread, arm, measure) for spread in s.norm_spreads for arm in s.arms[1:] for measure in MEASURES]
        found = [result.difference(measure, arm, spread, sinks) for spread, arm, measure in rows]
        for (spread, arm, measure), difference in zip(rows, found, strict=True):
            tables[1].add_row(f"{spread:g}", arm, measure, "none" if difference is None else str(difference))
        compared = [difference for difference in found if difference is not None]
        tables[1].caption, tables[1].caption_justify = "\n".join(about(["seeds"], by_chance(compared))), "left"
    if result.failed:
        tables.append(_table("Stopped, neither saved nor scored", ["seed", "because"]))
        tables[-1].style = tables[-1].title_style = "red"
        for run in result.failed:
            tables[-1].add_row(f"{run.norm_spread:g}", run.architecture, str(run.seed), run.reason)
    return tables


def _table(title: str, headings: Iterable[str]) -> Table:
    table = PlainTable(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("norm spread")
    table.add_column("architecture", no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right")
    return table


def _mean_and_spread(values: list[float]) -> str:
    if not values:
        return "none"
    mean = f"{statistics.mean(values):.3f}"
    return f"{mean}±{statistics.stdev(values):.3f}" if len(values) > 1 else mean

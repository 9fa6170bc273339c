"""How well SAEs recover features that are known, as the spread of token norms grows and with attention sinks among the tokens.

Data and scores are SAELens' synthetic benchmark (SynthSAEBench, arXiv 2602.14687): features with a hierarchy, correlations and
firing magnitudes, summed into activations; `planted` adds the norms and the sinks. SAEs are trained by SAELens' runner, saved,
loaded, and scored in that form, threshold included.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import replace
from typing import Any

import torch
from sae_lens import SAE, LoggingConfig
from sae_lens.synthetic import (
    FeatureDictionary,
    SyntheticModel,
    SyntheticSAERunner,
    SyntheticSAERunnerConfig,
    eval_sae_on_synthetic_data,
    orthogonal_initializer,
)
from sae_lens.util import temporary_seed

from saelens_cosine.experiments.ground_truth.planted import NormSpread, SinkDictionary
from saelens_cosine.experiments.ground_truth.recovery import Recovery, f1_one_to_one
from saelens_cosine.experiments.ground_truth.results import FailedRun, GroundTruth, GroundTruthRun
from saelens_cosine.experiments.ground_truth.settings import GroundTruthSettings
from saelens_cosine.metrics.norms.exponents import exponent_range
from saelens_cosine.progress import Progress, shown
from saelens_cosine.training.monitor import check_finite
from saelens_cosine.training.recipe import get_recipe, sae_config

AT_ONCE = 4096
"""Samples that are scored at a time."""

EVALUATION_SEED = 2**31
"""What a run's seed is moved by for the samples that it is scored on."""


def ground_truth(settings: GroundTruthSettings, on_progress: Progress | None = None) -> GroundTruth:
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

    return GroundTruthRun(
        arm,
        spread,
        seed,
        k,
        score(plain),
        score(sinks) if settings.sink_share else None,
        exponent_range(trained, saved),
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

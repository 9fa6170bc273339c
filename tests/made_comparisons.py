"""Comparisons made by hand: their figures follow from formulas, with a little noise of each seed."""

from __future__ import annotations

import math
import random

from saelens_cosine.activations.site import Part, SinkTokens, Site
from saelens_cosine.experiments.compare.results import ArmResult, Comparison, FailedArm, HookResult, RateTried
from saelens_cosine.experiments.compare.settings import ComparisonSettings
from saelens_cosine.metrics.reconstruction.by_norm import NormBin, Reconstruction
from saelens_cosine.training.monitor import TrainingLogEntry

ARMS = ("inner_product_batchtopk", "cosine_batchtopk", "per_feature_cosine_batchtopk")


def made_comparison(
    ks: tuple[int, ...] = (16, 32, 64),
    layers: tuple[int, ...] = (3,),
    seeds: int = 3,
    rates: tuple[float, ...] = (),
    arms: tuple[str, ...] = ARMS,
    noise: float = 0.002,
    **settings: object,
) -> Comparison:
    """Whole, of any shape of grid. What arm i has at k is `fve(i, k)` and so on, and noise of its seed."""
    asked = ComparisonSettings(
        arms=arms, k=ks, layer=layers, seeds=seeds, lr=rates or None, tokens=100_000, d_sae=512, **settings
    )
    hooks = tuple(made_hook(f"blocks.{layer}.hook_resid_post", layer) for layer in layers)
    results = tuple(
        made_result(arm, i, hook.hook_name, k, seed, noise)
        for hook in hooks
        for k in asked.ks
        for seed in range(seeds)
        for i, arm in enumerate(arms)
    )
    tried = tuple(
        RateTried(arm, hook.hook_name, asked.ks[0], lr, 0.8 + 0.01 * j - 0.002 * i, 0.1, j == len(rates) - 1)
        for hook in hooks
        for i, arm in enumerate(arms)
        for j, lr in enumerate(asked.rates)
        if len(asked.rates) > 1
    )
    return Comparison(asked, hooks, results, (), tried)


def made_hook(hook: str, layer: int) -> HookResult:
    """Sinks from layer 2 on."""
    at_first, separator = (Part(0, 0.98), Part(1, 0.02)), (Part(0, 1.0),)
    sinks = SinkTokens(81, 0.0081, 4000.0, 4321.0, at_first, separator) if layer > 1 else None
    site = Site(hook, 192, 10_000, 0, 79, 1.25, 0.75, 12.0, 20.0, 33.0, 10.0, sinks)
    return HookResult(hook, 192, 0.0078, 0.0081, site)


def fve(i: int, k: int) -> float:
    """Arm i's: a doubling of k adds .05; arm 0 is .01 above arm 1, and .02 above arm 2."""
    return 0.6 + 0.05 * math.log2(k / 16) - 0.01 * i


def ce(i: int, k: int) -> float:
    """Arm i's: .9 of its FVE and .005 for each arm before it: worse at the same k, better at the same FVE."""
    return 0.9 * fve(i, k) + 0.005 * i


def made_result(arm: str, i: int, hook: str, k: int, seed: int, noise: float) -> ArmResult:
    """One SAE's."""
    rng = random.Random(f"{arm} {hook} {k} {seed}")
    found = fve(i, k) + rng.gauss(0, noise)
    bins = tuple(NormBin(5.0 * q, 5.0 * (q + 1), 2500, found - 0.01 * (3 - q)) for q in range(4))
    reconstruction = Reconstruction(10_000, found, k * (1 + 0.01 * i) + rng.gauss(0, 0.1), 0.1 / (1 + k / 16), bins)
    exponent = None if i == 0 else (0.3 * i, 0.3 * i - 0.2 * (i - 1), 0.3 * i + 0.2 * (i - 1))
    log = tuple(made_entry(found, k, t, exponent) for t in range(11))
    lost = ce(i, k) + rng.gauss(0, noise)
    place = f"{arm}/k{k}/seed{seed}"
    return ArmResult(arm, seed, place, reconstruction, lost, exponent, 12.0, log, "00", hook, k, 1e-3)


def made_entry(fve: float, k: int, t: int, exponent: tuple[float, float, float] | None) -> TrainingLogEntry:
    """The tenth t of a training."""
    names = ("norm_exponent_mean", "norm_exponent_min", "norm_exponent_max")
    metrics = {} if exponent is None else {name: t / 10 * value for name, value in zip(names, exponent, strict=True)}
    return TrainingLogEntry(10_000 * t, fve - 0.4 / (1 + t) ** 1.5, float(k), metrics)


def failed(comparison: Comparison, arm: str, k: int, seed: int) -> Comparison:
    """The same where one SAE could not be trained."""
    kept = tuple(r for r in comparison.arms if (r.architecture, r.k, r.seed) != (arm, k, seed))
    hook = comparison.hooks[0].hook_name
    lost = FailedArm(arm, seed, 5000, "the loss is NaN", hook, k, 1e-3)
    return Comparison(comparison.settings, comparison.hooks, kept, (lost,), comparison.rates)

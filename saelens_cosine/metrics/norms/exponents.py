"""How the norm exponents of a cosine-scored SAE are distributed, and whether frequent features have other ones than rare ones.

Source: the released code of arXiv 2606.15054 (experiments 17, 37, 42c). Exponents are limited by how far the optimizer could
move them, so compare runs of one length and learning rate.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sae_lens.saes.sae import SAE
from scipy import stats

from saelens_cosine.metrics.not_finite import NotFiniteError
from saelens_cosine.saes.cosine import CosineScore, FoldedCosineScore
from saelens_cosine.saes.magnitude_bypass_sae import NormRestore

BOUNDS = (0.05, 0.2, 0.5)
"""The authors' classes of |a|: near zero below the first."""


@dataclass(frozen=True)
class ExponentSummary:
    """
    Some features' exponents; NaN throughout if there are none.

    Args:
        features (int): How many.
        mean (float): Mean of a.
        std (float): Standard deviation (population).
        minimum (float): Smallest.
        p5 (float): 5th percentile.
        median (float): Median.
        p95 (float): 95th percentile.
        maximum (float): Largest.
        shares (tuple[float, ...]): Share with |a| below 0.05 ("near zero"), from there to 0.2, to 0.5, and from 0.5.
        negative (float): Share below 0.
    """

    features: int
    mean: float
    std: float
    minimum: float
    p5: float
    median: float
    p95: float
    maximum: float
    shares: tuple[float, ...]
    negative: float


@dataclass(frozen=True)
class ExponentDistribution:
    """
    Exponents of one SAE.

    Args:
        shared (bool): One exponent for all features; it is then the only value below.
        every (ExponentSummary): Of all features.
        alive (ExponentSummary | None): Of those that fire, where firing rates are given; dead ones stay near their start.
        firing_rate_correlation (float | None): Spearman's, of exponent and firing rate over the features that fire; None where it is not defined (no rates, a shared exponent, or no spread).
        histogram_edges (tuple[float, ...]): 51 edges of 50 equal bins, from the smallest to the largest exponent of all features.
        histogram (tuple[int, ...]): Features in each; of all features.
    """

    shared: bool
    every: ExponentSummary
    alive: ExponentSummary | None
    firing_rate_correlation: float | None
    histogram_edges: tuple[float, ...]
    histogram: tuple[int, ...]


def norm_exponents(sae: SAE[Any]) -> torch.Tensor | None:
    """Exponents that an SAE scores with once it is trained, `[]` or `[d_sae]`; None where there is none to choose."""
    if isinstance(sae, CosineScore):
        return sae.inference_parameters().norm_exponent
    if isinstance(sae, FoldedCosineScore) and not isinstance(sae, NormRestore):
        return sae.norm_exponent.detach()
    return None


def exponent_range(trained: SAE[Any], saved: SAE[Any]) -> tuple[float, float, float] | None:
    """Mean, minimum and maximum of the exponents as saved, of an SAE that learns one; the magnitude bypass saves 0 and learns none."""
    if not hasattr(trained, "norm_exponent"):
        return None
    exponent: Any = saved.norm_exponent
    return exponent.mean().item(), exponent.min().item(), exponent.max().item()


@torch.no_grad()
def exponent_distribution(sae: SAE[Any], firing_rate: torch.Tensor | None = None) -> ExponentDistribution | None:
    """Summarise an SAE's exponents.

    Args:
        sae: any SAELens SAE, in any form.
        firing_rate: `[d_sae]`, share of tokens on which each feature is active (or how many), on tokens of the caller's choice.

    Returns:
        None for a score without an exponent: an inner product (a = 1 throughout), or the magnitude bypass (a = 0).
    """
    exponents = norm_exponents(sae)
    if exponents is None:
        return None
    NotFiniteError.check("Norm exponents", exponents.reshape(-1), "of them")
    a = exponents.cpu().double().reshape(-1).numpy()
    shared, alive, correlation = exponents.ndim == 0, None, None
    if firing_rate is not None:
        if firing_rate.shape != (sae.cfg.d_sae,):
            raise ValueError(f"firing_rate has shape {tuple(firing_rate.shape)}, the SAE has d_sae={sae.cfg.d_sae}.")
        rate = firing_rate.cpu().double().numpy()
        fires = rate > 0
        if not shared:
            alive = _summary(a[fires])
            if all(len(np.unique(values[fires])) > 1 for values in (a, rate)):
                spearman: Any = stats.spearmanr(a[fires], rate[fires])
                correlation = float(spearman.statistic)
    counts, edges = np.histogram(a, bins=50)
    return ExponentDistribution(
        shared=shared,
        every=_summary(a),
        alive=alive,
        firing_rate_correlation=correlation,
        histogram_edges=tuple(edges.tolist()),
        histogram=tuple(counts.tolist()),
    )


def _summary(a: np.ndarray[Any, Any]) -> ExponentSummary:
    if len(a) == 0:
        nan = float("nan")
        return ExponentSummary(0, nan, nan, nan, nan, nan, nan, nan, (nan,) * (len(BOUNDS) + 1), nan)
    size = np.searchsorted(BOUNDS, np.abs(a), side="right")
    minimum, p5, median, p95, maximum = np.percentile(a, (0, 5, 50, 95, 100)).tolist()
    return ExponentSummary(
        features=len(a),
        mean=float(a.mean()),
        std=float(a.std()),
        minimum=minimum,
        p5=p5,
        median=median,
        p95=p95,
        maximum=maximum,
        shares=tuple((np.bincount(size, minlength=len(BOUNDS) + 1) / len(a)).tolist()),
        negative=float((a < 0).mean()),
    )

"""Correlations of ablation effects with what might predict them, feature by feature, and which predictor wins how often."""

from __future__ import annotations

from typing import NamedTuple

import torch

from saelens_cosine.metrics.causal.win_rate_protocol import WinRateProtocol

MIN_SAMPLES = 10
"""Samples that a correlation is computed from, at least (experiments 5 to 39)."""

MIN_STD = 1e-10
"""Standard deviation of either side below which there is no correlation (experiments 5 to 39)."""

TIE = 1e-6
"""Correlations closer than this are a tie: with equal norms the two scores differ by float32 rounding alone."""


def correlations(predictors: torch.Tensor, kl: torch.Tensor, group: torch.Tensor, n: int) -> torch.Tensor:
    """Pearson correlations `[n, predictors]` of `[pairs, predictors]` with `[pairs]`, group by group; NaN where there is none."""
    keep = kl.isfinite()
    values = torch.cat([predictors, kl.unsqueeze(-1)], dim=-1)[keep]
    group = group[keep]
    counts = torch.bincount(group, minlength=n).double().unsqueeze(-1)
    means = torch.zeros(n, values.shape[-1], dtype=torch.float64).index_add(0, group, values) / counts
    values = values - means[group]
    squares = torch.zeros_like(means).index_add(0, group, values**2)
    products = torch.zeros_like(means).index_add(0, group, values * values[:, -1:])
    std = (squares / counts).sqrt()
    exists = (counts >= MIN_SAMPLES) & (std >= MIN_STD) & (std[:, -1:] >= MIN_STD)
    correlation = products / (squares.sqrt() * squares[:, -1:].sqrt())
    return torch.where(exists, correlation, torch.nan)[:, :-1]


def advantage(found: torch.Tensor, protocol: WinRateProtocol) -> torch.Tensor:
    """What the protocol compares, cosine minus inner product, `[n]`, of `correlations` whose first two predictors these are."""
    cosine, inner = found[:, 0], found[:, 1]
    return cosine.abs() - inner.abs() if protocol.compared == "absolute_correlations" else cosine - inner


class Rate(NamedTuple):
    """
    Args:
        wins (int): Features with a larger correlation with the cosine.
        ties (int): Features whose correlations are within `TIE`.
        features (int): Features with correlations.
        rate (float): Wins and half the ties over features; NaN if there are none.
        median (float): Of the advantage; likewise.
    """

    wins: int
    ties: int
    features: int
    rate: float
    median: float


def rate(advantages: torch.Tensor) -> Rate:
    """How many of `advantages [n]` are above zero; NaN ones do not count."""
    seen = advantages[~advantages.isnan()]
    wins, ties = int((seen > TIE).sum()), int((seen.abs() <= TIE).sum())
    if not len(seen):
        return Rate(0, 0, 0, float("nan"), float("nan"))
    return Rate(wins, ties, len(seen), (wins + ties / 2) / len(seen), seen.quantile(0.5).item())

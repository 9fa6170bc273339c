"""Whether features fire by a token's norm: how their firings spread over the quartiles of the norm.

The paper (experiment 58c of its released code) weighs each token by the number of features that are active on it, so that
one attention sink with 30,000 active features counts as much as 400 ordinary tokens with 80, and a set's share in the top
quartile is that of its sinks. Beside this, shares are given here per feature, where every feature counts once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy import sparse

from saelens_cosine.metrics.token_gram import firings, pattern

PERCENTILES = (5, 25, 50, 75, 95)
"""Of ratios and shares over features."""


@dataclass(frozen=True)
class NormDetectors:
    """
    Where on the scale of norms a set of features fires. Quartiles are of ||x|| over all tokens, the smallest norms first.

    Args:
        tokens (int): Tokens measured on.
        features (int): Features in the set.
        counted (int): Of these, with at least `min_firings` firings: what the fields per feature are of.
        min_firings (int): Firings below which a feature's shares say too little.
        edges (tuple[float, ...]): The three norms between the quartiles.
        quartile_tokens (tuple[int, ...]): Tokens in each quartile.
        weighted_shares (tuple[float, ...]): The paper's: share of all firings of the set in each quartile. NaN if it never fires.
        median_shares (tuple[float, ...]): Median over features of the share of a feature's firings in each quartile; they need not add up to 1. NaN if no feature is counted, as are the next four.
        top_quartile_percentiles (tuple[float, ...]): 5th, 25th, 50th, 75th and 95th percentile over features of the share in the top quartile.
        detectors (float): Share of the counted features with at least `detector_share` of their firings in the top quartile.
        detector_share (float): That bound.
        median_mean_norm (float): Median over features of the mean norm of a feature's tokens.
        weighted_mean_norm (float): The paper's: mean of ||x|| over all firings of the set. NaN if it never fires.
        mean_norm (float): Mean of ||x|| over all tokens, what a set that ignores norms has.
        median_norm (float): Median likewise.
        largest_norms_share (float): Share of all firings on the 1 % of tokens with the largest norms, rounded up; well above 0.01, these decide the weighted fields. NaN if the set never fires.
    """

    tokens: int
    features: int
    counted: int
    min_firings: int
    edges: tuple[float, ...]
    quartile_tokens: tuple[int, ...]
    weighted_shares: tuple[float, ...]
    median_shares: tuple[float, ...]
    top_quartile_percentiles: tuple[float, ...]
    detectors: float
    detector_share: float
    median_mean_norm: float
    weighted_mean_norm: float
    mean_norm: float
    median_norm: float
    largest_norms_share: float


def norm_detectors(
    codes: sparse.csr_array,
    norms: torch.Tensor,
    features: Sequence[int] | None = None,
    min_firings: int = 10,
    detector_share: float = 0.9,
) -> NormDetectors:
    """Characterise a set of features by the norms of the tokens that they fire on.

    Args:
        codes: `[tokens, d_sae]`, from `sparse_codes`.
        norms: `[tokens]`, of the activations, as `TokenSample.norms`.
        features: indices of the set, such as `Matches.matched_features`; all features if None.
        min_firings: features that fire less often are left out of the fields per feature.
        detector_share: share of its firings in the top quartile from which a feature is a norm detector.

    Raises:
        ValueError: as many norms as tokens are needed.
    """
    matrix: Any = codes
    if norms.shape != (matrix.shape[0],):
        raise ValueError(f"norms {tuple(norms.shape)} do not go with codes of {matrix.shape[0]} tokens.")
    size = norms.double().cpu().numpy()
    edges = np.quantile(size, (0.25, 0.5, 0.75))
    quartile = np.searchsorted(edges, size, side="right")
    active: Any = pattern(codes if features is None else matrix[:, np.asarray(features, dtype=np.int64)])
    fired = firings(active)
    in_quartile = active.T @ np.eye(4)[quartile]
    counted = fired >= max(1, min_firings)
    shares = in_quartile[counted] / fired[counted, None]
    weight = np.diff(active.indptr)  # the number of the set's features that are active on each token
    largest = np.argsort(-size, kind="stable")[: -(-len(size) // 100)]

    def per_firing(total: Any) -> Any:
        return total / weight.sum() if weight.any() else np.full(np.shape(total), np.nan)

    def percentiles(values: Any, at: Any) -> Any:
        return np.percentile(values, at, axis=0) if counted.any() else np.full((np.size(at), *values.shape[1:]), np.nan)

    return NormDetectors(
        tokens=len(size),
        features=len(fired),
        counted=int(counted.sum()),
        min_firings=min_firings,
        edges=tuple(edges.tolist()),
        quartile_tokens=tuple(np.bincount(quartile, minlength=4).tolist()),
        weighted_shares=tuple(per_firing(in_quartile.sum(axis=0)).tolist()),
        median_shares=tuple(percentiles(shares, [50])[0].tolist()),
        top_quartile_percentiles=tuple(percentiles(shares[:, 3], PERCENTILES).tolist()),
        detectors=float((shares[:, 3] >= detector_share).mean()) if counted.any() else float("nan"),
        detector_share=detector_share,
        median_mean_norm=float(percentiles((active.T @ size)[counted] / fired[counted], [50])[0]),
        weighted_mean_norm=float(per_firing(weight @ size)),
        mean_norm=float(size.mean()),
        median_norm=float(np.median(size)),
        largest_norms_share=float(per_firing(weight[largest].sum())),
    )

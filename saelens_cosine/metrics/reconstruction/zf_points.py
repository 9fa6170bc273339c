"""Points of the ZF plot: norms of tokens' features over norms of the tokens (arXiv 2503.24277 and its released code)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from saelens_cosine.metrics.reconstruction.afa import AFATokens

POINTS = 1000
"""Points of an SAE in the paper's plots."""


@dataclass(frozen=True)
class ZFPoints:
    """
    Points of one SAE.

    Args:
        label (str): Name in the legend.
        afa (tuple[float, ...]): x, `||z||`.
        feature_norm (tuple[float, ...]): y, `||f||`.
        d_sae (int): h, which turns eps (h - 1) into eps.
        bias_norm (float): `||b_dec||`, a floor of y with `bias="augment"`: points in a row at that height have no active features.
        reference (str): What z is, "input" (the paper) or "reconstruction".
        bias (str): What b_dec is, "augment" (the paper), "center" or "ignore".
    """

    label: str
    afa: tuple[float, ...]
    feature_norm: tuple[float, ...]
    d_sae: int
    bias_norm: float
    reference: str
    bias: str


def zf_points(tokens: AFATokens, label: str, max_points: int = POINTS, seed: int = 0) -> ZFPoints:
    """The points of `measure_afa`'s tokens, or of so many of them chosen at random."""
    chosen = torch.randperm(len(tokens.afa), generator=torch.Generator().manual_seed(seed))[:max_points].sort().values
    return ZFPoints(
        label=label,
        afa=tuple(tokens.afa[chosen].tolist()),
        feature_norm=tuple(tokens.feature_norm[chosen].tolist()),
        d_sae=tokens.d_sae,
        bias_norm=tokens.bias_norm,
        reference=tokens.reference,
        bias=tokens.bias,
    )

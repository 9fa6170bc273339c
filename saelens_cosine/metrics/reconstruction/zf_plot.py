"""The ZF plot: norms of tokens' features over norms of the tokens (arXiv 2503.24277 and its released code)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from saelens_cosine.files.whole import whole_file
from saelens_cosine.metrics.reconstruction.afa import AFATokens

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BANDS = (0.25, 0.5, 1.0)
"""Values of eps (h - 1) that the paper draws bands for."""

POINTS = 1000
"""Points of an SAE in the paper's plots."""

_OPACITY = (1.0, 0.66, 0.33)
_FILL = 0.25


class BandSlopes(NamedTuple):
    """Lines through the origin between which eps (h - 1) is below a value; `upper` is infinite from 1 on."""

    lower: float
    upper: float


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


def band_slopes(scale_free: float) -> BandSlopes:
    """Edges of the band of eps (h - 1): `y = x / sqrt(1 + e)` and `y = x / sqrt(1 - e)`.

    Raises:
        ValueError: a negative number.
    """
    if scale_free < 0:
        raise ValueError(f"eps (h - 1) = {scale_free} is negative.")
    return BandSlopes(1 / math.sqrt(1 + scale_free), 1 / math.sqrt(1 - scale_free) if scale_free < 1 else math.inf)


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


def zf_figure(saes: Sequence[ZFPoints]) -> Figure:
    """The plot as the paper draws it: square, with the diagonal, where norms agree, and a band for each of `BANDS`.

    Below the diagonal an SAE activates a token's features less than the token's norm says, above it more.

    Raises:
        ValueError: no points, or SAEs measured with different references or treatments of the bias.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    values = [v for points in saes for v in (*points.afa, *points.feature_norm) if math.isfinite(v)]
    if not values:
        raise ValueError("There are no points to draw.")
    kinds = {(points.reference, points.bias) for points in saes}
    if len(kinds) > 1:
        raise ValueError(f"Points of different kinds do not go in one plot: (reference, bias) are {sorted(kinds)}.")
    reference, bias = kinds.pop()
    most = max(values) or 1.0
    figure = Figure(figsize=(6.4, 6.8), layout="constrained")
    axes = figure.subplots()
    for e, opacity in zip(BANDS, _OPACITY, strict=True):
        lower, upper = band_slopes(e)
        left, right = (most / upper, most), (most, lower * most)  # where the edges leave the square
        axes.fill(*zip((0, 0), left, (most, most), right, strict=True), color="lightblue", alpha=_FILL * opacity, lw=0)
        for edge in (left, right):
            axes.plot([0, edge[0]], [0, edge[1]], color="black", ls="--", lw=0.6, alpha=opacity)
        axes.annotate(
            _band_label(e, {points.d_sae for points in saes}),
            right,
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=7,
            annotation_clip=False,
        )
    axes.plot([0, most], [0, most], color="red", ls="--", alpha=0.5)
    for i, points in enumerate(saes):
        colour = colormaps["viridis"](i / max(1, len(saes) - 1))
        axes.scatter(points.afa, points.feature_norm, s=7, alpha=0.7, color=colour, label=points.label, zorder=3)
    z = {"input": "z", "reconstruction": "\\hat{z}"}[reference] + (" - b_{dec}" if bias == "center" else "")
    f = "f, b_{dec}" if bias == "augment" else "f"
    axes.set(xlim=(0, most), ylim=(0, most), aspect="equal")
    axes.set_xlabel(f"Linear-AFA $\\| {z} \\|_2$")
    axes.set_ylabel(f"SAE feature activation $\\| {f} \\|_2$")
    columns = max(1, 80 // (max(len(points.label) for points in saes) + 6))
    figure.legend(loc="outside lower center", ncols=min(columns, len(saes)), markerscale=2, fontsize=8)
    return figure


def draw_zf_plot(saes: Sequence[ZFPoints], path: Path) -> None:
    """Write `zf_figure` as a picture, whole or not at all."""
    with whole_file(path) as unfinished:
        zf_figure(saes).savefig(unfinished, dpi=150)


def _band_label(e: float, widths: set[int]) -> str:
    only = widths.pop() if len(widths) == 1 else 0
    return (f"ε={e / (only - 1):.1e}\n" if only > 1 else "") + f"ε(h-1)={e:g}"

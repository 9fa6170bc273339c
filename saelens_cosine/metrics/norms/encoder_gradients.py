"""Which tokens train a feature's encoder: its gradient from the tokens of the largest norms against that from the smallest.

Source: experiments 28 and 54 of the released code of arXiv 2606.15054. Each batch is split by quartiles of ||x||, and each
quartile runs forward and backward alone, so that a batch-wide selection is made again among its tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sae_lens.saes.sae import SAE, TrainingSAE

from saelens_cosine.metrics.flat_tokens import flat_heads
from saelens_cosine.metrics.norms.norm_detectors import PERCENTILES
from saelens_cosine.metrics.not_finite import NotFiniteError
from saelens_cosine.saes.cosine import FoldedCosineScore

FLOOR = 1e-10
"""A mean gradient up to this counts as none (experiment 54)."""


@dataclass(frozen=True)
class EncoderGradients:
    """
    Norms of the gradient of each feature's encoder column, `g_1` from the quarter of the tokens with the smallest norms to
    `g_4`, averaged over batches; ratios `r = g_4 / max(g_1, 1e-12)`. NaN where no feature is left.

    Args:
        tokens (int): Tokens used.
        batches (int): Batches that they came in.
        form (str): "training", where the selection is the training one, or "inference", where thresholds are fixed.
        features (int): Features with a gradient from the first or the last quartile: those below.
        only_smallest (int): Of these, with none from the last.
        only_largest (int): With none from the first, so that r is as good as infinite.
        larger_from_smallest (int): With g_1 > g_4.
        median_ratio (float): Median of r.
        median_ratio_of_both (float): Median of r over the features with a gradient from both.
        ratio_percentiles (tuple[float, ...]): 5th, 25th, 50th, 75th and 95th percentile of r over the same.
        above_2 (float): Share of the features with r > 2.
        above_5 (float): With r > 5.
        above_10 (float): With r > 10.
        mean_gradients (tuple[float, ...]): Mean over all of the SAE's features of g_1 to g_4, in units of the loss (squared error summed over dimensions, mean over tokens) per unit of W_enc.
        norm_variation (float): Standard deviation of ||x|| over its mean, over all tokens used.
    """

    tokens: int
    batches: int
    form: str
    features: int
    only_smallest: int
    only_largest: int
    larger_from_smallest: int
    median_ratio: float
    median_ratio_of_both: float
    ratio_percentiles: tuple[float, ...]
    above_2: float
    above_5: float
    above_10: float
    mean_gradients: tuple[float, ...]
    norm_variation: float


def encoder_gradients(sae: SAE[Any], activations: torch.Tensor, batch: int = 2048) -> EncoderGradients:
    """Gradients of the squared error at the SAE's weights as they are, which stay as they are.

    Args:
        sae: a training SAE, measured as in training whatever its mode; or any inference form. A saved cosine SAE carries its
            scale in `W_enc`: only the part of the gradient that turns a column is counted, which is, up to a factor per
            feature that ratios do not see, what training gives its direction.
        activations: `[tokens, d_in]` in the order in which they are to be batched. They should be mixed: neighbours in a text
            share a context.
        batch: tokens of a batch; the last, shorter one is left out unless it is the only one.

    Raises:
        ValueError: fewer than four tokens.
        NotFiniteError: a gradient is NaN or infinite, as one bad token makes it.
    """
    if min(batch, len(activations)) < 4:
        raise ValueError(f"{len(activations)} tokens in batches of {batch} cannot be split into quartiles.")
    batches = [part for part in activations.split(batch) if len(part) == min(batch, len(activations))]
    training, learns = sae.training, sae.W_enc.requires_grad
    means = torch.zeros(4, sae.cfg.d_sae, dtype=torch.float64)
    torch.nn.Module.train(sae, isinstance(sae, TrainingSAE))  # not the class's own, which may touch the weights
    sae.W_enc.requires_grad_(True)
    try:
        with flat_heads(sae):
            for x in batches:
                means += torch.stack([_gradient_norms(sae, quarter) for quarter in _quartiles(x)]) / len(batches)
    finally:
        sae.W_enc.requires_grad_(learns)
        torch.nn.Module.train(sae, training)
    NotFiniteError.check("Encoder gradients", means.T, "features")
    norms = torch.cat(batches).double().norm(dim=-1)
    return EncoderGradients(
        tokens=len(norms),
        batches=len(batches),
        form="training" if isinstance(sae, TrainingSAE) else "inference",
        mean_gradients=tuple(means.mean(dim=1).tolist()),
        norm_variation=(norms.std(correction=0) / norms.mean()).item(),
        **_ratios(means[0].numpy(), means[3].numpy()),
    )


def _quartiles(x: torch.Tensor) -> list[torch.Tensor]:
    norms = x.float().norm(dim=-1)
    edges = torch.quantile(norms, torch.tensor((0.25, 0.5, 0.75), device=norms.device))
    quartile = torch.bucketize(norms, edges, right=True)
    return [x[quartile == q] for q in range(4)]


def _gradient_norms(sae: SAE[Any], x: torch.Tensor) -> torch.Tensor:
    """`[d_sae]` float64, norm of the gradient of each encoder column from these tokens alone; 0 without tokens."""
    if len(x) == 0:  # many equal norms
        return torch.zeros(sae.cfg.d_sae, dtype=torch.float64)
    x = x.to(sae.device, sae.dtype)
    with torch.enable_grad():
        codes = sae.encode_with_hidden_pre(x)[0] if isinstance(sae, TrainingSAE) else sae.encode(x)
        loss = (sae.decode(codes) - x).square().sum(dim=-1).mean()
        (gradient,) = torch.autograd.grad(loss, [sae.W_enc], materialize_grads=True)  # 0 where nothing fires
    if isinstance(sae, FoldedCosineScore):
        columns = torch.nn.functional.normalize(sae.W_enc.detach(), dim=0)
        gradient = gradient - columns * (gradient * columns).sum(dim=0)
    return gradient.float().norm(dim=0).cpu().double()


def _ratios(g_1: np.ndarray[Any, Any], g_4: np.ndarray[Any, Any]) -> dict[str, Any]:
    kept = (g_1 > FLOOR) | (g_4 > FLOOR)
    g_1, g_4 = g_1[kept], g_4[kept]
    r = g_4 / np.maximum(g_1, 1e-12)
    both = r[(g_1 > FLOOR) & (g_4 > FLOOR)]

    def share(bound: float) -> float:
        return float((r > bound).mean()) if len(r) else float("nan")

    return {
        "features": len(r),
        "only_smallest": int((g_4 <= FLOOR).sum()),
        "only_largest": int((g_1 <= FLOOR).sum()),
        "larger_from_smallest": int((g_1 > g_4).sum()),
        "median_ratio": float(np.median(r)) if len(r) else float("nan"),
        "median_ratio_of_both": float(np.median(both)) if len(both) else float("nan"),
        "ratio_percentiles": tuple((np.percentile(both, PERCENTILES) if len(both) else np.full(5, np.nan)).tolist()),
        "above_2": share(2),
        "above_5": share(5),
        "above_10": share(10),
    }

"""How long activations are, and where the high-norm tokens stand."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from saelens_cosine.experiments.evaluate.evals.eval import Eval, Figure
from saelens_cosine.experiments.evaluate.subject import Text


@dataclass(frozen=True)
class TokenNorms:
    """
    Norms of the activations of a text.

    Args:
        tokens (int): Tokens, sinks among them.
        high_norm_share (float): Share of them whose norm is above the settings' multiple of the median.
        high_norm_multiple (float | None): The median norm of these over that of all; None where there are none.
        high_norm_positions (tuple[tuple[int, int], ...]): The five positions of a context where most of them stand, and how many.
        norm_quantiles (tuple[tuple[float, float], ...]): Quantile and norm.
    """

    tokens: int
    high_norm_share: float
    high_norm_multiple: float | None
    high_norm_positions: tuple[tuple[int, int], ...]
    norm_quantiles: tuple[tuple[float, float], ...]


def _measure(text: Text) -> TokenNorms:
    sample = text.sample
    norms, high = sample.norms, ~sample.ordinary
    positions = torch.bincount(sample.positions[high], minlength=1)
    common = positions.argsort(descending=True, stable=True)[:5]
    quantiles = (0.01, 0.25, 0.5, 0.75, 0.99, 1.0)
    return TokenNorms(
        len(sample),
        sample.high_norm_share,
        (norms[high].median() / norms[norms > 0].median()).item() if high.any() else None,
        tuple((int(p), int(positions[p])) for p in common if positions[p]),
        tuple((q, float(np.quantile(norms.numpy(), q))) for q in quantiles),
    )


def _figures(result: TokenNorms) -> Iterator[Figure]:
    yield Figure("tokens", result.tokens, compared=False)
    yield Figure("share of high-norm tokens", result.high_norm_share, compared=False)
    yield Figure("their norm over the median", result.high_norm_multiple, compared=False)


TOKENS = Eval(
    "tokens", "text", "how long activations are, and where the high-norm tokens stand", _measure, figures=_figures
)

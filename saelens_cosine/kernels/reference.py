"""The readable form of each operation on active entries, in plain torch: what the fast forms are tested against.

Shapes: B tokens, F features, D inputs, N active entries. Same names and signatures as in `cpu` and `gpu`.
"""

from __future__ import annotations

import torch

from saelens_cosine.kernels.entries import Entries
from saelens_cosine.kernels.terms import ScoreTerms
from saelens_cosine.score import wide


def segment_sum(rows: torch.Tensor, offsets: torch.Tensor, weights: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """`out[s] = sum of weights[j] * table[rows[j]]` over the j in `offsets[s] .. offsets[s + 1] - 1`.

    The one operation behind decode (segments are tokens, the table is `W_dec`), both weight gradients (segments are
    features, the table is a batch) and the gradient of the input.

    Args:
        rows: `[N]` int64, rows of the table, segment after segment.
        offsets: `[S + 1]` int64, where each segment starts, and N.
        weights: `[N]`.
        table: `[R, D]`.

    Returns:
        `[S, D]`; zeros for an empty segment.
    """
    n_segments = offsets.shape[0] - 1
    segment = torch.repeat_interleave(torch.arange(n_segments, device=rows.device), offsets.diff())
    out = torch.zeros(n_segments, table.shape[1], dtype=table.dtype, device=table.device)
    return out.index_add_(0, segment, weights.unsqueeze(-1) * table[rows])


def sampled_product(entries: Entries, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """`<left[token], right[feature]>` at each active entry.

    Args:
        entries: which of the B x F products are wanted.
        left: `[B, D]`.
        right: `[F, D]`.

    Returns:
        `[N]`, in the entries' order.
    """
    return (left[entries.tokens] * right[entries.features]).sum(dim=-1)


def best_places(
    product: torch.Tensor, log_norm: torch.Tensor, terms: ScoreTerms, n_wanted: int, per_token: bool
) -> torch.Tensor:
    """Where the highest scores are, of the whole batch or of each token. Ties at the cut go to the lowest place.

    Args:
        product: `[B, F]`, `<u_b, w_i>`.
        log_norm: `[B]`.
        terms: what makes scores of products.
        n_wanted: how many, of the batch or of each token; all where there are fewer. Zeros count too.
        per_token: `n_wanted` of each token.

    Returns:
        `[n_wanted]` or `[B * n_wanted]` int64, flat places `token * F + feature`, ascending.
    """
    scores = _ranked_scores(product, log_norm, terms)
    groups = scores if per_token else scores.reshape(1, -1)
    best = groups.sort(dim=-1, descending=True, stable=True).indices[:, :n_wanted].sort(dim=-1).values
    starts = torch.arange(groups.shape[0], device=product.device) * groups.shape[1]
    return (starts.unsqueeze(-1) + best).flatten()


def places_above(
    product: torch.Tensor, log_norm: torch.Tensor, terms: ScoreTerms, threshold: torch.Tensor
) -> torch.Tensor:
    """Where scores are positive and above a threshold.

    Args:
        product: `[B, F]`, `<u_b, w_i>`.
        log_norm: `[B]`.
        terms: what makes scores of products.
        threshold: `[]` or `[F]`.

    Returns:
        `[N]` int64, flat places `token * F + feature`, ascending.
    """
    scores = _ranked_scores(product, log_norm, terms)
    return (scores > threshold.to(scores.dtype).clamp_min(0)).flatten().nonzero().squeeze(-1)


def _ranked_scores(product: torch.Tensor, log_norm: torch.Tensor, terms: ScoreTerms) -> torch.Tensor:
    """`[B, F]` in float32 or wider, rectified or, signed, their sizes; NaN counts as 0."""
    dtype = wide(product.dtype)
    exponent, log_scale = terms.norm_exponent.to(dtype), terms.log_scale.to(dtype)
    scale = (exponent * log_norm.to(dtype).unsqueeze(-1) + log_scale).exp() * terms.gain.to(dtype)
    score = scale * product.to(dtype) + terms.bias.to(dtype)
    score = score.abs() if terms.signed else score
    return score.where(score > 0, 0)

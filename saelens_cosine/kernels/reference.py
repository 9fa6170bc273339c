"""The readable form of each operation on active entries, in plain torch: what the fast forms are tested against.

Shapes: B tokens, F features, D inputs, N active entries. Same names and signatures as in `cpu` and `triton`.
"""

from __future__ import annotations

import torch

from saelens_cosine.kernels.entries import Entries


def segment_sum(
    rows: torch.Tensor, offsets: torch.Tensor, weights: torch.Tensor, table: torch.Tensor
) -> torch.Tensor:
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

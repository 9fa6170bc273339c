"""The operations of `reference` as the CPU does them fastest: embedding bags and sampled sparse products."""

from __future__ import annotations

import warnings

import torch

from saelens_cosine.kernels.entries import Entries


def segment_sum(rows: torch.Tensor, offsets: torch.Tensor, weights: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """See `reference.segment_sum`. An embedding bag with weights is this, vectorised and prefetched."""
    if len(rows) == 0:  # an embedding bag refuses an empty list of rows
        return table.new_zeros(offsets.shape[0] - 1, table.shape[1])
    return torch.nn.functional.embedding_bag(
        rows, table, offsets, mode="sum", per_sample_weights=weights.to(table.dtype), include_last_offset=True
    )


def sampled_product(entries: Entries, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """See `reference.sampled_product`. A zero matrix with the entries' pattern, plus the product where it has entries."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        pattern = torch.sparse_csr_tensor(
            entries.token_offsets,
            entries.features,
            torch.zeros(len(entries), dtype=left.dtype),
            size=(entries.n_tokens, entries.d_sae),
            check_invariants=False,
        )
    return torch.sparse.sampled_addmm(pattern, left, right.T, beta=0.0).values()

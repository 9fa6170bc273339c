"""Sums over tokens of products of two SAEs' codes, `A.T @ B`, of which never more than a few rows are dense."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
from scipy import sparse

Array = np.ndarray[Any, Any]

BLOCK_ENTRIES = 2**22
"""Entries of a block: 32 MiB in float64."""

SPARSE_COST = 256
"""Time of a product of two sparse entries, in those of a dense matrix product."""


class TokenGram:
    """`a.T @ b` of codes `[tokens, F_a]` and `[tokens, F_b]`; iterates over blocks: the first row, and `[rows, F_b]` float64.

    Tokens where very many features are active (attention sinks, in an SAE that scores by inner product) would cost the
    product of their counts; they go through a dense product instead, whose sums are float32.
    """

    def __init__(self, a: sparse.csr_array, b: sparse.csr_array):
        rows_a, rows_b = _rows(a), _rows(b)
        self.shape: tuple[int, int] = rows_a.shape[1], rows_b.shape[1]
        pairs = np.diff(rows_a.indptr).astype(np.float64) * np.diff(rows_b.indptr)
        crowded = pairs * SPARSE_COST > self.shape[0] * self.shape[1]
        self._sparse = rows_a[~crowded].T.tocsr(), rows_b[~crowded].astype(np.float64)
        self._dense = tuple(rows[crowded].toarray().astype(np.float32, copy=False) for rows in (rows_a, rows_b))
        self._step = max(1, BLOCK_ENTRIES // max(1, self.shape[1]))

    def __len__(self) -> int:
        return -(-self.shape[0] // self._step)

    def __iter__(self) -> Iterator[tuple[int, Array]]:
        (sparse_a, sparse_b), (dense_a, dense_b) = self._sparse, self._dense
        for start in range(0, self.shape[0], self._step):
            stop = start + self._step
            block = (sparse_a[start:stop] @ sparse_b).toarray()
            if len(dense_a):
                block += dense_a[:, start:stop].T @ dense_b
            yield start, block

    def joint(self) -> TokenGram:
        """The same sums of 1 instead of products: tokens on which both features are active, exact up to 16 million."""
        gram = copy.copy(self)
        gram._sparse = pattern(self._sparse[0]), pattern(self._sparse[1]).astype(np.float64)
        gram._dense = tuple((codes != 0).astype(np.float32) for codes in self._dense)
        return gram


def pattern(codes: sparse.csr_array) -> sparse.csr_array:
    """1 where a feature is active, float32."""
    rows = _rows(codes)
    return sparse.csr_array((np.ones(rows.nnz, np.float32), rows.indices, rows.indptr), shape=rows.shape)


def firings(codes: sparse.csr_array) -> Array:
    """`[d_sae]` int64, tokens on which each feature is active."""
    rows = _rows(codes)
    return np.bincount(rows.indices, minlength=rows.shape[1])


def _rows(codes: sparse.csr_array) -> Any:
    return codes  # scipy's stubs take a matrix for a vector in slices and products

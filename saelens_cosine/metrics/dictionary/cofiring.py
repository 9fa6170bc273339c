"""Features that fire together: pairs against independence."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import sparse

from saelens_cosine.metrics.token_gram import Array, TokenGram, firings, pattern

LIFTS = (1.0, 2.0, 10.0, 100.0)


@dataclass(frozen=True)
class CofiringPair:
    """
    Two features that fire together.

    Args:
        feature (int): Index, the smaller one.
        other (int): The larger one.
        joint_firings (int): Tokens on which both are active.
        lift (float): Their number over that expected of independent features, `n_ij T / (n_i n_j)`.
        pmi (float): Pointwise mutual information, log(lift), in nats.
        normalised_pmi (float): pmi / -log(n_ij / T): 0 if independent, 1 if neither fires without the other.
    """

    feature: int
    other: int
    joint_firings: int
    lift: float
    pmi: float
    normalised_pmi: float


@dataclass(frozen=True)
class Cofiring:
    """
    How an SAE's features fire together.

    Args:
        tokens (int): Tokens measured on.
        alive (int): Features that fire on any of them.
        min_joint_firings (int): Tokens on which a pair must fire together to be counted below.
        pairs_per_token (float): Mean number of pairs of features that are active on a token.
        expected_pairs_per_token (float): The same if features with these rates were independent.
        lift (float): The first over the second; NaN without pairs. Above 1 where some tokens (long ones, sinks) have many more codes than others.
        counted_pairs (int): Pairs with enough joint firings.
        pairs_above_lift (tuple[tuple[float, int], ...]): How many of these have a lift above 1, 2, 10 and 100.
        top (tuple[CofiringPair, ...]): The counted ones with the highest normalised pmi, the most joint firings first among equals.
    """

    tokens: int
    alive: int
    min_joint_firings: int
    pairs_per_token: float
    expected_pairs_per_token: float
    lift: float
    counted_pairs: int
    pairs_above_lift: tuple[tuple[float, int], ...]
    top: tuple[CofiringPair, ...]


def cofiring(codes: sparse.csr_array, min_joint_firings: int = 10, top: int = 100) -> Cofiring:
    """Count how often pairs of features fire together. No `F x F` matrix is held.

    Args:
        codes: `[tokens, d_sae]`, from `sparse_codes`.
        min_joint_firings: pairs that fire together less often are not counted: a lift of a few tokens is chance.
        top: pairs to list.
    """
    matrix: Any = codes
    tokens, min_joint = matrix.shape[0], max(1, min_joint_firings)
    fired = firings(codes)
    kept = np.flatnonzero(fired >= min_joint)
    active, n = pattern(matrix[:, kept]), fired[kept].astype(np.float64)
    above, counted = np.zeros(len(LIFTS), np.int64), 0
    best: tuple[Array, ...] = tuple(np.zeros(0, dtype) for dtype in (np.int64, np.int64, np.float64, np.float64))
    for start, joint in TokenGram(active, active):
        i, j = np.nonzero(joint >= min_joint)
        rows = start + i
        first = rows < j
        count, rows, j = joint[i, j][first].astype(np.float64), rows[first], j[first]
        lift = count * tokens / (n[rows] * n[j])
        counted += len(lift)
        above += [int((lift > bound).sum()) for bound in LIFTS]
        best = _best((*best, rows, j, count, _normalised(lift, count, tokens)), top)
    per_token, rate = np.diff(matrix.indptr).astype(np.float64), fired / tokens
    pairs = float((per_token * (per_token - 1)).sum() / (2 * tokens))
    expected = float((rate.sum() ** 2 - (rate**2).sum()) / 2)
    return Cofiring(
        tokens=tokens,
        alive=int((fired > 0).sum()),
        min_joint_firings=min_joint_firings,
        pairs_per_token=pairs,
        expected_pairs_per_token=expected,
        lift=pairs / expected if expected > 0 else float("nan"),
        counted_pairs=counted,
        pairs_above_lift=tuple(zip(LIFTS, above.tolist(), strict=True)),
        top=tuple(
            CofiringPair(int(kept[i]), int(kept[j]), int(count), lift, math.log(lift), normalised)
            for i, j, count, normalised in zip(*(column.tolist() for column in best), strict=True)
            for lift in [float(count * tokens / (n[i] * n[j]))]
        ),
    )


def _best(columns: tuple[Array, ...], top: int) -> tuple[Array, ...]:
    """The best `top` of two lists of pairs (rows, columns, counts, scores, and these four again), sorted."""
    rows, others, counts, scores = (np.concatenate([columns[i], columns[i + 4]]) for i in range(4))
    if len(scores) > top > 0:
        near = np.flatnonzero(scores >= np.partition(scores, -top)[-top])
        rows, others, counts, scores = rows[near], others[near], counts[near], scores[near]
    order = np.lexsort((others, rows, -counts, -scores))[:top]
    return rows[order], others[order], counts[order], scores[order]


def _normalised(lift: Array, count: Array, tokens: int) -> Array:
    surprise = -np.log(count / tokens)
    # two features that both fire on every token: neither fires without the other
    score = np.divide(np.log(lift), surprise, out=np.ones_like(lift), where=surprise > 0)
    return score.round(9)  # pairs that are equal but for rounding

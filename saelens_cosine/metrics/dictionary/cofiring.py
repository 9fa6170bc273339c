"""Features that fire together: pairs against independence, and how many features carry one concept.

Concept support is experiment 56a of the released code of arXiv 2606.15054.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy import sparse

from saelens_cosine.metrics.token_gram import TokenGram, firings, pattern

Array = np.ndarray[Any, Any]

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


@dataclass(frozen=True)
class ConceptSupport:
    """
    How many features respond to a concept, and how evenly. An item is a token, or a context where these are given.

    Args:
        positives (int): Items with the concept.
        negatives (int): Items without.
        support (int): Features that fire on more than 30 % of the positives and on less than 10 % of the negatives.
        broad_support (int): Features that fire on more than 20 % of the positives, whatever they do elsewhere.
        support_features (tuple[int, ...]): The support's indices, ascending.
        normalised_entropy (float): Entropy of the features' mean |code| on the positives as shares of their sum, over log(d_sae): 0 for one feature, 1 if all are alike. NaN if none fires.
        effective_features (float): exp of that entropy. NaN likewise.
        gini (float): Gini coefficient of the same means over all d_sae features: 0 if all are alike, 1 - 1 / d_sae for one feature. NaN likewise.
    """

    positives: int
    negatives: int
    support: int
    broad_support: int
    support_features: tuple[int, ...]
    normalised_entropy: float
    effective_features: float
    gini: float


def cofiring(
    codes: sparse.csr_array,
    min_joint_firings: int = 10,
    top: int = 100,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> Cofiring:
    """Count how often pairs of features fire together. No `F x F` matrix is held.

    Args:
        codes: `[tokens, d_sae]`, from `sparse_codes`.
        min_joint_firings: pairs that fire together less often are not counted: a lift of a few tokens is chance.
        top: pairs to list.
        on_progress: called with what is being done, how much of it, and out of how much.
    """
    matrix: Any = codes
    tokens, min_joint = matrix.shape[0], max(1, min_joint_firings)
    fired = firings(codes)
    kept = np.flatnonzero(fired >= min_joint)
    active, n = pattern(matrix[:, kept]), fired[kept].astype(np.float64)
    above, counted = np.zeros(len(LIFTS), np.int64), 0
    best: tuple[Array, ...] = tuple(np.zeros(0, dtype) for dtype in (np.int64, np.int64, np.float64, np.float64))
    gram = TokenGram(active, active)
    for done, (start, joint) in enumerate(gram, 1):
        i, j = np.nonzero(joint >= min_joint)
        rows = start + i
        first = rows < j
        count, rows, j = joint[i, j][first].astype(np.float64), rows[first], j[first]
        lift = count * tokens / (n[rows] * n[j])
        counted += len(lift)
        above += [int((lift > bound).sum()) for bound in LIFTS]
        best = _best((*best, rows, j, count, _normalised(lift, count, tokens)), top)
        if on_progress:
            on_progress("Counting joint firings", done, len(gram))
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


def concept_support(
    codes: sparse.csr_array, labels: torch.Tensor, contexts: torch.Tensor | None = None
) -> ConceptSupport:
    """Features that fire where a concept is, and rarely elsewhere.

    Args:
        codes: `[tokens, d_sae]`, from `sparse_codes`.
        labels: booleans, `[tokens]`, or `[contexts]` where `contexts` is given.
        contexts: `[tokens]` int64, the number of each token's context from 0 (`TokenSample.contexts`). A feature fires on a
            context when it does on any of its tokens; its code there is the mean of |code|. Contexts without tokens are
            left out.

    Raises:
        ValueError: labels of another length, or of one class only.
    """
    items: Any = abs(codes)
    labels = labels.cpu()
    if contexts is not None:
        items, labels = _by_context(items, contexts.cpu().numpy(), labels)
    if labels.shape != (items.shape[0],) or labels.dtype != torch.bool or not 0 < int(labels.sum()) < len(labels):
        raise ValueError(
            f"labels {labels.dtype} {tuple(labels.shape)} must be booleans for each of {items.shape[0]} items, of both classes."
        )
    positive = labels.numpy()
    on, off = items[positive], items[~positive]
    rate_on, rate_off = firings(on) / on.shape[0], firings(off) / off.shape[0]
    support = np.flatnonzero((rate_on > 0.3) & (rate_off < 0.1))
    mean = np.bincount(on.indices, on.data, on.shape[1]) / on.shape[0]
    entropy, gini = _entropy_and_gini(mean)
    return ConceptSupport(
        positives=on.shape[0],
        negatives=off.shape[0],
        support=len(support),
        broad_support=int((rate_on > 0.2).sum()),
        support_features=tuple(support.tolist()),
        normalised_entropy=entropy / math.log(len(mean)) if len(mean) > 1 else float("nan"),
        effective_features=math.exp(entropy),
        gini=gini,
    )


def _by_context(items: Any, contexts: Array, labels: torch.Tensor) -> tuple[Any, torch.Tensor]:
    """Means over the tokens of each context that has any, and those contexts' labels."""
    if contexts.shape != (items.shape[0],) or (len(contexts) and int(contexts.max()) >= len(labels)):
        raise ValueError(
            f"contexts {contexts.shape} with numbers up to {contexts.max(initial=-1)} do not go with {items.shape[0]} tokens and "
            f"{len(labels)} labels."
        )
    present, row, size = np.unique(contexts, return_inverse=True, return_counts=True)
    place = row.astype(np.int32), np.arange(len(row), dtype=np.int32)  # wider ones would widen those of the result
    mean = sparse.csr_array((1 / size[row], place), shape=(len(present), len(row)))
    return (mean @ items).tocsr(), labels[torch.from_numpy(present)]


def _entropy_and_gini(mean: Array) -> tuple[float, float]:
    """Of non-negative values: entropy in nats of their shares, and Gini coefficient; NaN if all are 0."""
    total = mean.sum()
    if total == 0:
        return float("nan"), float("nan")
    share = mean[mean > 0] / total
    entropy = float(-(share * np.log(share)).sum())
    n, ordered = len(mean), np.sort(mean)
    gini = float((2 * np.arange(1, n + 1) - n - 1) @ ordered / (n * total))
    return entropy, gini

"""Where a gap in probing accuracy comes from: features that only one SAE has, or features that it has in a purer form.

For accuracy at k, G is the gap with all features and M the gap when both SAEs are read from their matched features alone.
Separability is the share M / G, discovery the rest. Source: arXiv 2606.15054, released code, experiment 58b, which splits gaps
measured with attention sinks in the pooled contexts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy import sparse

from saelens_cosine.metrics.intervals import Difference, paired_difference
from saelens_cosine.metrics.probing.probing import K_VALUES, KProbe, Units, probe


@dataclass(frozen=True)
class Decomposition:
    """
    A gap in accuracy between SAEs a and b, and its two shares.

    Args:
        k (int | None): Features read; None is all.
        gap (Difference): Accuracy of a minus that of b, all features to choose from.
        matched_gap (Difference): The same, with only the matched features to choose from.
        separability (float | None): matched_gap / gap. None where no gap is seen: there is nothing to divide.
        discovery (float | None): 1 - separability.
        accuracies (tuple[tuple[float, ...], ...]): By split: a, b, a matched, b matched.
        matched_features (tuple[int, int]): Features of a and of b that count as matched; different numbers favour the SAE with more.
    """

    k: int | None
    gap: Difference
    matched_gap: Difference
    separability: float | None
    discovery: float | None
    accuracies: tuple[tuple[float, ...], ...]
    matched_features: tuple[int, int]


def decompose(
    codes_a: sparse.csr_array,
    codes_b: sparse.csr_array,
    labels: ArrayLike,
    matched_a: ArrayLike,
    matched_b: ArrayLike,
    ks: Sequence[int | None] = K_VALUES,
    units: Units = "canonical",
    splits: int = 5,
    seed: int = 0,
    known: Sequence[Sequence[KProbe]] | None = None,
) -> tuple[Decomposition, ...]:
    """Split the gap on one task, for each k.

    Args:
        codes_a: pooled codes `[contexts, features]` of one SAE (`pool(canonical_codes(...), ...)`).
        codes_b: of the other, on the same contexts.
        labels: `[contexts]`, as in `probe_sae`.
        matched_a: numbers of the features of a that have a match in b; repeated ones count once.
        matched_b: numbers of their matches. Take mutual matches, so that both sides have as many.
        ks: numbers of features; None is all.
        units, splits, seed: as in `probe`.
        known: what `probe` finds of a's and of b's codes with these arguments, where that is known.

    Raises:
        ValueError: as `probe`; a k above the number of matched features among them.
    """
    only_a, only_b = np.unique(np.asarray(matched_a, dtype=np.int64)), np.unique(np.asarray(matched_b, dtype=np.int64))
    matched: tuple[Any, ...] = (codes_a[:, only_a], codes_b[:, only_b])
    sets = matched if known else (codes_a, codes_b, *matched)
    probes = [*(known or ()), *(probe(codes, labels, ks, units, splits, seed) for codes in sets)]
    return tuple(
        _decomposition(k, tuple(by_k[i].accuracies for by_k in probes), (len(only_a), len(only_b)))
        for i, k in enumerate(ks)
    )


def over_tasks(parts: Sequence[Decomposition]) -> Decomposition:
    """One decomposition for several tasks at the same k: gaps are means over tasks, and the tasks are part of the noise.

    Its accuracies are by task, means over their splits.

    Raises:
        ValueError: no parts, or several k.
    """
    if len({part.k for part in parts}) != 1:
        raise ValueError(f"Parts with k={[part.k for part in parts]}: one k is needed.")
    accuracies = np.array([part.accuracies for part in parts])  # [tasks, 4, splits]
    by_task = tuple(tuple(map(float, values)) for values in accuracies.mean(axis=-1).T)
    largest = max(part.matched_features for part in parts)
    return _decomposition(parts[0].k, by_task, largest)


def _decomposition(
    k: int | None, accuracies: tuple[tuple[float, ...], ...], matched_features: tuple[int, int]
) -> Decomposition:
    a, b, only_a, only_b = accuracies
    gap, matched_gap = paired_difference(a, b), paired_difference(only_a, only_b)
    share = matched_gap.mean / gap.mean if gap.seen else None
    return Decomposition(k, gap, matched_gap, share, None if share is None else 1 - share, accuracies, matched_features)

"""k-sparse probing: how well a few features of an SAE, or all of them, tell two classes of contexts apart.

Features are chosen by the difference of the class means on the training split, and a logistic regression reads them
(SAEBench's sparse probing, arXiv 2503.09532). The choice depends on the units of the codes, which a score can change at no gain,
so two are reported: canonical (what a feature adds to the reconstruction, along a decoder row of length 1; SAEBench's units
where decoder rows have that length) and scale-free (divided by the feature's mean nonzero size on the training split, as
sae-probes does, arXiv 2502.16681; nothing changes when a feature's codes are multiplied by a number). The regression itself sees
each feature divided by its standard deviation on the training split, so that its penalty has no units and it converges: with all
features the two are the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import ArrayLike
from sae_lens.saes.sae import SAE
from scipy import sparse, stats

from saelens_cosine.activations.sample import TokenSample
from saelens_cosine.metrics.codes import canonical_codes
from saelens_cosine.metrics.not_finite import NotFiniteError
from saelens_cosine.metrics.token_gram import Array

Pooling = Literal["mean", "last"]
"""What stands for a context: the mean over its tokens, or its last token."""

Units = Literal["canonical", "scale_free"]

K_VALUES: tuple[int | None, ...] = (1, 2, 5, None)
"""Numbers of features; None is all of them."""

ITERATIONS = 10_000
"""Of the regression at most; on scaled inputs tens to hundreds are enough."""

FEW = 2000
"""Contexts or features, whichever are fewer, up to which the regression is solved by its second derivatives."""

BLOCK = 4096
"""Features whose products are summed at a time, as dense arrays."""

SPAN = 1e-13
"""Share of the largest eigenvalue of a Gram matrix below which one is rounding."""


@dataclass(frozen=True)
class KProbe:
    """
    Probes on the k best features, one for each split.

    Args:
        k (int | None): Features read; None is all.
        accuracy (float): Share of test contexts classified right, mean over the splits.
        auc (float): Area under the ROC curve, mean over the splits.
        accuracies (tuple[float, ...]): By split. Splits have no test context in common.
        aucs (tuple[float, ...]): By split.
        features (tuple[tuple[int, ...], ...]): Chosen features by split, best first; empty where all are read.
    """

    k: int | None
    accuracy: float
    auc: float
    accuracies: tuple[float, ...]
    aucs: tuple[float, ...]
    features: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Probing:
    """
    One task, read from one SAE.

    Args:
        contexts (int): Labelled contexts.
        tokens (int): Tokens that were pooled over, or chosen from.
        positive_share (float): Share of the contexts in the positive class: what always guessing gets is the larger of it and 1 minus it.
        pooling (Pooling): What stands for a context.
        canonical (tuple[KProbe, ...]): By k, with codes in units of unit decoder rows.
        scale_free (tuple[KProbe, ...]): By k, with each feature divided by its mean nonzero size.
    """

    contexts: int
    tokens: int
    positive_share: float
    pooling: Pooling
    canonical: tuple[KProbe, ...]
    scale_free: tuple[KProbe, ...]


def probe_sae(
    sae: SAE[Any],
    sample: TokenSample,
    labels: ArrayLike,
    ks: Sequence[int | None] = K_VALUES,
    pooling: Pooling = "mean",
    splits: int = 5,
    seed: int = 0,
) -> Probing:
    """Probe an SAE's codes for a property of contexts, in both units.

    Args:
        sae: any SAELens SAE; an inference form, or a training form in eval mode.
        sample: tokens of all contexts; those left out of it (sinks) are left out of the pooling.
        labels: `[contexts]`, true or 1 for the positive class; entry i is that of the tokens with `sample.contexts == i`.
        ks: numbers of features; None is all.
        pooling: see `Pooling`.
        splits: every context is tested once, by a probe trained on the other `splits - 1` parts.
        seed: decides the parts. SAEs that are probed with the same seed and labels can be paired split by split.

    Raises:
        ValueError: labels that do not fit the sample, or a class with fewer contexts than splits.
        ModuleNotFoundError: scikit-learn is not installed.
    """
    truth = _check_labels(labels, splits)
    pooled = pool(canonical_codes(sae, sample.activations), sample.contexts, len(truth), pooling)
    results = probe_in_units(pooled, truth, ks, splits=splits, seed=seed)
    return Probing(len(truth), len(sample), float(truth.mean()), pooling, **results)


def probe_activations(
    sample: TokenSample, labels: ArrayLike, pooling: Pooling = "mean", splits: int = 5, seed: int = 0
) -> KProbe:
    """The same probe on the activations themselves, all dimensions: what a dictionary can be measured against."""
    truth = _check_labels(labels, splits)
    NotFiniteError.check("Activations", sample.activations)
    pooled = pool(sparse.csr_array(sample.activations.numpy()), sample.contexts, len(truth), pooling)
    return probe(pooled, truth, (None,), "canonical", splits, seed)[0]


def pool(codes: sparse.csr_array, contexts: ArrayLike, n_contexts: int, how: Pooling = "mean") -> sparse.csr_array:
    """`[tokens, d_sae]` codes to `[n_contexts, d_sae]`, float64. A context without tokens gets zeros.

    Args:
        codes: entries in the order of the tokens.
        contexts: `[tokens]`, the number of each token's context.
        n_contexts: contexts that there are.
        how: mean over the context's tokens, or the last one of them.

    Raises:
        ValueError: contexts that do not fit the codes or n_contexts.
    """
    context = np.asarray(contexts, dtype=np.int32)  # wider indices would widen those of the result
    n_tokens = _shape(codes)[0]
    if len(context) != n_tokens or (n_tokens and not 0 <= context.min() <= context.max() < n_contexts):
        raise ValueError(f"{len(context)} context numbers for {n_tokens} tokens of contexts 0 to {n_contexts - 1}.")
    token = np.arange(n_tokens, dtype=np.int32)
    if how == "last":
        last = np.full(n_contexts, -1, dtype=np.int32)
        np.maximum.at(last, context, token)
        token = last[last >= 0]
        context = context[token]
    elif how != "mean":
        raise ValueError(f"pooling={how!r} is none of 'mean', 'last'.")
    weights = 1 / np.bincount(context, minlength=n_contexts)[context]
    members: Any = sparse.csr_array((weights, (context, token)), shape=(n_contexts, n_tokens))
    return sparse.csr_array(members @ codes)


def probe(
    codes: sparse.csr_array,
    labels: ArrayLike,
    ks: Sequence[int | None] = K_VALUES,
    units: Units = "canonical",
    splits: int = 5,
    seed: int = 0,
) -> tuple[KProbe, ...]:
    """Probe codes `[contexts, features]` that are pooled already; arguments and errors as in `probe_sae`.

    L2-penalised logistic regression with C = 1, as SAEBench; sae-probes fits C, which this does not. Unlike SAEBench's, its inputs
    are scaled to a standard deviation of 1 on the training split, not centred, so that the penalty weighs all features alike.
    """
    return probe_in_units(codes, labels, ks, (units,), splits, seed)[units]


def probe_in_units(
    codes: sparse.csr_array,
    labels: ArrayLike,
    ks: Sequence[int | None] = K_VALUES,
    units: Sequence[Units] = get_args(Units),
    splits: int = 5,
    seed: int = 0,
) -> dict[Units, tuple[KProbe, ...]]:
    """`probe` in several units; where these choose the same features, all of them for one, they are fitted once."""
    truth = _check_labels(labels, splits)
    n_contexts, n_features = _shape(codes)
    if len(truth) != n_contexts:
        raise ValueError(f"{len(truth)} labels for {n_contexts} contexts.")
    for name in units:
        if name not in get_args(Units):
            raise ValueError(f"units={name!r} is none of 'canonical', 'scale_free'.")
    for k in ks:
        if k is not None and not 0 < k <= n_features:
            raise ValueError(f"k={k} features cannot be chosen out of {n_features}.")
    scores: dict[tuple[Units, int | None], list[tuple[float, float]]] = {(name, k): [] for name in units for k in ks}
    chosen: dict[tuple[Units, int | None], list[tuple[int, ...]]] = {at: [] for at in scores}
    for train, test in _parts(truth, splits, seed):
        fitted: dict[tuple[int, ...], tuple[float, float]] = {}
        for name in units:
            x = codes
            if name == "scale_free":
                x = codes.copy()
                x.data *= (1 / _mean_nonzero_size(codes[train]))[x.indices]
            best = np.argsort(-_difference_of_means(x, truth, train), kind="stable")
            for k in ks:
                features = () if k is None else tuple(best[:k].tolist())
                columns = tuple(sorted(features))
                if columns not in fitted:
                    x_k = codes[:, columns].toarray() if columns else codes
                    fitted[columns] = _fit(x_k, truth, train, test)
                scores[name, k].append(fitted[columns])
                chosen[name, k].append(features)
    return {name: tuple(_over_splits(k, scores[name, k], chosen[name, k]) for k in ks) for name in units}


def _over_splits(k: int | None, scores: Sequence[tuple[float, float]], features: Sequence[tuple[int, ...]]) -> KProbe:
    accuracies, aucs = zip(*scores, strict=True)
    return KProbe(k, sum(accuracies) / len(scores), sum(aucs) / len(scores), accuracies, aucs, tuple(features))


def _check_labels(labels: ArrayLike, splits: int) -> Array:
    given = np.asarray(labels)
    if given.ndim != 1 or not np.isin(given, (0, 1)).all():
        raise ValueError(f"labels of shape {given.shape} must be one true or false (1 or 0) for each context.")
    truth = given.astype(bool)
    smallest = int(min(truth.sum(), (~truth).sum()))
    if splits < 2 or smallest < splits:
        raise ValueError(
            f"splits={splits} needs to be at least 2 and at most the contexts of the smaller class, {smallest}."
        )
    return truth


def _parts(truth: Array, splits: int, seed: int) -> Iterator[tuple[Array, Array]]:
    try:
        from sklearn.model_selection import StratifiedKFold
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("Probing needs scikit-learn: pip install scikit-learn") from error
    yield from StratifiedKFold(splits, shuffle=True, random_state=seed).split(truth, truth)


def _fit(x: Any, truth: Array, train: Array, test: Array) -> tuple[float, float]:
    """Test accuracy and area under the curve of one probe."""
    from sklearn import config_context

    # what scikit-learn checks, and where it looks for data frames, takes longer than to fit a few features
    with config_context(assume_finite=True, skip_parameter_validation=True):
        margin = _margins(x, truth, train, test)
    return float(((margin > 0) == truth[test]).mean()), _area_under_curve(margin, truth[test])


def _margins(x: Any, truth: Array, train: Array, test: Array) -> Array:
    """What a logistic regression that is fitted to the rows of `train` says of those of `test`."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    scaler: Any = StandardScaler(with_mean=False).fit(x[train])  # sparse codes stay sparse
    inputs, others = scaler.transform(x[train]), scaler.transform(x[test])
    if min(inputs.shape) > FEW:
        model: Any = LogisticRegression(max_iter=ITERATIONS)
    else:
        model = LogisticRegression(max_iter=ITERATIONS, solver="newton-cholesky", tol=1e-8)
        if inputs.shape[1] > len(train):
            inputs, others = _in_their_span(inputs, others)
    model.fit(inputs, truth[train])
    return model.decision_function(others)


def _area_under_curve(margin: Array, truth: Array) -> float:
    """Share of pairs of a positive and a negative context in the right order, ties by half (Mann and Whitney's U)."""
    n_positive = int(truth.sum())
    wins = stats.rankdata(margin)[truth].sum() - n_positive * (n_positive + 1) / 2
    return float(wins / (n_positive * (len(truth) - n_positive)))


def _in_their_span(rows: Any, others: Any) -> tuple[Array, Array]:
    """Coordinates of rows, and of others, in an orthonormal basis of the rows' span.

    The weights of an L2-penalised regression are a combination of the rows that it is fitted to (the representer theorem), so
    nothing else of its inputs counts, and both the weights' length and the margins are the same in these coordinates.
    """
    n_rows, n_columns = rows.shape
    gram, cross = np.zeros((n_rows, n_rows)), np.zeros((others.shape[0], n_rows))
    rows, others = (sparse.csc_array(x) for x in (rows, others))
    for start in range(0, n_columns, BLOCK):
        block, other = (x[:, start : start + BLOCK].toarray() for x in (rows, others))
        gram += block @ block.T
        cross += other @ block.T
    square, basis = np.linalg.eigh(gram)
    size = np.sqrt(np.where(square > SPAN * square[-1], square, 0))
    # a coordinate that is 0 in all rows gets no weight
    return basis * size, cross @ (basis / np.where(size > 0, size, 1))


def _difference_of_means(x: sparse.csr_array, truth: Array, rows: Array) -> Array:
    """Of the two classes among these rows, by feature."""
    columns: Any = x.T
    weights, on = np.zeros(len(truth)), truth[rows]
    weights[rows] = np.where(on, 1 / on.sum(), -1 / (~on).sum())
    return np.abs(columns @ weights)


def _mean_nonzero_size(x: sparse.csr_array) -> Array:
    """Of each feature; 1 where it is zero throughout."""
    n_features = _shape(x)[1]
    active = x.data != 0
    counts = np.bincount(x.indices[active], minlength=n_features)
    sums = np.bincount(x.indices, weights=np.abs(x.data), minlength=n_features)
    return np.where(counts > 0, sums, 1) / np.maximum(counts, 1)


def _shape(codes: sparse.csr_array) -> tuple[int, int]:
    n_rows, n_columns = codes.shape  # pyright: ignore  (scipy's stubs allow vectors)
    return n_rows, n_columns

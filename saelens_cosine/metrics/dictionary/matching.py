"""Which features two SAEs share: on the same tokens, the partner whose codes correlate best, and whether the decoders agree.

Source: the released code of arXiv 2606.15054. Experiment 56b classes features by correlation alone (strong from 0.7, weak
from 0.3), on filtered tokens; experiment 58 calls matched what is strong and has a decoder cosine above 0.7, on all tokens.
Both are given here. Two features that fire once, together, correlate perfectly: experiment 57a counts 52,237 such pairs,
with a median decoder cosine of 0.009. Hence the minimum of joint firings.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from scipy import sparse

from saelens_cosine.metrics.token_gram import Array, TokenGram, firings
from saelens_cosine.score import wide

PAIRS_AT_ONCE = 4096
"""Decoder rows that are compared at a time."""


@dataclass(frozen=True)
class FeaturePairs:
    """
    Features with their partners in the other SAE, one column a field; the best correlation first, equals by feature.

    Args:
        features (tuple[int, ...]): Index in this SAE.
        partners (tuple[int, ...]): Index in the other of the feature whose codes correlate best; of equals the first.
        correlations (tuple[float, ...]): Pearson's, of the two features' codes over all tokens, in [-1, 1].
        decoder_cosines (tuple[float, ...]): Cosine of the two decoder rows.
        joint_firings (tuple[int, ...]): Tokens on which both are active.
        mutual (tuple[bool, ...]): Whether the partner's best partner is this feature.
    """

    features: tuple[int, ...]
    partners: tuple[int, ...]
    correlations: tuple[float, ...]
    decoder_cosines: tuple[float, ...]
    joint_firings: tuple[int, ...]
    mutual: tuple[bool, ...]


@dataclass(frozen=True)
class MatchCounts:
    """
    How many features of one SAE have a counterpart in the other. `strong + weak + unmatched = alive`.

    Args:
        alive (int): Features of this SAE that fire on more than the alive rate of the tokens.
        strong (int): Of these, with a best correlation of at least `strong_correlation` (experiment 56b).
        weak (int): With one from `weak_correlation` up to that.
        unmatched (int): With a lower one, or with no feature that they fire together with often enough.
        matched (int): Strong, and with a decoder cosine above `min_decoder_cosine` (experiment 58).
        mutual (int): Of the matched, those that are their partner's best partner too.
        matched_correlation (float): Mean over the matched; NaN if there are none.
        matched_decoder_cosine (float): Likewise.
        strong_decoder_cosine (float): Median over the strong, NaN if there are none. Near 0, their correlations are chance.
    """

    alive: int
    strong: int
    weak: int
    unmatched: int
    matched: int
    mutual: int
    matched_correlation: float
    matched_decoder_cosine: float
    strong_decoder_cosine: float


@dataclass(frozen=True)
class Matches(MatchCounts):
    """
    Which features of one SAE have a counterpart in the other.

    Args:
        matched_features (tuple[int, ...]): Indices, ascending.
        unique_features (tuple[int, ...]): The alive ones that are not matched, ascending. Weak ones are among them.
        pairs (FeaturePairs): The matched with their partners; every feature that has one, if asked for.
    """

    matched_features: tuple[int, ...]
    unique_features: tuple[int, ...]
    pairs: FeaturePairs


@dataclass(frozen=True)
class MatchedBy:
    """
    On what two SAEs' features were matched, and by which bounds.

    Args:
        tokens (int): Tokens that the codes are of.
        min_joint_firings (int): Tokens on which both features of a pair must be active.
        alive_rate (float): Share of the tokens above which a feature is alive.
        strong_correlation (float): Where strong begins.
        weak_correlation (float): Where weak begins.
        min_decoder_cosine (float): What matched features are above.
    """

    tokens: int
    min_joint_firings: int
    alive_rate: float
    strong_correlation: float
    weak_correlation: float
    min_decoder_cosine: float


@dataclass(frozen=True)
class FeatureMatching(MatchedBy):
    """
    Two SAEs' features matched on the same tokens, in either direction: the numbers differ, since two features may share a partner.

    Args:
        a (Matches): The first SAE's features.
        b (Matches): The second's.
    """

    a: Matches
    b: Matches


@torch.no_grad()
def match_codes(
    codes_a: sparse.csr_array,
    codes_b: sparse.csr_array,
    W_dec_a: torch.Tensor,
    W_dec_b: torch.Tensor,
    *,
    min_joint_firings: int = 10,
    alive_rate: float = 0.0,
    strong_correlation: float = 0.7,
    weak_correlation: float = 0.3,
    min_decoder_cosine: float = 0.7,
    pairs: Literal["matched", "all"] = "matched",
) -> FeatureMatching:
    """Find each feature's best partner in the other SAE. No `F_a x F_b` matrix is held. Sums are float64 (see `TokenGram`).

    Args:
        codes_a: `[tokens, F_a]`, from `sparse_codes`. Codes with signs correlate with them: an AbsTopK feature is not matched
            with its negative.
        codes_b: `[tokens, F_b]` on the same tokens.
        W_dec_a: `[F_a, d_in]`.
        W_dec_b: `[F_b, d_in]`.
        min_joint_firings: tokens on which both features of a pair must be active for it to count.
        alive_rate: a feature is alive when it fires on more than this share of the tokens: 0 for any firing (experiment
            58), 0.001 (56b).
        strong_correlation: see `Matches`.
        weak_correlation: likewise.
        min_decoder_cosine: likewise; -1 leaves the decoders out.
        pairs: which pairs to list.

    Raises:
        ValueError: codes of different tokens, or decoders of different width.
    """
    shapes: tuple[Any, Any] = codes_a.shape, codes_b.shape
    if shapes[0][0] != shapes[1][0] or W_dec_a.shape[1] != W_dec_b.shape[1]:
        raise ValueError(
            f"Codes {shapes[0]} and {shapes[1]} with decoders {tuple(W_dec_a.shape)} and {tuple(W_dec_b.shape)}: matching needs "
            "the same tokens, and SAEs at hooks of one width."
        )
    alive_a, alive_b = (np.flatnonzero(firings(codes) > alive_rate * shapes[0][0]) for codes in (codes_a, codes_b))
    best_a, best_b = _best_partners(codes_a, codes_b, alive_a, alive_b, max(1, min_joint_firings))

    def matches(best: _Best, other: _Best, alive: Array, W_dec: torch.Tensor, other_W_dec: torch.Tensor) -> Matches:
        found = alive[best.correlation[alive] > -np.inf]
        partner, correlation = best.partner[found], best.correlation[found]
        cosine = _row_cosines(W_dec, other_W_dec, found, partner)
        strong = correlation >= strong_correlation
        matched = strong & (cosine > min_decoder_cosine)
        mutual = other.partner[partner] == found
        weak = int(((correlation >= weak_correlation) & ~strong).sum())
        listed = matched if pairs == "matched" else np.ones_like(matched)
        order = np.flatnonzero(listed)
        order = order[np.argsort(-correlation[order], kind="stable")]
        columns = (found, partner, correlation, cosine, best.joint[found], mutual)
        return Matches(
            alive=len(alive),
            strong=int(strong.sum()),
            weak=weak,
            unmatched=len(alive) - int(strong.sum()) - weak,
            matched=int(matched.sum()),
            mutual=int((matched & mutual).sum()),
            matched_correlation=_or_nan(np.mean, correlation[matched]),
            matched_decoder_cosine=_or_nan(np.mean, cosine[matched]),
            strong_decoder_cosine=_or_nan(np.median, cosine[strong]),
            matched_features=tuple(found[matched].tolist()),
            unique_features=tuple(np.setdiff1d(alive, found[matched]).tolist()),
            pairs=FeaturePairs(*(tuple(column[order].tolist()) for column in columns)),
        )

    return FeatureMatching(
        tokens=shapes[0][0],
        min_joint_firings=min_joint_firings,
        alive_rate=alive_rate,
        strong_correlation=strong_correlation,
        weak_correlation=weak_correlation,
        min_decoder_cosine=min_decoder_cosine,
        a=matches(best_a, best_b, alive_a, W_dec_a, W_dec_b),
        b=matches(best_b, best_a, alive_b, W_dec_b, W_dec_a),
    )


class _Best:
    """Each feature's best partner in the other SAE: -1, with a correlation of -inf, as long as it has none."""

    def __init__(self, n_features: int):
        self.correlation = np.full(n_features, -np.inf)
        self.partner = np.full(n_features, -1)
        self.joint = np.zeros(n_features, np.int64)

    def offer(self, features: Array, partners: Array, correlations: Array, joint: Array) -> None:
        """Take in one partner for each of some features. Of equally good ones the first stays."""
        better = correlations > self.correlation[features]
        features = features[better]
        self.partner[features] = partners[better]
        self.correlation[features] = correlations[better]
        self.joint[features] = joint[better]


def _best_partners(codes_a: Any, codes_b: Any, alive_a: Array, alive_b: Array, min_joint: int) -> tuple[_Best, _Best]:
    best_a, best_b = _Best(codes_a.shape[1]), _Best(codes_b.shape[1])
    x, mean_x, std_x, a = _candidates(codes_a, alive_a, min_joint)
    y, mean_y, std_y, b = _candidates(codes_b, alive_b, min_joint)
    if not len(b):
        return best_a, best_b
    gram, tokens = TokenGram(x, y), x.shape[0]
    del x, y  # with many sinks, as large as the codes themselves
    for (start, products), (_, joint) in zip(gram, gram.joint(), strict=True):
        rows = slice(start, start + len(products))
        correlation = products  # in place: the block is as large as anything here
        correlation *= 1 / (tokens * std_x[rows, None])
        correlation -= (mean_x[rows] / std_x[rows])[:, None] * mean_y
        correlation /= std_y
        correlation[joint < min_joint] = -np.inf
        for best, features, partners, axis in ((best_a, a[rows], b, 1), (best_b, b, a[rows], 0)):
            at = np.expand_dims(correlation.argmax(axis=axis), axis)
            values, counts = (np.take_along_axis(m, at, axis).squeeze(axis) for m in (correlation, joint))
            best.offer(features, partners[at.squeeze(axis)], values.clip(max=1), counts.astype(np.int64))
    return best_a, best_b


def _candidates(codes: Any, alive: Array, min_joint: int) -> tuple[Any, Array, Array, Array]:
    """The codes that can have a partner at all, their means and standard deviations over all tokens, and their indices."""
    tokens, n_features = codes.shape
    mean = np.bincount(codes.indices, codes.data, n_features) / tokens
    square = np.bincount(codes.indices, codes.data.astype(np.float64) ** 2, n_features) / tokens
    variance = square - mean**2
    varies = variance > 1e-12 * square  # correlations of a constant are not defined; it is one but for rounding
    kept = alive[varies[alive] & (firings(codes)[alive] >= min_joint)]
    candidates = codes if len(kept) == n_features else codes[:, kept]  # with sinks all are, and codes are many
    return candidates, mean[kept], np.sqrt(variance[kept]), kept


def _row_cosines(W_a: torch.Tensor, W_b: torch.Tensor, rows_a: Array, rows_b: Array) -> Array:
    parts = [np.zeros(0)]
    for i, j in zip(*(torch.from_numpy(rows).split(PAIRS_AT_ONCE) for rows in (rows_a, rows_b)), strict=True):
        a, b = (W[k.to(W.device)].to("cpu", wide(W.dtype)) for W, k in ((W_a, i), (W_b, j)))
        parts.append(torch.cosine_similarity(a, b, dim=-1).double().numpy())
    return np.concatenate(parts)


def _or_nan(statistic: Callable[[Array], Any], values: Array) -> float:
    return float(statistic(values)) if len(values) else float("nan")

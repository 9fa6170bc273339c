"""The N best entries of a batch: exact, from few candidates, without the `[B, F]` scores.

A floor that the last batch suggests (or a sample of this one) lets `filter.candidates` pass somewhat more entries than are
wanted. They are scored exactly, counted, and the best are kept. Where a floor was too high, dense scores take its place, so
that the result never depends on it. Ties at the cut go to the lowest place.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from sae_lens.saes.abstopk_sae import AbsTopK
from sae_lens.saes.batchtopk_sae import BatchTopK
from sae_lens.saes.topk_sae import TopK

from saelens_cosine.kernels import operations
from saelens_cosine.kernels.entries import Entries, stable_order
from saelens_cosine.kernels.filter import Rounded, candidates
from saelens_cosine.kernels.terms import ScoreTerms
from saelens_cosine.kernels.whole import HERE, Whole

SPARE = 1.15
"""How many candidates the next floor aims at, as a multiple of those wanted; batches differ by a few percent."""

LOWER_FLOORS = (0.9, 0.8)
"""What a floor that turns out too high is lowered by, before dense scores decide."""

SHORT_TOKENS = 0.01
"""Share of tokens that may have fewer than k candidates, when k are wanted of each: those are scored densely."""

SAMPLE_TOKENS = 64

FEW = 4
"""Positive scores are worth finding one by one where at most one in so many is positive; elsewhere dense scores are faster."""


@dataclass(frozen=True)
class UnitInputs:
    """
    A batch of centred inputs, direction and length apart.

    Args:
        unit (torch.Tensor): `[B, D]`, of length 1.
        log_norm (torch.Tensor): `[B]`, logarithms of the lengths.
    """

    unit: torch.Tensor
    log_norm: torch.Tensor


@dataclass(frozen=True)
class Encoder:
    """
    What is multiplied with a unit input, and what is made of the products.

    Args:
        weight (torch.Tensor): `[F, D]`, encoder columns as rows.
        terms (ScoreTerms): the score.
        rounded (Rounded | None): `weight` as the filter multiplies it; None on a GPU, which has no use for one.
        product_dtype (torch.dtype | None): Precision of the product on a GPU, where autocast sets one.
        whole (Whole): The dictionary that these F features are of.
    """

    weight: torch.Tensor
    terms: ScoreTerms
    rounded: Rounded | None = None
    product_dtype: torch.dtype | None = None
    whole: Whole = HERE

    def dense(self, inputs: UnitInputs) -> torch.Tensor:
        """All scores `[B, F]` as they are ranked."""
        terms = self.terms
        scale = (terms.norm_exponent * inputs.log_norm.unsqueeze(-1) + terms.log_scale).exp()
        scores = scale * (inputs.unit @ self.weight.T) * terms.gain + terms.bias
        return scores.abs() if terms.signed else scores

    def by_size(self) -> Encoder:
        """The same, for a selector that ranks by size and keeps signs."""
        return replace(self, terms=replace(self.terms, signed=True))


@dataclass(frozen=True)
class Scored:
    """Entries with their products `<u_b, w_i>`, what the score multiplies these with, and their scores, all `[N]`.

    Codes are the scores if these are signed, and the rectified scores otherwise.
    """

    entries: Entries
    product: torch.Tensor
    factor: torch.Tensor
    score: torch.Tensor
    signed: bool = False

    @property
    def rank(self) -> torch.Tensor:
        """What the entries are ranked by, `[N]`."""
        return self.score.abs() if self.signed else self.score

    def where(self, keep: torch.Tensor) -> Scored:
        places = keep.nonzero().squeeze(-1)
        tokens, features = (t.index_select(0, places) for t in (self.entries.tokens, self.entries.features))
        entries = Entries(tokens, features, self.entries.n_tokens, self.entries.d_sae)
        product, factor, score = (t.index_select(0, places) for t in (self.product, self.factor, self.score))
        return Scored(entries, product, factor, score, self.signed)


def score_entries(tokens: torch.Tensor, features: torch.Tensor, inputs: UnitInputs, encoder: Encoder) -> Scored:
    """Exact scores of the given places, which may come in any order as long as each token's features ascend."""
    n_tokens = len(inputs.unit)
    order = stable_order(tokens, n_tokens)
    tokens, features = tokens.index_select(0, order), features.index_select(0, order)
    entries = Entries(tokens, features, n_tokens, len(encoder.weight))
    product = operations.sampled_product(entries, inputs.unit, encoder.weight)
    factor = encoder.terms.factor(inputs.log_norm.index_select(0, tokens), features)
    score = factor * product + encoder.terms.bias.index_select(0, features)
    return Scored(entries, product, factor, score, encoder.terms.signed)


EntrySelector = Callable[[UnitInputs, Encoder, Any], tuple[Scored, Any]]
"""Takes a batch, the encoder and the last call's hint; gives the entries that a selector keeps, and the next hint."""


@torch.no_grad()
def above(inputs: UnitInputs, encoder: Encoder, threshold: torch.Tensor) -> Scored:
    """Entries with a positive score above `threshold`, `[]` or `[F]`: what a trained JumpReLU keeps."""
    floor = threshold.clamp_min(0).to(inputs.unit.dtype)
    if len(inputs.unit) == 0:
        return _nothing(inputs, encoder)
    if on_gpu(inputs):
        return _scored_by_gpu(inputs, encoder, lambda gpu, *scores: gpu.places_above(*scores, floor))
    scored = score_entries(*_candidates(inputs, encoder, floor), inputs, encoder)
    return scored.where(scored.score > (floor if floor.ndim == 0 else floor.index_select(0, scored.entries.features)))


@torch.no_grad()
def few_positive_of_each(inputs: UnitInputs, encoder: Encoder, k: int) -> Scored | None:
    """The k highest positive scores of each token, from a CPU's whole dictionary; None where a sample has more than one in `FEW` positive."""
    sample = encoder.dense(_sample(inputs))
    if FEW * int((sample > 0).sum()) > sample.numel():
        return None
    scored = above(inputs, encoder, sample.new_zeros(()))
    most = int(scored.entries.token_offsets.diff().max()) if len(scored.entries) else 0
    return scored if most <= k else _best_each(scored, k, HERE)[0]


@torch.no_grad()
def best_of_batch(
    inputs: UnitInputs, encoder: Encoder, n_wanted: int, hint: torch.Tensor | None
) -> tuple[Scored, torch.Tensor | None]:
    """The `n_wanted` entries with the highest positive scores of the whole batch (BatchTopK), and the next hint.

    Args:
        hint: `[]`, a score that somewhat more entries than wanted should exceed. It changes the time taken only.
    """
    if on_gpu(inputs):
        best = _scored_by_gpu(inputs, encoder, lambda gpu, *scores: gpu.best_places(*scores, n_wanted, False))
        return best if encoder.whole is HERE else _best(best, n_wanted, encoder.whole)[0], None
    if n_wanted == 0 or len(inputs.unit) == 0:
        return _nothing(inputs, encoder), hint
    whole = encoder.whole
    if hint is None:
        sample = _sample(inputs)
        share = len(sample.unit) / len(inputs.unit)
        (hint,) = whole.ranked(encoder.dense(sample).flatten(), math.ceil(1.5 * n_wanted * share))
    hint = hint.clamp_min(0)
    scored = score_entries(*_candidates(inputs, encoder, hint), inputs, encoder)
    enough = hint == 0 or whole.count(scored.score > hint) >= n_wanted
    for lower in LOWER_FLOORS:
        if enough:
            break
        hint = lower * hint
        scored = score_entries(*_candidates(inputs, encoder, hint), inputs, encoder)
        enough = whole.count(scored.score > hint) >= n_wanted
    if not enough:
        (exact,) = whole.ranked(encoder.dense(inputs).flatten(), n_wanted)
        hint = (exact - 1e-4 * exact.abs()).clamp_min(0)
        scored = score_entries(*_candidates(inputs, encoder, hint), inputs, encoder)
    best, next_hint = _best(scored, n_wanted, whole)
    return best, 0.9 * hint if next_hint is None else next_hint


def _best(scored: Scored, n_wanted: int, whole: Whole) -> tuple[Scored, torch.Tensor | None]:
    """The `n_wanted` highest positive scores, and the score at `SPARE` times that rank; None where no more than that are there."""
    score = scored.score
    if whole.count(torch.ones_like(score, dtype=torch.bool)) <= n_wanted:
        return scored.where(score > 0), None
    cut, spare = whole.ranked(score, n_wanted, math.ceil(SPARE * n_wanted))
    keep = score >= cut.clamp_min(torch.finfo(cut.dtype).tiny)
    if whole.count(keep) > n_wanted:  # ties at the cut
        keep = _at_least(scored, cut.expand_as(score), n_wanted, False, whole)
    return scored.where(keep), spare


@torch.no_grad()
def best_of_each(
    inputs: UnitInputs, encoder: Encoder, k: int, hint: torch.Tensor | None
) -> tuple[Scored, torch.Tensor | None]:
    """The k entries with the highest positive scores of each token (TopK) or, signed, the largest, and the next hint.

    Args:
        hint: `[]`, a score that most tokens' k-th largest should exceed, at norm 1: a token's floor goes with the same
            power of its norm as its scores do. It changes the time taken only.
    """
    if on_gpu(inputs):
        best = _scored_by_gpu(inputs, encoder, lambda gpu, *scores: gpu.best_places(*scores, k, True))
        if encoder.whole is HERE:
            return best, None
        return _best_each(best.where(best.rank > 0), k, encoder.whole)[0], None
    if len(inputs.unit) == 0:
        return _nothing(inputs, encoder), hint
    whole = encoder.whole
    rise = whole.mean(encoder.terms.norm_exponent)
    reach = (rise * inputs.log_norm).exp()
    if hint is None:
        sample = _sample(inputs)
        hint = _lowest(whole.largest_each(encoder.dense(sample), k)[:, -1] / (rise * sample.log_norm).exp(), 0)
    hint = hint.clamp_min(0)
    scored = score_entries(*_candidates(inputs, encoder, hint, rise), inputs, encoder)
    floor = hint * reach
    scored = scored.where(scored.rank > floor.index_select(0, scored.entries.tokens))
    found = whole.sum(scored.entries.token_offsets.diff())
    short = ((found < k) & (floor > 0)).nonzero().squeeze(-1)
    if len(short):
        scored = _with_dense_tokens(scored, short, inputs, encoder, k)
    best, cut = _best_each(scored, k, whole)
    return best, 0.98 * _lowest(cut / reach, SHORT_TOKENS)


def _best_each(scored: Scored, k: int, whole: Whole) -> tuple[Scored, torch.Tensor]:
    """Each token's k highest positive scores or, signed, largest, and the k-th of each, `[tokens]`."""
    entries = scored.entries
    # each token's candidates side by side, so that one top-k cuts all
    found = entries.token_offsets.diff()
    width = max(k, int(found.max()))
    place = torch.arange(len(scored.score), device=found.device) - entries.token_offsets.index_select(0, entries.tokens)
    table = scored.score.new_zeros(entries.n_tokens, width)
    table[entries.tokens, place] = scored.rank
    cut = whole.largest_each(table, k)[:, -1]
    keep = _at_least(scored, cut.index_select(0, entries.tokens), k, True, whole)
    return scored.where(keep), cut


def _candidates(
    inputs: UnitInputs, encoder: Encoder, floor: torch.Tensor, floor_exponent: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    assert encoder.rounded is not None
    if len(encoder.weight) == 0:  # a part without features
        nothing = _nothing(inputs, encoder).entries
        return nothing.tokens, nothing.features
    return candidates(inputs.unit, inputs.log_norm, encoder.rounded, encoder.terms, floor, floor_exponent)


def _nothing(inputs: UnitInputs, encoder: Encoder) -> Scored:
    place, value = torch.empty(0, dtype=torch.int64), inputs.unit.new_empty(0)
    entries = Entries(place, place, len(inputs.unit), len(encoder.weight))
    return Scored(entries, value, value, value, encoder.terms.signed)


def on_gpu(inputs: UnitInputs) -> bool:
    """Whether the device's kernels pick entries themselves."""
    return hasattr(operations.kernels_for(inputs.unit), "best_places")


def _scored_by_gpu(inputs: UnitInputs, encoder: Encoder, places: Callable[..., torch.Tensor]) -> Scored:
    """Entries that a kernel picks from the dense product, which a GPU makes and reads faster than it could filter."""
    dtype = encoder.product_dtype or inputs.unit.dtype
    product = inputs.unit.to(dtype) @ encoder.weight.to(dtype).T
    flat = places(operations.kernels_for(product), product, inputs.log_norm, encoder.terms)
    d_sae = len(encoder.weight)
    tokens = torch.div(flat, d_sae, rounding_mode="floor")
    entries = Entries(tokens, flat - tokens * d_sae, len(inputs.unit), d_sae)
    picked = product.view(-1).index_select(0, flat).to(inputs.unit.dtype)
    factor = encoder.terms.factor(inputs.log_norm.index_select(0, tokens), entries.features)
    score = factor * picked + encoder.terms.bias.index_select(0, entries.features)
    return Scored(entries, picked, factor, score, encoder.terms.signed)


def _sample(inputs: UnitInputs) -> UnitInputs:
    """Some tokens, spread evenly over the norms."""
    step = max(1, len(inputs.unit) // SAMPLE_TOKENS)
    tokens = inputs.log_norm.argsort()[step // 2 :: step]
    return UnitInputs(inputs.unit[tokens], inputs.log_norm[tokens])


def _lowest(values: torch.Tensor, share: float) -> torch.Tensor:
    """The value that this share of the finite ones does not exceed; 0 if there is none."""
    finite = values[values.isfinite()]
    if len(finite) == 0:
        return values.new_zeros(())
    return finite.kthvalue(max(1, int(share * len(finite)))).values


def _at_least(scored: Scored, cut: torch.Tensor, quota: int, each: bool, whole: Whole) -> torch.Tensor:
    """True where a score is above the cut `[N]`, and at the cut for as many of the first as the quota leaves, see `Whole.rooms`."""
    entries, rank = scored.entries, scored.rank
    sure, tied = rank > cut, rank == cut
    room = whole.rooms(quota, *(entries.sum_by_token(mask.to(torch.int64)) for mask in (sure, tied)), each=each)
    before = tied.cumsum(0) - tied.to(torch.int64)
    starts = entries.token_offsets[:-1].clamp_max(max(len(entries) - 1, 0))
    if len(entries):
        before = before - before.index_select(0, starts).index_select(0, entries.tokens)
    return sure | (tied & (before < room.index_select(0, entries.tokens)))


def _with_dense_tokens(scored: Scored, tokens: torch.Tensor, inputs: UnitInputs, encoder: Encoder, k: int) -> Scored:
    """`scored` with the entries of some tokens replaced by their k best of a dense product."""
    some = UnitInputs(inputs.unit[tokens], inputs.log_norm[tokens])
    dense = encoder.dense(some)
    cut = HERE.largest_each(dense, k)[:, -1:]  # none of what is kept here lies below
    # with ties and neighbours by rounding, which the caller's cut decides between
    row, features = ((dense >= cut - 1e-5 * cut.abs()) & (dense > 0)).nonzero(as_tuple=True)
    again = torch.zeros(len(inputs.unit), dtype=torch.bool).index_fill(0, tokens, True)
    keep = ~again.index_select(0, scored.entries.tokens)
    kept = scored.where(keep).entries
    return score_entries(torch.cat([kept.tokens, tokens[row]]), torch.cat([kept.features, features]), inputs, encoder)


def _batch_topk(activation: BatchTopK, n_tokens: int) -> EntrySelector:
    return lambda inputs, encoder, hint: best_of_batch(inputs, encoder, int(activation.k * n_tokens), hint)


def _topk(activation: TopK, _n_tokens: int) -> EntrySelector:
    return lambda inputs, encoder, hint: best_of_each(inputs, encoder, activation.k, hint)


def _abs_topk(activation: AbsTopK, _n_tokens: int) -> EntrySelector:
    return lambda inputs, encoder, hint: best_of_each(inputs, encoder.by_size(), activation.k, hint)


ENTRY_SELECTORS: dict[type[Any], Callable[[Any, int], EntrySelector]] = {
    BatchTopK: _batch_topk,
    TopK: _topk,
    AbsTopK: _abs_topk,
}
"""How to select entries, by SAELens' activation function: what a new selector adds to join the fast path."""

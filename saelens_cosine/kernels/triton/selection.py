"""Where the best scores are: `reference.best_places` as Triton kernels, for `gpu`."""

# The bodies of kernels are Triton's language, which Python's types do not describe.
# pyright: reportMissingParameterType=false, reportUnknownParameterType=false, reportUnknownVariableType=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false, reportArgumentType=false
# pyright: reportUntypedFunctionDecorator=false, reportIndexIssue=false, reportCallIssue=false, reportMissingImports=false

from __future__ import annotations

import torch
import triton
import triton.language as tl

from saelens_cosine.kernels import reference
from saelens_cosine.kernels.terms import ScoreTerms
from saelens_cosine.kernels.triton.scores import append, ranked_scores, score_arguments

TILE_TOKENS, TILE_FEATURES = 8, 512
"""Scores that a program makes at once where it looks at all of them."""

MAXIMA_BLOCK = 512
"""Groups that a program looks at at once."""

DIGIT_BITS = 8
"""Bits of a score that one pass of the selection decides, a divisor of its 32: four passes, histograms of 256."""

GROUP = 32
"""Neighbouring features whose largest score stands for all of them when the selection looks where the best can be."""

BOUND_PASSES = 2
"""Passes over these largest scores: 16 bits are a bound within 1 % of the exact one, which would let little less through."""


def best_places(
    product: torch.Tensor, log_norm: torch.Tensor, terms: ScoreTerms, n_wanted: int, per_token: bool
) -> torch.Tensor:
    """See `reference.best_places`. Scores are float32, and the host never waits; float64 products go to the reference.

    The device's exponential is off by a few roundings, so among scores as near as that the reference may choose others.

    Two radix selects. Scores, rectified or by size, are ordered as their bits are, so a histogram of the first eight bits
    tells in which bin the cut lies and how many of that bin are wanted, and more passes over what has these first bits make
    the cut exact. The first select is over the largest score of each group of features: where as many groups as entries are
    wanted reach a bound, no entry below it can be among the best. The second is over the groups that reach it, a few
    percent of all, and knows for each token how many entries it has above the cut and at it, hence where in the result it
    writes. Every program reads the digits off the histograms itself, which saves a dozen launches a pass.
    """
    if product.dtype == torch.float64:
        return reference.best_places(product, log_norm, terms, n_wanted, per_token)
    n_tokens, n_features = product.shape
    n_sets, set_size = (n_tokens, n_features) if per_token else (1, n_tokens * n_features)
    n_wanted = min(n_wanted, set_size)
    device = product.device
    places = torch.empty(n_sets * n_wanted, dtype=torch.int64, device=device)
    if places.numel() == 0:
        return places
    arguments, options = score_arguments(product, log_norm, terms)
    n_groups = triton.cdiv(n_features, GROUP)
    maxima = torch.empty(n_tokens, n_groups, device=device)
    members = torch.empty(n_tokens, n_groups, dtype=torch.int32, device=device)
    n_members = torch.empty(n_tokens, dtype=torch.int32, device=device)
    passes, n_bins = 32 // DIGIT_BITS, 2**DIGIT_BITS
    fits = torch.int32 if set_size < 2**31 else torch.int64
    totals = torch.zeros(BOUND_PASSES + passes, n_sets, n_bins, dtype=fits, device=device)
    of_maxima, of_scores = totals[:BOUND_PASSES], totals[BOUND_PASSES:]
    counts = None if per_token else torch.empty(passes, n_tokens, n_bins, dtype=torch.int32, device=device)
    select = {"PER_TOKEN": per_token, "BITS": DIGIT_BITS}
    with torch.cuda.device_of(product):
        _group_maxima[(triton.cdiv(n_tokens, TILE_TOKENS), triton.cdiv(n_features, TILE_FEATURES))](
            *arguments, n_tokens, n_groups, maxima,
            GROUP=GROUP, TOKENS=TILE_TOKENS, **{**options, "BLOCK": TILE_FEATURES},
        )  # fmt: skip
        for done in range(BOUND_PASSES):
            _count_maxima[(n_tokens,)](
                maxima, n_groups, of_maxima, n_tokens, n_wanted, done, BLOCK=MAXIMA_BLOCK, **select
            )
        _list_members[(n_tokens,)](
            maxima, n_groups, of_maxima, n_tokens, n_wanted, BOUND_PASSES, members, n_members,
            BLOCK=MAXIMA_BLOCK, **select,
        )  # fmt: skip
        listed = (*arguments, members, n_members, n_groups)
        for done in range(passes):
            _count_digits[(n_tokens,)](
                *listed, of_scores, counts, n_tokens, n_wanted, done, GROUP=GROUP, **select, **options
            )
        ends = None
        if not per_token:  # of the entries above the cut and at it, token after token
            ends = torch.empty(2, n_tokens, dtype=torch.int64, device=device)
            _count_chosen[(n_tokens,)](of_scores, counts, ends, n_tokens, n_wanted, PASSES=passes, **select)
            ends = ends.cumsum(dim=1)
        _write_best[(n_tokens,)](
            *listed, of_scores, ends, n_tokens, n_wanted, passes, places, GROUP=GROUP, **select, **options
        )
    return places


@triton.jit
def _group_maxima(
    product, log_norm, exponent, log_scale, gain, bias, n_features, n_tokens, n_groups, maxima,
    GROUP: tl.constexpr, TOKENS: tl.constexpr,
    EXPONENT_STEP: tl.constexpr, SCALE_STEP: tl.constexpr, SIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The largest score of each group of features, for some tokens at a time, which share what is read per feature."""
    tokens = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    features = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    score = ranked_scores(
        product, log_norm, exponent, log_scale, gain, bias, n_features,
        tl.minimum(tokens, n_tokens - 1)[:, None], features[None, :], EXPONENT_STEP, SCALE_STEP, SIGNED,
    )  # fmt: skip
    largest = tl.max(tl.reshape(score, [TOKENS, BLOCK // GROUP, GROUP]), axis=2)
    groups = tl.program_id(1) * (BLOCK // GROUP) + tl.arange(0, BLOCK // GROUP)
    inside = (tokens < n_tokens)[:, None] & (groups < n_groups)[None, :]
    tl.store(maxima + tokens[:, None] * n_groups + groups[None, :], largest, mask=inside)


@triton.jit
def _cut(totals, token, n_tokens, n_wanted, done, PER_TOKEN: tl.constexpr, BITS: tl.constexpr):
    """The cut's bits that the passes so far decide, and how many of the entries that have these bits are wanted.

    Zeros where fewer entries were counted than are wanted.
    """
    bins = tl.arange(0, 1 << BITS)
    wanted = token * 0 + n_wanted
    cut = (token * 0).to(tl.int32)
    for earlier in range(0, done):
        row = earlier * n_tokens + token if PER_TOKEN else token * 0 + earlier
        found = tl.load(totals + (row << BITS) + bins).to(tl.int64)
        reached = tl.sum(found, axis=0) - tl.cumsum(found, 0) + found  # entries in a bin or in one above it
        digit = tl.maximum(tl.sum((reached >= wanted).to(tl.int32), axis=0) - 1, 0)
        wanted -= tl.sum(tl.where(bins > digit, found, 0), axis=0)
        cut = (cut << BITS) + digit
    return cut, wanted


@triton.jit
def _digits(score, inside, cut, shift, BITS: tl.constexpr):
    """How many scores have each value of the BITS above `shift`, among those whose bits above these are the cut's."""
    bins = tl.arange(0, 1 << BITS)
    bits = score.to(tl.int32, bitcast=True) >> shift
    counted = inside & ((bits >> BITS) == cut)
    n_counted = tl.sum(counted.to(tl.int32), axis=0)
    count = tl.zeros([1 << BITS], dtype=tl.int32)
    if n_counted > 0:
        count += tl.histogram(tl.where(counted, bits & ((1 << BITS) - 1), 0), 1 << BITS)
        # what is not counted went to bin 0: older Tritons have no masked histogram
        count -= tl.where(bins == 0, score.shape[0] - n_counted, 0)
    return count


@triton.jit
def _add_up(totals, count, token, n_tokens, done, PER_TOKEN: tl.constexpr, BITS: tl.constexpr):
    """Adds a program's counts to those of its set. Whole numbers: the order makes no difference."""
    bins = tl.arange(0, 1 << BITS)
    count = count.to(totals.dtype.element_ty)
    if PER_TOKEN:
        tl.store(totals + ((done * n_tokens + token) << BITS) + bins, count)
    else:
        tl.atomic_add(totals + (done << BITS) + bins, count, mask=count > 0)


@triton.jit(do_not_specialize=["n_wanted", "done"])
def _count_maxima(
    maxima, n_groups, totals, n_tokens, n_wanted, done,
    PER_TOKEN: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One pass of the select over the groups' largest scores."""
    token = tl.program_id(0).to(tl.int64)
    cut, _ = _cut(totals, token, n_tokens, n_wanted, done, PER_TOKEN, BITS)
    count = tl.zeros([1 << BITS], dtype=tl.int32)
    for first in range(0, n_groups, BLOCK):
        groups = first + tl.arange(0, BLOCK)
        inside = groups < n_groups
        score = tl.load(maxima + token * n_groups + groups, mask=inside, other=0.0)
        count += _digits(score, inside, cut, 32 - BITS - done * BITS, BITS)
    _add_up(totals, count, token, n_tokens, done, PER_TOKEN, BITS)


@triton.jit(do_not_specialize=["n_wanted", "done"])
def _list_members(
    maxima, n_groups, totals, n_tokens, n_wanted, done, members, n_members,
    PER_TOKEN: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A token's groups that may hold one of the best, ascending, and how many they are."""
    token = tl.program_id(0).to(tl.int64)
    cut, _ = _cut(totals, token, n_tokens, n_wanted, done, PER_TOKEN, BITS)
    bound = cut << (32 - done * BITS)
    end = token * n_groups
    for first in range(0, n_groups, BLOCK):
        groups = first + tl.arange(0, BLOCK)
        inside = groups < n_groups
        score = tl.load(maxima + token * n_groups + groups, mask=inside, other=0.0)
        end = append(members, end, inside & (score.to(tl.int32, bitcast=True) >= bound), groups)
    tl.store(n_members + token, (end - token * n_groups).to(tl.int32))


@triton.jit
def _listed_features(members, token, n_groups, slots, live, n_features, GROUP: tl.constexpr):
    """The features of slots in a token's list of groups; `n_features` for what is none."""
    group = tl.load(members + token * n_groups + slots // GROUP, mask=live, other=n_groups)
    return tl.where(live, tl.minimum(group * GROUP + slots % GROUP, n_features), n_features)


@triton.jit(do_not_specialize=["n_wanted", "done"])
def _count_digits(
    product, log_norm, exponent, log_scale, gain, bias, n_features, members, n_members, n_groups,
    totals, counts, n_tokens, n_wanted, done,
    GROUP: tl.constexpr, PER_TOKEN: tl.constexpr, BITS: tl.constexpr,
    EXPONENT_STEP: tl.constexpr, SCALE_STEP: tl.constexpr, SIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One pass of the select over the scores of the listed groups; also each token's own counts, if the set is larger."""
    token = tl.program_id(0).to(tl.int64)
    cut, _ = _cut(totals, token, n_tokens, n_wanted, done, PER_TOKEN, BITS)
    n_slots = tl.load(n_members + token) * GROUP
    count = tl.zeros([1 << BITS], dtype=tl.int32)
    for first in range(0, n_slots, BLOCK):
        slots = first + tl.arange(0, BLOCK)
        features = _listed_features(members, token, n_groups, slots, slots < n_slots, n_features, GROUP)
        score = ranked_scores(
            product, log_norm, exponent, log_scale, gain, bias, n_features, token, features,
            EXPONENT_STEP, SCALE_STEP, SIGNED,
        )  # fmt: skip
        count += _digits(score, features < n_features, cut, 32 - BITS - done * BITS, BITS)
    _add_up(totals, count, token, n_tokens, done, PER_TOKEN, BITS)
    if not PER_TOKEN:
        tl.store(counts + ((done * n_tokens + token) << BITS) + tl.arange(0, 1 << BITS), count)


@triton.jit(do_not_specialize=["n_wanted"])
def _count_chosen(
    totals, counts, ends, n_tokens, n_wanted, PASSES: tl.constexpr, PER_TOKEN: tl.constexpr, BITS: tl.constexpr
):
    """How many entries a token has above the cut and at it."""
    token = tl.program_id(0).to(tl.int64)
    cut, _ = _cut(totals, token, n_tokens, n_wanted, PASSES, PER_TOKEN, BITS)
    bins = tl.arange(0, 1 << BITS)
    above = token * 0
    for done in range(0, PASSES):
        digit = (cut >> (32 - BITS - done * BITS)) & ((1 << BITS) - 1)
        count = tl.load(counts + ((done * n_tokens + token) << BITS) + bins)
        above += tl.sum(tl.where(bins > digit, count, 0), axis=0)
    last = tl.load(counts + (((PASSES - 1) * n_tokens + token) << BITS) + (cut & ((1 << BITS) - 1)))
    tl.store(ends + token, above)
    tl.store(ends + n_tokens + token, last.to(tl.int64))


@triton.jit(do_not_specialize=["n_wanted", "done"])
def _write_best(
    product, log_norm, exponent, log_scale, gain, bias, n_features, members, n_members, n_groups,
    totals, ends, n_tokens, n_wanted, done, places,
    GROUP: tl.constexpr, PER_TOKEN: tl.constexpr, BITS: tl.constexpr,
    EXPONENT_STEP: tl.constexpr, SCALE_STEP: tl.constexpr, SIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A token's places above the cut, and the first at the cut up to what earlier tokens leave."""
    token = tl.program_id(0).to(tl.int64)
    cut, room = _cut(totals, token, n_tokens, n_wanted, done, PER_TOKEN, BITS)
    end = token * n_wanted
    if not PER_TOKEN:
        above = tl.load(ends + token - 1, mask=token > 0, other=0)
        tied_before = tl.load(ends + n_tokens + token - 1, mask=token > 0, other=0)
        end = above + tl.minimum(tied_before, room)
        room -= tied_before
    n_slots = tl.load(n_members + token) * GROUP
    for first in range(0, n_slots, BLOCK):
        slots = first + tl.arange(0, BLOCK)
        features = _listed_features(members, token, n_groups, slots, slots < n_slots, n_features, GROUP)
        score = ranked_scores(
            product, log_norm, exponent, log_scale, gain, bias, n_features, token, features,
            EXPONENT_STEP, SCALE_STEP, SIGNED,
        )  # fmt: skip
        bits = score.to(tl.int32, bitcast=True)
        inside = features < n_features
        tied = ((bits == cut) & inside).to(tl.int32)
        taken = ((bits > cut) & inside) | ((tied > 0) & (tl.cumsum(tied, 0) <= room))
        end = append(places, end, taken, token * n_features + features)
        room -= tl.sum(tied, axis=0)
    # room may end below zero: more ties than wanted

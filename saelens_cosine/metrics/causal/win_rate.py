"""Does the size of a feature's ablation effect follow the cosine with its direction, or the inner product?

For each feature its decoder direction is removed from activations, and over tokens the KL of the next-token distribution is
correlated with the cosine and with the inner product; the better one wins the feature. The paper's experiments do this in three
ways that give different numbers (A, B and C of `PROTOCOLS`), here one function with parameters.

Pooled over norms the winner is partly the spread of the norms itself: inside a quartile of the norm the paper's own rate falls
from 80-87 % to 40-70 % (experiment 19). So both are always reported. Removing the inner product also makes the KL of long
tokens larger; `removed="cosine"` takes the same length off tokens of every norm (experiment 13).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sae_lens.saes.sae import SAE

from saelens_cosine.activations.sample import TokenSample
from saelens_cosine.metrics.causal.correlations import advantage, correlations, rate
from saelens_cosine.metrics.causal.forward import CleanRun
from saelens_cosine.metrics.causal.win_rate_protocol import PROTOCOLS, WinRateProtocol
from saelens_cosine.metrics.codes import sparse_codes

LONE_TOKENS_AT_ONCE = 256
"""One-token contexts whose clean predictions are held at a time."""


@dataclass(frozen=True)
class FeatureCorrelations:
    """
    One feature. Correlations are Pearson's, over its samples, of the KL with each predictor.

    Args:
        feature (int): Its number in the SAE.
        samples (int): Tokens or texts.
        active_share (float): Share of them at which the feature is active.
        mean_kl (float): Mean KL(clean || ablated), nats.
        cosine (float): With cos(x, d), x not centred and d the decoder row; with its absolute value where the protocol says so.
        inner_product (float): With <x, d>, d of length 1; likewise.
        activation (float): With the SAE's code; NaN where it is constant.
        norm (float): With ||x||.
        advantage (float): What the protocol compares, cosine minus inner product.
    """

    feature: int
    samples: int
    active_share: float
    mean_kl: float
    cosine: float
    inner_product: float
    activation: float
    norm: float
    advantage: float


@dataclass(frozen=True)
class NormRangeWinRate:
    """
    Win rate among samples whose norm lies in one quartile.

    Args:
        low (float): Smallest norm of the range.
        high (float): Largest.
        samples (int): Pairs of a feature and a token or text in it.
        features (int): Features with at least 10 samples in it whose correlations exist.
        win_rate (float): As in WinRate; NaN if there are no features.
        median_advantage (float): Median over features of correlation with the cosine minus with the inner product.
    """

    low: float
    high: float
    samples: int
    features: int
    win_rate: float
    median_advantage: float


@dataclass(frozen=True)
class WinRate:
    """
    How often the cosine predicts an ablation's effect better than the inner product.

    Args:
        protocol (WinRateProtocol): As it was measured.
        tokens (int): Tokens of the sample.
        samples (int): Pairs of a feature and a token or text that were ablated.
        features (int): Features whose correlations exist.
        features_left_out (int): Chosen ones whose do not: too few samples, or an effect that never varies.
        wins (int): Features that the cosine wins.
        ties (int): Features whose correlations are within 1e-6.
        win_rate (float): Wins and half the ties over features, pooled over norms; NaN if there are no features.
        win_rate_within_quartiles (float): The same within quartiles of ||x||, mean of `by_norm` weighted by features.
        cosine (float): Mean over features of their correlation; NaN if there are none. The same for the next three.
        inner_product (float): With the inner product.
        activation (float): With the SAE's code, over features where it varies.
        norm (float): With the norm.
        by_norm (tuple[NormRangeWinRate, ...]): By quartile of ||x||, ascending: of the texts' last tokens, or of the whole sample for `alone`.
        per_feature (tuple[FeatureCorrelations, ...]): In the order in which they were chosen.
    """

    protocol: WinRateProtocol
    tokens: int
    samples: int
    features: int
    features_left_out: int
    wins: int
    ties: int
    win_rate: float
    win_rate_within_quartiles: float
    cosine: float
    inner_product: float
    activation: float
    norm: float
    by_norm: tuple[NormRangeWinRate, ...]
    per_feature: tuple[FeatureCorrelations, ...]


@torch.no_grad()
def win_rate(
    run: CleanRun,
    sae: SAE[Any],
    sample: TokenSample,
    protocol: WinRateProtocol = PROTOCOLS["B"],
    seed: int = 0,
) -> WinRate:
    """Win rate of the cosine against the inner product.

    Args:
        run: the clean run of some contexts.
        sae: any SAELens SAE of that hook, in its inference form.
        sample: `run.sample()`, or a part of it such as `run.sample().without_sinks()`. Features are chosen on its tokens,
            only they are ablated, and a text counts only if its last token is among them.
        protocol: one of `PROTOCOLS`, or another.
        seed: of the draw of active tokens, for `alone`.

    Raises:
        ValueError: no feature is active often enough, or the sample holds no text to its end.
    """
    codes = sparse_codes(sae, sample.activations)
    chosen = _choose(codes, sample, protocol)
    active: Any = codes[:, chosen.numpy()]
    acts = torch.from_numpy(active.toarray())  # [tokens, features]
    group, token = _samples(run, sample, acts != 0, protocol, seed)
    directions = torch.nn.functional.normalize(sae.W_dec.detach().float().cpu()[chosen], dim=-1)
    kl = _ablate(run, sample, directions, group, token, protocol)

    norms = sample.norms.double()
    x, d = sample.activations[token].double(), directions[group].double()
    inner = (x * d).sum(dim=-1)
    cosine = inner / norms[token].clamp_min(torch.finfo(torch.float64).tiny)
    if protocol.compared == "absolute_predictors":
        cosine, inner = cosine.abs(), inner.abs()
    predictors = torch.stack([cosine, inner, acts[token, group].double(), norms[token]], dim=-1)
    pooled = correlations(predictors, kl, group, len(chosen))
    advantages = advantage(pooled, protocol)
    found = rate(advantages)

    of = norms[token] if protocol.context == "text" else norms
    edges = torch.quantile(of, torch.linspace(0, 1, 5, dtype=torch.float64))
    quartile = torch.bucketize(norms[token], edges[1:-1], right=True)
    within = correlations(predictors, kl, quartile * len(chosen) + group, 4 * len(chosen)).unflatten(0, (4, -1))
    by_norm = tuple(
        NormRangeWinRate(
            edges[q].item(),
            edges[q + 1].item(),
            int((quartile == q).sum()),
            *rate(advantage(within[q], protocol))[2:],
        )
        for q in range(4)
    )
    counted = sum(part.features for part in by_norm)
    inside = sum(part.win_rate * part.features for part in by_norm if part.features)
    means = pooled[~advantages.isnan()].nanmean(dim=0).tolist()
    counts = torch.bincount(group, minlength=len(chosen)).double()
    columns = [
        chosen.tolist(),
        counts.long().tolist(),
        (torch.bincount(group, (acts[token, group] != 0).double(), len(chosen)) / counts).tolist(),
        (torch.bincount(group, kl, len(chosen)) / counts).tolist(),
        *pooled.T.tolist(),
        advantages.tolist(),
    ]
    return WinRate(
        protocol=protocol,
        tokens=len(sample),
        samples=len(token),
        features=found.features,
        features_left_out=len(chosen) - found.features,
        wins=found.wins,
        ties=found.ties,
        win_rate=found.rate,
        win_rate_within_quartiles=inside / counted if counted else float("nan"),
        cosine=means[0],
        inner_product=means[1],
        activation=means[2],
        norm=means[3],
        by_norm=by_norm,
        per_feature=tuple(FeatureCorrelations(*row) for row in zip(*columns, strict=True)),
    )


def _choose(codes: Any, sample: TokenSample, protocol: WinRateProtocol) -> torch.Tensor:
    """Numbers of the features to compare, the most active first."""
    active = torch.from_numpy(np.bincount(codes.indices, minlength=codes.shape[1]))
    chosen_on = codes
    if protocol.chosen_on is not None:
        chosen_on = codes[(sample.contexts < protocol.chosen_on).numpy()]
    weights = np.ones_like(chosen_on.data) if protocol.chosen_by == "firing_rate" else np.abs(chosen_on.data)
    weight = torch.from_numpy(np.bincount(chosen_on.indices, weights, codes.shape[1]))
    weight[active < max(1, protocol.min_active)] = 0
    best = weight.argsort(descending=True, stable=True)[: protocol.features]
    best = best[weight[best] > 0]
    if len(best) == 0:
        raise ValueError(
            f"No feature is active on {max(1, protocol.min_active)} of these {len(sample)} tokens; take more contexts."
        )
    return best


def _samples(
    run: CleanRun, sample: TokenSample, active: torch.Tensor, protocol: WinRateProtocol, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Places of features among the chosen and rows of the sample, pair by pair, feature after feature."""
    if protocol.context == "text":
        texts = run.read_rows(sample)[: protocol.samples]
        if len(texts) == 0:
            raise ValueError("The sample holds the last token of no context, whose prediction is read.")
        n = active.shape[1]
        return torch.arange(n).repeat_interleave(len(texts)), texts.repeat(n)
    order = torch.rand(active.shape, generator=torch.Generator().manual_seed(seed))
    order = torch.where(active, order, 2.0)
    kept, rows = order.topk(min(protocol.samples, len(active)), dim=0, largest=False)
    group, place = (kept < 2).T.nonzero(as_tuple=True)
    return group, rows.T[group, place]


def _ablate(
    run: CleanRun,
    sample: TokenSample,
    directions: torch.Tensor,
    group: torch.Tensor,
    token: torch.Tensor,
    protocol: WinRateProtocol,
) -> torch.Tensor:
    """KL of each pair, `[pairs]` float64."""
    median = sample.norms.median()

    def without(hidden: torch.Tensor, pairs: torch.Tensor) -> torch.Tensor:
        d = directions[group[pairs]].unsqueeze(1)
        amount = (hidden * d).sum(dim=-1, keepdim=True)
        if protocol.removed == "cosine":
            amount = median * amount / hidden.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        return hidden - amount * d

    if protocol.context == "alone":
        parts: list[torch.Tensor] = []
        for pairs in torch.arange(len(token)).split(LONE_TOKENS_AT_ONCE):
            lone = run.alone(sample.activations[token[pairs]])
            parts.append(
                lone.kl(torch.arange(len(pairs)), lambda hidden, rows, pairs=pairs: without(hidden, pairs[rows]))
            )
        return torch.cat(parts)
    ablated = run.holds(sample)
    if protocol.ablated == "read":
        ablated &= torch.arange(ablated.shape[1]) == run.read.unsqueeze(-1)
    contexts = sample.contexts[token]

    def edit(hidden: torch.Tensor, pairs: torch.Tensor) -> torch.Tensor:
        return torch.where(ablated[contexts[pairs]].unsqueeze(-1), without(hidden, pairs), hidden)

    return run.kl(contexts, edit)

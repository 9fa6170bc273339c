"""How well an SAE reconstructs held-out activations, overall and by the activations' norm. `fve` has the definitions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from sae_lens.saes.sae import SAE

from saelens_cosine.activations.norm_filter import token_norms
from saelens_cosine.metrics.codes import reconstruct, tokens_at_once
from saelens_cosine.metrics.flat_tokens import on_flat_tokens
from saelens_cosine.metrics.norm_ranges import WithAndWithoutTop, group_by_norm
from saelens_cosine.metrics.reconstruction.dead import BatchDeaths, DeadShares, dead_in_training
from saelens_cosine.metrics.reconstruction.fve import Fit, FitSums


@dataclass(frozen=True)
class NormBin:
    """
    Tokens whose norm lies in one range.

    Args:
        low (float): Smallest norm of the range.
        high (float): Largest.
        tokens (int): Tokens in it.
        fve (float): Fraction of variance explained of these tokens, about their own mean.
    """

    low: float
    high: float
    tokens: int
    fve: float


@dataclass(frozen=True)
class Reconstruction:
    """
    An SAE on held-out activations, in the figures that a comparison shows.

    Args:
        tokens (int): Tokens evaluated, after the filter that the caller applied.
        fve (float): Fraction of variance explained, the authors'.
        l0 (float): Active features per token.
        dead_fraction (float): Share of features that fire on none of these tokens: the window is `tokens`.
        by_norm (tuple[NormBin, ...]): The same by quartile of ||x||, ascending; without quartiles that no token is in.
        not_finite (int): Tokens with a reconstruction, codes or an activation that are NaN or infinite; the figures then are NaN.
    """

    tokens: int
    fve: float
    l0: float
    dead_fraction: float
    by_norm: tuple[NormBin, ...]
    not_finite: int = 0


@dataclass(frozen=True)
class ReconstructionDiagnostics:
    """
    An SAE on held-out activations, in every definition in use.

    Args:
        by_norm (WithAndWithoutTop[Fit]): Reconstruction and sparsity, overall and by quartile of ||x||, each again without the 1 % of tokens with the largest norms.
        dead (DeadShares): Dead features over all tokens.
    """

    by_norm: WithAndWithoutTop[Fit]
    dead: DeadShares


@torch.no_grad()
def diagnose_reconstruction(
    sae: SAE[Any],
    activations: torch.Tensor,
    bins: int = 4,
    batch: int = 2048,
    training_metrics: Mapping[str, float] | None = None,
) -> ReconstructionDiagnostics:
    """Measure an SAE on activations `[tokens, d_in]` that it has not been trained on.

    Args:
        sae: any SAELens SAE; an inference form, or a training form in eval mode.
        activations: what it reconstructs. Whether high-norm tokens are among them is the caller's to say.
        bins: number of equally filled ranges of the norm; 4 gives quartiles.
        batch: tokens of a batch, for variances and dead features within batches; the authors' is 2,048, at first 4,096.
        training_metrics: last entry of the SAE's training log, for the features that were dead in training.

    Raises:
        ValueError: no activations, or an SAE that does not reconstruct single tokens (see `on_flat_tokens`).
    """
    groups = group_by_norm(token_norms(activations), bins)
    sums = FitSums(groups.unions, groups.n_groups, activations.shape[-1], sae.cfg.d_sae)
    deaths = BatchDeaths(min(batch, len(activations)))
    at_once = min(deaths.batch_tokens, tokens_at_once(sae, activations))
    with on_flat_tokens(sae):
        for in_batch, group_of in zip(
            activations.split(deaths.batch_tokens), groups.group.split(deaths.batch_tokens), strict=True
        ):
            for x, group in zip(in_batch.split(at_once), group_of.split(at_once), strict=True):
                codes, x_hat = reconstruct(sae, x)
                sums.add(x, x_hat, codes, group)
                deaths.add(codes)
            sums.end_batch()
    by_norm = groups.measure(sums.fit)
    overall = by_norm.all_norms.overall
    in_training, window = dead_in_training(sae, training_metrics) or (None, None)
    dead = DeadShares(
        tokens=overall.tokens,
        never_fired=overall.never_fired,
        rarely_fired=overall.rarely_fired,
        in_batch=deaths.mean(),
        batch_tokens=deaths.batch_tokens,
        in_training=in_training,
        training_window_tokens=window,
    )
    return ReconstructionDiagnostics(by_norm, dead)


def evaluate_reconstruction(sae: SAE[Any], activations: torch.Tensor) -> Reconstruction:
    """`diagnose_reconstruction` in the few figures that a comparison shows."""
    measured = diagnose_reconstruction(sae, activations, batch=4096).by_norm.all_norms
    return Reconstruction(
        tokens=measured.overall.tokens,
        not_finite=measured.overall.not_finite,
        fve=measured.overall.fve,
        l0=measured.overall.l0,
        dead_fraction=measured.overall.never_fired,
        by_norm=tuple(NormBin(r.low, r.high, r.measured.tokens, r.measured.fve) for r in measured.ranges),
    )

"""How far predictions move when a feature's code at the last token is multiplied (experiments 44, 55d, 57c)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from sae_lens.saes.sae import SAE

from saelens_cosine.activations.sample import TokenSample
from saelens_cosine.metrics.causal.code_edits import decoded_change
from saelens_cosine.metrics.causal.forward import CleanRun, kl_divergence
from saelens_cosine.metrics.codes import code_units, sparse_codes


@dataclass(frozen=True)
class SteeringEffect:
    """
    All chosen features, one after another, multiplied by one factor. Means over pairs of a feature and a text.

    Args:
        factor (float): What the code is multiplied by; 1 changes nothing.
        kl (float): KL(clean || steered) of the next token, nats; pairs whose feature is not active count as 0, as in the paper.
        kl_where_active (float): The same over active pairs.
        top_change (float): Sum of |change of probability| over the clean prediction's most likely tokens, over all pairs.
        top_change_where_active (float): The same over active pairs.
        edit_norm (float): Length of the edit over ||x||, over active pairs: how strongly two SAEs were steered.
    """

    factor: float
    kl: float
    kl_where_active: float
    top_change: float
    top_change_where_active: float
    edit_norm: float


@dataclass(frozen=True)
class Steering:
    """
    Steering with single features: generic, frequent ones only, by the choice of the paper.

    Args:
        texts (int): Texts.
        features (tuple[int, ...]): Features steered, the largest mean code first. None may be active often enough; then all figures are NaN.
        active_share (float): Share of pairs of these features and texts that are active.
        top (int): Most likely tokens in `top_change`.
        effects (tuple[SteeringEffect, ...]): By factor, as given.
    """

    texts: int
    features: tuple[int, ...]
    active_share: float
    top: int
    effects: tuple[SteeringEffect, ...]


@torch.no_grad()
def steering(
    run: CleanRun,
    sae: SAE[Any],
    sample: TokenSample,
    factors: Sequence[float] = (0.0, 0.5, 2.0, 5.0),
    n_features: int = 10,
    min_firing_share: float = 0.3,
    top: int = 5,
) -> Steering:
    """Add `(f - 1) z_i d_i` to the activation of each text's last token.

    Features are those active at the last token of more than `min_firing_share` of the texts, and of them the ones with the
    largest mean |code| in units of the activations.

    Args:
        run: the clean run of the texts; the paper takes 50.
        sae: any SAELens SAE of that hook, in its inference form.
        sample: `run.sample()` or a part of it; texts whose last token is not in it are left out.
        factors: f.
        n_features: features, at most.
        min_firing_share: see above.
        top: tokens in `top_change`.

    Raises:
        ValueError: the sample holds no text to its end.
    """
    rows = run.read_rows(sample)
    if len(rows) == 0:
        raise ValueError("The sample holds the last token of no context, which is steered.")
    codes: Any = sparse_codes(sae, sample.activations[rows])
    firing = torch.from_numpy((codes != 0).mean(axis=0))
    size = torch.from_numpy(abs(codes).mean(axis=0)) * code_units(sae)
    size[firing <= min_firing_share] = 0
    features = size.argsort(descending=True, stable=True)[:n_features]
    features = features[size[features] > 0]
    texts = sample.contexts[rows]
    active = torch.from_numpy(codes[:, features.numpy()].toarray() != 0)  # [texts, features]
    norms = sample.norms[rows].double()
    place, feature = (part.flatten() for part in torch.meshgrid(torch.arange(len(rows)), features, indexing="ij"))

    def effect(factor: float) -> SteeringEffect:
        length = torch.zeros(len(place), dtype=torch.float64)

        def edit(hidden: torch.Tensor, edits: torch.Tensor) -> torch.Tensor:
            steered = feature[edits].to(sae.device)

            def multiplied(codes: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
                codes, rows = codes.clone(), rows.to(sae.device)
                codes[torch.arange(len(rows)), steered[rows]] *= factor
                return codes

            at = torch.arange(len(edits)), run.read[texts[place[edits]]]
            moved = decoded_change(sae, hidden[at], multiplied)
            length[edits] = moved.double().norm(dim=-1) / norms[place[edits]]
            hidden[at] += moved
            return hidden

        kl = torch.zeros(len(place), dtype=torch.float64)
        change = torch.zeros_like(kl)
        for edits, log_p, log_q in run.predictions(texts[place], edit):
            kl[edits] = kl_divergence(log_p, log_q).cpu().double()
            likely = log_p.topk(min(top, log_p.shape[-1]), dim=-1).indices
            p, q = (log.gather(-1, likely).exp() for log in (log_p, log_q))
            change[edits] = (q - p).abs().sum(dim=-1).cpu().double()
        on = active.flatten()
        figures = (kl.mean(), kl[on].mean(), change.mean(), change[on].mean(), length[on].mean())
        return SteeringEffect(factor, *(figure.item() for figure in figures))

    return Steering(
        texts=len(rows),
        features=tuple(features.tolist()),
        active_share=active.double().mean().item(),
        top=top,
        effects=tuple(effect(factor) for factor in factors),
    )

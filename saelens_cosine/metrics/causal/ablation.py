"""How precisely a concept's features carry it: what zeroing them does to the concept's texts and to the others.

Experiment 65's test on next-token distributions, with the intended and unintended effects of targeted probe perturbation
(arXiv 2606.15054; SAEBench). Its infinite precisions stay infinite where no other text has any of the features, and are no artefact:
a text whose activations did not change has KL 0, and no other KL can be negative.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from sae_lens.saes.sae import SAE

from saelens_cosine.activations.sample import TokenSample
from saelens_cosine.metrics.causal.code_edits import decoded_change
from saelens_cosine.metrics.causal.forward import CleanRun
from saelens_cosine.metrics.codes import code_units, sparse_codes


@dataclass(frozen=True)
class AblationEffect:
    """
    One concept's first k features zeroed. KL(clean || ablated) of the texts' next token, nats.

    Args:
        k (int): Features zeroed.
        intended_kl (float): Mean over the concept's texts.
        collateral_kl (float): Mean over the other texts.
        precision (float): Intended over collateral; infinite if no other text changed, NaN if no text did.
        selectivity (float): Intended minus collateral.
        intended_share (float): Share of the concept's texts in which an active feature was zeroed.
        collateral_share (float): Share of the others.
    """

    k: int
    intended_kl: float
    collateral_kl: float
    precision: float
    selectivity: float
    intended_share: float
    collateral_share: float


@dataclass(frozen=True)
class ConceptAblation:
    """
    One concept.

    Args:
        concept (int): Its label.
        texts (int): Texts with it that were measured.
        other_texts (int): Without it.
        features (tuple[int, ...]): Features zeroed, the first ones first.
        effects (tuple[AblationEffect, ...]): By k, ascending.
    """

    concept: int
    texts: int
    other_texts: int
    features: tuple[int, ...]
    effects: tuple[AblationEffect, ...]


@dataclass(frozen=True)
class AblationPrecision:
    """
    Intended effect against collateral damage.

    Args:
        ablated (Literal["read", "all"]): Features are zeroed at the token whose prediction is read, or at all tokens of the sample.
        held_out (bool): Whether the texts measured are others than those that features were ranked on.
        concepts (tuple[ConceptAblation, ...]): One for each label, ascending.
        mean (tuple[AblationEffect, ...]): Means over concepts by k; its precision is the ratio of the means.
    """

    ablated: Literal["read", "all"]
    held_out: bool
    concepts: tuple[ConceptAblation, ...]
    mean: tuple[AblationEffect, ...]


@torch.no_grad()
def ablation_precision(
    run: CleanRun,
    sae: SAE[Any],
    sample: TokenSample,
    concepts: torch.Tensor,
    n_features: Sequence[int] = (1, 3, 5, 10, 20, 50),
    ablated: Literal["read", "all"] = "read",
    ranked: Mapping[int, Sequence[int]] | None = None,
) -> AblationPrecision:
    """Zero each concept's features and measure the effect on texts with and without it.

    Features are ranked by the mean code at the texts' last tokens, with the concept minus without, in units of the activations;
    on every other text of each label, and measured on the rest, so that no feature is chosen for its noise. (Experiment 65
    ranks and measures on the same texts.) The SAE's error stays in the activations.

    Args:
        run: the clean run of the texts.
        sae: any SAELens SAE of that hook, in its inference form.
        sample: `run.sample()` or a part of it. Only its tokens are changed; a text counts if its last token is among them.
        concepts: `[contexts]` integers, the label of each text.
        n_features: numbers of features zeroed.
        ablated: where.
        ranked: features of each label, the first ones first, instead; then all texts are measured.

    Raises:
        ValueError: labels of another shape, or fewer than two labels, or too few texts of one.
    """
    sizes = sorted({min(k, sae.cfg.d_sae) for k in n_features})
    if not sizes or sizes[0] < 1:
        raise ValueError(f"n_features={tuple(n_features)} must be numbers of features, 1 or more.")
    if ablated not in ("read", "all"):
        raise ValueError(f"ablated={ablated!r} is none of 'read', 'all'.")
    if concepts.shape != (len(run.tokens),):
        raise ValueError(
            f"concepts of shape {tuple(concepts.shape)} are not one label for each of {len(run.tokens)} texts."
        )
    rows = run.read_rows(sample)
    contexts = sample.contexts[rows]
    labels = concepts.cpu()[contexts]
    names = labels.unique().tolist()
    order = _order_within_label(labels)
    measured = torch.ones_like(order, dtype=torch.bool) if ranked else order % 2 == 1
    if len(names) < 2 or any(not (measured & (labels == name)).any() for name in names):
        raise ValueError(f"{len(labels)} texts with labels {names} are too few: two labels, two texts each, at least.")
    if ranked is None:
        codes = sparse_codes(sae, sample.activations[rows[~measured]])
        units = code_units(sae)
        found = {name: _rank(codes, units, (labels == name)[~measured]) for name in names}
    else:
        found = {name: torch.tensor(ranked[name], dtype=torch.int64) for name in names}
    where = run.holds(sample)
    if ablated == "read":
        where &= torch.arange(where.shape[1]) == run.read.unsqueeze(-1)
    texts = contexts[measured]
    results = tuple(
        _concept(name, found[name][: sizes[-1]], run, sae, where, texts, labels[measured] == name, sizes)
        for name in names
    )
    mean = tuple(_mean([result.effects[i] for result in results]) for i in range(len(sizes)))
    return AblationPrecision(ablated, ranked is None, results, mean)


def _concept(
    name: int,
    features: torch.Tensor,
    run: CleanRun,
    sae: SAE[Any],
    where: torch.Tensor,
    texts: torch.Tensor,
    on: torch.Tensor,
    sizes: list[int],
) -> ConceptAblation:
    rank = torch.full((sae.cfg.d_sae,), sae.cfg.d_sae)
    rank[features] = torch.arange(len(features))
    rank = rank.to(sae.device)
    contexts, k = texts.repeat(len(sizes)), torch.tensor(sizes).repeat_interleave(len(texts))
    changed = torch.zeros(len(contexts), dtype=torch.bool)

    def edit(hidden: torch.Tensor, edits: torch.Tensor) -> torch.Tensor:
        places = where[contexts[edits]]
        kept = k[edits].unsqueeze(-1).expand(places.shape)[places].to(sae.device)

        def zeroed(codes: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
            return codes * (rank >= kept[rows.to(sae.device)].unsqueeze(-1))

        moved = decoded_change(sae, hidden[places], zeroed)
        hidden[places] += moved
        place = places.nonzero()[:, 0]
        changed[edits] = torch.zeros(len(edits)).index_add(0, place, (moved != 0).any(dim=-1).float()) > 0
        return hidden

    kl = run.kl(contexts, edit).unflatten(0, (len(sizes), -1))
    share = changed.double().unflatten(0, (len(sizes), -1))
    effects = tuple(
        _effect(
            size,
            *(
                means.item()
                for means in (kl[i][on].mean(), kl[i][~on].mean(), share[i][on].mean(), share[i][~on].mean())
            ),
        )
        for i, size in enumerate(sizes)
    )
    return ConceptAblation(name, int(on.sum()), int((~on).sum()), tuple(features.tolist()), effects)


def _effect(
    k: int, intended: float, collateral: float, intended_share: float, collateral_share: float
) -> AblationEffect:
    ratio = intended / collateral if collateral else math.inf if intended else math.nan
    return AblationEffect(k, intended, collateral, ratio, intended - collateral, intended_share, collateral_share)


def _mean(effects: list[AblationEffect]) -> AblationEffect:
    def of(field: str) -> float:
        return sum(getattr(effect, field) for effect in effects) / len(effects)

    return _effect(effects[0].k, of("intended_kl"), of("collateral_kl"), of("intended_share"), of("collateral_share"))


def _rank(codes: Any, units: torch.Tensor, on: torch.Tensor) -> torch.Tensor:
    """Features by mean code with the concept minus without, the largest first."""
    with_it, without = (torch.from_numpy(codes[rows.numpy()].mean(axis=0)) for rows in (on, ~on))
    return ((with_it - without) * units).argsort(descending=True, stable=True)


def _order_within_label(labels: torch.Tensor) -> torch.Tensor:
    """How many texts of the same label come before each."""
    order = torch.zeros_like(labels)
    for label in labels.unique():
        order[labels == label] = torch.arange(int((labels == label).sum()))
    return order

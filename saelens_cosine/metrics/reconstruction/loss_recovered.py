"""How much of the language model's prediction survives reconstruction: cross-entropy and KL divergence, SAELens' measures.

SAELens' own `get_recons_loss` gives the same numbers, and runs the model as it is, and with zeros, again for every SAE.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from sae_lens.saes.sae import SAE

from saelens_cosine.activations.bridges import name_in_bridge
from saelens_cosine.activations.contexts import ContextForm
from saelens_cosine.activations.norm_filter import HighNormFilter
from saelens_cosine.metrics.causal.resumed import ResumedModel
from saelens_cosine.metrics.flat_tokens import on_flat_tokens
from saelens_cosine.metrics.norm_ranges import WithAndWithoutTop, group_by_norm
from saelens_cosine.metrics.reconstruction.clean_losses import CleanBatch, CleanLosses, TokenLosses

CE_DEFINITION = "(L_zero - L_sae) / (L_zero - L): L_sae passes high-norm tokens through where they are filtered, L_zero zeroes every token"

CE_NOTE = (
    "CE recovered counts the loss on the next token alone, as a share of what zeros at every token cost: an SAE that destroys a "
    "planted sink, which predicts nothing, has recovered 0.98 at an FVE of 0.01. KL is from the model's own predictions."
)
"""For a reader of tables that have both."""


@dataclass(frozen=True)
class PredictionLoss:
    """
    A model's predictions at some tokens, with activations reconstructed at all tokens. Names as in SAELens' `run_evals`.

    Args:
        tokens (int): Tokens predicted from. A context's last one has no cross-entropy but counts for the KL divergence.
        not_finite (int): Of these, with a cross-entropy or KL divergence that is NaN or infinite. With any, the means are so too.
        ce_loss_without_sae (float): Cross-entropy of the model as it is, nats per token.
        ce_loss_with_sae (float): With reconstructions.
        ce_loss_with_ablation (float): With zeros in place of all activations.
        ce_loss_score (float): `(ablation - sae) / (ablation - without)`: 1 is lossless, 0 as bad as zeros. NaN where zeros change nothing. Reconstructions that change what the model predicts without a loss on the next token, as of sinks that say nothing of it, are free here: see `kl_div_with_sae`.
        kl_div_with_sae (float | None): KL divergence of the predictions with reconstructions from the model's own, nats per token; None if not asked for.
        kl_div_with_ablation (float | None): The same with zeros.
        kl_div_score (float | None): `(ablation - sae) / ablation`.
    """

    tokens: int
    not_finite: int
    ce_loss_without_sae: float
    ce_loss_with_sae: float
    ce_loss_with_ablation: float
    ce_loss_score: float
    kl_div_with_sae: float | None
    kl_div_with_ablation: float | None
    kl_div_score: float | None


@dataclass(frozen=True)
class LossRecovered:
    """
    Cross-entropy and KL divergence recovered, and by the norm of the activation that a prediction is made from.

    A token's prediction suffers from the reconstruction of every token before it, whatever its own norm is.

    Args:
        by_norm (WithAndWithoutTop[PredictionLoss]): On all predictions, and by norm.
        replaced_share (float): Share of the tokens whose activations are replaced by reconstructions; the others are passed through.
        max_norm_multiple (float | None): Multiple of their batch's median norm above which tokens are passed through; None: none are.
    """

    by_norm: WithAndWithoutTop[PredictionLoss]
    replaced_share: float
    max_norm_multiple: float | None


@torch.no_grad()
def loss_recovered(sae: SAE[Any], clean: CleanLosses, max_norm_multiple: float | None, bins: int = 4) -> LossRecovered:
    """Replace activations by reconstructions and see what the model predicts.

    `ce_loss_with_ablation` zeroes every token, high-norm ones too, which lifts all SAEs of a model that leans on its attention
    sinks; so does passing them through. Measure with and without.

    Args:
        sae: an inference form, or a training form in eval mode; `cfg.metadata` says where it goes.
        clean: of the model that the SAE was trained on, at its hook; the same for every SAE there.
        max_norm_multiple: tokens above this multiple of their batch's median norm are passed through, not replaced; so are those
            that the SAE's metadata leave out (`seqpos_slice`, `exclude_special_tokens`).
        bins: number of equally filled ranges of the norm.

    Raises:
        ValueError: the SAE is of another hook or head, or does not reconstruct single tokens.
    """
    _check_place(sae, clean.resumed)
    norm_filter, form = HighNormFilter(max_norm_multiple), ContextForm.of(sae.cfg.metadata)
    losses: list[dict[str, torch.Tensor]] = []
    replaced = 0
    with on_flat_tokens(sae):
        for batch in clean.batches:
            x = batch.hidden.to(sae.device)
            seen = form.seen(clean.resumed.model, batch.tokens).to(x.device)
            keep = seen.clone()
            keep[seen] = norm_filter.keep(x[seen])
            replaced += int(keep.sum())
            x_hat = torch.where(keep.unsqueeze(-1), sae.decode(sae.encode(x)).to(x.dtype), x)
            losses.append(_by_name(batch, clean.losses(x_hat, batch)))
    groups, lengths = group_by_norm(clean.norms, bins), [batch.tokens.shape[1] for batch in clean.batches]

    def joined(of: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, torch.Tensor]:
        return {
            name: torch.cat([_to_length(of(batch[name]), n) for batch, n in zip(losses, lengths, strict=True)])
            for name in losses[0]
        }

    per_token, exists = joined(torch.Tensor.double), joined(lambda values: torch.ones_like(values, dtype=torch.bool))

    def measure(which: list[int]) -> PredictionLoss:
        rows = torch.isin(groups.group, torch.tensor(which))
        return _prediction_loss(
            {name: values[rows] for name, values in per_token.items()},
            {name: there[rows] for name, there in exists.items()},
        )

    return LossRecovered(groups.measure(measure), replaced / len(groups.group), max_norm_multiple)


def ce_loss_recovered(sae: SAE[Any], clean: CleanLosses, max_norm_multiple: float | None) -> float:
    """`ce_loss_score` of `loss_recovered` over all tokens."""
    return loss_recovered(sae, clean, max_norm_multiple).by_norm.all_norms.overall.ce_loss_score


def _check_place(sae: SAE[Any], resumed: ResumedModel) -> None:
    metadata = sae.cfg.metadata
    hook, head = metadata.hook_name, metadata.hook_head_index
    if hook is not None:
        hook = name_in_bridge(hook, resumed.model) or hook
    if (hook, head) != (resumed.hook_name, resumed.head):
        raise ValueError(
            f"The SAE is of hook {hook}, head {head}, and these losses are at {resumed.hook_name}, head {resumed.head}; take "
            "clean_losses at the SAE's own hook."
        )


def _by_name(batch: CleanBatch, with_sae: TokenLosses) -> dict[str, torch.Tensor]:
    """As SAELens calls them."""
    found = {
        "ce_loss_with_sae": with_sae.ce,
        "ce_loss_without_sae": batch.clean.ce,
        "ce_loss_with_ablation": batch.ablated.ce,
    }
    if with_sae.kl is None or batch.ablated.kl is None:
        return found
    return {"kl_div_with_sae": with_sae.kl, "kl_div_with_ablation": batch.ablated.kl, **found}


def _to_length(values: torch.Tensor, length: int) -> torch.Tensor:
    """`[contexts, length or length - 1]` losses as `[contexts * length]`, 0 or False where there is none."""
    return torch.nn.functional.pad(values, (0, length - values.shape[1])).flatten()


def _prediction_loss(losses: dict[str, torch.Tensor], exists: dict[str, torch.Tensor]) -> PredictionLoss:
    mean = {name: values[exists[name]].mean().item() for name, values in losses.items()}
    finite = torch.stack([values.isfinite() for values in losses.values()]).all(dim=0)
    ablated = mean["ce_loss_with_ablation"]
    kl, kl_ablated = mean.get("kl_div_with_sae"), mean.get("kl_div_with_ablation")
    return PredictionLoss(
        tokens=len(finite),
        not_finite=int((~finite).sum()),
        ce_loss_without_sae=mean["ce_loss_without_sae"],
        ce_loss_with_sae=mean["ce_loss_with_sae"],
        ce_loss_with_ablation=ablated,
        ce_loss_score=_share(ablated - mean["ce_loss_with_sae"], ablated - mean["ce_loss_without_sae"]),
        kl_div_with_sae=kl,
        kl_div_with_ablation=kl_ablated,
        kl_div_score=None if kl is None or kl_ablated is None else _share(kl_ablated - kl, kl_ablated),
    )


def _share(part: float, whole: float) -> float:
    return part / whole if whole != 0 else math.nan  # NaN and infinities stay what they are

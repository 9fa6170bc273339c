"""How much of the language model's prediction survives reconstruction: cross-entropy and KL divergence, SAELens' measures."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from sae_lens.evals import get_recons_loss
from sae_lens.saes.sae import SAE
from sae_lens.training.activation_scaler import ActivationScaler

from saelens_cosine.activations.bridges import name_in_bridge
from saelens_cosine.activations.contexts import ContextForm
from saelens_cosine.activations.hook_points import device_of
from saelens_cosine.activations.norm_filter import HighNormFilter, token_norms
from saelens_cosine.metrics.flat_tokens import on_flat_tokens
from saelens_cosine.metrics.norm_ranges import WithAndWithoutTop, group_by_norm

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


class _Replacement:
    """Reconstructs like an SAE but passes through high-norm tokens and those it was not trained to see, as `get_recons_loss` calls an SAE; keeps the norms.

    Args:
        seen: the coming batch's, `[contexts, length]` booleans.
    """

    seen: torch.Tensor

    def __init__(self, sae: SAE[Any], max_norm_multiple: float | None):
        self.sae, self.filter = sae, HighNormFilter(max_norm_multiple)
        self.cfg, self.device = sae.cfg, sae.device
        self.norms: list[torch.Tensor] = []
        self.replaced = 0

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def decode(self, x: torch.Tensor) -> torch.Tensor:
        seen = self.seen.to(x.device)
        keep = seen.clone()
        keep[seen] = self.filter.keep(x[seen])
        keep = keep.unsqueeze(-1)
        self.norms.append(token_norms(x).cpu())
        self.replaced += int(keep.sum())
        return torch.where(keep, self.sae.decode(self.sae.encode(x)).to(x.dtype), x)


class _FlatHooks:
    """A bridge as `get_recons_loss` calls a model: what hooks see there is `[contexts, length, d_in]`.

    That function tells by a hook point's name whether activations are split by head, and knows a HookedTransformer's names.
    """

    def __init__(self, bridge: Any, head: int | None):
        self.bridge, self.head = bridge, head

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.bridge(*args, **kwargs)

    def run_with_hooks(
        self, tokens: torch.Tensor, fwd_hooks: list[tuple[str, Callable[..., Any]]], **kwargs: Any
    ) -> Any:
        hooks = [(name, partial(self._changed, change)) for name, change in fwd_hooks]
        return self.bridge.run_with_hooks(tokens, fwd_hooks=hooks, **kwargs)

    def _changed(self, change: Callable[..., torch.Tensor], x: torch.Tensor, hook: Any) -> torch.Tensor:
        if self.head is None:
            return change(x.flatten(2), hook).reshape(x.shape)
        edited = x.clone()
        edited[:, :, self.head] = change(x[:, :, self.head], hook)
        return edited


@torch.no_grad()
def loss_recovered(
    sae: SAE[Any],
    model: Any,
    token_batches: Iterable[torch.Tensor],
    max_norm_multiple: float | None,
    bins: int = 4,
    compute_kl: bool = True,
) -> LossRecovered:
    """Replace activations by reconstructions and see what the model predicts.

    `ce_loss_with_ablation` zeroes every token, high-norm ones too, which lifts all SAEs of a model that leans on its attention
    sinks; so does passing them through. Measure with and without.

    Args:
        sae: an inference form, or a training form in eval mode; `cfg.metadata.hook_name` says where it goes.
        model: the hooked model that the SAE was trained on.
        token_batches: `[contexts, length]` tokens each.
        max_norm_multiple: tokens above this multiple of their batch's median norm are passed through, not replaced; so are those
            that the SAE's metadata leave out (`seqpos_slice`, `exclude_special_tokens`).
        bins: number of equally filled ranges of the norm.
        compute_kl: whether to compute KL divergences, from softmaxes in the dtype of the model's logits.

    Raises:
        ValueError: there are no token batches, or an SAE that does not reconstruct single tokens.
    """
    batches = [tokens.to(device_of(model)) for tokens in token_batches]
    if not batches:
        raise ValueError("There are no token batches to predict from.")
    replacement: Any = _Replacement(sae, max_norm_multiple)
    form = ContextForm.of(sae.cfg.metadata)
    hook = name_in_bridge(sae.cfg.metadata.hook_name, model)
    hooked: Any = model if hook is None else _FlatHooks(model, sae.cfg.metadata.hook_head_index)
    losses: list[dict[str, torch.Tensor]] = []
    with on_flat_tokens(sae):  # SAELens' loss flattens heads itself
        for tokens in batches:
            replacement.seen = form.seen(model, tokens)
            per_token = get_recons_loss(
                replacement,
                hooked,
                ActivationScaler(),
                tokens,
                compute_kl=compute_kl,
                compute_ce_loss=True,
                hook_name=hook,
            )
            losses.append({name: values.cpu() for name, values in per_token.items()})
    groups = group_by_norm(torch.cat([norms.flatten() for norms in replacement.norms]), bins)

    def joined(of: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, torch.Tensor]:
        return {
            name: torch.cat([_to_length(of(batch[name]), t.shape[1]) for batch, t in zip(losses, batches, strict=True)])
            for name in losses[0]
        }

    per_token, exists = joined(torch.Tensor.double), joined(lambda values: torch.ones_like(values, dtype=torch.bool))

    def measure(which: list[int]) -> PredictionLoss:
        rows = torch.isin(groups.group, torch.tensor(which))
        return _prediction_loss(
            {name: values[rows] for name, values in per_token.items()},
            {name: there[rows] for name, there in exists.items()},
        )

    return LossRecovered(groups.measure(measure), replacement.replaced / len(groups.group), max_norm_multiple)


def ce_loss_recovered(
    sae: SAE[Any], model: Any, token_batches: Iterable[torch.Tensor], max_norm_multiple: float | None
) -> float:
    """`ce_loss_score` of `loss_recovered` over all tokens."""
    recovered = loss_recovered(sae, model, token_batches, max_norm_multiple, compute_kl=False)
    return recovered.by_norm.all_norms.overall.ce_loss_score


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

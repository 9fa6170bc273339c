"""How well an SAE reconstructs held-out activations, overall and by the activations' norm.

Fraction of variance explained (FVE) is the authors': `1 - Var(x - x_hat) / Var(x)`, variances summed over dimensions,
over all tokens that are evaluated (the authors average the variances of batches of 2,048; the difference is a batch's
share of one degree of freedom). A constant error is free in it; SAELens' `explained_variance` charges for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from sae_lens import ActivationsStore
from sae_lens.evals import get_recons_loss
from sae_lens.saes.sae import SAE, TrainingSAE
from sae_lens.training.activation_scaler import ActivationScaler

from saelens_cosine.training.norm_filter import HighNormFilter

CE_DEFINITION = "(L_zero - L_sae) / (L_zero - L): L_sae passes high-norm tokens through where they are filtered, L_zero zeroes every token"
FVE_DEFINITION = "1 - Var(x - x_hat) / Var(x), each summed over dimensions, over all evaluated tokens"


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
    An SAE on held-out activations.

    Args:
        tokens (int): Tokens evaluated, after the filter that the caller applied.
        fve (float): Fraction of variance explained, see the module's text.
        l0 (float): Active features per token.
        dead_fraction (float): Share of features that fire on none of these tokens: the window is `tokens`.
        by_norm (tuple[NormBin, ...]): The same by quartile of ||x||, ascending.
    """

    tokens: int
    fve: float
    l0: float
    dead_fraction: float
    by_norm: tuple[NormBin, ...]


class _Variance:
    """Variance of vectors, summed over dimensions, from batches; sums in float64 on the CPU (MPS has no float64)."""

    def __init__(self) -> None:
        self.count, self.sum, self.squares = 0, torch.zeros((), dtype=torch.float64), 0.0

    def add(self, vectors: torch.Tensor) -> None:
        vectors = vectors.cpu().double()
        self.count += len(vectors)
        self.sum = self.sum + vectors.sum(dim=0)
        self.squares += vectors.pow(2).sum().item()

    def value(self) -> float:
        return self.squares / self.count - (self.sum / self.count).pow(2).sum().item() if self.count else 0.0


def explained_variance(x: torch.Tensor, x_hat: torch.Tensor) -> float:
    """FVE of one batch `[tokens, d_in]`; 0 when all tokens are the same."""
    total, residual = _Variance(), _Variance()
    total.add(x)
    residual.add(x - x_hat)
    return _fve(residual, total)


def _fve(residual: _Variance, total: _Variance) -> float:
    return 1 - residual.value() / total.value() if total.value() > 0 else 0.0


@torch.no_grad()
def heldout_activations(
    store: ActivationsStore, tokens: int, max_norm_multiple: float | None
) -> tuple[torch.Tensor, HighNormFilter]:
    """The next `[tokens, d_in]` activations of a store, on the CPU, and the filter that counted what was dropped.

    A corpus that ends before gives fewer tokens, never the same token twice.
    """
    norm_filter = HighNormFilter(max_norm_multiple).attach(store)
    batches: list[torch.Tensor] = []
    while sum(map(len, batches)) < tokens:
        try:
            batches.append(store.get_filtered_llm_batch(raise_on_epoch_end=True).cpu())
        except StopIteration:
            break
    if not batches:
        raise ValueError(
            f"The held-out text is shorter than one batch of {store.store_batch_size_prompts} contexts of "
            f"{store.context_size} tokens; use a larger dataset."
        )
    return torch.cat(batches)[:tokens], norm_filter


@torch.no_grad()
def evaluate_reconstruction(
    sae: SAE[Any], activations: torch.Tensor, bins: int = 4, batch: int = 4096
) -> Reconstruction:
    """Measure an SAE on activations `[tokens, d_in]` that it has not been trained on.

    Args:
        sae: any SAELens SAE; an inference form, or a training form in eval mode.
        activations: what it reconstructs. Whether high-norm tokens are among them is the caller's to say.
        bins: number of equally filled ranges of the norm; 4 gives quartiles.
        batch: tokens encoded at once.
    """
    if isinstance(sae, TrainingSAE) and sae.training:
        raise ValueError(
            f"{type(sae).__name__} is in training mode, where BatchTopK depends on the batch. Call sae.eval(), or load what "
            "was saved."
        )
    norms = activations.float().norm(dim=-1).cpu().double()
    edges = torch.quantile(norms, torch.linspace(0, 1, bins + 1, dtype=torch.float64))
    bin_of = torch.bucketize(norms, edges[1:-1], right=True)
    total, residual = [_Variance() for _ in range(bins + 1)], [_Variance() for _ in range(bins + 1)]
    active, fired = 0, torch.zeros(sae.cfg.d_sae, dtype=torch.bool)
    for x, index in _batches(activations, bin_of, batch):
        codes = sae.encode(x.to(sae.device))
        error = x - sae.decode(codes).to(x.device)
        codes = codes.to_dense()
        active += int((codes != 0).sum())
        fired |= (codes != 0).any(dim=0).cpu()
        for part in range(bins + 1):  # the last one takes every token
            rows = slice(None) if part == bins else index == part
            total[part].add(x[rows])
            residual[part].add(error[rows])
    return Reconstruction(
        tokens=len(activations),
        fve=_fve(residual[bins], total[bins]),
        l0=active / len(activations),
        dead_fraction=1 - fired.double().mean().item(),
        by_norm=tuple(
            NormBin(edges[i].item(), edges[i + 1].item(), total[i].count, _fve(residual[i], total[i]))
            for i in range(bins)
        ),
    )


def _batches(
    activations: torch.Tensor, bin_of: torch.Tensor, batch: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    for x, index in zip(activations.split(batch), bin_of.split(batch), strict=True):
        yield x.cpu(), index


class _ReplaceOrdinaryTokens:
    """Reconstruct like an SAE but pass high-norm tokens through, as SAELens' `get_recons_loss` calls an SAE."""

    def __init__(self, sae: SAE[Any], max_norm_multiple: float | None):
        self.sae, self.filter = sae, HighNormFilter(max_norm_multiple)
        self.cfg, self.device = sae.cfg, sae.device

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def decode(self, x: torch.Tensor) -> torch.Tensor:
        keep = self.filter.keep(x.flatten(0, -2)).view(*x.shape[:-1], 1)
        return torch.where(keep, self.sae.decode(self.sae.encode(x)).to(x.dtype), x)


@torch.no_grad()
def ce_loss_recovered(
    sae: SAE[Any], model: Any, token_batches: list[torch.Tensor], max_norm_multiple: float | None
) -> float:
    """Share of the model's next-token loss that survives when its activations are replaced by reconstructions.

    `(L_zero - L_sae) / (L_zero - L)`, SAELens' measure: 1 is lossless, 0 is as bad as zeroing the activations. `L_zero`
    zeroes every token, high-norm ones too, which lifts all SAEs of a model that leans on its attention sinks.

    Args:
        sae: an inference form.
        model: the hooked model that the SAE was trained on.
        token_batches: `[prompts, context]` tokens each.
        max_norm_multiple: tokens above this multiple of their batch's median norm are passed through, not replaced.
    """
    reshaping = sae.hook_z_reshaping_mode  # SAELens' loss flattens heads itself
    sae.turn_off_forward_pass_hook_z_reshaping()
    patched: Any = _ReplaceOrdinaryTokens(sae, max_norm_multiple)
    sums = {"ce_loss_with_sae": 0.0, "ce_loss_without_sae": 0.0, "ce_loss_with_ablation": 0.0}
    try:
        for tokens in token_batches:
            losses = get_recons_loss(patched, model, ActivationScaler(), tokens, compute_kl=False, compute_ce_loss=True)
            for name in sums:
                sums[name] += losses[name].double().sum().item()
    finally:
        if reshaping:
            sae.turn_on_forward_pass_hook_z_reshaping()
    ablated = sums["ce_loss_with_ablation"]
    return (ablated - sums["ce_loss_with_sae"]) / (ablated - sums["ce_loss_without_sae"])

"""What a model predicts without any SAE: made once for a text, and held against every SAE's reconstructions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import kl_div

from saelens_cosine.activations.bridges import name_in_bridge
from saelens_cosine.activations.norm_filter import token_norms
from saelens_cosine.metrics.causal.resumed import LOGITS_AT_ONCE, ResumedModel


@dataclass(frozen=True)
class TokenLosses:
    """
    Losses of each prediction in some contexts, on the CPU, in the dtype of the model's logits.

    Args:
        ce (torch.Tensor): `[contexts, length - 1]`, cross-entropy of the next token, nats.
        kl (torch.Tensor | None): `[contexts, length]`, KL divergence from the model's own prediction, nats; None if not asked for.
    """

    ce: torch.Tensor
    kl: torch.Tensor | None


@dataclass(frozen=True)
class CleanBatch:
    """
    Contexts of one forward pass, on the CPU.

    Args:
        tokens (torch.Tensor): `[contexts, length]` int64.
        hidden (torch.Tensor): `[contexts, length, d_in]`, activations at the hook in the model's dtype.
        unembedded (torch.Tensor | None): `[contexts, length, d_model]`, what the model's own logits are made from; None where it takes more than the unembedding, or they are not asked for.
        clean (TokenLosses): Of the model as it is; without KL.
        ablated (TokenLosses): With zeros in place of all activations at the hook.
    """

    tokens: torch.Tensor
    hidden: torch.Tensor
    unembedded: torch.Tensor | None
    clean: TokenLosses
    ablated: TokenLosses


@dataclass(frozen=True)
class CleanLosses:
    """
    A model's predictions at some contexts, and its activations at a hook, which reconstructions start from.

    Of the predictions the losses alone are kept: logits of 20,000 tokens are 4 GB in a vocabulary of 50,000.

    Args:
        resumed (ResumedModel): The model and the hook.
        batches (tuple[CleanBatch, ...]): The contexts.
        has_kl (bool): Whether KL divergences are measured.
    """

    resumed: ResumedModel
    batches: tuple[CleanBatch, ...]
    has_kl: bool

    @property
    def norms(self) -> torch.Tensor:
        """`[tokens]`, of the activations at the hook."""
        return torch.cat([token_norms(batch.hidden).flatten() for batch in self.batches])

    def losses(self, hidden: torch.Tensor, batch: CleanBatch) -> TokenLosses:
        """Losses of one of the batches with other activations `[contexts, length, d_in]` at the hook."""
        logits = self.resumed.logits(hidden, batch.tokens)
        if not self.has_kl:
            return token_losses(logits, batch.tokens)
        if batch.unembedded is None:
            own = self.resumed.logits(batch.hidden, batch.tokens)
        else:
            own = self.resumed.unembed(batch.unembedded)
        return token_losses(logits, batch.tokens, own)


@torch.no_grad()
def clean_losses(
    model: Any, hook_name: str, token_batches: Iterable[torch.Tensor], head: int | None = None, compute_kl: bool = True
) -> CleanLosses:
    """Run a model over contexts as it is, and with zeros in place of its activations at a hook.

    Args:
        model: HookedTransformer, TransformerBridge, or SAELens' wrapper of a Hugging Face model.
        hook_name: a hook point of it.
        token_batches: `[contexts, length]` tokens each, as many as the model takes at once.
        head: the attention head whose activations are replaced; None for all.
        compute_kl: whether to compute KL divergences, from softmaxes in the dtype of the model's logits.

    Raises:
        ValueError: there are no token batches, or no such hook point.
    """
    resumed = ResumedModel(model, name_in_bridge(hook_name, model) or hook_name, head)
    batches = tuple(_batches(resumed, token_batches, compute_kl))
    if not batches:
        raise ValueError("There are no token batches to predict from.")
    return CleanLosses(resumed, batches, compute_kl)


def _batches(resumed: ResumedModel, token_batches: Iterable[torch.Tensor], compute_kl: bool) -> Iterator[CleanBatch]:
    keep = compute_kl
    for tokens in token_batches:
        tokens = tokens.cpu()
        hidden, unembedded, logits = resumed.forward(tokens)
        keep = keep and torch.equal(resumed.unembed(unembedded), logits)  # else caps or scales come after it
        own = logits if compute_kl else None
        yield CleanBatch(
            tokens=tokens,
            hidden=hidden.cpu(),
            unembedded=unembedded.cpu() if keep else None,
            clean=token_losses(logits, tokens),
            ablated=token_losses(resumed.logits(torch.zeros_like(hidden), tokens), tokens, own),
        )


def token_losses(logits: torch.Tensor, tokens: torch.Tensor, own: torch.Tensor | None = None) -> TokenLosses:
    """Cross-entropy and KL divergence of each prediction, a few contexts at a time: a vocabulary is larger than a CPU's caches.

    Args:
        logits: `[contexts, length, vocabulary]`.
        tokens: `[contexts, length]`.
        own: logits of the model as it is, which `logits` diverge from; None for no KL divergence.
    """
    following = tokens[:, 1:, None].to(logits.device)
    ce: list[torch.Tensor] = []
    kl: list[torch.Tensor] = []
    at_once = max(1, LOGITS_AT_ONCE // logits[0].numel())
    for rows in torch.arange(len(logits), device=logits.device).split(at_once):
        log_q = logits[rows].log_softmax(dim=-1)
        ce.append(-log_q[:, :-1].gather(-1, following[rows]).squeeze(-1))
        if own is not None:
            kl.append(kl_div(log_q, own[rows].softmax(dim=-1), reduction="none").sum(dim=-1))
    return TokenLosses(torch.cat(ce).cpu(), torch.cat(kl).cpu() if own is not None else None)

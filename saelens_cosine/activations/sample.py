"""Tokens with their activations at a hook, and which of them are ordinary: what every diagnostic here is measured on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from saelens_cosine.activations.hook_points import activations_at, device_of, of_head
from saelens_cosine.activations.norm_filter import HighNormFilter, token_norms

Sinks = Literal["keep", "drop", "both"]
"""What happens to tokens of a very high norm (attention sinks): they are measured, left out, or both are reported."""


@dataclass(frozen=True)
class TokenSample:
    """
    Activations at one hook of whole contexts.

    Args:
        activations (torch.Tensor): `[tokens, d_in]` float32 on the CPU, context after context.
        tokens (torch.Tensor): `[tokens]` int64, token ids.
        contexts (torch.Tensor): `[tokens]` int64, the number of each token's context.
        documents (torch.Tensor): `[tokens]` int64, the number of the document that each token's context is from.
        positions (torch.Tensor): `[tokens]` int64, places in the context.
        ordinary (torch.Tensor): `[tokens]` booleans, False for the high-norm tokens.
        max_norm_multiple (float | None): Multiple of the median norm above which a token is not ordinary; None: all are.
    """

    activations: torch.Tensor
    tokens: torch.Tensor
    contexts: torch.Tensor
    documents: torch.Tensor
    positions: torch.Tensor
    ordinary: torch.Tensor
    max_norm_multiple: float | None

    def __len__(self) -> int:
        return len(self.activations)

    @property
    def norms(self) -> torch.Tensor:
        """`[tokens]`, `||x||`."""
        return token_norms(self.activations)

    @property
    def high_norm_share(self) -> float:
        """Share of the tokens that is not ordinary."""
        return 1 - self.ordinary.double().mean().item()

    def where(self, keep: torch.Tensor) -> TokenSample:
        """The tokens that a mask `[tokens]` keeps."""
        kept = {name: tensor[keep] for name, tensor in vars(self).items() if name != "max_norm_multiple"}
        return replace(self, **kept)

    def without_sinks(self) -> TokenSample:
        """The ordinary tokens."""
        return self.where(self.ordinary)


def hook_activations(model: Any, hook_name: str, tokens: torch.Tensor, head: int | None = None) -> torch.Tensor:
    """Activations of `tokens [contexts, length]` at a hook, `[contexts, length, d_in]` float32 on the CPU; arguments as in `sample_tokens`."""
    found = activations_at(model.run_with_cache, [hook_name], tokens.to(device_of(model)))
    return of_head(found[hook_name], head).float().cpu()


@torch.no_grad()
def sample_tokens(
    model: Any,
    hook_name: str,
    token_batches: Iterable[torch.Tensor],
    max_norm_multiple: float | None = 10.0,
    documents: torch.Tensor | None = None,
    seen: torch.Tensor | None = None,
    head: int | None = None,
) -> TokenSample:
    """Run a hooked model over contexts and keep its activations at a hook, those of one attention head or heads flattened.

    Args:
        model: as SAELens' runners take it (HookedTransformer, bridge, or the wrapper of a Hugging Face model).
        hook_name: a hook point of it.
        token_batches: `[contexts, length]` int64 each.
        max_norm_multiple: tokens above this multiple of the sample's median norm are marked as not ordinary.
        documents: `[contexts]` int64, the document of each context; each is one of its own if None.
        seen: `[contexts, length]` booleans, the tokens that are kept (see `ContextForm.seen`); all if None.
        head: number of the attention head; None for all of them.

    Raises:
        ValueError: no batches.
    """
    activations: list[torch.Tensor] = []
    tokens: list[torch.Tensor] = []
    contexts: list[torch.Tensor] = []
    positions: list[torch.Tensor] = []
    n_contexts = 0
    for batch in token_batches:
        activations.append(hook_activations(model, hook_name, batch, head).flatten(0, 1))
        tokens.append(batch.flatten().cpu())
        rows = torch.arange(n_contexts, n_contexts + len(batch)).unsqueeze(-1)
        contexts.append(rows.expand(batch.shape).flatten())
        positions.append(torch.arange(batch.shape[1]).expand(batch.shape).flatten())
        n_contexts += len(batch)
    if not activations:
        raise ValueError("There are no token batches to sample from.")
    x, context = torch.cat(activations), torch.cat(contexts)
    document = context if documents is None else documents[context]
    keep = torch.ones_like(context, dtype=torch.bool) if seen is None else seen.flatten()
    ordinary = torch.ones_like(keep)
    ordinary[keep] = HighNormFilter(max_norm_multiple).keep(x[keep])
    sample = TokenSample(x, torch.cat(tokens), context, document, torch.cat(positions), ordinary, max_norm_multiple)
    return sample if seen is None else sample.where(keep)

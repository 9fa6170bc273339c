"""Edits of the token that is read, run as branches of its context: one more token each, where a pass of their own runs all before it again.

A branch stands after the context, at the edited token's position, and attends to what came before that and to itself. Models of
Transformers are told so with an attention mask and position ids. Whether a model heeds them is tried, on a few tokens.
"""

from __future__ import annotations

import sys
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, cast

import torch

from saelens_cosine.metrics.causal.resumed import ResumedModel

REACHES = (
    "sliding_window",
    "window_size",
    "attention_window_size",
    "local_attention_window_size",
    "attention_chunk_size",
    "local_attention",
)
"""What configs call how far attention reaches back in some layers, by number of keys or in chunks: a branch stands behind the others."""

ROTARY = ("rope_theta", "rope_parameters", "rope_scaling", "rotary_dim", "rotary_pct")
"""What configs have whose models take positions of any number; others may keep masks of `max_position_embeddings`."""

TRIED_TOKENS = 6
"""Of the context that a model is tried with."""

TOLERANCE = 1e-3
"""By how much a log-probability may differ from that of a pass of its own: a mask that is not heeded changes it by more."""


class Branches:
    """
    A resumed model that takes branches.

    Args:
        resumed (ResumedModel): The model.
        inner (torch.nn.Module): Transformers' own, inside it.
        longest (int | None): Tokens, those of the branches too, that a pass may have; None for any.
    """

    def __init__(self, resumed: ResumedModel, inner: torch.nn.Module, longest: int | None):
        self.resumed, self.inner, self.longest = resumed, inner, longest

    @classmethod
    def of(cls, resumed: ResumedModel) -> Branches | None:
        """None for a model that takes none: TransformerLens' own, recurrent ones, one in half precision, where it could not be tried."""
        model: Any = resumed.model
        inner = getattr(model, "original_model", None) or getattr(model, "model", None)
        if not isinstance(inner, torch.nn.Module):
            return None
        try:
            config = cast("Any", inner).config.get_text_config()
            if next(inner.parameters()).dtype not in (torch.float32, torch.float64):
                return None
            found = cls(resumed, inner, _longest(config))
            return found if found.room(TRIED_TOKENS) >= 4 and found._heeded() else None
        except Exception:  # of any kind: a model may do as it likes with what it does not know
            return None

    def room(self, length: int) -> int:
        """How many branches contexts of this length may have in a pass."""
        return sys.maxsize if self.longest is None else max(0, self.longest - length)

    @torch.no_grad()
    def log_probs(
        self, hidden: torch.Tensor, tokens: torch.Tensor, at: torch.Tensor, edited: torch.Tensor
    ) -> torch.Tensor:
        """Log-probabilities after tokens of one context, each edited on its own, `[edits, vocabulary]` on the model's device.

        Args:
            hidden: `[length, d_in]`, the context at the hook.
            tokens: `[length]`, its tokens.
            at: `[edits]`, the position of each edit, whose prediction is read.
            edited: `[edits, d_in]`, what is put there.
        """
        n, edits = int(at.max()) + 1, len(at)
        seen = torch.zeros(n + edits, n + edits, dtype=torch.bool)
        seen[:n, :n] = torch.ones(n, n, dtype=torch.bool).tril()
        seen[n:, :n] = torch.arange(n) < at.unsqueeze(-1)
        seen[n:, n:] = torch.eye(edits, dtype=torch.bool)
        positions = torch.cat([torch.arange(n), at])
        with self._told(seen, positions):
            return self.resumed.log_probs(
                torch.cat([hidden[:n], edited]).unsqueeze(0),
                torch.cat([tokens[:n], tokens[at]]).unsqueeze(0),
                torch.arange(n, n + edits).unsqueeze(0),
            ).squeeze(0)

    @contextmanager
    def _told(self, seen: torch.Tensor, positions: torch.Tensor) -> Generator[None]:
        """Within it the model sees only what `seen [queries, keys]` allows, from these positions."""
        dtype, device = next(self.inner.parameters()).dtype, self.resumed.device
        mask = torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)[None, None].to(device)
        told = {"attention_mask": mask, "position_ids": positions.unsqueeze(0).to(device)}
        handle = self.inner.register_forward_pre_hook(
            lambda _module, inputs, kwargs: (inputs, kwargs | told), with_kwargs=True
        )
        try:
            yield
        finally:
            handle.remove()

    def _heeded(self) -> bool:
        tokens = torch.arange(TRIED_TOKENS)
        hidden = self.resumed.run(tokens.unsqueeze(0), tokens[-1:])[0][0].cpu()
        at = torch.tensor([4, 2, 4, 0])
        edited = hidden[at] * torch.tensor([0.5, 2.0, 0.0, 1.5]).unsqueeze(-1).to(hidden)
        copies = hidden.repeat(len(at), 1, 1)
        copies[torch.arange(len(at)), at] = edited
        alone = self.resumed.log_probs(copies, tokens.repeat(len(at), 1), at)
        return torch.allclose(self.log_probs(hidden, tokens, at, edited), alone, rtol=0, atol=TOLERANCE)


def _longest(config: Any) -> int | None:
    names = REACHES if any(hasattr(config, name) for name in ROTARY) else (*REACHES, "max_position_embeddings")
    found = [getattr(config, name, None) for name in names]
    return min((size for size in found if isinstance(size, int) and size > 0), default=None)

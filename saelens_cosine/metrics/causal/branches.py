"""Edits of the token that is read, run as branches of its context: one more token each, where a pass of their own runs all before it again.

A branch stands after the context, at the edited token's position, and attends to what came before that and to itself. Models of
Transformers are told so with an attention mask and position ids. Whether a model heeds them is tried, on a few tokens.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch

from saelens_cosine.metrics.causal.resumed import ResumedModel

NOT_HEEDED = (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)
"""What models raise that take no such mask."""

TOLERANCE = 1e-3
"""By how much a log-probability may differ from that of a pass of its own: a mask that is not heeded changes it by more."""


class Branches:
    """
    A resumed model that takes branches.

    Args:
        resumed (ResumedModel): The model.
        inner (torch.nn.Module): Transformers' own, inside it.
        longest (int | None): Positions that its attention reaches back, beyond which branches would see more; None for all.
    """

    def __init__(self, resumed: ResumedModel, inner: torch.nn.Module, longest: int | None):
        self.resumed, self.inner, self.longest = resumed, inner, longest

    @classmethod
    def of(cls, resumed: ResumedModel) -> Branches | None:
        """None for a model that takes none: TransformerLens' own, recurrent ones, one in half precision, where it could not be tried."""
        model: Any = resumed.model
        inner = getattr(model, "original_model", None) or getattr(model, "model", None)
        config = getattr(inner, "config", None)
        if not isinstance(inner, torch.nn.Module) or config is None:
            return None
        if next(inner.parameters()).dtype not in (torch.float32, torch.float64):
            return None
        found = cls(resumed, inner, getattr(config.get_text_config(), "sliding_window", None))
        try:
            return found if found._heeded() else None
        except NOT_HEEDED:
            return None

    def reach(self, length: int) -> bool:
        """Whether contexts of this length may be branched."""
        return self.longest is None or length <= self.longest

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
        tokens = torch.arange(6)
        hidden = self.resumed.run(tokens.unsqueeze(0), torch.tensor([5]))[0][0].cpu()
        at = torch.tensor([4, 2, 4, 0])
        edited = hidden[at] * torch.tensor([0.5, 2.0, 0.0, 1.5]).unsqueeze(-1).to(hidden)
        copies = hidden.repeat(len(at), 1, 1)
        copies[torch.arange(len(at)), at] = edited
        alone = self.resumed.log_probs(copies, tokens.repeat(len(at), 1), at)
        return torch.allclose(self.log_probs(hidden, tokens, at, edited), alone, rtol=0, atol=TOLERANCE)

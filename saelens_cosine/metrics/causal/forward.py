"""A model's predictions after its activations at a hook are edited, against its clean ones.

Clean activations and predictions are computed once. An edited forward pass starts at the hook where the model can do that, and
only the tokens whose prediction is read are unembedded. What comes after them is not run, and where nothing before them changes, and the
model allows it, what comes before is run once for many edits (`branches`). The released code runs the whole model two or three times for each feature
and text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from saelens_cosine.activations.norm_filter import HighNormFilter
from saelens_cosine.activations.sample import TokenSample
from saelens_cosine.metrics.causal.branches import Branches
from saelens_cosine.metrics.causal.resumed import LOGITS_AT_ONCE, ResumedModel
from saelens_cosine.metrics.not_finite import NotFiniteError

TOKENS_AT_ONCE = 4096
"""Tokens in one forward pass, or one context if that is longer."""

EDITED_AT_ONCE = 4
"""So many times the contexts of one forward pass are edited together: of those of one context that are branches, a pass takes more."""

BRANCHED_PASS = 256
"""Tokens that a pass over one context costs beside its own: many contexts in a pass take less than as many passes."""

Edit = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""`edit(hidden, rows)`: float32 activations `[rows, length, d_in]` of the edits with numbers `rows [rows]`, changed."""


def kl_divergence(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """KL(p || q) in nats along the last dimension, zero or positive whatever the rounding.

    The sum of `p d + q - p` with `d = log p - log q`. Without `q - p`, which sums to zero, terms of either sign cancel and
    leave tiny negative sums; with it no term is negative, and an error of normalisation counts by its square. So float32
    is enough: the result differs from float64's by about 1e-6 of itself, or 1e-12 nats.
    """
    p, q, d = log_p.exp(), log_q.exp(), log_p - log_q
    near = p * (d + torch.expm1(-d)).clamp_min(0)  # the same; exact for small d, but overflows for large ones
    far = torch.where(p > 0, p * d, 0) + q - p
    return torch.where(d.abs() < 1, near, far).sum(dim=-1)


@dataclass(frozen=True)
class CleanRun:
    """
    Contexts as the model runs them, the starting point of edits. On the CPU.

    Args:
        resumed (ResumedModel): The model and the hook.
        tokens (torch.Tensor): `[contexts, length]` int64.
        read (torch.Tensor): `[contexts]` int64, the position of each context whose prediction is compared: its last token.
        hidden (torch.Tensor): `[contexts, length, d_in]`, activations at the hook in the model's dtype, of the head or heads flattened.
        log_probs (torch.Tensor): `[contexts, vocabulary]` float32, the clean prediction.
        branches (Branches | None): Runs edits of the token that is read at the price of a token each; None for models that cannot.
        origin (torch.Tensor | None): `[contexts]`, the same number for copies of one context; None where there are no copies.
    """

    resumed: ResumedModel
    tokens: torch.Tensor
    read: torch.Tensor
    hidden: torch.Tensor
    log_probs: torch.Tensor
    branches: Branches | None = None
    origin: torch.Tensor | None = None

    def sample(self, max_norm_multiple: float | None = 10.0) -> TokenSample:
        """The tokens of these contexts, up to the one that is read: what SAEs are measured on and what may be edited.

        Args:
            max_norm_multiple: as in `sample_tokens`.
        """
        length = self.tokens.shape[1]
        inside = torch.arange(length) <= self.read.unsqueeze(-1)
        contexts, positions = inside.nonzero(as_tuple=True)
        activations = self.hidden[inside].float()
        ordinary = HighNormFilter(max_norm_multiple).keep(activations)
        return TokenSample(activations, self.tokens[inside], contexts, contexts, positions, ordinary, max_norm_multiple)

    def holds(self, sample: TokenSample) -> torch.Tensor:
        """`[contexts, length]` booleans: the tokens that a sample of these contexts has.

        Raises:
            ValueError: the sample is not of these contexts.
        """
        if len(sample) == 0:
            raise ValueError("The sample has no tokens.")
        n, length = self.tokens.shape
        if int(sample.contexts.max()) >= n or int(sample.positions.max()) >= length:
            raise ValueError(f"The sample has tokens beyond these {n} contexts of {length} tokens; take run.sample().")
        if not torch.equal(self.tokens[sample.contexts, sample.positions], sample.tokens):
            raise ValueError("The sample's tokens are not those of these contexts; take run.sample().")
        mask = torch.zeros((n, length), dtype=torch.bool)
        mask[sample.contexts, sample.positions] = True
        return mask

    def read_rows(self, sample: TokenSample) -> torch.Tensor:
        """Rows of a sample that are the token read of their context; contexts that the sample holds to the end."""
        self.holds(sample)
        return (sample.positions == self.read[sample.contexts]).nonzero().squeeze(-1)

    def at(self, contexts: torch.Tensor, positions: torch.Tensor) -> CleanRun:
        """Some of the contexts `[n]`, repeats allowed, each read at another position `[n]`."""
        log_probs = self.log_probs.new_empty(len(contexts), self.log_probs.shape[-1])
        origin = self._origin(contexts)
        for one in origin.unique():
            for rows in (origin == one).nonzero().squeeze(-1).split(LOGITS_AT_ONCE // self.log_probs.shape[-1] or 1):
                first, end = contexts[rows[:1]], int(positions[rows].max()) + 1
                found = self.resumed.log_probs(
                    self.hidden[first, :end], self.tokens[first, :end], positions[rows].unsqueeze(0)
                )
                log_probs[rows] = found.squeeze(0).cpu()
        return replace(
            self,
            tokens=self.tokens[contexts],
            hidden=self.hidden[contexts],
            read=positions,
            log_probs=log_probs,
            origin=origin,
        )

    def alone(self, activations: torch.Tensor) -> CleanRun:
        """Activations `[n, d_in]`, each as the only one of a context with one token, whose own is replaced by it.

        The paper's one-token protocols. Nothing comes before the token, so no attention: a degenerate context.
        """
        hidden = activations.to(self.hidden.dtype).unsqueeze(1)
        tokens, read = torch.zeros((len(hidden), 1), dtype=torch.int64), torch.zeros(len(hidden), dtype=torch.int64)
        lone = replace(self, tokens=tokens, hidden=hidden, read=read, origin=None)
        parts = [
            lone.resumed.log_probs(hidden[rows], tokens[rows], read[rows]).cpu()
            for rows in torch.arange(len(hidden)).split(lone._contexts_at_once())
            if len(rows)  # not every model takes no contexts
        ]
        return replace(lone, log_probs=torch.cat([self.log_probs[:0], *parts]))

    def predictions(
        self, contexts: torch.Tensor, edit: Edit
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Edited predictions beside clean ones, batch by batch, of the edits that change something.

        Args:
            contexts: `[edits]`, the context that each edit is of.
            edit: makes them.

        Yields:
            Numbers of the edits `[b]` on the CPU, and clean and edited log-probabilities `[b, vocabulary]`.
        """
        if len(contexts) == 0:
            return
        read, origin = self.read[contexts], self._origin(contexts)
        # those of a context, and of like lengths, together
        order = read.argsort(stable=True) if self.branches is None else (origin * self.tokens.shape[1] + read).argsort()
        for rows in order.split(self._contexts_at_once() * (EDITED_AT_ONCE if self.branches else 1)):
            hidden = self.hidden[contexts[rows]]
            edited = edit(hidden.to(torch.float32, copy=True), rows).to(hidden.dtype)
            differs = (edited != hidden).any(dim=-1)
            for part, log_q in self._run(contexts[rows], edited, differs):
                yield rows[part], self.log_probs[contexts[rows[part]]].to(log_q), log_q

    def _run(
        self, contexts: torch.Tensor, edited: torch.Tensor, differs: torch.Tensor
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Places among the edits `[b]`, and their predictions, where `differs [b, length]` at any token.

        Those that change nothing but the token read are branches of their context, where that is worth a pass of its own.
        """
        read, left = self.read[contexts], differs.any(dim=-1)
        at_end = (differs.sum(dim=-1) == 1) & differs[torch.arange(len(read)), read]
        for part in self._branches_of(contexts, read, at_end):
            assert self.branches is not None
            left[part] = False
            context = contexts[part[0]]
            ends = edited[part, read[part]]
            yield part, self.branches.log_probs(self.hidden[context], self.tokens[context], read[part], ends)
        whole = left.nonzero().squeeze(-1)
        for part in whole[read[whole].argsort(stable=True)].split(self._contexts_at_once()):
            if len(part):  # not every model takes no contexts
                length = int(read[part].max()) + 1  # what comes after has no say
                tokens = self.tokens[contexts[part], :length]
                yield part, self.resumed.log_probs(edited[part, :length], tokens, read[part])

    def _branches_of(self, contexts: torch.Tensor, read: torch.Tensor, at_end: torch.Tensor) -> Iterator[torch.Tensor]:
        """Of the edits `at_end [b]`, those of one context that run together, context by context."""
        if self.branches is None or not bool(at_end.any()):
            return
        origin = self._origin(contexts)
        for one in origin[at_end].unique():
            every = (at_end & (origin == one)).nonzero().squeeze(-1)
            length = int(read[every].max()) + 1
            for part in every.split(max(1, self.branches.room(length))):
                if len(part) * length > BRANCHED_PASS + length + len(part):  # never of one, as where there is no room
                    yield part

    def _origin(self, contexts: torch.Tensor) -> torch.Tensor:
        """Numbers that are the same for copies of one context."""
        return contexts if self.origin is None else self.origin[contexts]

    def kl(self, contexts: torch.Tensor, edit: Edit) -> torch.Tensor:
        """KL(clean || edited) of the token read, in nats: `[edits]` float64, 0 for edits that change nothing.

        Args: as for `predictions`.

        Raises:
            NotFiniteError: a divergence is NaN, as activations that are not finite make it.
        """
        kl = torch.zeros(len(contexts), dtype=torch.float64)
        for rows, log_p, log_q in self.predictions(contexts, edit):
            kl[rows] = kl_divergence(log_p, log_q).cpu().double()
        if bad := int(kl.isnan().sum()):
            raise NotFiniteError("Predictions after an edit", bad, len(kl), "edits")
        return kl

    def _contexts_at_once(self) -> int:
        vocabulary = self.log_probs.shape[-1]
        return max(1, min(TOKENS_AT_ONCE // self.tokens.shape[1], LOGITS_AT_ONCE // vocabulary))


def clean_run(
    model: Any,
    hook_name: str,
    tokens: torch.Tensor,
    read: torch.Tensor | None = None,
    head: int | None = None,
) -> CleanRun:
    """Run a hooked model over contexts once and keep its activations at a hook and its predictions.

    Args:
        model: HookedTransformer, TransformerBridge, or SAELens' wrapper of a Hugging Face model.
        hook_name: a hook point of it.
        tokens: `[contexts, length]` int64. Shorter texts are padded on the right, with any token.
        read: `[contexts]`, the position of each text's last token; None: the contexts' end.
        head: the attention head that is edited; None for all of them.

    Raises:
        ValueError: no such hook point, tokens of another shape, or read positions outside of them.
    """
    if tokens.ndim != 2 or tokens.numel() == 0:
        raise ValueError(f"tokens of shape {tuple(tokens.shape)} are not [contexts, length].")
    n, length = tokens.shape
    read = torch.full((n,), length - 1) if read is None else read.cpu().long()
    if read.shape != (n,) or int(read.min()) < 0 or int(read.max()) >= length:
        raise ValueError(f"read must hold {n} positions from 0 to {length - 1}, one for each context.")
    resumed, tokens = ResumedModel(model, hook_name, head), tokens.cpu().long()
    hidden: list[torch.Tensor] = []
    log_probs: list[torch.Tensor] = []
    for rows in torch.arange(n).split(max(1, TOKENS_AT_ONCE // length)):
        activations, predictions = resumed.run(tokens[rows], read[rows])
        hidden.append(activations.cpu())
        log_probs.append(predictions.cpu())
    return CleanRun(resumed, tokens, read, torch.cat(hidden), torch.cat(log_probs), Branches.of(resumed))

"""Shares of dead features by the four definitions in use, which do not agree and must not be mixed (arXiv 2606.15054, released code)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from sae_lens.saes.sae import SAE

from saelens_cosine.kernels.codes import EntryCodes

ONE_IN = 1000
"""A feature is rare when it fires on at most one token in so many."""


@dataclass(frozen=True)
class DeadShares:
    """
    Share of an SAE's features that is dead, by definition.

    Args:
        tokens (int): Tokens that the first two are counted on.
        never_fired (float): Fires on none of these tokens. The headline "dead" of the authors, on 2 million tokens.
        rarely_fired (float): Fires on at most 0.1 % of these tokens; the complement of "alive" in experiments 53, 56b and 62.
        in_batch (float): Fires on none of a batch's tokens, mean over batches in the sample's order; the authors' early logs.
        batch_tokens (int): Tokens of such a batch.
        in_training (float | None): Had not fired for `training_window_tokens` when training ended, where the training log, the SAE or its metadata says so; None: unknown. 0 by construction if training was shorter than the window.
        training_window_tokens (int | None): That window; the authors' is 10 million.
    """

    tokens: int
    never_fired: float
    rarely_fired: float
    in_batch: float
    batch_tokens: int
    in_training: float | None
    training_window_tokens: int | None


def never_fired(fired: torch.Tensor) -> float:
    """Share of the features that fired on no token, from `fired [d_sae]`, the tokens that each fired on."""
    return (fired == 0).double().mean().item()


def rarely_fired(fired: torch.Tensor, tokens: int) -> float:
    """Share of the features that fired on at most 0.1 % of the tokens."""
    return (fired * ONE_IN <= tokens).double().mean().item()


class BatchDeaths:
    """Share of the features that do not fire in a batch, as batches go by in pieces."""

    def __init__(self, batch_tokens: int):
        self.batch_tokens = batch_tokens
        self._fired: torch.Tensor | None = None
        self._defined = True
        self._tokens = 0
        self._shares: list[float] = []

    def add(self, codes: EntryCodes) -> None:
        """Take in `codes [tokens, d_sae]` that are not 0; no piece may reach over the end of its batch."""
        self._defined &= bool(codes.values.isfinite().all())
        here = codes.entries.feature_counts > 0
        self._fired = here if self._fired is None else self._fired | here
        self._tokens += codes.entries.n_tokens
        if self._tokens == self.batch_tokens:
            self._shares.append(1 - self._fired.double().mean().item())
            self._fired, self._tokens = None, 0

    def mean(self) -> float:
        """Over whole batches: a shorter one at the end has more dead features for being shorter. NaN if a code is not finite."""
        return sum(self._shares) / len(self._shares) if self._defined else math.nan


def dead_in_training(sae: SAE[Any], metrics: Mapping[str, float] | None = None) -> tuple[float, int] | None:
    """Share of the features that were dead when training ended, and the window in tokens; None if nobody recorded it.

    Args:
        sae: a training form of this package counts itself; a saved form may say it in its metadata.
        metrics: the last entry of a `TrainingMonitor`'s log, which is in `comparison.json` too.
    """
    scored: Any = sae
    counts: Any = metrics or (scored.training_metrics() if hasattr(sae, "training_metrics") else sae.cfg.metadata)
    dead, window = counts.get("dead_features_in_token_window"), counts.get("dead_feature_window_tokens")
    return None if dead is None or window is None else (float(dead) / sae.cfg.d_sae, int(window))

"""What replacing activations costs the model's predictions, token by token (experiments 38 to 41)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from saelens_cosine.activations.sample import TokenSample
from saelens_cosine.metrics.causal.forward import CleanRun, Progress


@dataclass(frozen=True)
class SubstitutionKL:
    """
    KL(clean || replaced) of the next token, nats, over the tokens that were replaced.

    Args:
        tokens (int): Tokens replaced and measured. Others of their contexts, such as sinks that a sample leaves out, stay as they are.
        mean (float): Mean.
        median (float): Median.
        p90 (float): 90th percentile.
        p99 (float): 99th percentile.
    """

    tokens: int
    mean: float
    median: float
    p90: float
    p99: float


@torch.no_grad()
def substitution_kl(
    run: CleanRun,
    sample: TokenSample,
    replace: Callable[[torch.Tensor], torch.Tensor],
    on_progress: Progress | None = None,
) -> SubstitutionKL:
    """Replace the activations of a sample's tokens, all at once, and compare their predictions.

    Args:
        run: the clean run of the contexts.
        sample: `run.sample()` or a part of it.
        replace: from `[tokens, d_in]` float32 to the same; `reconstruct(sae)` for an SAE's reconstructions,
            `torch.nn.functional.normalize` for unit norms (experiment 38).
        on_progress: called after each batch.
    """
    where = run.holds(sample)
    contexts = where.any(dim=-1).nonzero().squeeze(-1)

    def edit(hidden: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        places = where[contexts[rows]]
        hidden[places] = replace(hidden[places])
        return hidden

    kl = run.kl_everywhere(contexts, edit, on_progress)[where[contexts]].numpy()
    median, p90, p99 = np.percentile(kl, [50, 90, 99]).tolist()
    return SubstitutionKL(len(kl), kl.mean().item(), median, p90, p99)

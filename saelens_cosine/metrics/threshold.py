"""A JumpReLU SAE's threshold, fitted to an L0."""

from __future__ import annotations

import math
import warnings
from typing import Any, NamedTuple

import torch
from sae_lens.saes.sae import SAE, TrainingSAE

from saelens_cosine.metrics.codes import scored_form, tokens_at_once
from saelens_cosine.metrics.flat_tokens import flat_heads
from saelens_cosine.saes.encoding import scores_above

SAMPLE_TOKENS = 2048
"""From whose scores the floor of all is taken."""

WORTH_A_SAMPLE = 2
"""So many times the sample's tokens from which on a sample is taken."""

SPARE = 1.5
"""So many times as many of the sample's scores as are wanted lie above the floor."""


class Threshold(NamedTuple):
    """
    A threshold that gives an L0.

    Args:
        value (float): Features are active when their score is above it.
        l0 (float): Active features per token on the activations that it was fitted on.
    """

    value: float
    l0: float


@torch.no_grad()
def fit_threshold(sae: SAE[Any], activations: torch.Tensor, target_l0: float) -> Threshold:
    """Set all thresholds of a JumpReLU SAE, in place, to the one value that gives an L0 on `[tokens, d_in]` activations.

    The exact quantile of all `tokens * d_sae` scores, of which never more than about twice the active ones are held: midway between
    the last that is active and the first that is not, so that neither depends on the last bits of a score. Among equal scores at the
    cut, all or none are active, whichever is nearer. Only positive scores can be active: if there are too few, the threshold is
    0 and a warning says which L0 that gives.

    Raises:
        ValueError: the SAE is not in an inference form or has no thresholds, or target_l0 is not between 0 and d_sae.
    """
    if isinstance(sae, TrainingSAE) or not hasattr(sae, "threshold"):
        raise ValueError(f"{type(sae).__name__} is no inference form with thresholds to fit; rescore makes one.")
    if not 0 < target_l0 < sae.cfg.d_sae:
        raise ValueError(f"target_l0={target_l0} must be above 0 and below d_sae={sae.cfg.d_sae}.")
    wanted = max(1, round(target_l0 * len(activations)))
    with flat_heads(sae):
        scores = _by_entry(sae, activations, target_l0, wanted)
        if scores is None:
            scores = _from_dense(sae, activations, wanted)
    active, value = len(scores), 0.0
    if active >= wanted:
        cut = scores.topk(wanted, sorted=False).values.min()
        above, below = scores[scores > cut], scores[scores < cut]
        active -= len(below)
        if wanted - len(above) <= active - wanted:  # none of those at the cut
            value = _between(above.min(), cut) if len(above) else cut.item()
            active = len(above)
        else:
            value = _between(cut, below.max() if len(below) else torch.zeros_like(cut))
    else:
        warnings.warn(
            f"Only {active / len(activations):.4g} scores per token are positive, so L0 cannot be {target_l0:.4g}; the "
            "threshold is 0. A larger scale makes more of them positive if b_enc is negative.",
            stacklevel=3,  # past torch's decorator
        )
    parameters: Any = sae
    parameters.threshold.fill_(value)
    return Threshold(value, active / len(activations))


def _from_dense(sae: SAE[Any], activations: torch.Tensor, wanted: int) -> torch.Tensor:
    """The `wanted` largest positive scores, or all where there are fewer, with what decides between them and the next."""
    chunks: list[torch.Tensor] = []
    held, floor = 0, 0.0
    for x in activations.split(tokens_at_once(sae)):
        scores = _scores(sae, x)
        chunks.append(scores[(scores > 0) & (scores >= floor)])
        held += chunks[-1].numel()
        if held > 2 * wanted:
            chunks = [_largest(torch.cat(chunks), wanted)]
            held, floor = chunks[0].numel(), chunks[0].min().item()
    return torch.cat(chunks)


def _by_entry(sae: SAE[Any], activations: torch.Tensor, target_l0: float, wanted: int) -> torch.Tensor | None:
    """The same, and some more, found without the dense scores of all tokens; None where that cannot be.

    A sample says which scores can be among them.
    """
    form = scored_form(sae, activations) if len(activations) > WORTH_A_SAMPLE * SAMPLE_TOKENS else None
    if form is None:
        return None
    sample = activations[:: -(-len(activations) // SAMPLE_TOKENS)]
    spare = math.ceil(SPARE * target_l0 * len(sample))
    held = _from_dense(sae, sample, spare)
    floor = held.topk(spare, sorted=False).values.min() if len(held) > spare else held.new_zeros(())
    parts = [scores_above(form, x.to(sae.device), floor) for x in activations.split(tokens_at_once(sae, activations))]
    found = torch.cat(parts)
    if len(found) <= wanted:
        return None
    cut = found.topk(wanted, sorted=False).values.min()
    return found if bool((found < cut).any()) else None


def _scores(sae: SAE[Any], x: torch.Tensor) -> torch.Tensor:
    """Pre-activations `[tokens, d_sae]` as they meet the threshold."""
    seen: list[torch.Tensor] = []
    with sae.hooks(fwd_hooks=[("hook_sae_acts_pre", lambda scores, hook: seen.append(scores))]):  # noqa: ARG005
        sae.encode(x.to(sae.device))
    return seen[0]


def _between(active: torch.Tensor, inactive: torch.Tensor) -> float:
    """A threshold that lets the larger of two scores pass and not the other, as far from both as their precision has it."""
    middle = (active.double() / 2 + inactive.double() / 2).to(active.dtype)
    return torch.where(middle < active, middle, inactive).item()


def _largest(scores: torch.Tensor, n: int) -> torch.Tensor:
    """The n largest, whatever equals the least of them, and the next one below; there are n or more."""
    cut = scores.topk(n, sorted=False).values.min()
    below = scores[scores < cut]
    return torch.cat([scores[scores >= cut], below.max()[None]]) if len(below) else scores

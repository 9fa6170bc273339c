"""What a model reads from an activation: its direction or its norm? Patches of one with the other kept (experiment 8).

No SAE is involved. Reference token A, donor token B of another context: the direction patch is B's direction with A's norm, the
norm patch A's direction with B's norm.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from saelens_cosine.activations.sample import TokenSample
from saelens_cosine.metrics.causal.forward import CleanRun

DRAWS = 200
"""How many times the wanted number of pairs is drawn in search of pairs that meet a control's conditions."""


@dataclass(frozen=True)
class Mean:
    """
    A mean with its 95 % interval, 1.96 standard errors either way; NaN where there is nothing to average.

    Args:
        mean (float): The mean.
        low (float): Lower end.
        high (float): Upper end.
    """

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Patches:
    """
    Direction and norm patches of one set of pairs. KL(reference || patched) in nats.

    Args:
        pairs (int): Pairs of tokens of different contexts; fewer than asked for if fewer were found, 0 if none.
        direction_kl (Mean): Of the direction patch.
        norm_kl (Mean): Of the norm patch.
        direction_larger (float): Share of the pairs whose direction patch has the larger KL.
        median_ratio (float): Median over pairs of direction KL over norm KL; infinite where the norm does not matter at all.
        mean_cosine (float): Between the two activations.
        mean_norm_ratio (float): The longer over the shorter.
    """

    pairs: int
    direction_kl: Mean
    norm_kl: Mean
    direction_larger: float
    median_ratio: float
    mean_cosine: float
    mean_norm_ratio: float


@dataclass(frozen=True)
class ScaledKL:
    """
    Activations times a number.

    Args:
        factor (float): The number.
        kl (Mean): KL(reference || scaled), nats.
    """

    factor: float
    kl: Mean


@dataclass(frozen=True)
class Patching:
    """
    Direction against norm.

    Args:
        context (Literal["alone", "text"]): Where activations were put: into a one-token context, as the paper does, or at the reference's own place.
        tokens (int): Tokens of the sample that pairs were drawn from.
        random (Patches): Pairs drawn at random.
        same_norm (Patches): Control: norms within 10 % and cosine below 0.5.
        same_direction (Patches): Control: cosine above 0.7 and norms 1.5 times apart or more.
        scaled (tuple[ScaledKL, ...]): Reference activations rescaled.
        rotated (Mean): Reference activations turned to a random direction, norm kept.
        rescaled_tokens (int): Tokens in `scaled` and in `rotated`.
    """

    context: Literal["alone", "text"]
    tokens: int
    random: Patches
    same_norm: Patches
    same_direction: Patches
    scaled: tuple[ScaledKL, ...]
    rotated: Mean
    rescaled_tokens: int


@torch.no_grad()
def direction_norm_patching(
    run: CleanRun,
    sample: TokenSample,
    pairs: int = 500,
    control_pairs: int = 200,
    rescaled_tokens: int = 100,
    factors: Sequence[float] = (0.5, 2.0, 5.0),
    context: Literal["alone", "text"] = "alone",
    seed: int = 0,
) -> Patching:
    """Patch directions and norms between random tokens of different contexts.

    Args:
        run: the clean run of some contexts.
        sample: `run.sample()` or a part of it; the paper's is without sinks.
        pairs: random pairs.
        control_pairs: pairs in each control, as far as `DRAWS` times so many random ones hold them.
        rescaled_tokens: tokens that are rescaled and rotated.
        factors: of the rescaling.
        context: `"alone"` puts activations into a one-token context, the paper's protocol; `"text"` at the reference's
            place in its own context, with the prediction read there.
        seed: of all draws.

    Raises:
        ValueError: another `context`, or a sample of a single context.
    """
    if context not in ("alone", "text"):
        raise ValueError(f"context={context!r} is none of 'alone', 'text'.")
    run.holds(sample)
    if bool((sample.contexts == sample.contexts[0]).all()):
        raise ValueError("All tokens of the sample are of one context; pairs are of two.")
    draw = _Draw(sample, torch.Generator().manual_seed(seed))
    effect = _Effect(run, sample, context)
    some = draw.rows(rescaled_tokens)
    x = sample.activations[some]
    turned = _with_norm_of(torch.randn(x.shape, generator=draw.rng), x)
    *scaled, rotated = effect.kls(some, *(factor * x for factor in factors), turned)
    return Patching(
        context=context,
        tokens=len(sample),
        random=effect.patches(*draw.pairs(pairs)),
        same_norm=effect.patches(*draw.pairs(control_pairs, lambda cosine, ratio: (ratio < 1.1) & (cosine < 0.5))),
        same_direction=effect.patches(*draw.pairs(control_pairs, lambda cosine, ratio: (ratio > 1.5) & (cosine > 0.7))),
        scaled=tuple(ScaledKL(factor, _mean(kl)) for factor, kl in zip(factors, scaled, strict=True)),
        rotated=_mean(rotated),
        rescaled_tokens=rescaled_tokens,
    )


class _Draw:
    """Draws tokens of a sample, alone or in pairs."""

    def __init__(self, sample: TokenSample, rng: torch.Generator):
        self.sample, self.rng = sample, rng

    def rows(self, n: int) -> torch.Tensor:
        return torch.randint(len(self.sample), (n,), generator=self.rng)

    def pairs(
        self, n: int, condition: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Up to n pairs of different contexts whose cosine and norm ratio, longer over shorter, meet a condition."""
        found = torch.zeros((2, 0), dtype=torch.int64)
        for _ in range(DRAWS):
            pair = torch.stack([self.rows(n), self.rows(n)])
            keep = self.sample.contexts[pair[0]] != self.sample.contexts[pair[1]]
            if condition:
                keep &= condition(*_cosine_and_ratio(self.sample, *pair))
            found = torch.cat([found, pair[:, keep]], dim=1)
            if found.shape[1] >= n:
                break
        return found[0, :n], found[1, :n]


def _cosine_and_ratio(sample: TokenSample, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x, y = sample.activations[a], sample.activations[b]
    one, other = x.norm(dim=-1), y.norm(dim=-1)
    return torch.cosine_similarity(x, y, dim=-1), torch.maximum(one, other) / torch.minimum(one, other)


@dataclass(frozen=True)
class _Effect:
    """KL of putting other activations in the place of a token's."""

    run: CleanRun
    sample: TokenSample
    context: str

    def kls(self, rows: torch.Tensor, *vectors: torch.Tensor) -> list[torch.Tensor]:
        """Of each of several `vectors [n, d_in]` in the place of the sample's `rows [n]`."""
        kinds = len(vectors)
        parts = [torch.zeros(kinds, 0, dtype=torch.float64)]
        order = self.sample.contexts[rows].argsort(stable=True)  # a context's clean predictions are made together
        for part in order.split(64):  # each has a copy of its context
            token = rows[part]
            if self.context == "alone":
                clean = self.run.alone(self.sample.activations[token])
            else:
                clean = self.run.at(self.sample.contexts[token], self.sample.positions[token])
            put = _put(clean, torch.cat([of[part] for of in vectors]))
            parts.append(clean.kl(torch.arange(len(part)).repeat(kinds), put).view(kinds, -1))
        return list(torch.cat(parts, dim=1)[:, order.argsort()])

    def patches(self, a: torch.Tensor, b: torch.Tensor) -> Patches:
        """Of references a and donors b."""
        x, y = self.sample.activations[a], self.sample.activations[b]
        direction, norm = self.kls(a, _with_norm_of(y, x), _with_norm_of(x, y))
        cosine, ratio = _cosine_and_ratio(self.sample, a, b)
        ratios = direction / norm
        return Patches(
            pairs=len(a),
            direction_kl=_mean(direction),
            norm_kl=_mean(norm),
            direction_larger=(direction > norm).double().mean().item(),
            median_ratio=ratios[~ratios.isnan()].nanmedian().item() if len(a) else float("nan"),
            mean_cosine=cosine.mean().item(),
            mean_norm_ratio=ratio.mean().item(),
        )


def _put(clean: CleanRun, vectors: torch.Tensor) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """The edit that puts vector i at the token read of context i, counted over and over again."""

    def put(hidden: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        hidden[torch.arange(len(rows)), clean.read[rows % len(clean.read)]] = vectors[rows]
        return hidden

    return put


def _with_norm_of(direction: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(direction, dim=-1) * norm.norm(dim=-1, keepdim=True)


def _mean(values: torch.Tensor) -> Mean:
    mean = values.mean().item()
    if len(values) < 2:
        return Mean(mean, float("nan"), float("nan"))
    half = 1.96 * (values.std() / len(values) ** 0.5).item()
    return Mean(mean, mean - half, mean + half)

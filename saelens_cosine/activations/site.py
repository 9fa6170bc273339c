"""What the activations at a hook are like: how far their mean is from zero for their spread, how long they are, where sinks stand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from saelens_cosine.activations.norm_filter import HighNormFilter
from saelens_cosine.activations.sample import TokenSample

MULTIPLE = 10.0
"""Of the median norm, above which a token is described as a sink where the sample keeps none apart."""

MOST = 5
"""Positions and token ids that are listed."""

_TOKENS_AT_ONCE = 8192
"""In float64."""


@dataclass(frozen=True)
class Part:
    """
    One position or token id among the sinks.

    Args:
        value (int): The position in the context, or the token id.
        share (float): Share of the sinks that have it.
    """

    value: int
    share: float


@dataclass(frozen=True)
class SinkTokens:
    """
    Tokens of a norm far above the others'.

    Args:
        tokens (int): How many.
        share (float): Of all tokens.
        median_norm (float): Of their norms, the lower one of the two in the middle.
        largest_norm (float): Largest of them.
        positions (tuple[Part, ...]): In the context, at most 5, the most frequent first.
        token_ids (tuple[Part, ...]): Likewise.
        token_texts (tuple[str, ...] | None): Text of each of these ids; None where no tokenizer tells.
    """

    tokens: int
    share: float
    median_norm: float
    largest_norm: float
    positions: tuple[Part, ...]
    token_ids: tuple[Part, ...]
    token_texts: tuple[str, ...] | None = None

    @property
    def shown_positions(self) -> str:
        """`0 (98%), 1 (2%)`."""
        return _shown(self.positions, [str(part.value) for part in self.positions])

    @property
    def shown_tokens(self) -> str:
        """`'The' (75%), 'A' (25%)`; ids where there are no texts."""
        ids = [str(part.value) for part in self.token_ids]
        return _shown(self.token_ids, ids if self.token_texts is None else list(map(repr, self.token_texts)))


def _shown(parts: Sequence[Part], names: Sequence[str]) -> str:
    """Without those that round to nothing, but the first."""
    told = [f"{name} ({part.share:.0%})" for part, name in zip(parts, names, strict=True)]
    return ", ".join(text for i, text in enumerate(told) if i == 0 or not text.endswith("(0%)"))


@dataclass(frozen=True)
class Site:
    """
    Activations at one hook, as their tokens' sample has them.

    Gamma is `||mean|| / ||standard deviation||`, the latter of each dimension: the root of the mean of `||x - mean||^2`. It predicts
    how many features of an inner-product SAE are dead before training (arXiv 2605.31518): near none at 1 and below, most of them at 15.

    Args:
        hook_name (str): The hook.
        d_in (int): Size of one token's activations.
        tokens (int): Tokens with finite activations; all figures are of these.
        not_finite (int): Tokens with others.
        contexts (int): Contexts that they stand in.
        gamma (float | None): Over all tokens; None where they are all the same.
        gamma_ordinary (float | None): Over the ordinary ones.
        median_norm (float): As the norm filter takes it: of tokens other than 0, the lower one of the two in the middle.
        p99_norm (float): What 1 % of all tokens exceed.
        largest_ordinary_norm (float): Largest norm that is no sink's.
        max_norm_multiple (float): Multiple of the median norm above which a token is a sink: the sample's, 10 if that has none.
        sinks (SinkTokens | None): None if there are none.
    """

    hook_name: str
    d_in: int
    tokens: int
    not_finite: int
    contexts: int
    gamma: float | None
    gamma_ordinary: float | None
    median_norm: float
    p99_norm: float
    largest_ordinary_norm: float
    max_norm_multiple: float
    sinks: SinkTokens | None


def describe_site(sample: TokenSample, hook_name: str, decode: Callable[[int], str] | None = None) -> Site:
    """What a sample's activations are like.

    Args:
        sample: whole, with its sinks.
        hook_name: where it is from.
        decode: the text of a token id, such as a tokenizer's.

    Raises:
        ValueError: no token of it has finite activations other than 0.
    """
    finite = sample.activations.isfinite().all(dim=-1)
    not_finite = int((~finite).sum())
    if not_finite:
        sample = sample.where(finite)
    norms = sample.norms
    above_zero = norms[norms > 0]
    if len(above_zero) == 0:
        raise ValueError(
            f"Of {len(finite):,} tokens at {hook_name}, {not_finite:,} have activations that are not finite, and the others zeros: "
            "there is nothing to describe. Run the language model in bfloat16 or float32, on more text."
        )
    given = sample.max_norm_multiple
    ordinary = sample.ordinary if given is not None else HighNormFilter(MULTIPLE).keep(sample.activations)
    return Site(
        hook_name=hook_name,
        d_in=sample.activations.shape[-1],
        tokens=len(sample),
        not_finite=not_finite,
        contexts=len(sample.contexts.unique()),
        gamma=_gamma(sample.activations),
        gamma_ordinary=_gamma(sample.activations[ordinary]),
        median_norm=above_zero.median().item(),
        p99_norm=torch.quantile(norms.double(), 0.99).item(),
        largest_ordinary_norm=norms[ordinary].max().item(),
        max_norm_multiple=MULTIPLE if given is None else given,
        sinks=_sinks(sample.where(~ordinary), len(sample), decode),
    )


def site_lines(site: Site) -> list[str]:
    """A site in sentences for a terminal."""
    aside = f"; {site.not_finite:,} tokens are not finite and left out" if site.not_finite else ""
    size = f"{site.tokens:,} tokens in {site.contexts:,} contexts, d_in {site.d_in:,}{aside}"
    norms = (
        f"Norms: median {_number(site.median_norm)}, 99 % up to {_number(site.p99_norm)}, "
        f"the largest ordinary one {_number(site.largest_ordinary_norm)}."
    )
    gamma = f"{site.hook_name}: gamma (||mean|| / ||standard deviation||) {_number(site.gamma)}"
    sinks, above = site.sinks, f"{site.max_norm_multiple:g} times the median norm"
    if sinks is None:
        return [f"{gamma}; {size}.", norms, f"No sinks: no token is above {above}."]
    return [
        f"{gamma} with sinks, {_number(site.gamma_ordinary)} without; {size}.",
        norms,
        f"Sinks: {sinks.share:.2%} of the tokens are above {above}, {_number(sinks.median_norm)} in the median and "
        f"{_number(sinks.largest_norm)} at most; at positions {sinks.shown_positions}; tokens {sinks.shown_tokens}.",
    ]


def _gamma(x: torch.Tensor) -> float | None:
    """`||mean|| / ||standard deviation||` of `x [tokens, d_in]`, with sums in float64."""
    parts = x.split(_TOKENS_AT_ONCE)
    mean = sum((part.double().sum(dim=0) for part in parts), torch.zeros(x.shape[-1], dtype=torch.float64)) / len(x)
    variance = sum((part.double() - mean).square().sum().item() for part in parts) / len(x)
    return mean.norm().item() / variance**0.5 if variance > 0 else None


def _sinks(sinks: TokenSample, all_tokens: int, decode: Callable[[int], str] | None) -> SinkTokens | None:
    if not len(sinks):
        return None
    norms, ids = sinks.norms, _most_frequent(sinks.tokens)
    return SinkTokens(
        tokens=len(sinks),
        share=len(sinks) / all_tokens,
        median_norm=norms.median().item(),
        largest_norm=norms.max().item(),
        positions=_most_frequent(sinks.positions),
        token_ids=ids,
        token_texts=None if decode is None else tuple(decode(part.value) for part in ids),
    )


def _most_frequent(values: torch.Tensor) -> tuple[Part, ...]:
    """Of equally frequent ones, the smaller first."""
    found, counts = values.unique(return_counts=True)
    order = counts.argsort(descending=True, stable=True)[:MOST]
    return tuple(Part(int(found[i]), int(counts[i]) / len(values)) for i in order)


def _number(value: float | None) -> str:
    if value is None:
        return "undefined"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:#.3g}"

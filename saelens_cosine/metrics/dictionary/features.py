"""What a dashboard shows of each feature: how often it is active, where most, and what its decoder row writes.

Contexts pass by once. Kept of them are the active codes of each feature's best contexts and those contexts' tokens: memory
grows with features times contexts per feature, not with the corpus.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from sae_lens.saes.sae import SAE
from sae_lens.util import extract_stop_at_layer_from_tlens_hook_name

from saelens_cosine.activations.contexts import ContextForm
from saelens_cosine.activations.hook_points import device_of, of_head
from saelens_cosine.activations.norm_filter import HighNormFilter
from saelens_cosine.metrics.codes import most_at_once
from saelens_cosine.metrics.flat_tokens import flat_heads
from saelens_cosine.saes.scored_sae import ScoredSAE

MERGE_CODES = 2**20
"""New codes that wait to be compared with those kept: 20 MiB."""

_SHIFT = 2**32  # a pair of a feature and a context as one number: feature * 2**32 + context


class TokenValue(NamedTuple):
    """A token and the logit that a decoder row adds to it."""

    token: str
    value: float


class Context(NamedTuple):
    """The tokens of a context and a feature's code at each."""

    tokens: tuple[str, ...]
    values: tuple[float, ...]


@dataclass(frozen=True)
class FeatureDashboard:
    """
    What is shown of one feature.

    Args:
        index (int): Its number in the SAE.
        density (float): Share of the evaluated tokens at which it is not zero.
        top_logits (tuple[TokenValue, ...]): Largest of `W_dec[index] @ W_U` first; empty where the SAE does not write into the residual stream.
        bottom_logits (tuple[TokenValue, ...]): Smallest first.
        contexts (tuple[Context, ...]): Contexts with the largest codes, the largest first.
    """

    index: int
    density: float
    top_logits: tuple[TokenValue, ...]
    bottom_logits: tuple[TokenValue, ...]
    contexts: tuple[Context, ...]


class _Pairs(NamedTuple):
    """Features in contexts, `feature * 2**32 + context`, and the largest code of each."""

    numbers: torch.Tensor
    scores: torch.Tensor


class _Codes(NamedTuple):
    """Codes: the number of their pair, their position in its context, their value."""

    pairs: torch.Tensor
    positions: torch.Tensor
    values: torch.Tensor


class TopActivations:
    """
    Running counts and best contexts of every feature.

    Args:
        d_sae (int): Features.
        n_contexts (int): Contexts kept of each feature.
    """

    def __init__(self, d_sae: int, n_contexts: int):
        self.n_contexts = n_contexts
        self.active = torch.zeros(d_sae, dtype=torch.int64)
        self.tokens_evaluated = self.tokens_seen = self.contexts_seen = 0
        self._lowest = torch.zeros(d_sae)  # what a context must exceed to be kept
        none = torch.zeros(0, dtype=torch.int64)
        self._pairs = _Pairs(none, torch.zeros(0))  # feature by feature, the best first
        self._starts = torch.zeros(d_sae + 1, dtype=torch.int64)  # where in them each feature begins
        self._codes = _Codes(none, none, torch.zeros(0))  # theirs, by the pairs' numbers
        self._tokens: dict[int, torch.Tensor] = {}
        self._new: list[tuple[_Pairs, _Codes]] = []  # not merged yet

    @property
    def density(self) -> torch.Tensor:
        """`[d_sae]`, share of the evaluated tokens at which each feature is not zero."""
        return self.active / max(1, self.tokens_evaluated)

    @property
    def high_norm_share_dropped(self) -> float:
        """Share of the tokens that the filter left out, and those that the SAE was not trained on."""
        return 1 - self.tokens_evaluated / self.tokens_seen if self.tokens_seen else 0.0

    def add(self, tokens: torch.Tensor, rows: torch.Tensor, features: torch.Tensor, values: torch.Tensor) -> None:
        """Take in the active codes of some contexts.

        Args:
            tokens: `[contexts, positions]`.
            rows: `[N]`, which of the `contexts * positions` tokens each code belongs to.
            features: `[N]` its feature.
            values: `[N]` its value, not zero.
        """
        width = tokens.shape[1]
        self.active += torch.bincount(features, minlength=len(self.active))
        pair_of_code = features * _SHIFT + self.contexts_seen + rows // width
        numbers, place = pair_of_code.unique(return_inverse=True)
        scores = torch.zeros(len(numbers)).scatter_reduce(0, place, values, "amax")  # 0 for negative codes alone
        better = scores > self._lowest[numbers // _SHIFT]
        codes = _Codes(pair_of_code, rows % width, values)
        self._new.append((_Pairs(numbers[better], scores[better]), _Codes(*(part[better[place]] for part in codes))))
        self._tokens |= {self.contexts_seen + i: row for i, row in enumerate(tokens.cpu().clone())}
        self.contexts_seen += len(tokens)
        if sum(len(new.values) for _, new in self._new) >= MERGE_CODES:
            self._merge()

    def _merge(self) -> None:
        """Of the pairs kept and the new ones keep the best of each feature, their codes, and their contexts' tokens."""
        pairs, codes = zip((self._pairs, self._codes), *self._new, strict=True)
        numbers, scores = (torch.cat(parts) for parts in zip(*pairs, strict=True))
        order = scores.argsort(descending=True, stable=True)  # of equals, the earlier context
        order = order[(numbers[order] // _SHIFT).argsort(stable=True)]
        features = numbers[order] // _SHIFT
        rank = torch.arange(len(order)) - torch.searchsorted(features, features)
        best, last = order[rank < self.n_contexts], rank == self.n_contexts - 1
        self._lowest[features[last]] = scores[order[last]]
        self._pairs = _Pairs(numbers[best], scores[best])
        self._starts = torch.searchsorted(numbers[best] // _SHIFT, torch.arange(len(self.active) + 1))

        pair_of_code, positions, values = (torch.cat(parts) for parts in zip(*codes, strict=True))
        kept = torch.isin(pair_of_code, self._pairs.numbers).nonzero().squeeze(1)
        kept = kept[pair_of_code[kept].argsort(stable=True)]
        self._codes = _Codes(pair_of_code[kept], positions[kept], values[kept])
        wanted = (self._pairs.numbers % _SHIFT).unique().tolist()
        self._tokens = {context: self._tokens[context] for context in wanted}
        self._new = []

    def contexts(self, feature: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Best contexts of a feature, the one with its largest code first: tokens `[positions]`, codes `[positions]`."""
        if self._new:
            self._merge()
        found: list[tuple[torch.Tensor, torch.Tensor]] = []
        for pair in self._pairs.numbers[self._starts[feature] : self._starts[feature + 1]]:
            first, stop = torch.searchsorted(self._codes.pairs, torch.stack([pair, pair + 1])).tolist()
            tokens = self._tokens[int(pair % _SHIFT)]
            values = torch.zeros(len(tokens))
            values[self._codes.positions[first:stop]] = self._codes.values[first:stop]
            found.append((tokens, values))
        return found


@torch.no_grad()
def top_activations(
    sae: SAE[Any],
    model: Any,
    token_batches: Iterable[torch.Tensor],
    n_contexts: int = 20,
    max_norm_multiple: float | None = None,
) -> TopActivations:
    """Run contexts through a model and an SAE and keep each feature's best.

    Args:
        sae: any SAELens SAE in its inference form; its metadata names the hook point.
        model: the hooked model that it was trained on.
        token_batches: `[contexts, positions]` tokens each, as `ActivationsStore.get_batch_tokens` gives them.
        n_contexts: contexts kept of each feature.
        max_norm_multiple: leave out tokens above this multiple of their batch's median norm, attention sinks above all.
            None keeps every token. SAEs trained with the filter name theirs in `sae.cfg.metadata.max_norm_multiple`.
    """
    found, norm_filter = TopActivations(sae.cfg.d_sae, n_contexts), HighNormFilter(max_norm_multiple)
    form = ContextForm.of(sae.cfg.metadata)
    with flat_heads(sae):
        for tokens in token_batches:
            activations = _at_hook(sae, model, tokens)
            keep = norm_filter.keep(activations).view(tokens.shape)
            evaluated = (keep & form.seen(model, tokens).to(keep.device)).flatten()
            found.tokens_seen += evaluated.numel()
            found.tokens_evaluated += int(evaluated.sum())
            rows = evaluated.nonzero().squeeze(1)
            places, features, values = _active_codes(sae, activations[rows])
            found.add(tokens, rows.cpu()[places], features, values)
    return found


def _at_hook(sae: SAE[Any], model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Activations `[contexts * positions, d_in]` on the SAE's device, heads flattened or the SAE's one picked."""
    hook, head = sae.cfg.metadata.hook_name, sae.cfg.metadata.hook_head_index
    stop = extract_stop_at_layer_from_tlens_hook_name(hook)
    _, cache = model.run_with_cache(
        tokens.to(device_of(model)), names_filter=[hook], stop_at_layer=stop, prepend_bos=False
    )
    return of_head(cache[hook], head).flatten(0, 1).to(sae.device)


def _active_codes(sae: SAE[Any], x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Row, feature and value of every code of `x [tokens, d_in]` that is not zero, on the CPU."""
    if isinstance(sae, ScoredSAE):
        codes = sae.encode_sparse(x)
        rows, places = (codes.values != 0).nonzero(as_tuple=True)
        return rows.cpu(), codes.indices[rows, places].cpu(), codes.values[rows, places].float().cpu()
    size = most_at_once(sae)
    found: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
    for start in range(0, max(1, len(x)), size):
        codes = sae.encode(x[start : start + size]).to_dense()
        rows, features = codes.nonzero(as_tuple=True)
        found.append(((rows + start).cpu(), features.cpu(), codes[rows, features].float().cpu()))
    rows, features, values = (torch.cat(parts) for parts in zip(*found, strict=True))
    return rows, features, values


@torch.no_grad()
def feature_dashboards(
    sae: SAE[Any],
    model: Any,
    activations: TopActivations,
    features: Iterable[int] | None = None,
    n_logits: int = 10,
    batch: int = 128,
) -> Iterator[FeatureDashboard]:
    """Dashboards of some features, all of them if None, made `batch` at a time.

    Args:
        sae: the SAE that the activations are of.
        model: its model, with a tokenizer.
        activations: from `top_activations`.
        features: their numbers.
        n_logits: tokens at either end of the logits.
        batch: features whose logits `[batch, vocabulary]` are computed at once.
    """
    wanted = list(range(sae.cfg.d_sae) if features is None else features)
    W_U = _unembedding(sae, model)
    words, density = _vocabulary(model), activations.density.tolist()
    for start in range(0, len(wanted), batch):
        part = wanted[start : start + batch]
        logits = None if W_U is None else sae.W_dec[part].to(W_U) @ W_U
        for i, feature in enumerate(part):
            ends = [() if logits is None else _end(words, logits[i], n_logits, largest) for largest in (True, False)]
            contexts = tuple(
                Context(tuple(words[token] for token in tokens.tolist()), tuple(values.tolist()))
                for tokens, values in activations.contexts(feature)
            )
            yield FeatureDashboard(feature, density[feature], ends[0], ends[1], contexts)


def _end(words: list[str], logits: torch.Tensor, n: int, largest: bool) -> tuple[TokenValue, ...]:
    values, tokens = logits.float().topk(min(n, len(logits)), largest=largest)
    return tuple(TokenValue(words[token], value) for token, value in zip(tokens.tolist(), values.tolist(), strict=True))


def _vocabulary(model: Any) -> list[str]:
    one_by_one = [[token] for token in range(len(model.tokenizer))]
    return model.tokenizer.batch_decode(one_by_one, clean_up_tokenization_spaces=False)


def _unembedding(sae: SAE[Any], model: Any) -> torch.Tensor | None:
    """`W_U [d_model, vocabulary]` of the tokens that have a name; None where the SAE's outputs are not residual."""
    W_U = model.W_U if hasattr(model, "W_U") else model.model.get_output_embeddings().weight.T
    if ".attn." in sae.cfg.metadata.hook_name or sae.cfg.d_in != len(W_U):
        return None
    return W_U[:, : len(model.tokenizer)].to(sae.device)

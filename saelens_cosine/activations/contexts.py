"""Text as contexts of tokens, in the form that an SAE was trained on, and drawn from all of the held-out documents."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, NamedTuple

import torch
from sae_lens import ActivationsStore
from sae_lens.util import get_special_token_ids

from saelens_cosine.progress import Progress

CONTEXTS_AT_ONCE = 16
"""Contexts in one forward pass of the language model."""


class Contexts(NamedTuple):
    """
    Args:
        tokens (torch.Tensor): `[contexts, length]` int64.
        documents (torch.Tensor): `[contexts]` int64, the number of the document that each context's last token is from.
    """

    tokens: torch.Tensor
    documents: torch.Tensor

    @property
    def batches(self) -> tuple[torch.Tensor, ...]:
        """`tokens` by 16 contexts, as a language model takes them."""
        return self.tokens.split(CONTEXTS_AT_ONCE)

    def at_even_steps(self, contexts: int) -> Contexts:
        """This many of them, all where there are fewer: the middle one of each of as many equal stretches."""
        n = len(self.tokens)
        if contexts >= n:
            return self
        steps = (2 * torch.arange(contexts) + 1) * n // (2 * contexts)
        return Contexts(self.tokens[steps], self.documents[steps])


@dataclass(frozen=True)
class ContextForm:
    """
    How text becomes contexts and which of their tokens an SAE sees: fields of SAELens' runners, and of an SAE's metadata.

    Args:
        context_size (int): Tokens of a context, the beginning-of-sequence token among them.
        prepend_bos (bool): Whether that token begins each context.
        sequence_separator_token (int | str | None): Between documents that share a context: an id, "bos", "eos", "sep" or nothing.
        disable_concat_sequences (bool): Each document gives one context, its beginning; documents that are shorter give none.
        seqpos_slice (tuple[int | None, ...]): Positions that the SAE sees, as the arguments of a `slice`.
        exclude_special_tokens (bool | tuple[int, ...]): Whether the tokenizer's special tokens are left out, or the ids that are.
        use_chat_formatting (bool): Whether documents are conversations, put into words by the tokenizer's chat template.
    """

    context_size: int = 128
    prepend_bos: bool = True
    sequence_separator_token: int | str | None = "bos"
    disable_concat_sequences: bool = False
    seqpos_slice: tuple[int | None, ...] = (None,)
    exclude_special_tokens: bool | tuple[int, ...] = False
    use_chat_formatting: bool = False

    @classmethod
    def of(cls, metadata: Any, context_size: int | None = None, longest: int | None = None) -> ContextForm:
        """The form that an SAE's metadata name; SAELens' defaults where they are silent.

        Args:
            metadata: an SAE's `cfg.metadata`.
            context_size: in place of the one named there.
            longest: what the model takes, tokens.
        """
        stated = {field.name: metadata[field.name] for field in fields(cls) if field.name in metadata}
        # None is a value of the separator alone
        named: dict[str, Any] = {
            name: value for name, value in stated.items() if value is not None or name.startswith("sequence_sep")
        }
        for name in ("seqpos_slice", "exclude_special_tokens"):
            if isinstance(named.get(name), list):  # as JSON keeps it
                named[name] = tuple(named[name])
        size = context_size or named.get("context_size") or cls.context_size
        named["context_size"] = min(size, longest or size)
        return cls(**named)

    def store(self, model: Any, dataset: Any, hook: str, d_in: int, device: str) -> ActivationsStore:
        """SAELens' store of a dataset in this form, at one hook of a model."""
        form: dict[str, Any] = {**asdict(self), "exclude_special_tokens": self.excluded(model)}
        return ActivationsStore.from_config_multi_hook(
            model,
            dataset=dataset,
            hook_names=[hook],
            hook_d_ins={hook: d_in},
            store_batch_size_prompts=CONTEXTS_AT_ONCE,
            device=device,
            **form,
        )

    def excluded(self, model: Any) -> torch.Tensor | None:
        """Ids that are left out, `[ids]`; None if none are."""
        if self.exclude_special_tokens is False:
            return None
        every = self.exclude_special_tokens is True
        ids: Any = get_special_token_ids(model.tokenizer) if every else self.exclude_special_tokens
        return torch.tensor(list(ids), dtype=torch.int64)

    def seen(self, model: Any, tokens: torch.Tensor) -> torch.Tensor:
        """Which of `tokens [contexts, length]` the SAE sees: booleans of that shape."""
        inside = torch.zeros_like(tokens, dtype=torch.bool)
        inside[:, slice(*self.seqpos_slice)] = True
        excluded = self.excluded(model)
        return inside if excluded is None else inside & ~torch.isin(tokens, excluded.to(tokens))


def check_context_size(tokens: int) -> None:
    """Raise ValueError for contexts without room for a token of text: SAELens would fill such ones for ever."""
    if tokens < 2:
        raise ValueError(
            f"context_size={tokens} must be 2 or more: a token of text, after the one that begins the context."
        )


def sample_contexts(store: ActivationsStore, tokens: int) -> Contexts:
    """Contexts with about this many tokens in all, at even steps through every document of a store; all there are where that is less.

    Each document has its share of them, so that a long one does not stand for all.

    Raises:
        ValueError: the text is shorter than one context.
    """
    found: list[torch.Tensor] = []
    documents: list[int] = []
    for context in store.iterable_sequences:
        found.append(context.cpu())
        documents.append(store.n_dataset_processed)  # documents that have ended before the one being read
    if not found:
        what = "No document of the text has" if store.disable_concat_sequences else "The text is shorter than"
        raise ValueError(
            f"{what} one context of {store.context_size} tokens; use a larger dataset, or a smaller context size."
        )
    every = Contexts(torch.stack(found), torch.tensor(documents))
    return every.at_even_steps(max(1, -(-tokens // store.context_size)))


def told(batches: Sequence[torch.Tensor], progress: Progress, what: str) -> Iterator[torch.Tensor]:
    """Batches of contexts, and with each the tokens of those that are done."""
    done, total = 0, sum(batch.numel() for batch in batches)
    for batch in batches:
        progress(what, done, total)
        yield batch
        done += batch.numel()
    progress(what, done, total)


def read_contexts(store: ActivationsStore, tokens: int, progress: Progress) -> Iterator[torch.Tensor]:
    """Contexts from the beginning of a store with about this many tokens in all, a batch at a time; fewer where the text ends before."""
    done = 0
    while done < tokens:
        progress("Reading text", done, tokens)
        try:
            batch = store.get_batch_tokens(raise_at_epoch_end=True)
        except StopIteration:
            return
        yield batch
        done += batch.numel()

"""The contexts of a text's training documents, once for all seeds, and as a dataset that SAELens takes for tokenised."""

from __future__ import annotations

from typing import Any

import torch

from saelens_cosine.activations.contexts import ContextForm, read_contexts
from saelens_cosine.activations.models import HookedModel
from saelens_cosine.progress import Progress

MORE = 1.02
"""Contexts are read for so many times the training tokens, since some tokens are dropped for their norm."""


def tokens_read(tokens: int, buffer_tokens: int) -> int:
    """Tokens of text for a training of `tokens`, with what SAELens' mixing buffer reads ahead of it."""
    return int(MORE * tokens) + buffer_tokens


def training_contexts(
    model: HookedModel, text: Any, form: ContextForm, tokens: int, progress: Progress, buffer_tokens: int = 0
) -> torch.Tensor:
    """The first contexts of a text, `[n, length]` int64: for this many training tokens and 2 % more, fewer where the text is shorter.

    Every seed is trained on the same ones, in an order of its own (`as_dataset`). Where they end before a training does, SAELens
    begins again with them.

    Args:
        model: the model, with its tokenizer.
        text: its training documents, in the order of seed 0 (`load_text(name).train`).
        form: how they become contexts.
        tokens: training tokens.
        progress: told of tokens.
        buffer_tokens: that SAELens' mixing buffer reads ahead of the training.

    Raises:
        ValueError: the text is shorter than one batch of contexts.
    """
    store = form.store(model.model, text, model.hook_name, model.d_in, "cpu")
    found = [batch.cpu() for batch in read_contexts(store, tokens_read(tokens, buffer_tokens), progress)]
    if not found:
        raise ValueError(
            f"The text is shorter than {store.store_batch_size_prompts} contexts of {form.context_size} tokens; use a larger "
            "dataset, or a smaller context size."
        )
    return torch.cat(found)


def as_dataset(contexts: torch.Tensor, seed: int) -> Any:
    """Contexts `[n, length]` in an order that follows the seed, as an iterable Hugging Face dataset with the column `tokens`."""
    from datasets import Dataset

    order = torch.randperm(len(contexts), generator=torch.Generator().manual_seed(seed))
    return Dataset.from_dict({"tokens": contexts[order].to(torch.int32).numpy()}).to_iterable_dataset()

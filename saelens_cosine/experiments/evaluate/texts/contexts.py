"""Texts as contexts of a model, in the form of an SAE's training (SAELens' ActivationsStore).

They come without the tokenizer's own special tokens, after its beginning-of-sequence token if it has one and the SAE was trained
with it. A text that is too long loses its beginning, as in sae-probes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from saelens_cosine.activations.contexts import ContextForm
from saelens_cosine.activations.sample import TokenSample, sample_tokens
from saelens_cosine.experiments.evaluate.texts.tasks import Task
from saelens_cosine.metrics.causal.forward import CleanRun, clean_run

TEXT_TOKENS_AT_ONCE = 2048
"""Tokens in one forward pass, whose logits may all exist at a time."""


def sample_task(
    model: Any,
    hook_name: str,
    task: Task,
    max_tokens: int = 128,
    max_norm_multiple: float | None = 10.0,
    head: int | None = None,
    form: ContextForm | None = None,
) -> TokenSample:
    """Run a hooked model over a task's texts and keep its activations at a hook. Nothing is padded.

    Args:
        model: as in `sample_tokens`, with its tokenizer.
        hook_name: a hook point of it.
        task: labelled texts.
        max_tokens: tokens of a text at most, with the beginning-of-sequence token; never more than `form.context_size`.
        max_norm_multiple, head: as in `sample_tokens`.
        form: whether the beginning-of-sequence token begins each text, and which tokens are kept; SAELens' defaults if None.

    Returns:
        Text after text; `contexts` are indices of `task.texts` and `task.labels`.

    Raises:
        ValueError: a text without tokens.
    """
    form = form or ContextForm()
    texts = _tokenize(model, task.texts, max_tokens, f"task {task.name!r}", form)
    by_length: dict[int, list[int]] = {}
    for i, tokens in enumerate(texts):
        by_length.setdefault(len(tokens), []).append(i)
    batches = [
        rows[start : start + max(1, TEXT_TOKENS_AT_ONCE // length)]
        for length, rows in by_length.items()
        for start in range(0, len(rows), max(1, TEXT_TOKENS_AT_ONCE // length))
    ]
    stacked = (torch.stack([texts[i] for i in rows]) for rows in batches)
    sample = sample_tokens(model, hook_name, stacked, max_norm_multiple, head=head)
    contexts = torch.tensor([i for rows in batches for i in rows])[sample.contexts]
    order = contexts.argsort(stable=True)
    sample = replace(sample.where(order), contexts=contexts[order], documents=contexts[order])
    return sample.where(torch.cat([form.seen(model, tokens.unsqueeze(0))[0] for tokens in texts]))


def concept_run(
    model: Any,
    hook_name: str,
    texts: Sequence[str],
    max_tokens: int = 64,
    head: int | None = None,
    form: ContextForm | None = None,
) -> CleanRun:
    """The clean run that `ablation_precision` starts from: texts as contexts, each read at its last token.

    Args:
        model: as in `clean_run`, with its tokenizer.
        hook_name: a hook point of it.
        texts: such as those of `bundled_concepts`.
        max_tokens: as in `sample_task`.
        head: as in `clean_run`.
        form: as in `sample_task`.

    Raises:
        ValueError: a text without tokens.
    """
    contexts = _tokenize(model, texts, max_tokens, "the concepts", form or ContextForm())
    read = torch.tensor([len(tokens) - 1 for tokens in contexts])
    padded = torch.nn.utils.rnn.pad_sequence(contexts, batch_first=True)
    return clean_run(model, hook_name, padded, read, head=head)


def _tokenize(model: Any, texts: Sequence[str], max_tokens: int, whose: str, form: ContextForm) -> list[torch.Tensor]:
    if not texts:
        raise ValueError(f"There are no texts in {whose}.")
    bos = model.tokenizer.bos_token_id
    begin = torch.tensor([bos] if form.prepend_bos and bos is not None else [], dtype=torch.int64)
    room = min(max_tokens, form.context_size) - len(begin)
    if room < 1:
        raise ValueError(f"max_tokens={max_tokens} leaves no room for a text after {len(begin)} tokens that begin it.")
    contexts: list[torch.Tensor] = []
    for i, text in enumerate(texts):
        # as ActivationsStore calls it; some tokenizers put their own first token there nevertheless
        tokens = model.to_tokens(text, truncate=False, move_to_device=False, prepend_bos=False).flatten().long()
        if len(tokens) and int(tokens[0]) == bos:
            tokens = tokens[1:]
        if not len(tokens):
            raise ValueError(f"Text {i} of {whose} has no tokens: {text!r}. Leave it out.")
        contexts.append(torch.cat([begin, tokens[-room:]]))
    return contexts

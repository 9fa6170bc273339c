"""Texts as contexts of a model, in the form of an SAE's training (SAELens' ActivationsStore).

They come without the tokenizer's own special tokens, after its beginning-of-sequence token if it has one and the SAE was trained
with it. A text that is too long loses its beginning, as in sae-probes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from saelens_cosine.activations.contexts import ContextForm
from saelens_cosine.activations.norm_filter import HighNormFilter
from saelens_cosine.activations.sample import TokenSample, hook_activations
from saelens_cosine.experiments.evaluate.texts.tasks import Task
from saelens_cosine.metrics.causal.forward import CleanRun, clean_run
from saelens_cosine.progress import Progress, shown

TEXT_TOKENS_AT_ONCE = 2048
"""Tokens in one forward pass, whose logits may all exist at a time."""


class Concepts(NamedTuple):
    """
    Texts whose last token decides what comes next.

    Args:
        run (CleanRun): The texts, each read at its last token.
        labels (list[int]): Concept of each text.
        names (list[str]): What the concepts are called.
    """

    run: CleanRun
    labels: list[int]
    names: list[str]


@dataclass(frozen=True, eq=False)
class TaskTokens:
    """
    Where the tokens of a task are among those of all tasks.

    Args:
        rows (torch.Tensor): `[tokens]`, text after text.
        contexts (torch.Tensor): `[tokens]`, indices of the task's texts and labels.
        ordinary (torch.Tensor): `[tokens]` booleans, False for those of a high norm beside the task's other tokens.
    """

    rows: torch.Tensor
    contexts: torch.Tensor
    ordinary: torch.Tensor

    def treated(self, treatment: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows and contexts of all tokens, or of the ordinary ones."""
        if treatment == "with_sinks":
            return self.rows, self.contexts
        return self.rows[self.ordinary], self.contexts[self.ordinary]


@dataclass(frozen=True, eq=False)
class LabelledSample:
    """
    Tokens of the texts of tasks with their activations, each text once, however many tasks have it.

    Args:
        tasks (tuple[Task, ...]): Labelled texts.
        tokens (tuple[TaskTokens, ...]): Of each task.
        sample (TokenSample): Of all; which tokens are ordinary is told by task.
    """

    tasks: tuple[Task, ...]
    tokens: tuple[TaskTokens, ...]
    sample: TokenSample

    def of(self, task: int) -> TokenSample:
        """A task's own sample: `contexts` are indices of its `texts` and `labels`."""
        own = self.tokens[task]
        return replace(
            self.sample.where(own.rows), contexts=own.contexts, documents=own.contexts, ordinary=own.ordinary
        )


def sample_tasks(
    model: Any,
    hook_name: str,
    tasks: Sequence[Task],
    max_tokens: int = 128,
    max_norm_multiple: float | None = 10.0,
    head: int | None = None,
    form: ContextForm | None = None,
    progress: Progress | None = None,
) -> LabelledSample:
    """Run a hooked model over the texts of tasks and keep its activations at a hook. Nothing is padded, and no text is run twice.

    Args:
        model: as in `sample_tokens`, with its tokenizer.
        hook_name: a hook point of it.
        tasks: labelled texts.
        max_tokens: tokens of a text at most, with the beginning-of-sequence token; never more than `form.context_size`.
        max_norm_multiple: a task's tokens above this multiple of their median norm are not ordinary. Other tasks have no part in it.
        head: as in `sample_tokens`.
        form: whether the beginning-of-sequence token begins each text, and which tokens are kept; SAELens' defaults if None.
        progress: called with the tokens that have been run.

    Raises:
        ValueError: a text without tokens.
    """
    form = form or ContextForm()
    number: dict[str, int] = {}
    contexts: list[torch.Tensor] = []
    for task in tasks:
        new = [text for text in task.texts if text not in number]
        number |= {text: len(contexts) + i for i, text in enumerate(new)}
        contexts += _tokenize(model, new, max_tokens, f"task {task.name!r}", form)
    sample = _run(model, hook_name, contexts, head, form, max_norm_multiple, shown(progress))
    counts = torch.bincount(sample.contexts, minlength=len(contexts))
    starts, norms = counts.cumsum(0) - counts, sample.norms
    found: list[TaskTokens] = []
    for task in tasks:
        texts = torch.tensor([number[text] for text in task.texts])
        context = torch.arange(len(texts)).repeat_interleave(counts[texts])
        within = torch.arange(len(context)) - (counts[texts].cumsum(0) - counts[texts])[context]
        rows = starts[texts][context] + within
        ordinary = HighNormFilter(max_norm_multiple).keep(norms[rows].unsqueeze(-1))
        found.append(TaskTokens(rows, context, ordinary))
    return LabelledSample(tuple(tasks), tuple(found), sample)


@torch.no_grad()
def _run(
    model: Any,
    hook_name: str,
    contexts: Sequence[torch.Tensor],
    head: int | None,
    form: ContextForm,
    max_norm_multiple: float | None,
    progress: Progress,
) -> TokenSample:
    """Those tokens of contexts that the SAE sees, context after context; contexts of one length are run together."""
    seen = [form.seen(model, tokens.unsqueeze(0))[0] for tokens in contexts]
    counts = torch.tensor([int(mask.sum()) for mask in seen])
    starts = (counts.cumsum(0) - counts).tolist()
    by_length: dict[int, list[int]] = {}
    for i, tokens in enumerate(contexts):
        by_length.setdefault(len(tokens), []).append(i)
    activations: torch.Tensor | None = None
    done, total = 0, sum(map(len, contexts))
    for length, of_length in by_length.items():
        at_once = max(1, TEXT_TOKENS_AT_ONCE // length)
        for rows in (of_length[start : start + at_once] for start in range(0, len(of_length), at_once)):
            progress("Labelled texts, tokens", done, total)
            x = hook_activations(model, hook_name, torch.stack([contexts[i] for i in rows]), head)
            if activations is None:
                activations = torch.empty(int(counts.sum()), x.shape[-1])
            for i, of_context in zip(rows, x, strict=True):
                activations[starts[i] : starts[i] + int(counts[i])] = of_context[seen[i]]
            done += length * len(rows)
    if activations is None:
        raise ValueError("There are no texts in the tasks.")
    numbers = torch.arange(len(contexts)).repeat_interleave(counts)
    tokens = torch.cat([tokens[mask] for tokens, mask in zip(contexts, seen, strict=True)])
    positions = torch.cat([mask.nonzero().flatten() for mask in seen])
    ordinary = torch.ones(len(tokens), dtype=torch.bool)
    return TokenSample(activations, tokens, numbers, numbers, positions, ordinary, max_norm_multiple)


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
        max_tokens: as in `sample_tasks`.
        head: as in `clean_run`.
        form: as in `sample_tasks`.

    Raises:
        ValueError: a text without tokens.
    """
    if not texts:
        raise ValueError("There are no texts in the concepts.")
    contexts = _tokenize(model, texts, max_tokens, "the concepts", form or ContextForm())
    read = torch.tensor([len(tokens) - 1 for tokens in contexts])
    padded = torch.nn.utils.rnn.pad_sequence(contexts, batch_first=True)
    return clean_run(model, hook_name, padded, read, head=head)


def _tokenize(model: Any, texts: Sequence[str], max_tokens: int, whose: str, form: ContextForm) -> list[torch.Tensor]:
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

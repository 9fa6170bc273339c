"""Labelled texts: binary tasks to probe for, and concepts to ablate.

Texts become contexts as in training (SAELens' ActivationsStore): without the tokenizer's own special tokens, after the
tokenizer's beginning-of-sequence token if it has one and the SAE was trained with it. A text that is too long loses its beginning, as in sae-probes.
"""

from __future__ import annotations

import difflib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from saelens_cosine.activations.contexts import ContextForm
from saelens_cosine.activations.sample import TokenSample, sample_tokens
from saelens_cosine.bundled import BUNDLED, stdlib_corpus
from saelens_cosine.experiments.evaluate.texts.code_concepts import CONCEPTS, NEXT_TOKENS, SHORTEST_WINDOW, windows
from saelens_cosine.metrics.causal.forward import CleanRun, clean_run

SAE_PROBES = "sae_probes"
"""What names of tasks call the data sets of the sae-probes package (arXiv 2502.16681)."""

TOKENS_AT_ONCE = 2048
"""Tokens in one forward pass, whose logits may all exist at a time."""

_FILES = (".csv", ".jsonl", ".parquet")


@dataclass(frozen=True)
class Task:
    """
    Texts of two classes, as many of one as of the other.

    Args:
        name (str): What `load_tasks` finds it by.
        texts (tuple[str, ...]): In random order, no two alike.
        labels (tuple[bool, ...]): Of each text. True is the larger of the two values, where they were not booleans.
    """

    name: str
    texts: tuple[str, ...]
    labels: tuple[bool, ...]


class ConceptTexts(NamedTuple):
    """
    Texts by concept.

    Args:
        texts (list[str]): In random order.
        labels (list[int]): Of each text, its concept's place in `names`.
        names (list[str]): Concepts.
    """

    texts: list[str]
    labels: list[int]
    names: list[str]


class _Labelled(NamedTuple):
    name: str
    texts: Sequence[str]
    labels: Sequence[bool]


def load_tasks(names: Sequence[str], max_texts: int = 400, seed: int = 0) -> tuple[Task, ...]:
    """Binary tasks by name, each with a balanced draw of its texts.

    Texts that occur twice count once; those that occur with both labels are left out.

    Args:
        names: `"bundled"`, all tasks on held-out files of the bundled corpus (`code_concepts.CONCEPTS`), or
            `"bundled:NAME"`; `"sae_probes"`, the 113 data sets that sae-probes ships, or `"sae_probes:NAME"` with or without
            the number that its names begin with; or a .csv, .jsonl or .parquet file with columns `text` and `label`.
        max_texts: texts of a task at most, half of them of each class.
        seed: decides which texts, and their order.

    Raises:
        ValueError: a name that stands for nothing, a file without these columns, or labels that are not of two classes.
        FileNotFoundError: no such file.
        ModuleNotFoundError: sae-probes is not installed.
    """
    if max_texts < 2:
        raise ValueError(f"max_texts={max_texts} must be 2 or more: half of the texts are of each class.")
    found = (labelled for name in names for labelled in _find(name))
    return tuple({labelled.name: _draw(labelled, max_texts, seed) for labelled in found}.values())


def bundled_concepts(max_texts_per_concept: int = 40, seed: int = 0) -> ConceptTexts:
    """Beginnings of code whose end decides what comes next, from held-out files of the bundled corpus.

    Each text ends where a concept of `code_concepts.NEXT_TOKENS` is due, such as right after `import`. No two overlap.

    Args:
        max_texts_per_concept: texts of each at most; so many of each on a full standard library, unless it is over 100.
        seed: decides which texts, and their order.
    """
    names = list(NEXT_TOKENS)
    ends = list(_bundled().ends)
    random.Random(seed).shuffle(ends)
    texts: dict[str, int] = {}
    counts = [0] * len(names)
    for window in ends:
        name = min(window, key=lambda name: counts[names.index(name)])  # the rarest concept gets it
        label = names.index(name)
        if counts[label] < max_texts_per_concept and window[name] not in texts:
            texts[window[name]] = label
            counts[label] += 1
    return ConceptTexts(list(texts), list(texts.values()), names)


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
        rows[start : start + max(1, TOKENS_AT_ONCE // length)]
        for length, rows in by_length.items()
        for start in range(0, len(rows), max(1, TOKENS_AT_ONCE // length))
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


class TokenConcepts(NamedTuple):
    """
    Places in contexts, by the token that is there.

    Args:
        contexts (torch.Tensor): `[places]`, row in the tokens given; each at most once.
        positions (torch.Tensor): `[places]`, position in it.
        labels (list[int]): Of each place, its token's number in `tokens`.
        tokens (list[int]): Token ids, the most frequent first.
    """

    contexts: torch.Tensor
    positions: torch.Tensor
    labels: list[int]
    tokens: list[int]


def token_concepts(tokens: torch.Tensor, n_tokens: int = 8, per_token: int = 40, first: int = 8) -> TokenConcepts:
    """Concepts of any text: what was read last, among the most frequent tokens.

    Args:
        tokens: `[contexts, length]`.
        n_tokens: tokens, at most.
        per_token: places of each, at most.
        first: positions before this one are not taken: too little has been read there.

    Raises:
        ValueError: contexts that are too short or too few for two tokens with two places each.
    """
    generator = torch.Generator().manual_seed(0)
    length = tokens.shape[1]
    if length <= first:
        raise ValueError(f"Contexts of {length} tokens end before position {first}; take longer ones.")
    positions = torch.randint(first, length, (len(tokens),), generator=generator)
    read = tokens[torch.arange(len(tokens)), positions]
    values, counts = read.unique(return_counts=True)
    chosen = values[counts.argsort(descending=True, stable=True)[:n_tokens]]
    rows = [(read == token).nonzero().flatten()[:per_token] for token in chosen]
    rows = [found for found in rows if len(found) > 1]
    if len(rows) < 2:
        raise ValueError(f"{len(tokens)} contexts are too few to find two tokens twice; take more.")
    labels = [label for label, found in enumerate(rows) for _ in found]
    order = torch.cat(rows)
    return TokenConcepts(order, positions[order], labels, [int(read[found[0]]) for found in rows])


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


def _draw(labelled: _Labelled, max_texts: int, seed: int) -> Task:
    labels: dict[str, set[bool]] = {}
    for text, label in zip(labelled.texts, labelled.labels, strict=True):
        labels.setdefault(text, set()).add(label)
    classes = {label: [text for text, seen in labels.items() if seen == {label}] for label in (False, True)}
    n = min(max_texts // 2, *map(len, classes.values()))
    if n == 0:
        raise ValueError(
            f"Task {labelled.name!r} has {len(classes[True])} positive and {len(classes[False])} negative texts; it needs both."
        )
    rng = random.Random(seed)
    chosen = [(text, label) for label, texts in classes.items() for text in rng.sample(texts, n)]
    rng.shuffle(chosen)
    return Task(labelled.name, *zip(*chosen, strict=True))


def _find(name: str) -> Iterator[_Labelled]:
    family, _, wanted = name.partition(":")
    if family == BUNDLED:
        return _find_bundled(wanted)
    if family == SAE_PROBES:
        return _find_sae_probes(wanted)
    if name.endswith(_FILES):
        return iter([_read_file(name)])
    raise ValueError(
        f"There is no task {name!r}. There are {BUNDLED!r} and {SAE_PROBES!r}, one of theirs as in "
        f"'{BUNDLED}:method', and files ending in {', '.join(_FILES)}."
    )


class _Bundled(NamedTuple):
    """
    Args:
        tasks (dict[str, tuple[list[str], list[bool]]]): Texts and labels of each of `CONCEPTS`.
        ends (list[dict[str, str]]): For each window in which one is due, texts by concepts of `NEXT_TOKENS`.
    """

    tasks: dict[str, tuple[list[str], list[bool]]]
    ends: list[dict[str, str]]


@cache
def _bundled() -> _Bundled:
    found = _Bundled({name: ([], []) for name in CONCEPTS}, [])
    for source in stdlib_corpus("heldout")["text"]:
        for window in windows(source):
            for name, concept in CONCEPTS.items():
                if concept.among(window):
                    found.tasks[name][0].append(window.text)
                    found.tasks[name][1].append(concept.holds(window))
            ends = {name: window.text[:length] for name, length in window.cuts if length >= SHORTEST_WINDOW}
            if ends:
                found.ends.append(ends)
    return found


def _find_bundled(wanted: str) -> Iterator[_Labelled]:
    if wanted and wanted not in CONCEPTS:
        raise ValueError(f"The bundled corpus has no task {wanted!r}; it has {', '.join(CONCEPTS)}.")
    for name in [wanted] if wanted else CONCEPTS:
        yield _Labelled(f"{BUNDLED}:{name}", *_bundled().tasks[name])


def _find_sae_probes(wanted: str) -> Iterator[_Labelled]:
    try:
        from sae_probes.utils_data import get_numbered_binary_tags, read_numbered_dataset_df
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"The tasks of sae-probes need {error.name}: pip install 'saelens-cosine[probes]'"
        ) from error
    tags = {tag: tag.partition("_")[2] for tag in get_numbered_binary_tags()}
    chosen = [tag for tag, short in tags.items() if wanted in ("", tag, short)]
    if not chosen:
        near = difflib.get_close_matches(wanted, [*tags, *tags.values()], n=5)
        hint = f"; near it are {', '.join(near)}" if near else f": {', '.join(tags)}"
        raise ValueError(f"sae-probes has no data set {wanted!r} among its {len(tags)}{hint}.")
    for tag in chosen:
        yield _labelled(f"{SAE_PROBES}:{tag}", read_numbered_dataset_df(tag), "prompt", "target")


def _read_file(name: str) -> _Labelled:
    import pandas as pd

    path = Path(name)
    if not path.is_file():  # a pipe would be waited for, for ever
        raise FileNotFoundError(f"There is no file {name!r}.")
    if path.suffix == ".csv":
        table = pd.read_csv(path, keep_default_na=False, dtype={"text": str})  # "None" and "NA" are texts
    elif path.suffix == ".jsonl":
        table = pd.read_json(path, lines=True, dtype=False)  # pyright: ignore[reportArgumentType]  (stubs lack it)
    else:
        table = pd.read_parquet(path)
    return _labelled(name, table, "text", "label")


def _labelled(name: str, table: Any, text: str, label: str) -> _Labelled:
    missing = {text, label} - set(table.columns)
    if missing:
        raise ValueError(f"{name} has columns {', '.join(map(str, table.columns))}; it needs {text!r} and {label!r}.")
    texts, labels = table[text].tolist(), table[label].tolist()
    not_text = next((i for i, given in enumerate(texts) if not isinstance(given, str)), None)
    if not_text is not None:
        raise ValueError(f"{name} has {texts[not_text]!r} for a text in row {not_text}, counted from 0.")
    if table[label].isna().any():
        raise ValueError(f"{name} has {table[label].isna().sum()} rows without a label.")
    values = sorted(set(labels), key=lambda value: (isinstance(value, str), value))
    if len(values) != 2:
        some = ", ".join(map(repr, values[:10])) + (", ..." if len(values) > 10 else "")
        raise ValueError(f"{name} has labels of {len(values)} values, {some}; a task needs two.")
    return _Labelled(name, texts, [value == values[1] for value in labels])

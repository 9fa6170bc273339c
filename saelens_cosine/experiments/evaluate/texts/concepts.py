"""Concepts to ablate: texts and places by what is due next in code, or by what was read last in any text."""

from __future__ import annotations

import random
from functools import cache
from typing import NamedTuple

import torch

from saelens_cosine.bundled import stdlib_corpus
from saelens_cosine.experiments.evaluate.texts.code_concepts import CONCEPTS, NEXT_TOKENS, SHORTEST_WINDOW, windows


class CorpusWindows(NamedTuple):
    """
    Args:
        tasks (dict[str, tuple[list[str], list[bool]]]): Texts and labels of each of `CONCEPTS`.
        ends (list[dict[str, str]]): For each window in which one is due, texts by concepts of `NEXT_TOKENS`.
    """

    tasks: dict[str, tuple[list[str], list[bool]]]
    ends: list[dict[str, str]]


@cache
def windows_of_the_corpus() -> CorpusWindows:
    """The windows of the bundled corpus's held-out files, by what they are labelled with."""
    found = CorpusWindows({name: ([], []) for name in CONCEPTS}, [])
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


def bundled_concepts(max_texts_per_concept: int = 40, seed: int = 0) -> ConceptTexts:
    """Beginnings of code whose end decides what comes next, from held-out files of the bundled corpus.

    Each text ends where a concept of `code_concepts.NEXT_TOKENS` is due, such as right after `import`. No two overlap.

    Args:
        max_texts_per_concept: texts of each at most; so many of each on a full standard library, unless it is over 100.
        seed: decides which texts, and their order.
    """
    names = list(NEXT_TOKENS)
    ends = list(windows_of_the_corpus().ends)
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

"""The bundled corpus with short documents: what is held out is tokenised whole for each sample, most of a small run's time."""

from datasets import Dataset

from saelens_cosine.activations import text as data
from saelens_cosine.bundled import stdlib_corpus

CHARACTERS = 2000
"""Of each document, about 600 tokens: 45,000 of the 70 that are held out, nine times as many of the others."""


def short_corpus(split="train"):
    return Dataset.from_list([{**row, "text": row["text"][:CHARACTERS]} for row in stdlib_corpus(split)])


def few_documents(split="train"):
    """Each fifth one, whole: as few beginnings of documents in a context as there are in all of the corpus."""
    rows = stdlib_corpus(split)
    return rows.select(range(0, len(rows), 5))


def apply(patch=setattr, corpus=short_corpus) -> None:
    """To `load_text` in this process."""
    patch(data, "stdlib_corpus", corpus)

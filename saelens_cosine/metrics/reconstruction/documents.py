"""What a fraction of variance explained is made of, document by document."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from saelens_cosine.activations.sample import TokenSample
from saelens_cosine.metrics.intervals import DocumentErrors

RECONSTRUCTED_AT_ONCE = 2048
"""Tokens whose reconstructions are held at once."""


class ErrorsByDocument(NamedTuple):
    """
    What `intervals.difference_over_documents` needs of an SAE.

    Args:
        text (str): A hash of tokens and documents, without which two SAEs' documents are no pairs.
        documents (tuple[int, ...]): Their numbers.
        by_treatment (dict[str, DocumentErrors]): With sinks, without, or both.
    """

    text: str
    documents: tuple[int, ...]
    by_treatment: dict[str, DocumentErrors]


class DocumentSums:
    """Running sums of tokens by document, in float64 on the CPU.

    Args:
        documents: how many there are.
        d_in: size of a token.
    """

    def __init__(self, documents: int, d_in: int):
        self._tokens = torch.zeros(documents, dtype=torch.float64)
        self._squares = torch.zeros(documents, 2, dtype=torch.float64)  # of e = x - x_hat and of x
        self._vectors = torch.zeros(documents, 2, d_in, dtype=torch.float64)

    def add(self, x: torch.Tensor, x_hat: torch.Tensor, document: torch.Tensor) -> None:
        """Take in tokens `[tokens, d_in]` and their reconstructions, with each token's document `[tokens]`, from 0."""
        x, x_hat = x.cpu().double(), x_hat.cpu().double()
        pairs = torch.stack([x - x_hat, x], dim=1)
        self._tokens.index_add_(0, document, torch.ones_like(document, dtype=torch.float64))
        self._squares.index_add_(0, document, pairs.square().sum(dim=-1))
        self._vectors.index_add_(0, document, pairs)

    def about_the_mean(self) -> torch.Tensor:
        """`[documents, 2]`: the sum over a document's tokens of `||e - mean e||^2` and of `||x - mean x||^2`.

        The means are those of all tokens, so that `1 - residual.sum() / total.sum()` is the fraction of variance explained.
        """
        mean = self._vectors.sum(dim=0) / self._tokens.sum()
        return (
            self._squares - 2 * (self._vectors * mean).sum(dim=-1) + self._tokens[:, None] * mean.square().sum(dim=-1)
        )


def fve_by_document(
    reconstruct: Callable[[torch.Tensor], torch.Tensor], sample: TokenSample, treatments: Sequence[str]
) -> ErrorsByDocument:
    """What a fraction of variance explained is made of, with and without sinks.

    Args:
        reconstruct: from `[tokens, d_in]` to their reconstructions.
        sample: what it is measured on.
        treatments: of `with_sinks` and `without_sinks`.
    """
    numbers, document = sample.documents.unique(return_inverse=True)
    sums = {name: DocumentSums(len(numbers), sample.activations.shape[-1]) for name in treatments}
    parts = (tensor.split(RECONSTRUCTED_AT_ONCE) for tensor in (sample.activations, document, sample.ordinary))
    for x, part, ordinary in zip(*parts, strict=True):
        x_hat = reconstruct(x)
        for name, found in sums.items():
            keep = ordinary if name == "without_sinks" else torch.ones_like(ordinary)
            found.add(x[keep], x_hat[keep], part[keep])
    text = torch.stack([sample.tokens, sample.documents]).numpy().tobytes()
    by_treatment = {
        name: DocumentErrors(*map(tuple, found.about_the_mean().T.tolist())) for name, found in sums.items()
    }
    return ErrorsByDocument(hashlib.sha256(text).hexdigest(), tuple(numbers.tolist()), by_treatment)

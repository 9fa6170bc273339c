"""How well an SAE reconstructs, how sparsely, and how much of it is dead."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from saelens_cosine.experiments.evaluate.evals.eval import BySinks, Eval, Figure, Treatment, tokens_of
from saelens_cosine.experiments.evaluate.subject import Subject
from saelens_cosine.experiments.evaluate.training_log import training_log
from saelens_cosine.metrics.causal.code_edits import reconstruct
from saelens_cosine.metrics.intervals import DocumentErrors
from saelens_cosine.metrics.reconstruction.by_norm import ReconstructionDiagnostics, diagnose_reconstruction
from saelens_cosine.metrics.reconstruction.documents import fve_by_document


@dataclass(frozen=True, kw_only=True)
class FVEByDocument(BySinks[DocumentErrors]):
    """
    The sums that FVE is a ratio of, document by document.

    Args:
        text (str): A hash of tokens and documents, without which two SAEs' documents are no pairs.
        documents (tuple[int, ...]): Their numbers.
    """

    text: str
    documents: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Reconstructed(BySinks[ReconstructionDiagnostics]):
    """
    FVE, L0 and dead features.

    Args:
        fve_by_document (FVEByDocument): What an interval over documents needs.
    """

    fve_by_document: FVEByDocument


def _training_metrics(subject: Subject) -> dict[str, float] | None:
    log = training_log(subject.source, subject.sae)
    return log[-1].get("metrics") if log else None


def _measure(subject: Subject) -> Reconstructed:
    metrics = _training_metrics(subject)
    found = subject.by_treatment(
        lambda sample: diagnose_reconstruction(subject.sae, sample.activations, training_metrics=metrics)
    )
    sample, treatments = subject.text.sample, subject.settings.treatments
    documents = fve_by_document(reconstruct(subject.sae), sample, treatments)
    by_document = FVEByDocument(text=documents.text, documents=documents.documents, **documents.by_treatment)
    return Reconstructed(fve_by_document=by_document, **found)


def _figures(result: Reconstructed) -> Iterator[Figure]:
    for sinks, fit in result.items():
        overall, top = fit.by_norm.all_norms.overall, fit.by_norm.without_top.overall
        yield _fve(overall.fve, result.fve_by_document, sinks)
        yield Figure("FVE without the top 1 % of norms", top.fve, sinks)
        yield Figure("cosine", overall.cosine, sinks)
        yield Figure("norm ratio", overall.norm_ratio, sinks)
        yield Figure("L0", overall.l0, sinks, "{:.1f}")
        yield Figure("never fired", overall.never_fired, sinks, "{:.1%}")
        yield Figure("rarely fired", overall.rarely_fired, sinks)
        yield Figure("dead in a batch", fit.dead.in_batch, sinks)
    dead = result.first().dead.in_training  # the same whatever tokens are measured
    if dead is not None:
        yield Figure("dead in training", dead, None, "{:.1%}")


def _fve(value: float, by_document: FVEByDocument, sinks: Treatment) -> Figure:
    errors: DocumentErrors | None = getattr(by_document, sinks)
    measured = errors is not None and math.isfinite(value) and sum(errors.total) > 0
    documents = errors if measured else None
    return Figure("FVE", value, sinks, "{:.4f}", units=(by_document.text,), documents=documents)


RECONSTRUCTION = Eval(
    "reconstruction",
    "sae",
    "FVE in three definitions, L0, four kinds of dead features, by norm",
    _measure,
    figures=_figures,
    tokens=lambda result: tokens_of(result, lambda fit: fit.by_norm.all_norms.overall.tokens),
    reads=_training_metrics,
)

"""What can be measured: one eval, one file, which says how it is measured, what its figures are called, and how they are drawn."""

from __future__ import annotations

from typing import Any

from saelens_cosine.experiments.evaluate.evals.eval import (
    TREATMENTS,
    BySinks,
    Eval,
    EvalSection,
    Figure,
    NotApplicable,
    NotMeasured,
    Shown,
    Treatment,
    tokens_of,
)
from saelens_cosine.experiments.evaluate.evals.of_pair.decomposition import DECOMPOSITION
from saelens_cosine.experiments.evaluate.evals.of_pair.matching import MATCHING
from saelens_cosine.experiments.evaluate.evals.of_sae.afa import AFA_EVAL
from saelens_cosine.experiments.evaluate.evals.of_sae.causal import CAUSAL
from saelens_cosine.experiments.evaluate.evals.of_sae.dictionary import DICTIONARY
from saelens_cosine.experiments.evaluate.evals.of_sae.features import FEATURES
from saelens_cosine.experiments.evaluate.evals.of_sae.gradients import GRADIENTS
from saelens_cosine.experiments.evaluate.evals.of_sae.loss import LOSS
from saelens_cosine.experiments.evaluate.evals.of_sae.norm_response import NORM_RESPONSE
from saelens_cosine.experiments.evaluate.evals.of_sae.probing import PROBING
from saelens_cosine.experiments.evaluate.evals.of_sae.reconstruction import RECONSTRUCTION
from saelens_cosine.experiments.evaluate.evals.of_sae.saebench import SAEBENCH
from saelens_cosine.experiments.evaluate.evals.of_sae.score_swap import SCORE_SWAP
from saelens_cosine.experiments.evaluate.evals.of_text.patching import PATCHING
from saelens_cosine.experiments.evaluate.evals.of_text.probing_baseline import PROBING_BASELINE
from saelens_cosine.experiments.evaluate.evals.of_text.tokens import TOKENS

__all__ = [
    "EVALS",
    "register_eval",
    "Eval",
    "Figure",
    "EvalSection",
    "Shown",
    "BySinks",
    "tokens_of",
    "Treatment",
    "TREATMENTS",
    "NotApplicable",
    "NotMeasured",
]

EVALS: dict[str, Eval[Any]] = {}
"""By name, in the order in which tables, differences and the page have them."""


def register_eval(row: Eval[Any]) -> None:
    """Add an eval, for `evaluate` and the command.

    Raises:
        ValueError: there is one of this name, or it cannot be right, see `Eval.check`.
    """
    row.check()
    if row.name in EVALS:
        raise ValueError(f"There is an eval {row.name!r} already: {EVALS[row.name].about}.")
    EVALS[row.name] = row


for _row in (
    TOKENS,
    PATCHING,
    PROBING_BASELINE,
    RECONSTRUCTION,
    LOSS,
    NORM_RESPONSE,
    DICTIONARY,
    GRADIENTS,
    AFA_EVAL,
    PROBING,
    SCORE_SWAP,
    CAUSAL,
    FEATURES,
    MATCHING,
    DECOMPOSITION,
    *SAEBENCH,
):
    register_eval(_row)

"""What a run of SAEBench gave, as plain numbers."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from saelens_cosine.files.names import below
from saelens_cosine.files.whole import read_json, write_json
from saelens_cosine.plain import from_plain

SCHEMA = "saelens-cosine/saebench/1"
"""Layout of the record of one eval on one SAE; the number grows when a field changes its meaning or goes."""


@dataclass(frozen=True)
class VarianceExplained:
    """
    Fraction of variance explained, `1 - Var(x - x_hat) / Var(x)`, on the tokens that the core eval starts with.

    Core's own `explained_variance` divides by E||x||^2 less the square of one number, which is no variance: true 0.75 has
    come out as 0.98 and 1.17.

    Args:
        tokens (int): Tokens measured, special ones left out.
        fve (float): On all of them.
        high_norm_share (float | None): Share of them above the multiple of their median norm; None if no multiple was given.
        fve_without_high_norm (float | None): Without those.
    """

    tokens: int
    fve: float
    high_norm_share: float | None
    fve_without_high_norm: float | None


LABELS = {"reconstruction_quality.explained_variance": "explained_variance as SAEBench has it (no share of a variance)"}
"""What a reader sees in place of a metric's name that misleads: see `VarianceExplained`."""


@dataclass(frozen=True)
class EvalResult:
    """
    One eval on one SAE.

    Args:
        eval (str): Name of the eval.
        sae (str): The prepared SAE's name, with the hash of its content.
        metrics (dict[str, float]): SAEBench's headline numbers, `<category>.<metric>`, as it computes them.
        metrics_without_high_norm (dict[str, float] | None): The same with high-norm tokens left out of the activations that the probes pool, those of the language model's own probes included. None for an eval that pools no tokens, or if not asked for.
        high_norm_share (float | None): Share of the pooled tokens that these leave out.
        max_norm_multiple (float | None): Multiple of a data set's median norm that tells them apart.
        variance_explained (VarianceExplained | None): Beside the core eval only.
        config (dict[str, Any]): The eval's configuration.
        versions (dict[str, str]): Packages it ran with.
        seconds (float): Time for this SAE, caches not counted.
        silence_padding (bool): Whether zeroed tokens were given no codes, which stock SAEBench does not do.
        file (str | None): SAEBench's own JSON, complete; None where it is not told.
        file_without_high_norm (str | None): Likewise.
    """

    eval: str
    sae: str
    metrics: dict[str, float]
    metrics_without_high_norm: dict[str, float] | None
    high_norm_share: float | None
    max_norm_multiple: float | None
    variance_explained: VarianceExplained | None
    config: dict[str, Any]
    versions: dict[str, str]
    seconds: float
    silence_padding: bool
    file: str | None
    file_without_high_norm: str | None


@dataclass(frozen=True)
class EvalFailure:
    """
    An eval without a result.

    Args:
        eval (str): Name of the eval.
        sae (str | None): The prepared SAE's name; None if it could not run for any.
        reason (str): Why, in words.
        remedy (str): What would change that; empty where nothing is known.
    """

    eval: str
    sae: str | None
    reason: str
    remedy: str = ""

    def __str__(self) -> str:
        where = self.eval if self.sae is None else f"{self.eval} of {self.sae}"
        return f"{where}: {self.reason}" + (f" {self.remedy}" if self.remedy else "")


@dataclass(frozen=True)
class SAEBenchReport:
    """
    All evals on all SAEs.

    Args:
        results (tuple[EvalResult, ...]): SAEs in the caller's order, evals within.
        failures (tuple[EvalFailure, ...]): What did not run, with `on_problem="record"`.
    """

    results: tuple[EvalResult, ...]
    failures: tuple[EvalFailure, ...]


class SAEBenchError(RuntimeError):
    """Evals that cannot run, or ended without a result.

    Args:
        failures: which, and why.
    """

    def __init__(self, failures: list[EvalFailure]):
        super().__init__("\n".join(map(str, failures)))
        self.failures = tuple(failures)


def headline_metrics(path: Path) -> dict[str, float]:
    """The numbers of a SAEBench result file, `<category>.<metric>`."""
    categories: dict[str, dict[str, Any]] = read_json(path)["eval_result_metrics"]
    return {
        f"{category}.{metric}": float(value)
        for category, metrics in categories.items()
        for metric, value in metrics.items()
        if isinstance(value, (int, float)) and math.isfinite(value)
    }


def save_record(result: EvalResult, path: Path) -> None:
    """Write a result, complete or not at all; file names relative to the record's folder."""
    record = asdict(result) | {"schema": SCHEMA, "file": result.file and Path(result.file).name}
    if result.file_without_high_norm:
        record["file_without_high_norm"] = Path(result.file_without_high_norm).name
    write_json(record, path)


def load_record(path: Path) -> EvalResult | None:
    """A result that `save_record` wrote; None if there is none, or of another schema."""
    if not path.is_file():
        return None
    record: dict[str, Any] = read_json(path)
    if record.pop("schema", None) != SCHEMA:
        return None
    for name in ("file", "file_without_high_norm"):
        record[name] = record[name] and str(below(path.parent, record[name], f"{name} in {path}"))
    return from_plain(EvalResult, record, f"The record {path}")

"""SAEBench's evals, a row each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from saelens_cosine import saebench
from saelens_cosine.activations.sae_probes_text import tasks_trained_on
from saelens_cosine.experiments.evaluate.evals.eval import Eval, Figure
from saelens_cosine.experiments.evaluate.subject import Subject
from saelens_cosine.plain import digest
from saelens_cosine.saebench.evals import INSTALLED_TEXT
from saelens_cosine.saebench.results import LABELS, EvalResult


def saebench_settings(name: str, dataset: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Changes to an eval's configuration: on text that comes with a package, that text instead of a data set on the Hub, and no
    probing on what was trained on.

    Raises:
        ValueError: tasks are given whose texts were trained on.
    """
    ours: dict[str, Any] = {}
    if dataset in INSTALLED_TEXT:
        ours = {"core": {"dataset": dataset}, "autointerp": {"dataset_name": dataset}}.get(name, {})
    changed = {**ours, **given.get(name, {})}
    if name == "sparse_probing_sae_probes" and (trained_on := tasks_trained_on(dataset)):
        names = changed.get("dataset_names")
        if names is None:
            config = saebench.EVALS[name].make_config("", "float32", 1, {})
            changed["dataset_names"] = [task for task in config.dataset_names if task not in trained_on]
        elif seen := sorted(trained_on & set(names)):
            raise ValueError(f"{name} is to probe on {', '.join(seen)}, whose texts SAEs of {dataset} are trained on.")
    return changed


def _measure(name: str) -> Callable[[Subject], EvalResult]:
    def measure(subject: Subject) -> EvalResult:
        settings = subject.settings
        configured = saebench_settings(name, subject.text.dataset, settings.saebench)
        prepared = saebench.prepare(subject.sae, subject.source.arm)
        report = saebench.run(
            [prepared],
            [name],
            subject.folder / "saebench",
            model=subject.text.hooked_transformer,
            device=settings.device,
            settings={name: configured} if configured else None,
            max_norm_multiple=None if settings.sinks == "keep" else settings.max_norm_multiple,
            judge=settings.judge,
            quiet=True,
            model_identity=_hooked_model(subject),
        )
        (result,) = report.results
        return replace(result, file=None, file_without_high_norm=None)

    return measure


def _hooked_model(subject: Subject) -> str:
    """The model with the sinks that are planted in it."""
    text = subject.text
    return digest([text.model_sha256, text.hook if text.planted else None])


def _data(name: str) -> Callable[[Subject], Any]:
    def reads(subject: Subject) -> Any:
        configured = saebench_settings(name, subject.text.dataset, subject.settings.saebench)
        config = saebench.EVALS[name].make_config(subject.text.model_name, "float32", 1, configured)
        return [configured, saebench.data_contents(name, config), saebench.versions()]

    return reads


def _figures(result: EvalResult) -> Iterator[Figure]:
    of = f"SAEBench {result.eval}"
    for metric, value in result.metrics.items():
        yield Figure(f"{of}: {LABELS.get(metric, metric)}", value, None, "{:.4f}")
    for metric, value in (result.metrics_without_high_norm or {}).items():
        yield Figure(f"{of}: {LABELS.get(metric, metric)}", value, "without_sinks")
    if ours := result.variance_explained:
        yield Figure(f"{of}: FVE, ours on the same tokens", ours.fve, None, "{:.4f}")
        if ours.fve_without_high_norm is not None:
            yield Figure(f"{of}: FVE, ours on the same tokens", ours.fve_without_high_norm, "without_sinks")


def _tokens(result: EvalResult) -> str:
    return f"{result.variance_explained.tokens:,} for FVE" if result.variance_explained else ""


SAEBENCH = tuple(
    Eval(
        name,
        "sae",
        f"SAEBench's {name}",
        _measure(name),
        figures=_figures,
        tokens=_tokens,
        uses=("saebench", "judge") if name == "autointerp" else ("saebench",),
        reads=_data(name),
    )
    for name in saebench.EVALS
)

"""Run SAEBench's own eval functions on SAEs of any architecture, and make sure that there is a result.

What upstream leaves to the caller: units (`prepare`), one loaded model for all evals, caches that are warm before anything is
scored and never those of another model or configuration, seeds for each SAE, results that exist, versions that are ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from sae_lens.saes.sae import SAE

from saelens_cosine.activations.norm_filter import HighNormFilter
from saelens_cosine.files.names import check_name
from saelens_cosine.files.output import open_output
from saelens_cosine.files.secrets import without_secrets
from saelens_cosine.saebench.evals import EVALS, Judge
from saelens_cosine.saebench.model import dtype_of, how_loaded, load_for_saebench
from saelens_cosine.saebench.preflight import check_data, check_environment, check_saes
from saelens_cosine.saebench.prepare import PreparedSAE, prepare
from saelens_cosine.saebench.results import EvalFailure, EvalResult, SAEBenchError, SAEBenchReport
from saelens_cosine.saebench.runner import Runner


def run(
    saes: Sequence[SAE[Any] | PreparedSAE] | Mapping[str, SAE[Any] | PreparedSAE],
    evals: Sequence[str],
    output: str | Path,
    *,
    model: Any = None,
    device: str = "cpu",
    dtype: str | None = None,
    batch_size: int = 32,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    max_norm_multiple: float | None = None,
    judge: Judge | None = None,
    on_problem: Literal["raise", "record"] = "raise",
    quiet: bool = False,
    model_identity: str | None = None,
) -> SAEBenchReport:
    """Score SAEs of one language model.

    What is done is not done again: results and caches lie in `output`, by the content of the SAE, the model, the configuration
    and local data sets, and by the versions of packages, so that a run that was killed goes on where it was. A data set on the
    Hub counts by its name. SAEBench's own output goes to `saebench.log` there.

    Args:
        saes: any SAELens SAEs, or what `prepare` made of them. A mapping's keys begin their names.
        evals: among core, sparse_probing, sparse_probing_sae_probes, absorption, scr, tpp, ravel, autointerp, unlearning and
            meta_structure.
        output: folder for results (`<eval>/<key>/<name>.json` and SAEBench's own JSON beside it) and caches (`caches/`, up to
            100 GB for all data sets of a large model; safe to delete).
        model: a HookedTransformer in place of the one that the SAEs name. `"bundled"` needs none.
        device: where models and SAEs run.
        dtype: of both, where an eval lets it be chosen. None is the given model's, or bfloat16 on CUDA, float32 elsewhere.
        batch_size: texts that the language model reads at once.
        settings: changes to an eval's configuration, `{"sparse_probing": {"k_values": [1], "random_seed": 1}}`; the names are
            SAEBench's. Data sets may be local folders; core and autointerp take `"bundled"` too.
        max_norm_multiple: also score sparse_probing, scr and tpp with tokens left out whose norm is above this multiple of the
            median (attention sinks); None: off. Special tokens are always left out by SAEBench.
        judge: the language model that autointerp asks.
        on_problem: "raise" refuses before any work if an eval cannot run here, and stops at the first that ends without a
            result. "record" lists both in the report's `failures` and does the rest.
        quiet: send SAEBench's progress bars to the log too.
        model_identity: stands for what the model computes; needed where hooks change that (planted sinks). None is a hash of its
            weights and config.

    Raises:
        ValueError: unknown evals or settings, SAEs of different models, or what `prepare` refuses.
        OutputInUseError: another run writes to `output`.
        SAEBenchError: with on_problem="raise".
    """
    HighNormFilter(max_norm_multiple)  # refuses multiples that make no sense
    named = saes if isinstance(saes, Mapping) else dict.fromkeys(range(len(saes)))
    given = list(saes.values()) if isinstance(saes, Mapping) else list(saes)
    prepared = [prepare(sae, name if isinstance(name, str) else None) for name, sae in zip(named, given, strict=True)]
    models = sorted({sae.cfg.metadata.model_name for sae in prepared})
    if len(models) != 1:
        raise ValueError(f"A run is on one language model; these SAEs are of {', '.join(models) or 'none'}.")
    check_name(models[0], "model's name in the SAE's metadata, which SAEBench calls files by,")
    how, *others = [how_loaded(sae) for sae in prepared]
    if any(other != how for other in others):
        ways = ", ".join(str(one.kwargs) for one in (how, *others))
        raise ValueError(f"A run is on one language model, and these SAEs name {models[0]} loaded with {ways}.")
    dtype = dtype or dtype_of(model, device)
    problems = check_environment(evals, models[0], judge=judge)
    able = _without(evals, problems)
    configs = {
        name: EVALS[name].make_config(models[0], dtype, batch_size, (settings or {}).get(name, {})) for name in able
    }
    stray = sorted(set(settings or {}) - set(evals))
    if stray:
        raise ValueError(f"settings for {', '.join(stray)}, not among the evals to run: {', '.join(evals)}.")
    problems += [p for p in check_environment(able, models[0], configs, judge) if p not in problems]
    if problems and on_problem == "raise":
        raise SAEBenchError(problems)
    able = _without(able, problems)
    if model is None and any(EVALS[name].takes_model for name in able):
        model = load_for_saebench(models[0], how, device, dtype)
    runner = Runner(Path(output).resolve(), model, device, judge or Judge(), max_norm_multiple, quiet, model_identity)
    problems += check_saes(able, prepared, model, configs)
    problems += check_data([name for name in able if not runner.is_warm(EVALS[name], configs[name], prepared)], configs)
    if problems and on_problem == "raise":
        raise SAEBenchError(problems)
    able = _without(able, [p for p in problems if p.sae is None])
    skip = {(p.eval, p.sae) for p in problems}
    todo = [(name, sae) for name in EVALS if name in able for sae in prepared if (name, sae.name) not in skip]
    results: dict[tuple[str, str], EvalResult] = {}
    with open_output(runner.output, "saebench", parts=("*/*", "caches/*/*", "caches/*/*/*")):
        for name, sae in todo:
            try:
                results[name, sae.name] = runner.score(EVALS[name], configs[name], sae)
            except Exception as error:
                failure = EvalFailure(
                    name, sae.name, without_secrets(f"{type(error).__name__}: {error}"), f"See {runner.log}."
                )
                if on_problem == "raise":
                    raise SAEBenchError([failure]) from error
                problems.append(failure)
    order = [(name, sae.name) for sae in prepared for name in EVALS]
    return SAEBenchReport(tuple(results[key] for key in order if key in results), tuple(problems))


def _without(evals: Sequence[str], problems: Sequence[EvalFailure]) -> list[str]:
    return [name for name in evals if name not in {p.eval for p in problems}]

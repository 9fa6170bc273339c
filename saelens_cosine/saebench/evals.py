"""SAEBench's evals: how each is configured and called, and what it needs. One row each."""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from saelens_cosine.activations.sae_probes_text import SAE_PROBES_TEXT
from saelens_cosine.activations.text import load_text
from saelens_cosine.bundled import BUNDLED, stdlib_corpus
from saelens_cosine.files.whole import whole_folder
from saelens_cosine.saebench.scopes import replaced, within_the_context, working_in


@dataclass(frozen=True)
class Judge:
    """
    The language model that the autointerp eval asks, behind an OpenAI-compatible endpoint.

    Args:
        model (str): Its name there. SAEBench's own scores are gpt-4o-mini's.
        base_url (str | None): The endpoint; None is the OPENAI_BASE_URL variable's, or OpenAI's.
        api_key (str | None): None is the OPENAI_API_KEY variable's. Never saved.
    """

    model: str = "gpt-4o-mini"
    base_url: str | None = field(default=None, repr=False)
    api_key: str | None = field(default=None, repr=False)

    @property
    def key(self) -> str | None:
        return self.api_key or os.environ.get("OPENAI_API_KEY")


@dataclass(frozen=True)
class Call:
    """What a call of an eval gets beside its configuration: one SAE, and where things go."""

    sae: Any
    device: str
    output: Path
    artifacts: Path
    judge: Judge

    @property
    def saes(self) -> list[tuple[str, Any]]:
        return [(self.sae.name, self.sae)]


@dataclass(frozen=True)
class BenchEval:
    """
    Args:
        name (str): As the user names it.
        package (str): Folder below `sae_bench.evals`.
        config (str): Class name of its configuration; empty for core, which takes plain arguments.
        call (Callable): Runs it, from its module, a configuration and a `Call`.
        defaults (Mapping[str, Any]): Where we depart from the configuration's, or it has none.
        pools_tokens (bool): Probes see means over tokens, from cached activations.
        takes_model (bool): It runs the HookedTransformer.
        batch_share (int): A batch of the language model is this many times smaller than elsewhere, as upstream's own runs have it.
        packages (tuple[str, ...]): Modules that it imports beyond what every eval does.
    """

    name: str
    package: str
    config: str
    call: Callable[[Any, Any, Call], Any]
    defaults: Mapping[str, Any] = field(default_factory=dict[str, Any])
    pools_tokens: bool = False
    takes_model: bool = True
    batch_share: int = 1
    packages: tuple[str, ...] = ()

    @property
    def module(self) -> Any:
        return importlib.import_module(f"sae_bench.evals.{self.package}.main")

    def make_config(self, model_name: str, dtype: str, batch_size: int, settings: Mapping[str, Any]) -> Any:
        """Its configuration, the caller's settings last.

        Raises:
            ValueError: settings that it does not have.
        """
        given = {
            "model_name": model_name,
            "llm_dtype": dtype,
            "llm_batch_size": max(1, batch_size // self.batch_share),
        }
        if not self.config:
            known, make = set(self.defaults), dict
            given = {}
        else:
            make = getattr(importlib.import_module(f"sae_bench.evals.{self.package}.eval_config"), self.config)
            known = {f.name for f in fields(make)}
        unknown = sorted(set(settings) - known)
        if unknown:
            raise ValueError(f"{self.name} has no setting {', '.join(unknown)}; it has {', '.join(sorted(known))}.")
        return make(**{k: v for k, v in {**given, **self.defaults, **settings}.items() if k in known})


INSTALLED_TEXT = (BUNDLED, SAE_PROBES_TEXT)
"""Names of text that comes with a package."""


def heldout_texts(dataset: str) -> list[str]:
    """The documents of text that comes with a package which nothing is trained on."""
    return stdlib_corpus("heldout")["text"][:] if dataset == BUNDLED else _heldout_of_sae_probes()


@functools.cache
def _heldout_of_sae_probes() -> list[str]:
    return [row["text"] for row in load_text(SAE_PROBES_TEXT).heldout]


def text_folder(dataset: str, artifacts: Path) -> str:
    """A data set's name for SAEBench: `"bundled"` and `"sae-probes"` are the held-out part of that text, written to a folder."""
    if dataset not in INSTALLED_TEXT:
        return dataset
    folder = artifacts / f"{dataset}_text"
    if not folder.exists():
        artifacts.mkdir(parents=True, exist_ok=True)
        with whole_folder(folder) as unfinished:
            rows = (json.dumps({"text": text}) + "\n" for text in heldout_texts(dataset))
            (unfinished / "train.jsonl").write_text("".join(rows))
    return str(folder)


def _core(module: Any, config: dict[str, Any], call: Call) -> None:
    settings = {**config, "dataset": text_folder(config["dataset"], call.artifacts)}
    dtype = str(call.sae.dtype).removeprefix("torch.")
    module.multiple_evals(
        call.saes, output_folder=str(call.output), dtype=dtype, device=call.device, force_rerun=True, **settings
    )


def _with_artifacts(module: Any, config: Any, call: Call) -> None:
    module.run_eval(
        config, call.saes, call.device, str(call.output), force_rerun=True, artifacts_path=str(call.artifacts)
    )


def _absorption(module: Any, config: Any, call: Call) -> None:
    # its probes and tables would lie in the installed package, under the model's and the SAE's name
    probes, selection, experiment = (call.artifacts / part for part in ("probes", "k_sparse_probing", "absorption"))
    first = functools.partial(module.run_k_sparse_probing_experiment, probes_dir=probes, experiment_dir=selection)
    second = functools.partial(
        module.run_feature_absortion_experiment,
        probes_dir=probes,
        experiment_dir=experiment,
        sparse_probing_experiment_dir=selection,
    )
    with contextlib.ExitStack() as scopes:
        scopes.enter_context(replaced(module, "run_k_sparse_probing_experiment", first))
        scopes.enter_context(replaced(module, "run_feature_absortion_experiment", second))
        scopes.enter_context(working_in(call.artifacts))
        module.run_eval(config, call.saes, call.device, str(call.output), force_rerun=True)


def _sae_probes(module: Any, config: Any, call: Call) -> None:
    config.results_path = str(call.output / "sae_probes")  # empty: it would reuse what it finds under a name
    config.model_cache_path = config.model_cache_path and str(call.artifacts / "activations")
    of_model, kept = Path(config.results_path) / f"baseline_results_{config.model_name}", call.artifacts / "baseline"
    if kept.exists():  # probes on activations, which are the same for each SAE
        shutil.copytree(kept, of_model)
    with within_the_context():
        module.run_eval(config, call.saes, call.device, str(call.output), force_rerun=True)
    if of_model.exists() and not kept.exists():
        with whole_folder(kept) as unfinished:
            shutil.copytree(of_model, unfinished, dirs_exist_ok=True)


def _ravel(module: Any, config: Any, call: Call) -> None:
    config.artifact_dir = str(call.artifacts)
    _with_artifacts(module, config, call)


def _autointerp(module: Any, config: Any, call: Call) -> None:
    config.dataset_name = text_folder(config.dataset_name, call.artifacts)
    judge, openai_client = call.judge, module.OpenAI

    def client(api_key: str) -> Any:
        made = openai_client(api_key=api_key, base_url=judge.base_url)
        create = made.chat.completions.create
        made.chat.completions.create = lambda **request: create(**{**request, "model": judge.model})
        return made

    with replaced(module, "OpenAI", client):
        module.run_eval(
            config,
            call.saes,
            call.device,
            judge.key,
            str(call.output),
            force_rerun=True,
            artifacts_path=str(call.artifacts),
        )


def _meta_structure(module: Any, config: Any, call: Call) -> None:
    module.run_eval(config, call.saes, call.device, str(call.output), force_rerun=True)


CORE = {
    "n_eval_reconstruction_batches": 200,
    "n_eval_sparsity_variance_batches": 2000,
    "eval_batch_size_prompts": 16,
    "compute_featurewise_density_statistics": True,
    "compute_featurewise_weight_based_metrics": True,  # without these two it writes nothing
    "exclude_special_tokens_from_reconstruction": True,
    "dataset": "Skylion007/openwebtext",
    "context_size": 128,
}
"""How upstream runs core; its function has other defaults."""

EVALS: dict[str, BenchEval] = {
    row.name: row
    for row in (
        BenchEval("core", "core", "", _core, CORE),
        BenchEval("sparse_probing", "sparse_probing", "SparseProbingEvalConfig", _with_artifacts, pools_tokens=True),
        BenchEval(
            "sparse_probing_sae_probes",
            "sparse_probing_sae_probes",
            "SparseProbingSaeProbesEvalConfig",
            _sae_probes,
            packages=("xgboost", "zstandard", "sae_probes"),
        ),
        BenchEval("absorption", "absorption", "AbsorptionEvalConfig", _absorption),
        BenchEval(
            "scr", "scr_and_tpp", "ScrAndTppEvalConfig", _with_artifacts, {"perform_scr": True}, pools_tokens=True
        ),
        BenchEval(
            "tpp", "scr_and_tpp", "ScrAndTppEvalConfig", _with_artifacts, {"perform_scr": False}, pools_tokens=True
        ),
        BenchEval("ravel", "ravel", "RAVELEvalConfig", _ravel, takes_model=False, batch_share=4),
        BenchEval(
            "autointerp",
            "autointerp",
            "AutoInterpEvalConfig",
            _autointerp,
            packages=("openai",),
        ),
        BenchEval("unlearning", "unlearning", "UnlearningEvalConfig", _with_artifacts, batch_share=8),
        BenchEval("meta_structure", "meta_structure", "MetaStructureEvalConfig", _meta_structure, takes_model=False),
    )
}
"""By name, in the order in which they run."""

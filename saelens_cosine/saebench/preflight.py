"""What would stop an eval, or make it report nonsense, said before any work starts.

Each check is a known trap of SAEBench 0.6 with the packages of 2026; many of them end hours later in an empty result, or in
no error at all.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from saelens_cosine.activations.hook_points import size_at_hook
from saelens_cosine.hooked_transformer import WAY_OUT, hooked_transformer
from saelens_cosine.plain import digest, files_fingerprint
from saelens_cosine.saebench.evals import EVALS, INSTALLED_TEXT, Judge, heldout_texts
from saelens_cosine.saebench.prepare import PreparedSAE
from saelens_cosine.saebench.results import EvalFailure

INSTALL = (
    "Install it with `pip install 'saelens-cosine[bench-deps]'` and then `pip install --no-deps sae-bench==0.6.0 "
    "sae-probes==0.4.2`; with a CUDA build of torch, `pip install 'saelens-cosine[bench]'` will do."
)
K_FIELDS = {1, 2, 5, 10, 20, 50, 100}
N_FIELDS = {2, 5, 10, 20, 50, 100, 500}
"""Numbers of latents that the results of sparse probing, and of SCR and TPP, have fields for; others are dropped without a word."""
RAVEL_MODELS = ("gemma-2-2b", "pythia-160m-deduped")
UNLEARNING_TEXT = Path("sae_bench/evals/unlearning/data/bio-forget-corpus.jsonl")
DECIDING_PACKAGES = (
    "saelens-cosine",
    "sae-bench",
    "sae-probes",
    "sae-lens",
    "transformer-lens",
    "transformers",
    "torch",
    "datasets",
    "scikit-learn",
    "numpy",
)


def versions() -> dict[str, str]:
    """Installed versions of what decides a score. SAEBench's own record has the git commit of the working directory."""
    return {name: found for name in DECIDING_PACKAGES if (found := _version(name)) is not None}


def check_environment(
    evals: Sequence[str],
    model_name: str,
    configs: Mapping[str, Any] | None = None,
    judge: Judge | None = None,
) -> list[EvalFailure]:
    """What this machine lacks for some evals; an empty list if nothing is known to.

    Args:
        evals: names, see `EVALS`.
        model_name: of the language model.
        configs: each eval's configuration, to check its settings too.
        judge: for autointerp.
    """
    unknown = [name for name in evals if name not in EVALS]
    if unknown:
        raise ValueError(f"There is no eval {', '.join(unknown)}. SAEBench has {', '.join(EVALS)}.")
    if find_spec("sae_bench") is None:
        return [EvalFailure(name, None, "SAEBench is not installed.", INSTALL) for name in evals]
    if hooked_transformer() is None:
        return [EvalFailure(name, None, "SAEBench runs HookedTransformers.", WAY_OUT) for name in evals]
    found: list[EvalFailure] = []
    for name in evals:
        needed = ("sklearn", "tabulate", *EVALS[name].packages)
        missing = [package for package in needed if find_spec(package) is None]
        if missing:
            found.append(EvalFailure(name, None, f"It imports {', '.join(missing)}, not installed here.", INSTALL))
            continue
        config = (configs or {}).get(name)
        if config is not None:
            found += [EvalFailure(name, None, *why) for why in _settings(name, config)]
        found += [EvalFailure(name, None, *why) for why in _special(name, model_name, judge or Judge())]
    return found


def check_data(evals: Sequence[str], configs: Mapping[str, Any], offline: bool | None = None) -> list[EvalFailure]:
    """Data sets that cannot be had. Not needed for an eval whose caches are filled.

    Args:
        evals: names.
        configs: each eval's configuration.
        offline: whether the Hub is out of reach; None asks HF_HUB_OFFLINE.
    """
    offline = os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0") if offline is None else offline
    return [EvalFailure(name, None, *why) for name in evals for why in _datasets(name, configs[name], offline)]


def data_contents(name: str, config: Any) -> dict[str, str]:
    """Hashes of the data sets that an eval reads from this machine; those on the Hub count by their names."""
    contents: dict[str, str] = {}
    for dataset in _data_names(name, config):
        if dataset in INSTALLED_TEXT:
            contents[dataset] = digest(heldout_texts(dataset))
        elif Path(dataset).exists():
            contents[dataset] = files_fingerprint(Path(dataset))
    if name == "unlearning" and UNLEARNING_TEXT.exists():
        contents[str(UNLEARNING_TEXT)] = files_fingerprint(UNLEARNING_TEXT)
    return contents


def check_saes(
    evals: Sequence[str], saes: Sequence[PreparedSAE], model: Any, configs: Mapping[str, Any]
) -> list[EvalFailure]:
    """Evals that an SAE, its hook or the model does not fit.

    Args:
        evals: names.
        saes: prepared.
        model: the HookedTransformer; None if no eval takes one.
        configs: each eval's configuration.
    """
    found: list[EvalFailure] = []
    for sae in saes:
        hook = sae.cfg.metadata.hook_name
        for name in evals:
            found += [
                EvalFailure(name, sae.name, *why) for why in _hook(EVALS[name].takes_model, sae, hook, model, name)
            ]
            n_values = getattr(configs[name], "n_values", [])
            if name in ("scr", "tpp") and max(n_values) > sae.cfg.d_sae:
                found.append(
                    EvalFailure(
                        name,
                        sae.name,
                        f"n_values={n_values} are numbers of latents to ablate, of which there are {sae.cfg.d_sae}.",
                        "Leave out the larger ones in settings.",
                    )
                )
    for name in evals if model is not None else ():
        found += [EvalFailure(name, None, *why) for why in _length(configs[name], model)]
    if "absorption" in evals and model is not None:
        found += [EvalFailure("absorption", None, *why) for why in _letters(model.tokenizer)]
    return found


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _major(package: str) -> int:
    return int((_version(package) or "0").split(".")[0])


def _data_names(name: str, config: Any) -> list[str]:
    if name in ("sparse_probing_sae_probes", "unlearning"):
        return []  # the one ships its data, the other's are checked for elsewhere
    if name == "core":
        names = [config["dataset"]]
    else:
        names = list(getattr(config, "dataset_names", [])) or [getattr(config, "dataset_name", None)]
    return sorted({re.sub(r"_class_set\d|_sentiment$", "", dataset) for dataset in names if dataset})


def _datasets(name: str, config: Any, offline: bool) -> Iterable[tuple[str, str]]:
    named = [dataset for dataset in _data_names(name, config) if dataset not in INSTALLED_TEXT]
    remote = [dataset for dataset in named if not Path(dataset).exists()]
    if not remote:
        return
    if offline:
        yield (
            f"HF_HUB_OFFLINE is set and there is no folder {' or '.join(remote)} here. (The Hub's cache does not serve data "
            "sets offline.)",
            "Unset it, or put JSON lines into folders of these names in the working directory.",
        )
    elif "codeparrot/github-code" in remote and _major("datasets") >= 4:
        yield (
            f"codeparrot/github-code is loaded by a script, which datasets {_version('datasets')} does not run.",
            "Install datasets<4, or leave it out with settings={'sparse_probing': {'dataset_names': [...]}}.",
        )


def _settings(name: str, config: Any) -> Iterable[tuple[str, str]]:
    for field, known in (("k_values", K_FIELDS), ("n_values", N_FIELDS)):
        if not set(getattr(config, field, ())) <= known:
            yield (
                f"{field}={getattr(config, field)}: the result has fields for {sorted(known)} and drops the others.",
                "Choose among these.",
            )
    if name == "core" and not (
        config["compute_featurewise_density_statistics"] and config["compute_featurewise_weight_based_metrics"]
    ):
        yield ("Without both compute_featurewise_ settings its result is invalid, and it writes none.", "Keep both.")
    if name == "sparse_probing_sae_probes" and config.setting != "normal":
        yield (
            f"setting={config.setting!r}: SAEBench collects only 'normal'.",
            "Call sae_probes itself for the others.",
        )


def _special(name: str, model_name: str, judge: Judge) -> Iterable[tuple[str, str]]:
    if name == "ravel":
        if _major("transformers") >= 5:
            yield (
                f"transformers {_version('transformers')} returns tensors where RAVEL takes the first of a tuple: IndexError "
                "in the middle of the run.",
                "Install transformers==4.57.6 and transformer-lens==2.18, in an environment of their own.",
            )
        if model_name not in RAVEL_MODELS:
            yield (f"It knows only {' and '.join(RAVEL_MODELS)}, not {model_name}.", "")
    if name == "autointerp" and not judge.key:
        yield (
            "It asks a language model, and there is no key for one.",
            "Set OPENAI_API_KEY, or judge=Judge(model=..., base_url=..., api_key=...) for any OpenAI-compatible endpoint.",
        )
    if name == "unlearning":
        if "it" not in model_name:
            yield (f"It refuses models without 'it' (instruction-tuned) in their name, such as {model_name}.", "")
        if not UNLEARNING_TEXT.exists():
            yield (
                f"There is no {UNLEARNING_TEXT} in the working directory.",
                "Its authors give it out on request; the form is in SAEBench's unlearning README.",
            )


def _hook(takes_model: bool, sae: PreparedSAE, hook: str, model: Any, name: str) -> Iterable[tuple[str, str]]:
    if name == "absorption" and not hook.endswith("hook_resid_post"):
        yield (
            f"It reads blocks.<layer>.hook_resid_post whatever the SAE's hook; {hook} would be scored on another stream.",
            "",
        )
    head = sae.cfg.metadata.hook_head_index
    if head is not None and name != "meta_structure" and not (name == "core" and re.search("hook_[qkvz]", hook)):
        yield (f"It reads all of {hook}; this SAE is of head {head} alone.", "")
        return
    if sae.cfg.reshape_activations == "hook_z" and name not in ("core", "meta_structure"):
        yield (f"It cannot read {hook}, where activations are split by head.", "")
        return
    if not takes_model or model is None:
        return
    if hook not in model.hook_dict:
        yield (f"{model.cfg.model_name} has no hook {hook}.", "prepare(sae, hook_name=...) gives another.")
        return
    size = size_at_hook(model, hook, head)
    if size != sae.cfg.d_in:
        yield (f"The SAE has d_in={sae.cfg.d_in}, and {hook} of {model.cfg.model_name} has size {size}.", "")


def _length(config: Any, model: Any) -> Iterable[tuple[str, str]]:
    given = config if isinstance(config, dict) else vars(config)
    for field in ("context_size", "context_length", "llm_context_size"):
        if (given.get(field) or 0) > model.cfg.n_ctx:
            why = f"{field}={given[field]} tokens are more than {model.cfg.model_name} takes here, {model.cfg.n_ctx}."
            yield why, "Set it in settings."


def _letters(tokenizer: Any) -> Iterable[tuple[str, str]]:
    split = [
        letter
        for letter in "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
        if len(tokenizer.encode(f" {letter}", add_special_tokens=False)) != 1
    ]
    if split:
        yield (
            f"Its prompts end in a letter, and this tokenizer splits {', '.join(split)} after a space into several tokens, so "
            "that prompts would differ in length.",
            "",
        )

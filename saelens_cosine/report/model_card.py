"""What must stand beside saved SAEs, so that whoever finds them can load them and judge them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from sae_lens.saes.sae import SAEConfig

from saelens_cosine.hooked_transformer import official_model_name
from saelens_cosine.registry import INFERENCE_ARCHITECTURES

TAGS = ["saelens", "saelens-cosine", "sparse-autoencoder", "mechanistic-interpretability"]

CITATIONS = """\
@misc{naihin2026size,
  title  = {Size Doesn't Matter: Cosine-Scored Sparse Autoencoders},
  author = {Naihin and Stambler},
  year   = {2026},
  eprint = {2606.15054},
  archivePrefix = {arXiv},
}
@inproceedings{lee2025evaluating,
  title     = {Evaluating and Designing Sparse Autoencoders by Approximating Quasi-Orthogonality},
  author    = {S. Lee and A. Davies and M. Canby and J. Hockenmaier},
  booktitle = {Conference on Language Modeling (COLM)},
  year      = {2025},
  eprint = {2503.24277},
  archivePrefix = {arXiv},
}
"""

_SETTINGS = "training settings"  # too long for a column
_HUB_NAMES_WITHOUT_OWNER = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "distilgpt2")


def model_card(config: SAEConfig, where: str) -> str:
    """Text of a README.md for a folder that holds one SAE.

    SAELens finds an SAE's class by the architecture's name and answers an unknown one with a bare `KeyError`, before any
    code of ours can run; nothing but the card and the note in the metadata can tell a user what to install.

    Args:
        config: the saved (inference) config.
        where: Python expression that loads the SAE, such as `SAE.load_from_disk("folder")`.
    """
    return f"# {config.architecture()} SAE\n\n{_how_to_load([config], config, where)}\n{_table(('', ''), facts(config).items())}"


def repository_card(
    repo_id: str,
    saes: Mapping[str, SAEConfig],
    comparison: Mapping[str, Any] | None = None,
    picture: str | None = None,
    license: str | None = None,
) -> str:
    """Text of the README.md of a Hub repository, with the front matter that the Hub reads.

    Args:
        repo_id: `owner/name` on the Hub.
        saes: saved (inference) config of each SAE by its id, the folder in the repository. At least one.
        comparison: content of a `comparison.json` that measured them.
        picture: path of its picture in the repository.
        license: identifier as the Hub lists them, such as `mit`; none is stated if None.
    """
    first, config = next(
        (item for item in saes.items() if item[1].architecture() in INFERENCE_ARCHITECTURES), next(iter(saes.items()))
    )
    described = {sae_id: facts(config) for sae_id, config in saes.items()}
    shared = {
        key: value for key, value in described[first].items() if all(d.get(key) == value for d in described.values())
    }
    if comparison:
        shared["recipe"] = f"`{comparison['settings']['recipe']}`, {comparison['settings']['tokens']:,} training tokens"
    columns = [key for key in facts(config) if key not in shared and key != _SETTINGS]
    rows = [(f"`{sae_id}`", *(d.get(key, "-") for key in columns)) for sae_id, d in described.items()]
    names = {config.metadata.model_name for config in saes.values()}
    data = {config.metadata.dataset_path for config in saes.values()}
    front_matter = ModelCardData(
        library_name="saelens",
        tags=TAGS,
        base_model=sorted(filter(None, map(_model_on_the_hub, names))) or None,
        datasets=sorted(filter(None, map(_on_the_hub, data))) or None,
        license=license,
    )
    architectures = ", ".join(dict.fromkeys(f"`{config.architecture()}`" for config in saes.values()))
    parts = [
        f"---\n{front_matter.to_yaml()}\n---\n",
        f"# {repo_id.split('/')[-1]}\n",
        f"Sparse autoencoders ({architectures}) for [SAELens](https://github.com/decoderesearch/SAELens)"
        f" on {facts(config).get('model', 'a language model')}.\n",
        "## Load\n",
        _how_to_load(saes.values(), config, f'SAE.from_pretrained("{repo_id}", "{first}")'),
        "## What it is\n",
        _table(("", ""), shared.items()),
        _table(("id", *columns), rows) if len(saes) > 1 else "",
        _comparison_section(comparison, picture) if comparison else "",
        "## Cite\n",
        "The score is the first paper's; the second defines AFA and the top-AFA activation.\n\n"
        f"```bibtex\n{CITATIONS}```\n",
    ]
    return "\n".join(part for part in parts if part)


def facts(config: SAEConfig) -> dict[str, str]:
    """What is known about a saved SAE, as cells of a table."""
    metadata = config.metadata
    settings: Mapping[str, Any] = metadata.training_architecture_details or {}
    rows: dict[str, Any] = {
        "architecture": f"`{config.architecture()}`",
        "trained as": f"`{metadata.training_architecture}`" if metadata.training_architecture else None,
        "model": f"`{metadata.model_name}`" if metadata.model_name else None,
        "hook": f"`{metadata.hook_name}`" if metadata.hook_name else None,
        "features": f"{config.d_sae} on {config.d_in} dimensions",
        "dataset": f"`{metadata.dataset_path}`" if metadata.dataset_path else None,
        "context": f"{metadata.context_size} tokens" if metadata.context_size else None,
        "high-norm tokens": _tokens(metadata.max_norm_multiple, metadata.high_norm_share_dropped),
        "sinks": "planted in each context, see `saelens_cosine.activations.planted_sinks`"
        if metadata.planted_sinks
        else None,
        _SETTINGS: ", ".join(f"{key} {value}" for key, value in settings.items() if value is not None),
    }
    return {key: str(value) for key, value in rows.items() if value}


def _how_to_load(configs: Iterable[SAEConfig], example: SAEConfig, where: str) -> str:
    """Installation and code that loads `example`; the plugin only where one of the architectures is ours."""
    ours = [name for name in (config.architecture() for config in configs) if name in INFERENCE_ARCHITECTURES]
    why = (
        "The import registers the architecture in SAELens, which looks the class up by name before any other code runs.\n\n"
        if ours
        else ""
    )
    first = f"import saelens_cosine  # without it: KeyError: '{ours[0]}'\n" if ours else ""
    return (
        f"```bash\npip install {'saelens-cosine' if ours else 'sae-lens'}\n```\n\n{why}"
        f"```python\n{first}from sae_lens import SAE\n\nsae = {where}\n"
        f"codes = sae.encode(activations)  # [..., {example.d_in}] -> [..., {example.d_sae}]\n"
        "reconstruction = sae.decode(codes)\n```\n"
    )


def _comparison_section(comparison: Mapping[str, Any], picture: str | None) -> str:
    settings, high = comparison["settings"], comparison["high_norm_tokens"]
    arms = comparison["arms"]
    quartiles = range(len(arms[0]["fve_by_norm_quartile"]))
    hooks: list[dict[str, Any]] = comparison["hooks"]
    several = {"hook_name": len(hooks) > 1, **{name: len({arm[name] for arm in arms}) > 1 for name in ("k", "lr")}}
    differing = [name for name, differs in several.items() if differs]
    head = (
        "architecture",
        *differing,
        "seed",
        "FVE",
        "L0",
        "dead",
        "CE recovered",
        *(f"FVE Q{q + 1}" for q in quartiles),
    )
    rows = [
        (
            f"`{arm['architecture']}`",
            *(str(arm[name]) for name in differing),
            str(arm["seed"]),
            f"{arm['fve']:.4f}",
            f"{arm['l0']:.1f}",
            f"{arm['dead_fraction']:.1%}",
            f"{arm['ce_loss_recovered']:.4f}",
            *(f"{arm['fve_by_norm_quartile'][q]['fve']:.4f}" for q in quartiles),
        )
        for arm in arms
    ]
    multiple = high["max_norm_multiple"]
    sinks = (
        "kept in training and evaluation"
        if multiple is None
        else f"above {multiple:g} times the median norm dropped, "
        + "; ".join(
            f"{hook['high_norm_share_dropped']:.2%} of the tokens in training and "
            f"{hook['high_norm_share_dropped_heldout']:.2%} in evaluation"
            + (f" at {hook['hook_name']}" if several["hook_name"] else "")
            for hook in hooks
        )
    )
    sinks += "; a sink planted in each context" if high.get("planted") else ""
    curves = "FVE and cross-entropy recovered against L0" if several["k"] else "training curves"
    image = f"\n![{curves}, exponents, and FVE by quartile of the norm]({picture})\n" if picture else ""
    return (
        f"## Comparison\n\nAll arms on the same activations; measured: {settings['evaluated']}, "
        f"{arms[0]['dead_window_tokens']:,} tokens. High-norm tokens: {sinks}.\n\n"
        f"{_table(head, rows)}{image}\n"
        f"FVE: {settings['fve_definition']}; Q1 to Q4: by quartile of the norm, each about its own mean. "
        f"Dead: {settings['dead_definition']}. CE recovered: {settings['ce_definition']}.\n"
    )


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(cells) + " |\n" for cells in lines)


def _tokens(max_norm_multiple: float | None, share: float | None) -> str | None:
    if share is None:
        return None
    if max_norm_multiple is None:
        return "kept in training"
    return f"above {max_norm_multiple:g} times the median norm dropped in training: {share:.2%} of the tokens"


def _model_on_the_hub(name: str | None) -> str | None:
    """`gpt2-small` -> `gpt2`, `gemma-2-2b` -> `google/gemma-2-2b`; None for what is not on the Hub."""
    try:
        official = official_model_name(name) if name else None
    except ValueError:
        official = name
    return official if official in _HUB_NAMES_WITHOUT_OWNER else _on_the_hub(official)


def _on_the_hub(name: str | None) -> str | None:
    """The name if it has the form `owner/name` and is not a local path."""
    return name if name and re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) and not Path(name).exists() else None

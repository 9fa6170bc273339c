"""What must stand beside a saved cosine SAE, so that whoever finds it can load it."""

from __future__ import annotations

from typing import Any

from sae_lens.saes.sae import SAEConfig

from saelens_cosine.registry import INFERENCE_ARCHITECTURES


def model_card(config: SAEConfig, where: str) -> str:
    """Text of a README.md for a folder or Hub repository that holds one SAE.

    SAELens finds an SAE's class by the architecture's name and answers an unknown one with a bare `KeyError`, before any
    code of ours can run; nothing but the card and the note in the metadata can tell a user what to install.

    Args:
        config: the saved (inference) config.
        where: Python expression that loads the SAE, such as `SAE.load_from_disk("folder")`.
    """
    name, metadata = config.architecture(), config.metadata
    ours = name in INFERENCE_ARCHITECTURES
    install = "pip install saelens-cosine" if ours else "pip install sae-lens"
    first = f"import saelens_cosine  # without it: KeyError: '{name}'\n" if ours else ""
    facts: dict[str, Any] = {
        "architecture": f"`{name}`",
        "trained as": f"`{metadata.training_architecture}`" if metadata.training_architecture else None,
        "model": metadata.model_name,
        "hook": f"`{metadata.hook_name}`",
        "features": f"{config.d_sae} on {config.d_in} dimensions",
        "dataset": metadata.dataset_path,
        "high-norm tokens": _tokens(metadata.max_norm_multiple, metadata.high_norm_share_dropped),
    }
    rows = "".join(f"| {key} | {value} |\n" for key, value in facts.items() if value is not None)
    return (
        f"# {name} SAE\n\n```bash\n{install}\n```\n\n```python\n{first}from sae_lens import SAE\n\nsae = {where}\n```\n\n"
        f"| | |\n| --- | --- |\n{rows}"
    )


def _tokens(max_norm_multiple: float | None, share: float | None) -> str | None:
    if share is None:
        return None
    if max_norm_multiple is None:
        return "kept in training"
    return f"above {max_norm_multiple:g} times the median norm dropped in training: {share:.2%} of the tokens"

"""What was published, by short name. Listed by `saelens-cosine convert --list`.

Facts are the publishers' or those of the paper's code (arXiv 2606.15054); what nobody has looked at is None.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class PublishedSAE:
    """
    One SAE of a release.

    Args:
        folder (str): Folder in the repository.
        hook_name (str): Where in the model, as TransformerLens names it.
        d_sae (int): Number of features.
        k (int): Mean active features per training token.
        sha256 (str | None): Of the weights file. None: not seen yet, so not checked.
    """

    folder: str
    hook_name: str
    d_sae: int
    k: int
    sha256: str | None = None


@dataclass(frozen=True)
class Release:
    """
    SAEs in one Hub repository.

    Args:
        repo_id (str): On the Hub.
        format (str): Name of the layout in `saelens_cosine.loading.FORMATS`.
        d_in (int): Size of the activations.
        metadata (dict[str, Any]): What SAELens should know of all of them, beside the hook.
        saes (dict[str, PublishedSAE]): By id.
    """

    repo_id: str
    format: str
    d_in: int
    metadata: dict[str, Any]
    saes: dict[str, PublishedSAE]

    def metadata_of(self, folder: str) -> dict[str, Any]:
        """SAELens metadata of the SAE in a folder of the repository."""
        hooks = {sae.folder: {"hook_name": sae.hook_name} for sae in self.saes.values()}
        return {**self.metadata, **hooks.get(folder.strip("/"), {})}


_QWEN3_8B = {"model_name": "Qwen/Qwen3-8B", "prepend_bos": False, "context_size": 2048}  # its tokenizer has no BOS

RELEASES: dict[str, Release] = {
    "cosine-scored-saes-qwen3-8b": Release(
        repo_id="Silen/cosine-scored-saes-qwen3-8b",
        format="authors",
        d_in=4096,
        metadata={**_QWEN3_8B, "dataset_path": "HuggingFaceFW/fineweb", "max_norm_multiple": 10.0},
        saes={
            arm: PublishedSAE(arm, "blocks.18.hook_resid_post", 65536, 80)
            for arm in ("standard", "global-a", "perfeature")
        },
    ),
    "qwen3-8b-saes": Release(
        repo_id="adamkarvonen/qwen3-8b-saes",
        format="dictionary_learning",
        d_in=4096,
        metadata={"model_name": "Qwen/Qwen3-8B", "prepend_bos": False},
        saes={
            f"resid_post_layer_{layer}/trainer_{trainer}": PublishedSAE(
                f"saes_Qwen_Qwen3-8B_batch_top_k/resid_post_layer_{layer}/trainer_{trainer}",
                f"blocks.{layer}.hook_resid_post",
                d_sae,
                k,
            )
            for layer in (9, 18, 27)
            for trainer, (d_sae, k) in enumerate([(16384, 80), (16384, 160), (65536, 80), (65536, 160)])
        },
    ),
}


def release_of(repo_id: str) -> Release | None:
    """The release in a Hub repository, if it is listed."""
    return next((release for release in RELEASES.values() if release.repo_id == repo_id), None)

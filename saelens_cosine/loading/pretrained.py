"""`from_pretrained`: the converter is chosen by the files that are there."""

from __future__ import annotations

import os
import posixpath
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory
from sae_lens.saes.sae import SAE
from sae_lens.util import dtype_to_str, str_to_dtype

from saelens_cosine.loading.errors import CheckpointError, listed
from saelens_cosine.loading.formats.authors import AUTHORS
from saelens_cosine.loading.formats.dictionary_learning import DICTIONARY_LEARNING
from saelens_cosine.loading.formats.format import Format, published_metadata
from saelens_cosine.loading.formats.saelens import SAELENS, load_saelens
from saelens_cosine.loading.formats.sparsify import SPARSIFY
from saelens_cosine.loading.hub import files_of
from saelens_cosine.loading.releases import RELEASES

FORMATS: dict[str, Format] = {f.name: f for f in (SAELENS, SPARSIFY, DICTIONARY_LEARNING, AUTHORS)}
"""Layouts by name. The first whose files are all in a folder is taken."""


@dataclass(frozen=True)
class Located:
    """
    An SAE's files on this machine.

    Args:
        format (Format): Their layout.
        path (Path): Their folder, or the weights file itself.
        metadata (dict[str, Any]): What is known of the SAE beside its files.
        k (int | None): Features per token, where the files don't tell.
    """

    format: Format
    path: Path
    metadata: dict[str, Any] = field(default_factory=dict[str, Any])
    k: int | None = None


def from_pretrained(
    source: str | Path,
    sae_id: str | None = None,
    *,
    device: str = "cpu",
    dtype: str | torch.dtype | None = None,
    k: int | None = None,
    metadata: dict[str, Any] | None = None,
    force_download: bool = False,
) -> SAE[Any]:
    """Load an SAE that this package, SAELens, the paper's authors, dictionary_learning or sparsify saved.

    Args:
        source: a local folder or file, a release of `saelens-cosine convert --list` or of SAELens, or a Hub repository.
        sae_id: which of its SAEs: an id of the release, or the folder. Not needed where there is only one.
        device: where the SAE shall be; nothing larger than the SAE is made there.
        dtype: of the weights. None is the file's, and float32 or wider where a scale is folded into them. Exponents and
            thresholds of our classes are always float32 or wider.
        k: features per token of a TopK or AbsTopK SAE of the paper's authors, whose files don't tell.
        metadata: what the files don't tell, such as `{"model_name": "gpt2", "hook_name": "blocks.6.hook_resid_post"}`.
        force_download: again, though it is in the cache.

    Raises:
        CheckpointError: the files are damaged, of no known layout, a training checkpoint (`inference_form` reads those), or
            hold several SAEs and none was named.
        ConnectionError: the Hub cannot be had; the message says what was tried.
    """
    if isinstance(dtype, torch.dtype):
        dtype = dtype_to_str(dtype)
    if _is_saelens_release(source):
        if k is not None:
            raise CheckpointError(f"{source!r} says its own k; leave k={k} out.")
        if sae_id is None:
            ids = get_pretrained_saes_directory()[str(source)].saes_map
            raise CheckpointError(f"{source!r} holds {listed(ids)}. Name one as sae_id.")
        return SAE.from_pretrained(
            str(source), sae_id, device=device, dtype=dtype or "float32", force_download=force_download
        )
    return load(locate(source, sae_id, force_download, k), device=device, dtype=dtype, metadata=metadata)


def locate(
    source: str | Path, sae_id: str | None = None, force_download: bool = False, k: int | None = None
) -> Located:
    """Find (and download) the files of one SAE; arguments and errors as in `from_pretrained`."""
    located = _locate(source, sae_id, force_download)
    if k is not None and "k" not in located.format.options:
        raise CheckpointError(
            f"{located.path} is in the format {located.format.name!r}, which says its own k; leave k={k} out."
        )
    return replace(located, k=k)


def _locate(source: str | Path, sae_id: str | None, force_download: bool) -> Located:
    path = Path(source).expanduser()
    if os.path.isfile(path):  # False, not an error, for a name that no file can have
        return Located(AUTHORS, path)
    if os.path.isdir(path):
        files = (file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())
        folder, layout = _choose(f"folder {str(source)!r}", files, sae_id)
        return Located(layout, path / folder)
    if str(source) in RELEASES:
        release = RELEASES[str(source)]
        if sae_id not in release.saes:
            raise CheckpointError(f"{source!r} holds {listed(release.saes)}. Name one as sae_id, not {sae_id!r}.")
        repo_id, folder, layout = release.repo_id, release.saes[sae_id].folder, FORMATS[release.format]
    elif _is_repository(str(source)):
        repo_id = str(source)
        folder, layout = _choose(f"Hub repository {repo_id!r}", files_of(repo_id), sae_id)
    elif _is_saelens_release(source):
        raise CheckpointError(
            f"{str(source)!r} is a release of SAELens, which reads it: SAE.from_pretrained({str(source)!r}, sae_id).save_model(folder)."
        )
    else:
        raise CheckpointError(
            f"{str(source)!r} is no local folder, no release ({', '.join(RELEASES)}, and those of SAELens), and no Hub "
            "repository ('owner/name')."
        )
    return Located(layout, layout.download(repo_id, folder, force_download), published_metadata(repo_id, folder))


def load(
    located: Located, *, device: str = "cpu", dtype: str | None = None, metadata: dict[str, Any] | None = None
) -> SAE[Any]:
    """Load located files through SAELens; arguments and errors as in `from_pretrained`."""
    if located.format is SAELENS:  # its loader rounds exponents and thresholds, so the cast comes after it
        sae = load_saelens(located.path, device)
        sae = sae.to(dtype=str_to_dtype(dtype)) if dtype else sae
    else:
        given = {} if located.k is None else {"k": located.k}

        def with_k(path: Any, device: str, cfg_overrides: dict[str, Any] | None) -> Any:
            return located.format.disk_loader(path, device, {**(cfg_overrides or {}), **given})

        sae = SAE.load_from_disk(located.path, device=device, dtype=dtype, converter=with_k)
    for key, value in {**located.metadata, **(metadata or {})}.items():
        sae.cfg.metadata[key] = value
    return sae


def _is_saelens_release(source: str | Path) -> bool:
    # a Hub repository has a slash and a release has none; reading SAELens' directory takes seconds
    name = str(source)
    return (
        "/" not in name
        and name not in RELEASES
        and not os.path.exists(name)
        and name in get_pretrained_saes_directory()
    )


def _is_repository(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name


def _choose(where: str, files: Iterable[str], sae_id: str | None) -> tuple[str, Format]:
    """Folder and layout of the wanted SAE among the files of a tree."""
    files = list(files)
    in_folder: dict[str, set[str]] = {}
    for file in files:
        in_folder.setdefault(posixpath.dirname(file) or ".", set()).add(posixpath.basename(file))
    saes = {
        folder: next(layout for layout in FORMATS.values() if names.issuperset(layout.files))
        for folder, names in in_folder.items()
        if any(names.issuperset(layout.files) for layout in FORMATS.values())
    }
    if not saes:
        expected = "; ".join(f"{layout.name}: {' and '.join(layout.files)}" for layout in FORMATS.values())
        raise CheckpointError(
            f"{where} has no known layout. Expected in one folder {expected} (a file of the authors with another name is "
            f"given by its path). It has {listed(files)}."
        )
    if sae_id is None and len(saes) > 1:
        raise CheckpointError(f"{where} holds several SAEs: {listed(saes)}. Name one as sae_id.")
    folder = posixpath.normpath(sae_id.strip("/") or ".") if sae_id is not None else next(iter(saes))
    if folder not in saes:
        raise CheckpointError(f"{where} has no SAE in {sae_id!r}. It holds {listed(saes)}.")
    return folder, saes[folder]

"""A layout that others publish SAEs in, as SAELens' two loader protocols.

`SAE.load_from_disk(folder, converter=FORMAT.disk_loader)` and `SAE.from_pretrained(repo, folder,
converter=FORMAT.huggingface_loader)` run SAELens' own loading on what a converter returns.
"""

from __future__ import annotations

import posixpath
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from sae_lens import __version__ as sae_lens_version
from sae_lens.util import dtype_to_str, str_to_dtype

from saelens_cosine.files.names import check_name
from saelens_cosine.files.whole import sha256
from saelens_cosine.loading.errors import CheckpointError
from saelens_cosine.loading.hub import download
from saelens_cosine.loading.releases import release_of


class Converted(NamedTuple):
    """
    An SAE as SAELens' classes want it.

    Args:
        architecture (str): Registered name.
        tensors (dict[str, torch.Tensor]): State dict.
        settings (dict[str, Any]): Config fields beyond sizes, dtype and device.
        metadata (dict[str, Any]): What the files tell of model, hook and data.
    """

    architecture: str
    tensors: dict[str, torch.Tensor]
    settings: dict[str, Any]
    metadata: dict[str, Any]


@dataclass(frozen=True)
class Format:
    """
    One layout.

    Args:
        name (str): For messages and tables.
        files (tuple[str, ...]): What lies in an SAE's folder, weights first.
        convert (Callable[..., Converted]): From a folder (or weights file), to a device and a dtype (None: the file's).
        config_of_repository (str | None): A file beside the folder that says more, if it is there.
        options (tuple[str, ...]): Settings of the SAE that the files may not tell; `convert` takes them by name.
    """

    name: str
    files: tuple[str, ...]
    convert: Callable[..., Converted]
    config_of_repository: str | None = None
    options: tuple[str, ...] = ()

    def disk_loader(
        self, path: str | Path, device: str = "cpu", cfg_overrides: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """SAELens' `PretrainedSaeDiskLoader`.

        Raises:
            CheckpointError: the files are not what this layout has.
        """
        overrides = cfg_overrides or {}
        device = overrides.get("device") or device
        dtype = str_to_dtype(overrides["dtype"]) if overrides.get("dtype") else None
        options = {name: overrides[name] for name in self.options if overrides.get(name) is not None}
        architecture, tensors, settings, metadata = self.convert(Path(path), device, dtype, **options)
        d_in, d_sae = tensors["W_enc"].shape
        config = {
            "architecture": architecture,
            "d_in": d_in,
            "d_sae": d_sae,
            "dtype": dtype_to_str(tensors["W_enc"].dtype),
            "device": device,
            **settings,
            "metadata": {
                **metadata,
                "converted_from": self.name,
                "sae_lens_version": sae_lens_version,  # without one SAELens would take it for a config before 6.0
                "sae_lens_training_version": None,
            },
        }
        return {**config, **overrides}, tensors

    def huggingface_loader(
        self,
        repo_id: str,
        folder_name: str,
        device: str = "cpu",
        force_download: bool = False,
        cfg_overrides: dict[str, Any] | None = None,
    ) -> tuple[dict[str, Any], dict[str, torch.Tensor], torch.Tensor | None]:
        """SAELens' `PretrainedSaeHuggingfaceLoader`; metadata of a known release is added.

        Raises:
            CheckpointError: the files are not what this layout has.
            ConnectionError: a file cannot be had; the message says what was tried.
        """
        folder = self.download(repo_id, folder_name, force_download)
        config, tensors = self.disk_loader(folder, device, cfg_overrides)
        config["metadata"].update(published_metadata(repo_id, folder_name))
        return config, tensors, None

    def download(self, repo_id: str, folder_name: str, force_download: bool = False) -> Path:
        """The local folder with this layout's files of one SAE; a known checksum is compared.

        Raises:
            ConnectionError: a file cannot be had.
            CheckpointError: a file is not the published one.
        """
        folder = posixpath.normpath(folder_name.strip("/") or ".")
        try:
            names = [
                check_name(posixpath.normpath(f"{folder}/{name}"), "name of a file on the Hub") for name in self.files
            ]
        except ValueError as error:
            raise CheckpointError(str(error)) from None
        paths = [download(repo_id, name, force_download) for name in names]
        if self.config_of_repository is not None:
            with suppress(ConnectionError):
                download(repo_id, self.config_of_repository, force_download)
        _compare_checksum(paths[0], repo_id, folder)
        return paths[0].parent


def published_metadata(repo_id: str, folder_name: str) -> dict[str, Any]:
    """What the table of releases says of an SAE on the Hub; empty if it is not listed."""
    release = release_of(repo_id)
    return release.metadata_of(folder_name) if release else {}


def _compare_checksum(path: Path, repo_id: str, folder: str) -> None:
    release = release_of(repo_id)
    known = {sae.folder: sae.sha256 for sae in release.saes.values()} if release else {}
    expected = known.get(folder)
    if expected is None:
        return
    found = sha256(path)
    if found != expected:
        raise CheckpointError(
            f"{path} has sha256 {found}; the published file has {expected}. Download it again (force_download=True)."
        )

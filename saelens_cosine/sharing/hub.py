"""Publish saved SAEs on the Hugging Face Hub, with a card that says how to load them and what was measured.

SAELens' `upload_saes_to_huggingface` makes a commit per SAE, accepts training checkpoints that nobody can load, and its card
leaves out the import. The layout here is its own: one folder per id, so `SAE.from_pretrained(repo, id)` finds them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.errors import (
    HTTPError,  # pyright: ignore[reportPrivateImportUsage]  (of the HTTP client that this version uses)
    LocalTokenNotFoundError,
)
from sae_lens import SAE
from sae_lens.constants import RUNNER_CFG_FILENAME, SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME, SPARSITY_FILENAME
from sae_lens.saes.sae import SAEConfig

from saelens_cosine.experiments.compare.file import SCHEMAS, ComparisonFileError, as_now, read_comparison
from saelens_cosine.files.names import below, check_name
from saelens_cosine.files.secrets import published, without_secrets
from saelens_cosine.files.whole import read_json, whole_folder
from saelens_cosine.loading.formats.saelens import load_saelens
from saelens_cosine.report.model_card import model_card, repository_card

CARD = "README.md"
COMPARISON, PICTURE = "comparison.json", "comparison.png"
PUBLISHED_FILES = (SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME, SPARSITY_FILENAME, RUNNER_CFG_FILENAME)
"""What SAELens reads from an SAE's folder; nothing else in it is published."""


@dataclass(frozen=True)
class Bundle:
    """
    What a repository gets.

    Args:
        repo_id (str): `owner/name` on the Hub.
        sae_ids (tuple[str, ...]): Folder of each SAE in the repository, the second argument of `SAE.from_pretrained`.
        files (Mapping[str, Path | bytes]): By path in the repository: a local file, or its content.
        unnamed (tuple[str, ...]): Models and datasets on this machine, which nobody else finds by the last name of their place.
    """

    repo_id: str
    sae_ids: tuple[str, ...]
    files: Mapping[str, Path | bytes]
    unnamed: tuple[str, ...] = ()


class Published(NamedTuple):
    """
    Where an upload is to be found.

    Args:
        url (str): The repository.
        commit (str): The commit that holds everything; the latest one if nothing had changed.
        card_kept (bool): The repository had a card before, and it was left alone.
    """

    url: str
    commit: str
    card_kept: bool


def saved_saes(path: str | Path) -> dict[str, Path]:
    """Folders of saved SAEs under a path, by their relative paths; `{"": path}` for a folder that is one.

    Raises:
        FileNotFoundError: there is none.
    """
    path = Path(path)
    if (path / SAE_CFG_FILENAME).is_file():
        return {"": path}
    found = {
        config.parent.relative_to(path).as_posix(): config.parent
        for config in path.rglob(SAE_CFG_FILENAME)
        if config.is_file()
    }
    visible = {sae_id: folder for sae_id, folder in sorted(found.items()) if not _hidden(sae_id)}
    if not visible:
        raise FileNotFoundError(
            f"There is no saved SAE in {path}: neither it nor a folder below it holds {SAE_CFG_FILENAME}. Name a folder "
            "that SAELens' trainer, save_inference_model or `saelens-cosine compare` has written."
        )
    return visible


def load_for_sharing(folder: Path) -> SAE[Any]:
    """The SAE in a folder, loaded as its users will.

    Raises:
        FileNotFoundError: it has no weights.
        ValueError: a training checkpoint, an architecture that SAELens does not know, or weights that do not fit.
    """
    if not (folder / SAE_WEIGHTS_FILENAME).is_file():
        raise FileNotFoundError(f"{folder} has {SAE_CFG_FILENAME} but no {SAE_WEIGHTS_FILENAME}.")
    return load_saelens(folder)


def gather(path: str | Path, repo_id: str, sae_id: str | None = None, license: str | None = None) -> Bundle:
    """Everything that is published for one saved SAE, or for all in the output folder of a comparison.

    Args:
        path: folder of a saved SAE, or a folder that holds several; each of them keeps its relative path as id.
        repo_id: `owner/name` on the Hub.
        sae_id: id of a single SAE; its hook point's name if None, as in SAELens' own releases.
        license: for the card, an identifier as the Hub lists them, such as `mit`.

    Raises:
        FileNotFoundError: there is no SAE at `path`, or its weights are missing.
        ValueError: a training checkpoint, `repo_id` without an owner, `sae_id` with several SAEs.
    """
    if repo_id.count("/") != 1:
        raise ValueError(f"The repository {repo_id!r} must be owner/name, such as your-name/{repo_id.split('/')[-1]}.")
    check_name(repo_id, "repository")
    if sae_id is not None:
        check_name(sae_id, "id")
    folders = saved_saes(path)
    if sae_id is not None and "" not in folders:
        raise ValueError(
            f"{path} holds {len(folders)} SAEs ({', '.join(folders)}), which one id {sae_id!r} cannot name."
        )
    configs: dict[str, SAEConfig] = {}
    files: dict[str, Path | bytes] = {}
    unnamed: dict[str, None] = {}
    for relative, folder in folders.items():
        config = load_for_sharing(folder).cfg
        name = check_name(
            relative or sae_id or config.metadata.hook_name or folder.resolve().name,
            "id of the SAE (--id, or the hook name in its metadata)",
        )
        for key, value in published(config.metadata.to_dict()).items():
            if key in ("model_name", "dataset_path") and value and value != without_secrets(config.metadata[key]):
                unnamed[f"{key} {value!r}"] = None
            config.metadata[key] = value
        configs[name] = config
        files |= {
            f"{name}/{file}": _publishable(folder / file) for file in PUBLISHED_FILES if (folder / file).is_file()
        }
        files[f"{name}/{CARD}"] = model_card(config, f'SAE.from_pretrained("{repo_id}", "{name}")').encode()
    evaluation, comparison = _find_comparison(Path(path)) or (Path(path), None)
    measured = {
        name: _publishable(evaluation / name)
        for name in (COMPARISON, PICTURE)
        if comparison and (evaluation / name).is_file()
    }
    picture = PICTURE if PICTURE in measured else None
    comparison = published(comparison)
    try:
        card = repository_card(repo_id, configs, comparison, picture, license)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        if comparison is None:
            raise
        raise ComparisonFileError(evaluation / COMPARISON, f"{type(error).__name__}: {error}") from error
    files |= {**measured, CARD: card.encode()}
    return Bundle(repo_id, tuple(configs), files, tuple(unnamed))


def write(bundle: Bundle, folder: str | Path) -> Path:
    """Write to a new folder what `upload` would send.

    Raises:
        FileExistsError: the folder exists.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with whole_folder(folder) as unfinished:
        for name, source in bundle.files.items():
            target = below(unfinished, name, "name of a file")
            target.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(source, bytes):
                target.write_bytes(source)
            else:
                shutil.copyfile(source, target)
    return folder


def upload(bundle: Bundle, *, private: bool = False, replace_card: bool = False) -> Published:
    """Publish a bundle in one commit: all of it or, when anything fails, nothing.

    Blobs that the Hub has already received, in this upload or an interrupted one, are not sent again.

    Args:
        bundle: from `gather`.
        private: create the repository private; refused if it exists and is public.
        replace_card: replace a README.md that the repository has, with the comparison it shows. Otherwise they are left alone,
            as SAELens does.

    Raises:
        LocalTokenNotFoundError: no login; an OSError.
        PermissionError: `private`, and the repository is public.
        OSError: the Hub refused or could not be reached; nothing has been published.
    """
    if get_token() is None:
        raise LocalTokenNotFoundError(
            "No Hugging Face token. Log in with `hf auth login`, or set HF_TOKEN to a token with write access "
            "(https://huggingface.co/settings/tokens)."
        )
    try:
        return _publish(bundle, private, replace_card)
    except PermissionError:
        raise
    except (HTTPError, OSError, RuntimeError) as error:  # an answer of the Hub, no connection, a blob not taken
        cause = f"{error} {error.__cause__}" if isinstance(error, RuntimeError) else error
        raise OSError(
            f"The upload to {bundle.repo_id} failed and nothing was published: {without_secrets(str(cause))}\n"
            "Run the same command again; what the Hub has received is not sent twice."
        ) from error


def _publishable(file: Path) -> Path | bytes:
    """A file as it is or, if it is JSON that tells a secret or a place on this machine, its content without."""
    if file.suffix != ".json":
        return file
    try:
        content = read_json(file)
        told = published(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{file} is damaged ({error}), so what it tells is not known. Move it away to go without."
        ) from error
    return file if told == content else json.dumps(told, indent=2).encode()


def _publish(bundle: Bundle, private: bool, replace_card: bool) -> Published:
    api = HfApi(library_name="saelens-cosine")
    url = api.create_repo(bundle.repo_id, private=private or None, exist_ok=True)
    if private and not api.repo_info(bundle.repo_id).private:
        raise PermissionError(
            f"{bundle.repo_id} exists and is public. Nothing was uploaded; make it private on the Hub, choose another "
            "--repo, or leave out --private."
        )
    card_kept = not replace_card and api.file_exists(bundle.repo_id, CARD)
    kept = {name for name in bundle.files if "/" not in name} if card_kept else set[str]()  # and what the card shows
    operations = [CommitOperationAdd(name, source) for name, source in bundle.files.items() if name not in kept]
    message = f"Upload {', '.join(bundle.sae_ids)}" if len(bundle.sae_ids) < 4 else f"Upload {len(bundle.sae_ids)} SAEs"
    # not upload_folder, which may make several commits of a large folder
    commit = api.create_commit(bundle.repo_id, operations, commit_message=message)
    return Published(str(url), commit.oid, card_kept)


def _hidden(relative: str) -> bool:
    return any(part.startswith(".") for part in Path(relative).parts)


def _find_comparison(path: Path) -> tuple[Path, dict[str, Any]] | None:
    """The comparison that measured an SAE at or below `path`, and its folder: `path` itself or one that holds it."""
    path = path.resolve()
    for folder in (path, *path.parents[:2]):
        if (folder / COMPARISON).is_file():
            comparison = _read_comparison(folder / COMPARISON)
            if any((folder / arm["path"]).is_relative_to(path) for arm in comparison["arms"]):
                return folder, comparison
    return None


def _read_comparison(file: Path) -> dict[str, Any]:
    comparison = read_comparison(file)
    if comparison.get("schema") not in SCHEMAS:
        raise ValueError(
            f"{file} has schema {comparison.get('schema')!r}, this version reads {' and '.join(SCHEMAS)}. Run the comparison again, or "
            "move the file away to share the SAEs without it."
        )
    return as_now(comparison)

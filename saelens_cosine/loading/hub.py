"""The Hub as a place of files. What goes wrong there is one kind of error, which says the way out."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    HTTPError,  # pyright: ignore[reportPrivateImportUsage]  (of the HTTP client that this version uses; no OSError)
)


def files_of(repo_id: str) -> list[str]:
    """Names of a repository's files: the Hub's, or those in the local cache where it cannot be asked.

    Raises:
        ConnectionError: it cannot be asked, and nothing is in the cache.
    """
    with _reached(f"list the Hub repository {repo_id!r}"):
        try:
            return [file.rfilename for file in HfApi().model_info(repo_id).siblings or []]
        except (HTTPError, OSError) as error:
            try:
                cached = Path(snapshot_download(repo_id, local_files_only=True))
            except OSError:
                raise error from None
            return [file.relative_to(cached).as_posix() for file in cached.rglob("*") if file.is_file()]


def download(repo_id: str, name: str, force: bool = False) -> Path:
    """A file of a repository on this machine.

    Args:
        repo_id: `owner/name`.
        name: of the file, with its folder.
        force: again, though it is in the cache.

    Raises:
        ConnectionError: it cannot be had.
    """
    with _reached(f"get {name!r} of {repo_id!r} from the Hub"):
        return Path(hf_hub_download(repo_id, name, force_download=force))


@contextmanager
def _reached(what: str) -> Generator[None]:
    try:
        yield
    except (HTTPError, OSError) as error:
        raise ConnectionError(
            f"Could not {what} ({type(error).__name__}: {str(error).rstrip('.')}), and it is not in the local cache. Check the "
            "name, the network, HF_HUB_OFFLINE and HF_ENDPOINT; if a local folder was meant, there is none of this name."
        ) from error

"""Errors that a user can do something about, as the line that says what."""

from __future__ import annotations

import argparse
import errno
import re

from huggingface_hub.errors import HTTPError  # pyright: ignore[reportPrivateImportUsage]  (no OSError)
from safetensors import SafetensorError

from saelens_cosine.files.secrets import without_secrets

FAULTS = (
    argparse.ArgumentError,
    ValueError,
    OSError,
    HTTPError,
    FloatingPointError,
    ModuleNotFoundError,
    MemoryError,
    SafetensorError,
    RuntimeError,
)
"""What may be one; `line_of` tells for `RuntimeError`, which is most other errors too."""

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_MEMORY = re.compile(r"out of memory|can't allocate memory|not enough memory|ALLOC_FAILED|std::bad_alloc")
_TORCH_FILE = re.compile(r"PytorchStreamWriter failed|inline_container\.cc")


def line_of(error: BaseException) -> str | None:
    """One line for the user; None for an error that is none of the user's.

    Writers that do not raise `OSError` are given its words here: safetensors has the number in its text, torch nothing at all.
    """
    said = without_secrets(" ".join(str(error).split()))
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and _MEMORY.search(said)):
        return (
            f"Out of memory: {said.partition(' If reserved')[0] or type(error).__name__}. A smaller batch, fewer features (d_sae), a "
            "smaller mixing buffer (n_batches_in_buffer) or shorter contexts take less; so do fewer arms at a time, or fewer tokens "
            "to evaluate."
        )
    if isinstance(error, HTTPError) and not isinstance(error, OSError):
        return (
            f"{type(error).__name__}: {said}. Check the network, HF_HUB_OFFLINE and HF_ENDPOINT, or name local files."
        )
    if isinstance(error, SafetensorError):
        number = re.search(r"\(os error (\d+)\)", said)
        return f"{said}{_way_out(int(number[1]) if number else None)}"
    if isinstance(error, RuntimeError) and not isinstance(error, ValueError):
        return (
            f"A file could not be written whole ({said}){_way_out(errno.ENOSPC)}" if _TORCH_FILE.search(said) else None
        )
    return f"{said}{_way_out(error.errno) if isinstance(error, OSError) else ''}"


def _way_out(number: int | None) -> str:
    if number in _FULL:
        return ". Free some space, or choose another folder; what was written before is as it was."
    if number == errno.EROFS:
        return ". Choose a folder that can be written; what was written before is as it was."
    return ""

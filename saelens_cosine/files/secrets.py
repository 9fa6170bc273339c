"""Keep out of files and messages what is nobody else's: keys, tokens, passwords, and where things lie on this machine."""

from __future__ import annotations

import logging
import os
import re
import shlex
import warnings
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path, PureWindowsPath
from typing import Any

from huggingface_hub import get_token

HIDDEN = "(hidden)"
"""Stands for a secret in a message."""

_NAME = (
    r"(?:[a-z0-9]+[_-])*(?:(?:auth|access|api|hf|hub|huggingface|refresh|session|secret|bearer|private)[_-]?token"
    r"|api[_-]?key|access[_-]?key|secret[_-]?key|private[_-]?key|passwd|password|passphrase|secret|credentials?"
    r"|authorization|cookie)"
)
"""What secrets are called. Not `bos_token`, `max_tokens`."""

_CALLED = re.compile(rf"{_NAME}|token", re.IGNORECASE)
_GIVEN = re.compile(
    rf"""((?:(?<![\w-])-{{0,2}}(?:{_NAME}|token)["']?\s*=\s*|["'](?:{_NAME}|token)["']\s*:\s*"""
    rf"""|(?<![\w-]){_NAME}:\s*)["']?)"""
    r"""(?!\(hidden|(?:Bearer|Basic|token)\s)[^\s"',;&)}]+""",
    re.IGNORECASE,
)
_BEARER = re.compile(
    r"(?:\b(Bearer|Basic)\s+(?=\S*[\d_.=-])|(?<=authorization: )(token)\s+)[\w.~+/=-]{4,}", re.IGNORECASE
)
_SHAPED = re.compile(
    r"(?<![\w-])(?:hf_\w{8,}|gh[pousr]_\w{16,}|github_pat_\w{16,}|glpat-[\w-]{16,}|sk-[\w-]{16,}|AKIA[A-Z0-9]{16}"
    r"|AIza[\w-]{30,}|eyJ[\w-]{8,}\.[\w-]+\.[\w-]+)"
)
"""Tokens of the Hub, GitHub, GitLab, OpenAI, Amazon and Google, and signed ones (JWT), which show what they are."""

_ADDRESS = re.compile(r"(\w{2,}://?)(?:[^/\s]*@)?([^\s?#]*)[?#]?\S*")
"""With one slash too, as `Path` writes them."""
_VARIABLES = (
    "HF_TOKEN",
    "HUGGING_FACE_HUB_TOKEN",
    "OPENAI_API_KEY",
    "NEURONPEDIA_API_KEY",
    "WANDB_API_KEY",
    "GITHUB_TOKEN",
)
_SHORTEST = 8
"""Characters of a secret that is looked for in any text; `none` and `EMPTY` are keys of judges that take any."""

_PLACES = (
    *("model", "model_name", "tokenizer_name", "dataset", "dataset_path", "output_path", "checkpoint_path"),
    *("from_pretrained_path", "cached_activations_path", "resume_from_checkpoint", "autocast_cache_path"),
)
"""Entries that may be a local folder or file, or else a name on the Hub."""

_PATH = re.compile(
    r"""(?<=')[~]?/[^'\n]+/[^'\n]*(?=')|(?<=")[~]?/[^"\n]+/[^"\n]*(?=")"""  # where there are quotes, blanks belong to it
    r"""|(?<![\w:/.~-])(?:file://)?(?:~|[A-Za-z]:)?[\\/][^\s"'\\/:,;()]+[\\/][^\s"':,;()]*"""
)
"""An absolute path of at least two parts in a sentence."""


def as_typed(command: Sequence[str]) -> str:
    """A command line for a shell, without secrets."""
    flags = ["", *command]  # before each word
    hidden = (flag.startswith("-") and _CALLED.fullmatch(flag.lstrip("-")) for flag in flags)
    return shlex.join(
        HIDDEN if secret else without_secrets(part) for secret, part in zip(hidden, command, strict=False)
    )


def without_secrets(text: str) -> str:
    """Text without tokens, keys and passwords. Of addresses scheme, host and path are left."""
    text = _ADDRESS.sub(r"\1\2", text)
    for secret in _known():
        text = text.replace(secret, HIDDEN)
    text = _BEARER.sub(lambda found: f"{found[1] or found[2]} {HIDDEN}", text)
    return _SHAPED.sub(HIDDEN, _GIVEN.sub(rf"\1{HIDDEN}", text))


@contextmanager
def logged_without_secrets() -> Generator[None]:
    """While the block lasts, what libraries log and warn of is without secrets: the Hub's client tells signed addresses."""
    make, form = logging.getLogRecordFactory(), warnings.formatwarning

    def record(*args: Any, **kwargs: Any) -> logging.LogRecord:
        made = make(*args, **kwargs)
        with suppress(TypeError, ValueError, KeyError):  # a format that is wrong is for logging to complain of
            made.msg, made.args = without_secrets(made.getMessage()), ()
        return made

    def formatted(message: Any, *args: Any, **kwargs: Any) -> str:
        return form(without_secrets(str(message)), *args, **kwargs)

    logging.setLogRecordFactory(record)
    warnings.formatwarning = formatted
    try:
        yield
    finally:
        logging.setLogRecordFactory(make)
        warnings.formatwarning = form


def scrubbed(value: Any) -> Any:
    """What may be written of a value from JSON: entries that are called like a secret go, and strings are `without_secrets`."""
    if isinstance(value, Mapping):
        return {name: scrubbed(item) for name, item in value.items() if not _is_secret(name, item)}
    if isinstance(value, list | tuple):
        return [scrubbed(item) for item in value]
    return without_secrets(value) if isinstance(value, str) else value


def published(value: Any, name: str = "") -> Any:
    """What may be published of a value from JSON: `scrubbed`, and of places on this machine their last name.

    Args:
        value: of a config or a comparison.
        name: what it is called there.
    """
    if isinstance(value, Mapping):
        return {key: published(item, str(key)) for key, item in scrubbed(value).items()}
    if isinstance(value, list | tuple):
        return [published(item) for item in value]
    if not isinstance(value, str):
        return value
    text = without_secrets(value)
    if name in _PLACES and _is_local(text):
        return _last_name(text)
    return _PATH.sub(lambda found: _last_name(found[0]), text)


def _is_secret(name: object, value: Any) -> bool:
    said = isinstance(value, str | bytes | list | tuple | Mapping)  # not None, True, a number
    return said and isinstance(name, str) and _CALLED.fullmatch(name) is not None


def _is_local(text: str) -> bool:
    """Whether a name is a place on this machine. `owner/name` is the Hub's, unless there is such a folder here."""
    if "://" in text:
        return text.startswith("file://")
    if text.startswith(("/", "~", ".")) or "\\" in text or re.match(r"[A-Za-z]:", text) or text.count("/") > 1:
        return True
    return "/" in text and Path(re.sub(r":[^:/]+$", "", text)).exists()  # a file's column may follow it


def _last_name(path: str) -> str:
    return PureWindowsPath(path.removeprefix("file://")).name or HIDDEN


def _known() -> list[str]:
    """Secrets of this process, the longest first: one may be part of another."""
    values = {os.environ.get(name) for name in _VARIABLES} | {get_token()}
    return sorted((value for value in values if value and len(value) >= _SHORTEST), key=len, reverse=True)

"""Names from outside that become places below a folder of ours."""

from __future__ import annotations

import os
import re
from pathlib import Path

_WRONG = re.compile(r"[\x00-\x1f\x7f\\]")

LONGEST = 255
"""Bytes of one part of a path, on the file systems in use."""


def below(folder: str | Path, name: object, what: str) -> Path:
    """`folder / name`, which is below the folder.

    Args:
        folder: of ours.
        name: from a config, a file, or a command line: `blocks.3.hook_resid_post`, `layer_3/seed0`.
        what: it is, for the error.

    Raises:
        ValueError: the name is none, absolute, leads out of the folder or back into it (`..`, `.`, an empty part), or holds what no
            file system takes.
    """
    return Path(folder) / check_name(name, what)


def check_name(name: object, what: str) -> str:
    """A name that is a place below any folder; see `below`."""
    parts = name.split("/") if isinstance(name, str) else []
    long = any(len(part.encode("utf-8", "surrogatepass")) > LONGEST for part in parts)
    if not isinstance(name, str) or long or _WRONG.search(name) or not {"", ".", ".."}.isdisjoint(parts):
        shown = repr(name) if len(repr(name)) < 100 else f"{repr(name)[:80]}... ({len(repr(name))} characters)"
        raise ValueError(
            f"The {what} {shown} must be a relative path, without '..', '.', empty parts, backslashes and control characters, such "
            "as layer_3."
        )
    return name


def unused(path: Path) -> Path:
    """This path, or one beside it with a number, where nothing is yet."""
    number = 1
    candidate = path
    while os.path.lexists(candidate):  # a link that leads nowhere would be replaced
        number += 1
        candidate = path.with_name(f"{path.name}-{number}")
    return candidate

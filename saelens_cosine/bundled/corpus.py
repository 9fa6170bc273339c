"""The text that ships with every Python: the source code of the standard library.

Nothing is downloaded and nothing is copied. The files are read from the interpreter that runs, so the text differs a
little between Python versions; the held-out split does not, because it depends only on a file's path.
"""

from __future__ import annotations

import hashlib
import os
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from datasets import Dataset

Split = Literal["train", "heldout"]

HELDOUT_SHARE = 0.1
"""Share of the files (not of the tokens) that the held-out split gets."""

_NOT_THE_LIBRARY = {"site-packages", "dist-packages", "__pycache__"}

_TEST_FOLDERS = {"test", "tests", "idle_test"}

_NEARLY_ALIKE = {"encodings"}
"""Folders whose files are near-copies of each other (tables of codecs): none of them is held out."""


def stdlib_corpus(split: Split = "train", include_tests: bool = False, root: str | Path | None = None) -> Dataset:
    """The running Python's standard library as a Hugging Face dataset, one row per file.

    Columns: `text` (the file's source), `package` (its top-level module or package, a label for probing), `path`
    (relative to the library's folder, `/`-separated). Rows are sorted by path.

    Args:
        split: `"train"` or `"heldout"`. A file is held out when the hash of its path says so, so both splits are
            the same on every machine and no file is in both. None of the codec tables in `encodings` is.
        include_tests: also the library's own test suites, where they are installed (many distributions strip them).
        root: folder to read instead of the running Python's standard library.

    Raises:
        FileNotFoundError: the folder holds no Python source (an embedded or zipped Python).
        ValueError: unknown split.
    """
    if split not in ("train", "heldout"):
        raise ValueError(f"split={split!r} is not a split of the corpus; use 'train' or 'heldout'.")
    from datasets import Dataset

    folder = Path(root) if root is not None else Path(sysconfig.get_paths()["stdlib"])
    rows: list[dict[str, str]] = []
    for path in _source_files(folder, include_tests):
        name = path.relative_to(folder).as_posix()
        if is_heldout(name) != (split == "heldout"):
            continue
        text = _read(path)
        if text:
            package = name.split("/")[0].removesuffix(".py")
            rows.append({"text": text, "package": package, "path": name})
    if not rows:
        raise FileNotFoundError(
            f"No Python source for the {split!r} split under {str(folder)!r}. This Python ships its standard library "
            "without source; pass root=<Lib folder of a full CPython> or use another dataset."
        )
    return Dataset.from_list(rows)


def is_heldout(path: str) -> bool:
    """Whether the file at this `/`-separated relative path belongs to the held-out split."""
    if path.split("/")[0] in _NEARLY_ALIKE:
        return False
    digest = hashlib.sha256(path.encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 < HELDOUT_SHARE


def _source_files(folder: Path, include_tests: bool) -> list[Path]:
    """By path. Folders of none of them are not walked: what is installed beside the library can be many times its size."""
    left_out = _NOT_THE_LIBRARY if include_tests else _NOT_THE_LIBRARY | _TEST_FOLDERS
    found: list[Path] = []
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name not in left_out]
        for name in files:  # _sysconfigdata is generated when Python is built and describes the building machine
            if name.endswith(".py") and not name.startswith("_sysconfigdata"):
                found.append(Path(parent, name))
    return sorted(found)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except (UnicodeDecodeError, OSError):  # a few test files are deliberately not UTF-8
        return ""

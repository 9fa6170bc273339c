"""Results of earlier runs in `measured/`, each with a hash of itself: one that is damaged is measured again."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, cast

from saelens_cosine.files.whole import read_json, write_json
from saelens_cosine.plain import digest


def keep(measured: dict[str, Any], file: Path) -> None:
    """Write a `result` and its `seconds`."""
    file.parent.mkdir(exist_ok=True)
    write_json({**measured, "sha256": digest(measured["result"])}, file)


def read_kept(file: Path) -> dict[str, Any] | None:
    """What `keep` has written; None, with a warning that names the file, if it is not that any more, and None if there is none."""
    if not file.is_file():
        return None
    try:
        content: Any = read_json(file)
    except ValueError as error:
        fault = f"no JSON: {error}"
    else:
        if not (isinstance(content, dict) and {"result", "seconds"} <= set(cast("dict[str, Any]", content))):
            fault = "no result"
        elif content.get("sha256", "none") not in ("none", digest(content["result"])):  # earlier versions wrote none
            fault = "it does not match its checksum"
        else:
            return cast("dict[str, Any]", content)
    warnings.warn(f"{file} is damaged ({fault}); this is measured again.", stacklevel=2)
    return None

"""Results of earlier runs in `measured/`, each with a hash of itself: one that is damaged is measured again."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, NamedTuple, cast

from saelens_cosine.experiments.evaluate.evals import Eval
from saelens_cosine.files.whole import read_json, write_json
from saelens_cosine.plain import digest, plain


class Kept(NamedTuple):
    """What an eval found, or why it found nothing, and the seconds that it took."""

    result: Any
    seconds: float


def keep(measured: Kept, file: Path) -> None:
    """Write a result."""
    file.parent.mkdir(exist_ok=True)
    result = plain(measured.result)
    write_json({"result": result, "seconds": measured.seconds, "sha256": digest(result)}, file)


def read_kept(file: Path, row: Eval[Any]) -> Kept | None:
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
            try:
                return Kept(row.read(content["result"]), content["seconds"])
            except ValueError as error:
                fault = f"no result of {row.name}: {error}"
    warnings.warn(f"{file} is damaged ({fault}); this is measured again.", stacklevel=2)
    return None

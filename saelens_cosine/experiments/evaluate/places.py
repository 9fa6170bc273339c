"""What is at the places that SAEs are named by: the SAEs of a comparison, and what files say of an SAE before it is loaded."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

from saelens_cosine.experiments.compare.file import (
    NAME,
    Listed,
    comparison_beside,
    listed,
    nearest_comparison,
    read_comparison,
)
from saelens_cosine.files.whole import read_json

CONFIG = "cfg.json"
"""What a folder with an SAE has."""

Rank = tuple[int, int]
"""Which of the comparisons an SAE is of, in the order in which they are mentioned, and its place in that one's order."""


class Place(NamedTuple):
    """
    An SAE that was named.

    Args:
        arm (str | None): As `arm=place` calls it; None if it was not called anything.
        place (str): Folder, Hub repository or short name.
        sae_id (str | None): Which one of several there.
        rank (Rank | None): Where the comparison lists it that it is of; None: it is of none.
        listed (Listed | None): What that comparison says of it.
        hook (str | None): Hook point, by the comparison or its own config; None: nothing on this disk tells.
        k (int | None): Active features that it was trained with; likewise.
        training_architecture (str): By its config; empty: likewise.
    """

    arm: str | None
    place: str
    sae_id: str | None
    rank: Rank | None = None
    listed: Listed | None = None
    hook: str | None = None
    k: int | None = None
    training_architecture: str = ""

    @property
    def name(self) -> str:
        """Stands for it in messages."""
        return self.place if self.sae_id is None else f"{self.place}#{self.sae_id}"


def read_places(texts: Sequence[str]) -> list[Place]:
    """`[arm=]place[#sae_id]`; the folder of a comparison stands for all of its SAEs, in its order.

    Raises:
        ValueError: none at all, an empty name, one SAE twice, or a comparison that gives none or whose file is not to be read.
        FileNotFoundError: SAEs of a comparison are gone.
    """
    if not texts:
        raise ValueError("Name at least one SAE: a folder, a Hub repository or a short name.")
    places = [place for text in texts for place in _expanded(_split(text))]
    for name, count in Counter(place.name for place in places).items():
        if count > 1:
            raise ValueError(f"{name} is named {count} times.")
    comparisons: dict[Path, list[Listed]] = {}
    return [_read(place, comparisons) for place in places]


def _split(text: str) -> Place:
    named = re.match(r"([^/=#]+)=(.+)", text)
    arm, rest = (named[1], named[2]) if named else (None, text)
    place, _, sae_id = rest.partition("#")
    if not place:
        raise ValueError(f"{text!r} names no SAE; write folder, repository#sae_id or arm=folder.")
    return Place(arm, place.rstrip("/") or place, sae_id or None)


def _expanded(named: Place) -> Iterator[Place]:
    """The SAEs of a comparison's folder; any other place is one itself."""
    folder = Path(named.place)
    file = folder / NAME
    if named.sae_id is not None or (folder / CONFIG).exists() or not file.is_file():
        yield named
        return
    paths = [sae.path for sae in listed(read_comparison(file))]
    if not paths:
        raise ValueError(f"{file} lists no SAE that was trained to its end.")
    if named.arm is not None:
        raise ValueError(
            f"{named.arm}= is the name of one arm, and {named.place} is a comparison of several. Leave it out, or name one SAE, "
            f"as in {named.arm}={named.place}/{paths[0]}."
        )
    if gone := [path for path in paths if not (folder / path / CONFIG).is_file()]:
        more = f" and {len(gone) - 3} more" if len(gone) > 3 else ""
        raise FileNotFoundError(
            f"{file} lists SAEs that are not there: {', '.join(gone[:3])}{more}. Run the comparison again, or name the folders of "
            "those that are there."
        )
    for path in paths:
        yield Place(None, f"{named.place}/{path}", None)


def _read(named: Place, comparisons: dict[Path, list[Listed]]) -> Place:
    """With what files say of it; each comparison is read once."""
    if named.sae_id is not None:
        return named
    folder = Path(os.path.abspath(named.place))
    hook, k, architecture = _told(folder)
    named = named._replace(hook=hook, k=k, training_architecture=architecture)
    file = nearest_comparison(folder)
    if file is None:
        return named
    if file not in comparisons:
        comparisons[file] = listed(comparison_beside(file) or {"arms": []})
    path = folder.relative_to(file.parent).as_posix()
    for i, sae in enumerate(comparisons[file]):
        if sae.path == path:
            rank = (list(comparisons).index(file), i)
            return named._replace(rank=rank, listed=sae, hook=sae.hook or hook, k=sae.k if sae.k is not None else k)
    return named


def _told(folder: Path) -> tuple[str | None, int | None, str]:
    """Hook, k and training architecture by an SAE's config."""
    try:
        config: dict[str, Any] = read_json(folder / CONFIG)
        metadata = cast("dict[str, Any]", config["metadata"])
        details = cast("dict[str, Any]", metadata.get("training_architecture_details") or {}) | config
        hook, k = metadata.get("hook_name"), details.get("k")
        architecture = str(metadata.get("training_architecture") or "")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # loading it says what is wrong
        return None, None, ""
    return hook if isinstance(hook, str) else None, k if type(k) is int else None, architecture

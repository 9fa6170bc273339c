"""Which SAEs are evaluated, and which of them are seeds of one arm."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from saelens_cosine.experiments.compare.file import comparison_beside
from saelens_cosine.files.whole import read_json


class Source(NamedTuple):
    """
    One SAE.

    Args:
        arm (str): What the report calls it, together with its other seeds.
        seed (int): Its number among them: N of a folder `seedN`, for any other the first that is free, from 0.
        place (str): Folder, Hub repository or short name.
        sae_id (str | None): Which one of several there.
    """

    arm: str
    seed: int
    place: str
    sae_id: str | None

    @property
    def name(self) -> str:
        """Stands for it in messages."""
        return self.place if self.sae_id is None else f"{self.place}#{self.sae_id}"


def parse_sources(texts: Sequence[str], baseline: str | None = None) -> tuple[Source, ...]:
    """`[arm=]place[#sae_id]`, arm by arm, seeds ascending. The first arm is the baseline, which others are compared with.

    SAEs with the same arm are its seeds. Without one, `folder/arm/seed0` and `folder/arm/seed1` are seeds of `arm`, as
    `saelens-cosine compare` writes them; any other place is an arm of its own, called by as much of the end of its path as tells
    it from the others.

    The order of arms is not that of a shell's `*`: those of a comparison come first, as in the `comparison.json` beside their
    folders; then those of the standard score under our recipe (`inner_product_...`, by the arm's name or the training
    architecture in the SAE's config); then all others, as they are mentioned. Who names an arm and mentions it first means
    it: `arm=place` stays in front unless a comparison lists it.

    Args:
        texts: the SAEs.
        baseline: the arm to put first, whatever the above.

    Raises:
        ValueError: none at all, an empty name, one SAE or one seed of an arm twice, or a baseline that is no arm.
    """
    if not texts:
        raise ValueError("Name at least one SAE: a folder, a Hub repository or a short name.")
    split = [_split(text) for text in texts]
    for (place, sae_id), count in Counter((place, sae_id) for _, place, sae_id in split).items():
        if count > 1:
            raise ValueError(f"{place + (f'#{sae_id}' if sae_id else '')} is named {count} times.")
    paths = list(dict.fromkeys(_arm_path(place, sae_id) for arm, place, sae_id in split if arm is None))
    short = _shortest(paths)
    by_arm: dict[str, list[tuple[str, str | None]]] = {}
    for arm, place, sae_id in split:
        by_arm.setdefault(arm or short[_arm_path(place, sae_id)], []).append((place, sae_id))
    if baseline is not None and baseline not in by_arm:
        raise ValueError(f"No arm is called {baseline!r}, to be the baseline; there are {', '.join(by_arm)}.")
    ranks = _ranks(by_arm)
    first = next(iter(by_arm))
    if baseline is None and split[0][0] is not None and ranks[first][0] > _LISTED:
        baseline = first
    order = sorted(by_arm, key=lambda arm: (arm != baseline, ranks[arm]))
    return tuple(source for arm in order for source in _numbered(arm, by_arm[arm]))


def pair_seeds(seeds: Sequence[int], baseline: Sequence[int]) -> dict[int, int]:
    """The baseline's seed that each seed of an arm is compared with: that of the same number; seeds without one are missing.

    Two arms of a single SAE are a pair whatever their numbers: there is nothing to mistake it for.
    """
    if len(seeds) == len(baseline) == 1:
        return {seeds[0]: baseline[0]}
    return {seed: seed for seed in seeds if seed in baseline}


def _numbered(arm: str, places: Sequence[tuple[str, str | None]]) -> list[Source]:
    """An arm's SAEs by seed."""
    said = [_seed(place, sae_id) for place, sae_id in places]
    for seed, count in Counter(seed for seed in said if seed is not None).items():
        if count > 1:
            names = " and ".join(place for (place, _), number in zip(places, said, strict=True) if number == seed)
            raise ValueError(f"{names} are both seed {seed} of {arm!r}; name one of them otherwise, with another arm=.")
    free = iter(number for number in range(len(places)) if number not in said)
    sources = [
        Source(arm, next(free) if number is None else number, *place)
        for place, number in zip(places, said, strict=True)
    ]
    return sorted(sources, key=lambda source: source.seed)


def _seed(place: str, sae_id: str | None) -> int | None:
    found = re.fullmatch(r"seed(\d+)", PurePosixPath(place if sae_id is None else sae_id).name)
    return int(found[1]) if found else None


_LISTED, _STANDARD, _OTHER = range(3)


def _ranks(by_arm: dict[str, list[tuple[str, str | None]]]) -> dict[str, tuple[int, ...]]:
    """Arms sort by these: of a comparison, of the standard score, and others."""
    comparisons: dict[Path, list[str]] = {}
    ranks: dict[str, tuple[int, ...]] = {}
    for mentioned, (arm, places) in enumerate(by_arm.items()):
        standard = PurePosixPath(arm).name.startswith("inner_product_")
        ranks[arm] = (_OTHER, mentioned)
        for folder in (Path(os.path.abspath(place)) for place, sae_id in places if sae_id is None):
            file = folder.parent.parent / "comparison.json"
            if file not in comparisons:
                comparisons[file] = _arms_of(file)
            if folder.parent.name in comparisons[file]:
                rank = (_LISTED, list(comparisons).index(file), comparisons[file].index(folder.parent.name))
                ranks[arm] = min(ranks[arm], rank)
            standard = standard or _training_architecture(folder).startswith("inner_product_")
        if standard:
            ranks[arm] = min(ranks[arm], (_STANDARD, mentioned))
    return ranks


def _arms_of(file: Path) -> list[str]:
    """Arms of a `comparison.json` in its order; none if there is none, or it is damaged."""
    comparison = comparison_beside(file) or {"arms": []}
    return list(dict.fromkeys(PurePosixPath(arm["path"]).parent.name for arm in comparison["arms"]))


def _training_architecture(folder: Path) -> str:
    try:
        return str(read_json(folder / "cfg.json")["metadata"]["training_architecture"])
    except (OSError, ValueError, KeyError, TypeError):  # loading it says what is wrong
        return ""


def _split(text: str) -> tuple[str | None, str, str | None]:
    named = re.match(r"([^/=#]+)=(.+)", text)
    arm, rest = (named[1], named[2]) if named else (None, text)
    place, _, sae_id = rest.partition("#")
    if not place:
        raise ValueError(f"{text!r} names no SAE; write folder, repository#sae_id or arm=folder.")
    return arm, place.rstrip("/") or place, sae_id or None


def _arm_path(place: str, sae_id: str | None) -> tuple[str, ...]:
    """What tells an arm without a name from the others, least important part first."""
    parts, within = PurePosixPath(place).parts, PurePosixPath(sae_id or "").parts
    if len(parts + within) > 1 and _seed(place, sae_id) is not None:
        return (parts + within)[:-1]
    return parts if sae_id is None else (*parts, sae_id)


def _shortest(paths: Sequence[tuple[str, ...]]) -> dict[tuple[str, ...], str]:
    """The fewest last parts of each path that no other path ends with."""

    def name(path: tuple[str, ...]) -> str:
        for n in range(1, len(path) + 1):
            if sum(other[-n:] == path[-n:] for other in paths) == 1:
                return "/".join(path[-n:])
        return "/".join(path)

    return {path: name(path) for path in paths}

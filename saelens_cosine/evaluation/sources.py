"""Which SAEs are evaluated, and which of them are seeds of one arm."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import NamedTuple


class Source(NamedTuple):
    """
    One SAE.

    Args:
        arm (str): What the report calls it, together with its other seeds.
        seed (int): Its number among them, from 0.
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


def parse_sources(texts: Sequence[str]) -> tuple[Source, ...]:
    """`[arm=]place[#sae_id]`, the arms in order of first mention.

    SAEs with the same arm are its seeds, in the order given. Without one, `folder/arm/seed0` and `folder/arm/seed1` are seeds
    of `arm`, as `saelens-cosine compare` writes them; any other place is an arm of its own, called by as much of the end of its
    path as tells it from the others.

    Raises:
        ValueError: none at all, an empty name, or one SAE twice.
    """
    if not texts:
        raise ValueError("Name at least one SAE: a folder, a Hub repository or a short name.")
    split = [_split(text) for text in texts]
    for (place, sae_id), count in Counter((place, sae_id) for _, place, sae_id in split).items():
        if count > 1:
            raise ValueError(f"{place + (f'#{sae_id}' if sae_id else '')} is named {count} times.")
    paths = list(dict.fromkeys(_arm_path(place, sae_id) for arm, place, sae_id in split if arm is None))
    short = _shortest(paths)
    arms = [arm or short[_arm_path(place, sae_id)] for arm, place, sae_id in split]
    order = list(dict.fromkeys(arms))
    seeds: Counter[str] = Counter()
    sources: list[Source] = []
    for arm, (_, place, sae_id) in zip(arms, split, strict=True):
        sources.append(Source(arm, seeds[arm], place, sae_id))
        seeds[arm] += 1
    return tuple(sorted(sources, key=lambda source: order.index(source.arm)))


def _split(text: str) -> tuple[str | None, str, str | None]:
    named = re.match(r"([^/=#]+)=(.+)", text)
    arm, rest = (named[1], named[2]) if named else (None, text)
    place, _, sae_id = rest.partition("#")
    if not place:
        raise ValueError(f"{text!r} names no SAE; write folder, repository#sae_id or arm=folder.")
    return arm, place.rstrip("/") or place, sae_id or None


def _arm_path(place: str, sae_id: str | None) -> tuple[str, ...]:
    """What tells an arm without a name from the others, least important part first."""
    parts = PurePosixPath(place).parts
    if sae_id is None and len(parts) > 1 and re.fullmatch(r"seed\d+", parts[-1]):
        return parts[:-1]
    return parts if sae_id is None else (*parts, sae_id)


def _shortest(paths: Sequence[tuple[str, ...]]) -> dict[tuple[str, ...], str]:
    """The fewest last parts of each path that no other path ends with."""

    def name(path: tuple[str, ...]) -> str:
        for n in range(1, len(path) + 1):
            if sum(other[-n:] == path[-n:] for other in paths) == 1:
                return "/".join(path[-n:])
        return "/".join(path)

    return {path: name(path) for path in paths}

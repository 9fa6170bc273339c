"""Which SAEs are evaluated, which of them are seeds of one arm, and which may be compared with each other."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import PurePosixPath
from typing import NamedTuple, Protocol, TypeVar

from saelens_cosine.experiments.evaluate.places import Place, Rank, read_places


class Source(NamedTuple):
    """
    One SAE.

    Args:
        arm (str): What the report calls it, together with its other seeds.
        seed (int): Its number among them: N of a folder `seedN`, for any other the first that is free, from 0.
        place (str): Folder, Hub repository or short name.
        sae_id (str | None): Which one of several there.
        hook (str | None): Hook point; None where nothing on this disk tells.
        k (int | None): Active features that it was trained with; likewise.
        condition (str): What tells it from other SAEs of its arm besides the seed, `layer15 k32`: the hook where an arm has several, k where an arm has several; else empty.
    """

    arm: str
    seed: int
    place: str
    sae_id: str | None
    hook: str | None = None
    k: int | None = None
    condition: str = ""

    @property
    def name(self) -> str:
        """Stands for it in messages."""
        return self.place if self.sae_id is None else f"{self.place}#{self.sae_id}"


def parse_sources(texts: Sequence[str], baseline: str | None = None) -> tuple[Source, ...]:
    """`[arm=]place[#sae_id]`, arm by arm, condition by condition, seeds ascending. The first arm is the baseline, which others are compared with.

    SAEs with the same arm are its seeds. Without one, `folder/arm/seed0` and `folder/arm/seed1` are seeds of `arm`, as
    `saelens-cosine compare` writes them; any other place is an arm of its own, called by as much of the end of its path as tells
    it from the others. A folder with a `comparison.json` stands for all SAEs of that comparison.

    Where a comparison has several hooks or several k, seeds are numbered, and SAEs are compared, within a condition: one hook and
    one k. An SAE that is of no comparison has the condition that its config tells, where it lies on this disk.

    The order of arms is not that of a shell's `*`: those of a comparison come first, as in its `comparison.json`; then those of
    the standard score under our recipe (`inner_product_...`, by the arm's name or the training architecture in the SAE's config);
    then all others, as they are mentioned. Who names an arm and mentions it first means it: `arm=place` stays in front unless a
    comparison lists it. Conditions are in the comparison's order, too.

    Args:
        texts: the SAEs.
        baseline: the arm to put first, whatever the above.

    Raises:
        ValueError: none at all, an empty name, one SAE or one seed of an arm twice, a baseline that is no arm, or a comparison
            that gives no SAE or whose file is not to be read.
        FileNotFoundError: SAEs of a comparison are gone.
    """
    places = read_places(texts)
    short = _shortest(list(dict.fromkeys(_arm_path(place) for place in places if place.arm is None)))
    by_arm: dict[str, list[Place]] = {}
    for place in places:
        by_arm.setdefault(place.arm or short[_arm_path(place)], []).append(place)
    if baseline is not None and baseline not in by_arm:
        raise ValueError(f"No arm is called {baseline!r}, to be the baseline; there are {', '.join(by_arm)}.")
    ranks = _ranks(by_arm)
    first = next(iter(by_arm))
    if baseline is None and places[0].arm is not None and ranks[first][0] > _LISTED:
        baseline = first
    order = sorted(by_arm, key=lambda arm: (arm != baseline, ranks[arm]))
    condition_of = _conditions(by_arm)
    in_order = sorted(places, key=lambda place: (place.rank is None, place.rank or (0, 0)))
    conditions = list(dict.fromkeys(condition_of(place) for place in in_order))
    return tuple(
        source
        for arm in order
        for condition in conditions
        for source in _numbered(arm, condition, [place for place in by_arm[arm] if condition_of(place) == condition])
    )


class _Entry(Protocol):
    @property
    def arm(self) -> str: ...

    @property
    def condition(self) -> str: ...


Entry = TypeVar("Entry", bound=_Entry)


def controls(entries: Sequence[Entry], baseline: str, condition: str) -> list[Entry]:
    """The baseline's SAEs that those of a condition are compared with: its own of that condition, or else those that have none."""
    found = [entry for entry in entries if entry.arm == baseline]
    return [entry for entry in found if entry.condition == condition] or [e for e in found if not e.condition]


def pair_seeds(seeds: Sequence[int], baseline: Sequence[int]) -> dict[int, int]:
    """The baseline's seed that each seed of an arm is compared with: that of the same number; seeds without one are missing.

    Two arms of a single SAE are a pair whatever their numbers: there is nothing to mistake it for.
    """
    if len(seeds) == len(baseline) == 1:
        return {seeds[0]: baseline[0]}
    return {seed: seed for seed in seeds if seed in baseline}


def _numbered(arm: str, condition: str, places: Sequence[Place]) -> list[Source]:
    """An arm's SAEs of one condition by seed."""
    said = [_seed(place) for place in places]
    for seed, count in Counter(seed for seed in said if seed is not None).items():
        if count > 1:
            names = " and ".join(place.place for place, number in zip(places, said, strict=True) if number == seed)
            raise ValueError(f"{names} are both seed {seed} of {arm!r}; name one of them otherwise, with another arm=.")
    free = iter(number for number in range(len(places)) if number not in said)
    sources = [
        Source(arm, next(free) if number is None else number, *place[1:3], place.hook, place.k, condition)
        for place, number in zip(places, said, strict=True)
    ]
    return sorted(sources, key=lambda source: source.seed)


def _seed(place: Place) -> int | None:
    found = re.fullmatch(r"seed(\d+)", PurePosixPath(place.sae_id or place.place).name)
    return int(found[1]) if found else None


def _conditions(by_arm: Mapping[str, Sequence[Place]]) -> Callable[[Place], str]:
    """What the condition of a place is called: by hook and k as far as a comparison has several of them in one arm."""
    of_arms = [[place for place in places if place.listed] for places in by_arm.values()]
    several_hooks = any(len({place.hook for place in places}) > 1 for places in of_arms)
    several_ks = any(len({place.k for place in places}) > 1 for places in of_arms)
    names = _hook_names([place.hook for places in by_arm.values() for place in places if place.hook])

    def condition(place: Place) -> str:
        hook = [names[place.hook]] if several_hooks and place.hook else []
        return " ".join(hook + ([f"k{place.k}"] if several_ks and place.k is not None else []))

    return condition


def _hook_names(hooks: Sequence[str]) -> dict[str, str]:
    """`layer15`, or the hooks' own names where that does not tell one from another."""
    found = {hook: re.search(r"\.(\d+)(?:\.|$)", hook) for hook in hooks}
    layers = {hook: f"layer{number[1]}" for hook, number in found.items() if number}
    return layers if len(set(layers.values())) == len(found) else {hook: hook for hook in hooks}


_LISTED, _STANDARD, _OTHER = range(3)


def _ranks(by_arm: Mapping[str, Sequence[Place]]) -> dict[str, tuple[int, ...]]:
    """Arms sort by these: of a comparison, of the standard score, and others."""
    ranks: dict[str, tuple[int, ...]] = {}
    for mentioned, (arm, places) in enumerate(by_arm.items()):
        of_comparison: list[Rank] = [place.rank for place in places if place.rank]
        standard = [arm.rpartition("/")[-1], *(place.training_architecture for place in places)]
        if of_comparison:
            ranks[arm] = (_LISTED, *min(of_comparison))
        elif any(name.startswith("inner_product_") for name in standard):
            ranks[arm] = (_STANDARD, mentioned)
        else:
            ranks[arm] = (_OTHER, mentioned)
    return ranks


def _arm_path(place: Place) -> tuple[str, ...]:
    """What tells an arm without a name from the others, least important part first."""
    parts, within = PurePosixPath(place.place).parts, PurePosixPath(place.sae_id or "").parts
    if place.listed:  # without the parts for hook, k and seed
        return (*parts[: -len(PurePosixPath(place.listed.path).parts)], place.listed.arm)
    if len(parts + within) > 1 and _seed(place) is not None:
        return (parts + within)[:-1]
    return parts if place.sae_id is None else (*parts, place.sae_id)


def _shortest(paths: Sequence[tuple[str, ...]]) -> dict[tuple[str, ...], str]:
    """The fewest last parts of each path that no other path ends with."""

    def name(path: tuple[str, ...]) -> str:
        for n in range(1, len(path) + 1):
            if sum(other[-n:] == path[-n:] for other in paths) == 1:
                return "/".join(path[-n:])
        return "/".join(path)

    return {path: name(path) for path in paths}

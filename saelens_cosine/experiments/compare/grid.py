"""What a comparison trains, in what order, and what its parts are called."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from saelens_cosine.experiments.compare.settings import ComparisonSettings


@dataclass(frozen=True)
class Point:
    """
    One hook, k and seed, at which all arms are trained.

    Args:
        hook (int): Number of the hook among the settings'.
        k (int): Active features per token.
        seed (int): Of initialisation and data order.
        parts (tuple[str, ...]): What tells it from the grid's other points: `("layer15", "k32", "seed0")`.
    """

    hook: int
    k: int
    seed: int
    parts: tuple[str, ...]

    @property
    def name(self) -> str:
        """Of its record and its checkpoints."""
        return "-".join(self.parts)

    def path(self, arm: str) -> str:
        """Folder of an arm's SAE, relative to the comparison's."""
        return "/".join((arm, *self.parts))


@dataclass(frozen=True)
class Training:
    """
    One run of SAELens' multi-SAE runner, which knows one learning rate.

    Args:
        point (Point): Where on the grid.
        arms (tuple[str, ...]): Architectures that are trained side by side.
        lr (float | None): Learning rate; None for the recipe's.
        name (str): Of its checkpoints.
    """

    point: Point
    arms: tuple[str, ...]
    lr: float | None
    name: str


def points(settings: ComparisonSettings) -> list[Point]:
    """Seed by seed, in each hook by hook and k by k; a hook's first is where its learning rates are chosen."""
    n_hooks = max(1, len(settings.layers) + len(settings.hooks))
    tuned = tuned_k(settings)
    ks = sorted(settings.ks, key=lambda k: k != tuned) if len(settings.rates) > 1 else settings.ks
    return [
        Point(hook, k, seed, tuple(_parts(settings, hook, k, seed)))
        for seed in range(settings.seeds)
        for hook in range(n_hooks)
        for k in ks
    ]


def tuned_k(settings: ComparisonSettings) -> int:
    """The middle k, the lower one of two."""
    return settings.ks[(len(settings.ks) - 1) // 2]


def is_tuned(point: Point, settings: ComparisonSettings) -> bool:
    """Whether all learning rates are tried there."""
    return len(settings.rates) > 1 and point.seed == 0 and point.k == tuned_k(settings)


def trainings(point: Point, settings: ComparisonSettings, chosen: Mapping[str, float] | None) -> list[Training]:
    """What is trained at a point: all arms with each rate, or, once each arm's is chosen, those that share one.

    An arm that no rate was good for is missing.
    """
    rates: list[float | None] = list(settings.rates) or [None]
    if len(rates) == 1 or chosen is None:
        groups = [(rate, settings.arms) for rate in rates]
    else:
        groups = [(rate, tuple(arm for arm in settings.arms if chosen.get(arm) == rate)) for rate in rates]
    suffix = "-lr{:g}" if len(rates) > 1 else ""
    return [Training(point, arms, rate, point.name + suffix.format(rate)) for rate, arms in groups if arms]


def _parts(settings: ComparisonSettings, hook: int, k: int, seed: int) -> Iterator[str]:
    if len(settings.layers) > 1:
        yield f"layer{settings.layers[hook]}"
    if len(settings.hooks) > 1:
        yield settings.hooks[hook]
    if len(settings.ks) > 1:
        yield f"k{k}"
    yield f"seed{seed}"

"""Each arm at its own best learning rate: a gap between arms at one rate may be a gap in tuning."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from saelens_cosine.experiments.compare.results import RateTried, Trained


def rates_tried(tried: Sequence[Trained], arms: Sequence[str], hook_name: str, k: int) -> tuple[RateTried, ...]:
    """Every arm at every learning rate that it was trained with, arm by arm, rates ascending; its best one is marked as chosen.

    Args:
        tried: trainings of all arms, one for each rate.
        arms: in the order of the result.
        hook_name: where.
        k: active features per token.
    """
    return tuple(one for arm in arms for one in _of_arm(tried, arm, hook_name, k))


def chosen_rates(tried: Sequence[RateTried], hook_name: str) -> Mapping[str, float]:
    """By arm, the rate for all ks and seeds at a hook; without arms that no rate was good for."""
    return {one.architecture: one.lr for one in tried if one.chosen and one.hook_name == hook_name}


def about_edges(tried: Sequence[RateTried]) -> str:
    """Which arms did best at the smallest or the largest rate that was tried, where a better one may lie beyond; empty if none did."""
    rates = sorted({one.lr for one in tried})
    ends = {"smaller": rates[:1], "larger": rates[-1:]}
    arms = {
        end: dict.fromkeys(one.architecture for one in tried if one.chosen and [one.lr] == rate)
        for end, rate in ends.items()
    }
    return " ".join(f"A {end} rate may be better for {', '.join(found)}." for end, found in arms.items() if found)


def _of_arm(tried: Sequence[Trained], arm: str, hook_name: str, k: int) -> list[RateTried]:
    found: list[RateTried] = []
    for training in sorted(tried, key=lambda training: training.lr):
        judged = next((one.judged for one in training.arms if one.architecture == arm), None)
        if judged is None or not math.isfinite(judged.fve):
            found.append(RateTried(arm, hook_name, k, training.lr, None, None))
        else:
            found.append(RateTried(arm, hook_name, k, training.lr, judged.fve, judged.dead_fraction))
    best = max((one.fve for one in found if one.fve is not None), default=None)
    chosen = next((one for one in found if best is not None and one.fve == best), None)
    return [replace(one, chosen=one is chosen) for one in found]

"""What arms of a comparison are compared in, and their results by hook, arm and k."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from saelens_cosine.experiments.compare.results import ArmResult, Comparison
from saelens_cosine.report.estimate import Estimate, over_seeds


@dataclass(frozen=True)
class Measure:
    """
    A figure of one SAE.

    Args:
        name (str): In `comparison.json`.
        title (str): In tables.
        label (str): In charts.
        form (str): In a terminal.
        of (Callable[[ArmResult], float]): Its value; NaN where it could not be measured.
    """

    name: str
    title: str
    label: str
    form: str
    of: Callable[[ArmResult], float]

    def over_seeds(self, results: Sequence[ArmResult]) -> Estimate:
        """Mean and 95 % interval."""
        return over_seeds([self.of(result) for result in results])


def quartile(q: int) -> Measure:
    """FVE of the tokens in a quartile of the norm, 0 to 3; NaN where no token is in it."""

    def of(result: ArmResult) -> float:
        found = result.reconstruction.by_norm
        return found[q].fve if q < len(found) else math.nan

    return Measure(f"fve_norm_quartile_{q + 1}", f"FVE, Q{q + 1}", f"FVE, norm quartile {q + 1}", "{:.4f}", of)


FVE = Measure("fve", "FVE", "FVE", "{:.4f}", lambda arm: arm.reconstruction.fve)
L0 = Measure("l0", "L0", "L0, active features per token", "{:.1f}", lambda arm: arm.reconstruction.l0)
DEAD = Measure(
    "dead_fraction", "dead", "share of dead features", "{:.1%}", lambda arm: arm.reconstruction.dead_fraction
)
CE = Measure("ce_loss_recovered", "CE recov.", "CE loss recovered", "{:.4f}", lambda arm: arm.ce_loss_recovered)
SECONDS = Measure("seconds", "train s", "training seconds", "{:.0f}", lambda arm: arm.seconds)
QUARTILES = tuple(quartile(q) for q in range(4))

ByK = dict[int, list[ArmResult]]


def at_hook(comparison: Comparison, hook_name: str) -> dict[str, ByK]:
    """Results at a hook by arm, in the settings' order, and by k, ascending; each is of all seeds there are. No empty ones."""
    found = [result for result in comparison.arms if result.hook_name == hook_name]
    arms = {arm: [result for result in found if result.architecture == arm] for arm in comparison.settings.arms}
    return {
        arm: {k: [result for result in of if result.k == k] for k in sorted({result.k for result in of})}
        for arm, of in arms.items()
        if of
    }


def ks_of(arms: dict[str, ByK]) -> list[int]:
    """All ks that any arm has, ascending."""
    return sorted({k for by_k in arms.values() for k in by_k})

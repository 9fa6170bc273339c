"""Arms at the baseline's FVE and at its L0, in every figure, where an arm has several ks at a hook. The mathematics is `metrics.matched`'s."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from saelens_cosine.experiments.evaluate.evals import TREATMENTS, Figure
from saelens_cosine.metrics.matched import MatchedDifference, Point, matched_differences
from saelens_cosine.plain import plain

AT = ("FVE", "L0")
"""What arms are matched at, by its name in `reconstruction`: of ordinary tokens where these were measured, else of all."""


class OnCurve(NamedTuple):
    """
    An SAE as a point of its arm's curve.

    Args:
        arm (str): What it is called, together with its other seeds and ks.
        seed (int): Its number among them.
        k (int | None): Active features that it was trained with; None, which is no point, where that is not known.
        text (int): Which of the evaluation's texts it was measured on.
        compared (Mapping[str, Figure]): Figures that arms are compared in, by title.
    """

    arm: str
    seed: int
    k: int | None
    text: int
    compared: Mapping[str, Figure]


@dataclass(frozen=True)
class MatchedFigure:
    """
    One figure of an arm minus the baseline's at one of the baseline's ks, both at the same FVE or L0.

    Args:
        text (int): The evaluation's text that both were measured on, which says the hook.
        at (str): Title of the figure that is the same of both.
        arm (str): Minuend.
        baseline (str): Subtrahend.
        measure (str): Title of the figure that is compared.
        over (tuple[str, ...]): What its interval is over.
        found (MatchedDifference): The difference, or why there is none.
    """

    text: int
    at: str
    arm: str
    baseline: str
    measure: str
    over: tuple[str, ...]
    found: MatchedDifference

    def document(self, hook: str) -> dict[str, Any]:
        """As `evaluation.json` holds it."""
        told = {"hook": hook, "at": self.at, "arm": self.arm, "minus": self.baseline, "measure": self.measure}
        outside = [{**one._asdict(), "by": one.by} for one in self.found.outside]
        found = {**asdict(self.found), "inside": self.found.inside, "outside": outside}
        return plain({**told, "over": self.over, **found})


Curves = dict[str, dict[int, list[OnCurve]]]
"""By arm and seed, its SAEs at one hook whose k is known, ks ascending."""


def curves(saes: Sequence[OnCurve]) -> dict[int, Curves]:
    """By text, the SAEs of arms, where any arm has several ks."""
    found: dict[int, Curves] = {}
    for sae in sorted((sae for sae in saes if sae.k is not None), key=lambda sae: sae.k or 0):
        found.setdefault(sae.text, {}).setdefault(sae.arm, {}).setdefault(sae.seed, []).append(sae)
    order = list(dict.fromkeys(sae.arm for sae in saes))
    return {
        text: {arm: dict(sorted(of[arm].items())) for arm in order if arm in of}
        for text, of in sorted(found.items())
        if any(len({sae.k for saes in seeds.values() for sae in saes}) > 1 for seeds in of.values())
    }


def matched_at(saes: Sequence[OnCurve]) -> dict[str, str]:
    """By name, the title of what arms are matched at; without what was not measured."""
    titles = {title for sae in saes for title in sae.compared}
    found = {name: [f"{name}, {sinks}" for sinks in reversed(TREATMENTS.values())] for name in AT}
    return {
        name: next(title for title in of if title in titles) for name, of in found.items() if not titles.isdisjoint(of)
    }


def matched_figures(saes: Sequence[OnCurve], baseline: str) -> Iterator[MatchedFigure]:
    """Hook by hook, at FVE and at L0, arm by arm, figure by figure, k by k of the baseline. None where no arm has several ks."""
    for text, arms in curves(saes).items():
        theirs = arms.get(baseline, {})
        for at in matched_at([sae for of in theirs.values() for sae in of]).values():
            for arm, ours in arms.items():
                pair = [sae for seeds in (ours, theirs) for of in seeds.values() for sae in of]
                for title in pair[0].compared if arm != baseline else ():
                    if title != at and all(title in sae.compared and at in sae.compared for sae in pair):
                        figures = [sae.compared[title] for sae in pair]
                        repeated = len({(one.units, one.repeats.shape) for one in figures}) == 1 and figures[0].over
                        a, b = (_points(seeds, at, title, bool(repeated)) for seeds in (ours, theirs))
                        for found in matched_differences(a, b):
                            over = ("seeds",) * (len(found.seeds) > 1) + (figures[0].over if repeated else ())
                            yield MatchedFigure(text, at, arm, baseline, title, over, found)


def _points(seeds: Mapping[int, Sequence[OnCurve]], x: str, y: str, repeated: bool) -> dict[int, list[Point]]:
    def point(sae: OnCurve) -> Point:
        one = sae.compared[y]
        return Point(sae.k or 0, sae.compared[x].number, one.repeats if repeated else one.number)

    return {seed: [point(sae) for sae in saes] for seed, saes in seeds.items()}

"""Arms against the first one, beside the noise of seeds, tasks and text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from saelens_cosine.experiments.evaluate.evals import Figure
from saelens_cosine.experiments.evaluate.sources import pair_seeds
from saelens_cosine.metrics.intervals import Difference, difference_over_documents, paired_difference

DOCUMENTS = ("documents",)


@dataclass(frozen=True)
class ArmDifference:
    """
    One measure of one arm against the first.

    Args:
        arm (str): Minuend.
        baseline (str): Subtrahend.
        measure (str): What was measured.
        over (tuple[str, ...]): What the interval is over: "seeds", "tasks", "splits", "documents".
        difference (Difference): Its mean and 95 % interval. The mean is the difference of the figures, or its mean over seeds.
        condition (str): In which condition of both, see `sources.Source`; empty where there is one.
    """

    arm: str
    baseline: str
    measure: str
    over: tuple[str, ...]
    difference: Difference
    condition: str = ""

    @property
    def counted(self) -> str:
        """How many of what the interval is over: `3 seeds x 8 tasks`."""
        return " x ".join(f"{n} {what}" for n, what in zip(self.difference.shape, self.over, strict=True))


def differences(
    arms: Mapping[str, Mapping[int, Mapping[str, Figure]]], baseline: str | None = None
) -> Iterator[ArmDifference]:
    """Each arm minus the baseline, for every figure that both have, from the seeds that both have (`pair_seeds`).

    With several seeds, the mean over seeds of the differences of the figures, and an interval over seeds. With one, the difference
    of the figures: for FVE with an interval over the documents of the text, for probing over tasks and splits; other figures are
    single numbers, and are left out.

    Args:
        arms: by arm and seed, the figures that arms are compared in, by title.
        baseline: the arm that others are compared with; the first if None.
    """
    baseline = next(iter(arms)) if baseline is None else baseline
    theirs = arms.get(baseline, {})
    for arm, ours in ((arm, of) for arm, of in arms.items() if arm != baseline):
        partners = pair_seeds(list(ours), list(theirs))
        pairs = [(ours[seed], theirs[partners[seed]]) for seed in ours if seed in partners]
        for title in pairs[0][0] if pairs else ():
            if all(title in side for pair in pairs for side in pair):
                difference = _difference([(mine[title], its[title]) for mine, its in pairs])
                if difference is not None:
                    yield ArmDifference(arm, baseline, title, *difference)


def _difference(pairs: Sequence[tuple[Figure, Figure]]) -> tuple[tuple[str, ...], Difference] | None:
    """Over what, and the difference; None where there is no interval to be had."""
    (a, b), *more = pairs
    if not np.isfinite([[side.number for side in pair] for pair in pairs]).all():
        return None
    if a.documents and b.documents and not more:
        mean = a.number - b.number
        if a.units != b.units:
            reason = "not measured on the same tokens"
            return DOCUMENTS, Difference(mean, None, None, False, (len(a.documents.total),), reason)
        return DOCUMENTS, difference_over_documents(a.documents, b.documents, mean)
    if len({(one.units if one.over else (), one.repeats.shape) for pair in pairs for one in pair}) > 1:
        return None
    ours, theirs = (np.stack([pair[side].repeats for pair in pairs]) for side in (0, 1))
    if not more:
        ours, theirs = ours[0], theirs[0]
    if ours.size < 2:
        return None
    return (("seeds", *a.over) if more else a.over), paired_difference(ours, theirs)

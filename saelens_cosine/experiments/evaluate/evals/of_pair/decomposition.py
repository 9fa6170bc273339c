"""The probing gap to the first arm, taken apart: features that only one has, and features that both have."""

from __future__ import annotations

from collections.abc import Iterator

from saelens_cosine.experiments.evaluate.evals.eval import BySinks, Eval, Figure, NotApplicable, by_sinks
from saelens_cosine.experiments.evaluate.evals.of_pair.matching import matchings_of
from saelens_cosine.experiments.evaluate.evals.of_sae.probing import SPLITS, ks_up_to
from saelens_cosine.experiments.evaluate.subject import Subject
from saelens_cosine.metrics.probing.decomposition import Decomposition, decompose, over_tasks


def _measure(subject: Subject) -> BySinks[tuple[Decomposition, ...]]:
    matchings, baseline, tasks = matchings_of(subject), subject.baseline, subject.text.labelled
    assert baseline is not None

    def of(name: str) -> tuple[Decomposition, ...]:
        pairs = matchings[name].a.pairs
        # as `Matches` counts them
        matched = [
            (feature, partner)
            for feature, partner, correlation, cosine, mutual in zip(
                pairs.features, pairs.partners, pairs.correlations, pairs.decoder_cosines, pairs.mutual, strict=True
            )
            if mutual and correlation >= 0.7 and cosine > 0.7
        ]
        if not matched:
            raise NotApplicable("No feature has a mutual match in the SAE that it is compared with.")
        ours, theirs = zip(*matched, strict=True)
        ks = ks_up_to(len(matched))
        parts: list[tuple[Decomposition, ...]] = []
        for i, task in enumerate(tasks):
            codes = subject.pooled(i, name), baseline.pooled(i, name)
            known = [one.probed(i, name, ks, SPLITS, "canonical")["canonical"] for one in (subject, baseline)]
            parts.append(decompose(*codes, task.labels, ours, theirs, ks, splits=SPLITS, known=known))
        by_k = (list(by_task) for by_task in zip(*parts, strict=True))
        return tuple(over_tasks(by_task) if len(by_task) > 1 else by_task[0] for by_task in by_k)

    return BySinks(**by_sinks(subject.settings.treatments, of))


def _figures(result: BySinks[tuple[Decomposition, ...]]) -> Iterator[Figure]:
    for sinks, parts in result.items():
        for part in parts:
            k = f"k={part.k or 'all'}"
            gap, matched = part.gap.mean, part.matched_gap.mean
            yield Figure(f"probing gap to the first arm {k}", gap, sinks, compared=False)
            yield Figure(f"probing gap on matched features alone {k}", matched, sinks, compared=False)
            yield Figure(f"separability, share of the gap {k}", part.separability, sinks, compared=False)


DECOMPOSITION = Eval(
    "decomposition",
    "pair",
    "probing gap to the first arm: discovery, separability",
    _measure,
    figures=_figures,
    reads=lambda subject: subject.text.labelled,
)

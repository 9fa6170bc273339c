"""Approximate feature activation (Lee et al., arXiv 2503.24277): AFA, epsilon-LBO and the ZF plot's points."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from saelens_cosine.activations.sample import TokenSample
from saelens_cosine.experiments.evaluate.evals.eval import BySinks, Eval, Figure, tokens_of
from saelens_cosine.experiments.evaluate.subject import Subject
from saelens_cosine.metrics.reconstruction.afa import AFADistributions, AFATokens, Bias, measure_afa, summarize_afa
from saelens_cosine.metrics.reconstruction.zf_points import POINTS, ZFPoints, zf_points
from saelens_cosine.plain import named


@dataclass(frozen=True)
class AFAOfTokens:
    """
    AFA in both forms, to the input and to the reconstruction.

    Args:
        augmented (AFADistributions): `b_dec` counts as a feature, to the input: the paper's form.
        augmented_to_reconstruction (AFADistributions): Likewise, to the reconstruction.
        centred (AFADistributions): `b_dec` is taken from both, to the input.
        centred_to_reconstruction (AFADistributions): Likewise, to the reconstruction.
        zf_points_centred (ZFPoints): The ZF plot's points without `b_dec`.
    """

    augmented: AFADistributions = field(metadata=named("augment, to the input"))
    augmented_to_reconstruction: AFADistributions = field(metadata=named("augment, to the reconstruction"))
    centred: AFADistributions = field(metadata=named("center, to the input"))
    centred_to_reconstruction: AFADistributions = field(metadata=named("center, to the reconstruction"))
    zf_points_centred: ZFPoints


@dataclass(frozen=True, kw_only=True)
class AFA(BySinks[AFAOfTokens]):
    """
    AFA with and without sinks.

    Args:
        zf_points (ZFPoints): The ZF plot's points in the paper's form, with sinks if these were measured.
    """

    zf_points: ZFPoints


def _measure(subject: Subject) -> AFA:
    papers: list[ZFPoints] = []

    def points(tokens: AFATokens) -> ZFPoints:
        return zf_points(tokens, subject.source.name, POINTS)

    def of(sample: TokenSample) -> AFAOfTokens:
        def both(bias: Bias) -> tuple[AFATokens, AFATokens]:
            x = sample.activations
            return measure_afa(subject.sae, x, "input", bias), measure_afa(subject.sae, x, "reconstruction", bias)

        augmented, centred = both("augment"), both("center")
        papers.append(points(augmented[0]))
        return AFAOfTokens(*map(summarize_afa, (*augmented, *centred)), zf_points_centred=points(centred[0]))

    return AFA(**subject.by_treatment(of), zf_points=papers[0])


def _figures(result: AFA) -> Iterator[Figure]:
    for sinks, found in result.items():
        yield Figure("|f| / |x - b_dec| - 1", found.centred.signed_gap.median, sinks)
        yield Figure("|f, b_dec| / |x| - 1", found.augmented.signed_gap.median, sinks)


AFA_EVAL = Eval(
    "afa",
    "sae",
    "AFA, epsilon-LBO and the ZF plot",
    _measure,
    figures=_figures,
    tokens=lambda result: tokens_of(result, lambda found: found.augmented.tokens),
)

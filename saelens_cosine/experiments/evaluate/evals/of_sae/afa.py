"""Approximate feature activation (Lee et al., arXiv 2503.24277): AFA, epsilon-LBO and the ZF plot's points."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from math import isfinite

from saelens_cosine.activations.sample import TokenSample
from saelens_cosine.experiments.evaluate.evals.eval import (
    TREATMENTS,
    BySinks,
    Eval,
    EvalSection,
    Figure,
    Shown,
    tokens_of,
)
from saelens_cosine.experiments.evaluate.subject import Subject
from saelens_cosine.metrics.reconstruction.afa import AFADistributions, AFATokens, Bias, measure_afa, summarize_afa
from saelens_cosine.metrics.reconstruction.zf_points import POINTS, ZFPoints, zf_points
from saelens_cosine.plain import named
from saelens_cosine.report.chart import Arms, Axis, Chart, Plot, ends
from saelens_cosine.report.estimate import Estimate, short
from saelens_cosine.report.table import Table

BANDS = (0.25, 0.5, 1.0)
"""Values of epsilon (h - 1) whose bands the ZF plot shows (arXiv 2503.24277, section 4)."""


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


def _charts(shown: Shown[AFA]) -> Iterator[Chart]:
    """The ZF plot of each arm's first seed; one scale for all tokens, and one for those without sinks."""
    for sinks in ("without_sinks", "with_sinks"):
        found: dict[str, AFAOfTokens] = {arm: results[0] for arm, results in shown.of(sinks).items()}
        inputs = sorted(z for one in found.values() for z in one.zf_points_centred.afa if isfinite(z))
        log = bool(inputs) and inputs[-1] > 3 * inputs[len(inputs) // 2]  # sinks would crush the others
        points = [one.zf_points_centred for one in found.values()]
        held = ends((v for one in points for v in (*one.afa, *one.feature_norm) if v > 0), log=log)
        if not inputs or held is None:
            continue
        both = held if log else (0.0, held[1])
        for arm, one in found.items():
            yield _zf_plot(shown.arms, arm, one, f"{arm}, {TREATMENTS[sinks]}", both, log)


def _zf_plot(arms: Arms, arm: str, found: AFAOfTokens, title: str, both: tuple[float, float], log: bool) -> Chart:
    """Norm of the codes against that of the centred input, with the paper's bands."""
    x = Axis("norm of the input less b_dec, ‖x - b_dec‖", log, both)
    plot = Plot(arms, x, Axis("norm of the codes ‖f‖", log, both))
    for band in BANDS:
        lower, upper = (1 + band) ** -0.5, (1 - band) ** -0.5 if band < 1 else 1e3  # from 1 on it has no upper edge
        plot.band(both, [end * lower for end in both], [end * upper for end in both])
    plot.guide(both, both)
    z, f, centred = found.zf_points_centred.afa, found.zf_points_centred.feature_norm, found.centred
    drawn = plot.dots(arm, z, f, [f"‖x - b_dec‖ {short(a)}, ‖f‖ {short(b)}" for a, b in zip(z, f, strict=True)])
    ratio, below = Estimate(1 + centred.signed_gap.median), Estimate(centred.share_below)
    row = (arm, f"{centred.tokens:,}", f"{centred.without_features:,}", ratio, below)
    heads = ("arm", "tokens", "without codes", "median ‖f‖/‖x - b_dec‖", "share below the line")
    silent = f", {centred.without_features:,} of them without codes" if centred.without_features else ""
    note = (
        f"Median ‖f‖/‖x - b_dec‖ {short(ratio.value)}, {below.value:.1%} below the line, of {centred.tokens:,} tokens{silent}; "
        f"{drawn:,} drawn."
    )
    return Chart(title, note, plot.figure, Table(title, heads, [row]), height=400)


AFA_EVAL = Eval(
    "afa",
    "sae",
    "AFA, epsilon-LBO and the ZF plot",
    _measure,
    figures=_figures,
    tokens=lambda result: tokens_of(result, lambda found: found.augmented.tokens),
    section=EvalSection(
        "ZF plot",
        "Norm of the codes, b_dec left out, against that of what they stand for, x - b_dec. On the dashed line they are equal. "
        "Bands: ε(h - 1) up to 0.25, 0.5 and 1.",
        _charts,
    ),
)

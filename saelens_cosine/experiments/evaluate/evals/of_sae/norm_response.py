"""What happens to codes as the input is scaled, and to FVE as norms are noisy."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from math import isfinite

from saelens_cosine.activations.sample import TokenSample
from saelens_cosine.experiments.evaluate.evals.eval import BySinks, Eval, EvalSection, Figure, Shown, tokens_of
from saelens_cosine.experiments.evaluate.subject import Subject
from saelens_cosine.metrics.norms.norm_noise import NormNoise, norm_noise
from saelens_cosine.metrics.norms.norm_response import SCALING_NOTE, NormResponse, norm_response, scores_about
from saelens_cosine.plain import OMITTED
from saelens_cosine.report.chart import Axis, Chart, Plot
from saelens_cosine.report.estimate import Estimate, over_seeds
from saelens_cosine.report.table import Table


@dataclass(frozen=True)
class Scaled:
    """
    Tokens that are scaled about 0 and, where the SAE scores `x - b_dec`, about `b_dec`.

    Args:
        response (NormResponse): Codes of tokens times fixed factors.
        noise (NormNoise): FVE on tokens times random ones.
        response_about_b_dec (NormResponse | None): As `response`, about `b_dec`.
        noise_about_b_dec (NormNoise | None): As `noise`, about `b_dec`.
    """

    response: NormResponse
    noise: NormNoise
    response_about_b_dec: NormResponse | None = field(default=None, metadata=OMITTED)
    noise_about_b_dec: NormNoise | None = field(default=None, metadata=OMITTED)


def _measure(subject: Subject) -> BySinks[Scaled]:
    sae = subject.sae

    def of(sample: TokenSample) -> Scaled:
        x = sample.activations
        about_0 = norm_response(sae, x), norm_noise(sae, x)
        if scores_about(sae) is None:
            return Scaled(*about_0)
        noise = norm_noise(sae, x, about="b_dec", clean_of=about_0[1])
        return Scaled(*about_0, norm_response(sae, x, about="b_dec"), noise)

    return BySinks(**subject.by_treatment(of))


def _figures(result: BySinks[Scaled]) -> Iterator[Figure]:
    for sinks, scaled in result.items():
        for about, response, noise in (
            ("about b_dec", scaled.response_about_b_dec, scaled.noise_about_b_dec),
            ("about 0", scaled.response, scaled.noise),
        ):
            if response is not None and noise is not None:
                overlap = next(at.overlap for at in response.at_scales if at.scale == 0.5)
                yield Figure(f"active-set overlap at half scale, {about}", overlap, sinks, "{:.3f}")
                yield Figure(f"FVE lost to norm noise, {about}", noise.drop, sinks)
                yield Figure(f"FVE lost to norm noise, threshold refitted, {about}", noise.drop_refitted, sinks)
        yield Figure("length of b_dec by the median norm", scaled.response.bias_ratio, sinks)


def _charts(shown: Shown[BySinks[Scaled]]) -> Iterator[Chart]:
    """Overlap of active sets against the factor, about b_dec and about 0, on one scale."""
    scaled: dict[str, list[Scaled]] = shown.of(shown.treatment)
    about_b_dec = {
        arm: [one.response_about_b_dec for one in of if one.response_about_b_dec] for arm, of in scaled.items()
    }
    about_0 = {arm: [one.response for one in of] for arm, of in scaled.items()}
    for title, arms in (
        ("About b_dec: what is scored keeps its direction", about_b_dec),
        ("About 0: what is scored turns", about_0),
    ):
        found = {arm: responses for arm, responses in arms.items() if responses}
        if not found:
            continue
        factors = sorted({at.scale for responses in found.values() for at in responses[0].at_scales})
        x = Axis("factor s", log=True, ticks={s: f"{s:g}" for s in factors})
        plot = Plot(shown.arms, x, Axis("overlap of active features", ends=(0, 1.04)))
        rows: list[tuple[str | Estimate, ...]] = []
        for arm, responses in found.items():
            by_scale = list(zip(*(response.at_scales for response in responses), strict=True))
            at = {seeds[0].scale: over_seeds([one.overlap for one in seeds]) for seeds in by_scale}
            plot.line(arm, list(at), list(at.values()), [f"s = {s:g}, {e}" for s, e in at.items()], faint=True)
            bias = over_seeds([response.bias_ratio for response in responses]).value
            rows.append((arm, f"{bias:.3f}" if isfinite(bias) else "-", *(at.get(s, "-") for s in factors)))
        heads = ("arm", "‖b_dec‖ / median ‖x‖", *(f"s = {s:g}" for s in factors))
        note = f"‖b_dec‖ / median ‖x‖: {', '.join(f'{arm} {bias}' for arm, bias, *_ in rows)}."
        yield Chart(title, note, plot.figure, Table(title, heads, rows))


NORM_RESPONSE = Eval(
    "norm_response",
    "sae",
    "codes as the input is scaled; FVE under norm noise",
    _measure,
    figures=_figures,
    tokens=lambda result: tokens_of(result, lambda scaled: scaled.response.tokens),
    section=EvalSection(
        "Scaled tokens",
        f"Features active at a token and at the scaled one by those active at either. {SCALING_NOTE}",
        _charts,
    ),
    note=SCALING_NOTE,
)

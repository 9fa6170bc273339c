"""What happens to codes as the input is scaled, and to FVE as norms are noisy."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from saelens_cosine.activations.sample import TokenSample
from saelens_cosine.experiments.evaluate.evals.eval import BySinks, Eval, Figure, tokens_of
from saelens_cosine.experiments.evaluate.subject import Subject
from saelens_cosine.metrics.norms.norm_noise import NormNoise, norm_noise
from saelens_cosine.metrics.norms.norm_response import SCALING_NOTE, NormResponse, norm_response, scores_about
from saelens_cosine.plain import OMITTED


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
        return Scaled(*about_0, norm_response(sae, x, about="b_dec"), norm_noise(sae, x, about="b_dec"))

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


NORM_RESPONSE = Eval(
    "norm_response",
    "sae",
    "codes as the input is scaled; FVE under norm noise",
    _measure,
    figures=_figures,
    tokens=lambda result: tokens_of(result, lambda scaled: scaled.response.tokens),
    note=SCALING_NOTE,
)

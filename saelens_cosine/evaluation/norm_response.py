"""What the length of an input does to an SAE: to its codes when a token is scaled, and to its reconstructions when all are.

Source: arXiv 2606.15054; released code for the response to a scale, experiment 31 for noise on the norms. There SAEs are trained
with noise and measured without; here one trained SAE is measured with and without, each at the same L0 too.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from sae_lens.saes.sae import SAE, TrainingSAE

from saelens_cosine.evaluation.codes import TOKENS_AT_ONCE
from saelens_cosine.evaluation.flat_tokens import on_flat_tokens
from saelens_cosine.evaluation.not_finite import finite_rows
from saelens_cosine.evaluation.reconstruction import evaluate_reconstruction
from saelens_cosine.rescore import Threshold, fit_threshold

SCALES = (0.5, 2.0, 5.0)
"""The authors' factors."""

PER_TOKEN = ("layer_norm", "constant_norm_rescale")
"""SAELens' `normalize_activations` that take a token's norm out."""

NOISE = (0.5, 2.0)
"""The authors' range of random factors, uniform."""


@dataclass(frozen=True)
class ResponseAtScale:
    """
    Codes of `s * x` beside codes of `x`, on the same tokens. Sizes of codes, for selectors that keep signs.

    Args:
        scale (float): s.
        code_ratio (float): Mean active code at `s * x` by mean active code at `x`, the authors' measure. Features near their threshold come and go with s, which moves it. NaN if there are none at `x` or `s * x`.
        joint_code_ratio (float): The same over codes that are active at both, as sums; NaN if there are none.
        expected_ratio (float): What `joint_code_ratio` is by the exponents a_i alone: `s^a_i` averaged with the weight of feature i's codes at `x`. Exact where b_enc is 0, and b_dec is too or is scaled about. s for standard SAEs, 1 where the input is normalised token by token.
        identical_sets (float): Share of the tokens whose active features are the same at both.
        overlap (float): Active features at both by active features at either, mean over tokens; 1 where there are none at either.
        cosine (float): Mean cosine of a token's codes at both, over tokens with codes at either; 0 for those that lose all or had none. NaN if no token has codes.
        l0 (float): Active features per token at `s * x`.
    """

    scale: float
    code_ratio: float
    joint_code_ratio: float
    expected_ratio: float
    identical_sets: float
    overlap: float
    cosine: float
    l0: float


@dataclass(frozen=True)
class NormResponse:
    """
    How an SAE's codes change with the length of its input.

    Args:
        tokens (int): Tokens measured.
        not_finite (int): Of these, with codes that are NaN or infinite at some scale. With any, that scale's figures are NaN.
        about (str): What stays in place: "zero", for `s * x`, or "b_dec", for `b_dec + s * (x - b_dec)`.
        l0 (float): Active features per token at `x`.
        mean_code (float): Mean size of an active code at `x`, in the SAE's units; NaN if there are none.
        at_scales (tuple[ResponseAtScale, ...]): One for each scale.
    """

    tokens: int
    not_finite: int
    about: str
    l0: float
    mean_code: float
    at_scales: tuple[ResponseAtScale, ...]


@torch.no_grad()
def norm_response(
    sae: SAE[Any],
    activations: torch.Tensor,
    scales: Sequence[float] = SCALES,
    about: Literal["zero", "b_dec"] = "zero",
    on_progress: Callable[[str, int, int], None] | None = None,
) -> NormResponse:
    """Compare codes of scaled activations with those of the activations as they are.

    Args:
        sae: any SAELens SAE; an inference form, or a training form in eval mode.
        activations: `[tokens, d_in]`, as the SAE takes them.
        scales: factors, positive.
        about: "zero" scales activations, as the authors do; an SAE with a long b_dec then sees another direction too. "b_dec"
            scales what the SAE scores, the activations minus b_dec.
        on_progress: called with what is being done, tokens done, and tokens in all.

    Raises:
        ValueError: no activations, a scale that is not positive, `about="b_dec"` with an SAE whose b_dec is in other units than
            the activations, or an SAE that does not take single tokens.
    """
    if about not in ("zero", "b_dec"):
        raise ValueError(f"about={about!r} is neither 'zero' nor 'b_dec'.")
    if about == "b_dec" and sae.cfg.normalize_activations in PER_TOKEN:
        raise ValueError(
            f"about='b_dec' does not go with normalize_activations={sae.cfg.normalize_activations!r}, where b_dec is subtracted "
            "from normalised activations. Use about='zero'."
        )
    if len(activations) == 0 or not all(0 < s < math.inf for s in scales):
        raise ValueError(
            f"{len(activations)} tokens and scales={tuple(scales)}: tokens and positive scales are needed."
        )
    centre = sae.b_dec.detach() if about == "b_dec" else torch.zeros_like(sae.b_dec)
    at_scales = [_ScaledCodes(scale, sae) for scale in scales]
    base = _ScaledCodes(1.0, sae)
    done = 0
    with on_flat_tokens(sae):
        for x in activations.split(max(1, TOKENS_AT_ONCE // sae.cfg.d_sae)):
            if on_progress is not None:
                on_progress("Scaling activations", done, len(activations))
            x = x.to(sae.device)
            codes = sae.encode(x).to_dense().abs()
            base.add(codes, codes)
            for scaled in at_scales:
                scaled.add(codes, sae.encode(centre + scaled.scale * (x - centre)).to_dense().abs())
            done += len(x)
    if on_progress is not None:
        on_progress("Scaling activations", done, len(activations))
    return NormResponse(
        tokens=len(activations),
        not_finite=max(scaled.not_finite for scaled in (base, *at_scales)),
        about=about,
        l0=base.defined(base.active / len(activations)),
        mean_code=base.mean_code,
        at_scales=tuple(scaled.response(base.mean_code) for scaled in at_scales),
    )


def code_exponents(sae: SAE[Any]) -> torch.Tensor:
    """The power of the (centred) input's norm that each feature's code grows with, `[d_sae]` float64.

    The score's exponent; 1 for SAELens' own architectures and where the magnitude bypass gives codes the norm back; 0 where the
    input is normalised token by token.
    """
    cfg: Any = sae.cfg
    if cfg.normalize_activations in PER_TOKEN:
        exponent = torch.zeros(())
    elif getattr(cfg, "restore_output_norm", False) or not hasattr(sae, "score_parameters"):
        exponent = torch.ones(())
    else:
        scored: Any = sae
        exponent = scored.score_parameters().norm_exponent.detach()
    return exponent.double().cpu().expand(cfg.d_sae)


class _ScaledCodes:
    """Running sums of codes at one scale beside those at `x`, in float64 on the CPU."""

    def __init__(self, scale: float, sae: SAE[Any]):
        self.scale = scale
        self.gain = scale ** code_exponents(sae)
        self.tokens, self.with_codes, self.active, self.not_finite = 0, 0, 0, 0
        self.total = self.joint = self.joint_before = self.joint_expected = 0.0
        self.identical = self.overlap = self.cosine = 0.0

    def add(self, before: torch.Tensor, after: torch.Tensor) -> None:
        on_before, on_after = before != 0, after != 0
        both = on_before & on_after
        shared, either = both.sum(dim=-1), (on_before | on_after).sum(dim=-1)
        self.tokens += len(after)
        self.not_finite += int((~finite_rows(before, after)).sum())
        self.active += int(on_after.sum())
        self.total += after.sum(dim=-1).cpu().double().sum().item()
        self.joint += (after * both).sum(dim=-1).cpu().double().sum().item()
        mass = (before * both).sum(dim=0).cpu().double()
        self.joint_before += mass.sum().item()
        self.joint_expected += (mass * self.gain).sum().item()
        self.identical += int((shared == either).sum())
        self.overlap += (shared.cpu().double() / either.cpu()).nan_to_num(1.0).sum().item()
        self.with_codes += int((either > 0).sum())
        self.cosine += torch.nn.functional.cosine_similarity(before, after, dim=-1).cpu().double().sum().item()

    @property
    def mean_code(self) -> float:
        return self.defined(_ratio(self.total, self.active))

    def defined(self, value: float) -> float:
        """The value, NaN where codes are not finite: sets of active features would be those of NaN."""
        return math.nan if self.not_finite else value

    def response(self, mean_code_before: float) -> ResponseAtScale:
        return ResponseAtScale(
            scale=self.scale,
            code_ratio=_ratio(self.mean_code, mean_code_before),
            joint_code_ratio=self.defined(_ratio(self.joint, self.joint_before)),
            expected_ratio=self.defined(_ratio(self.joint_expected, self.joint_before)),
            identical_sets=self.defined(self.identical / self.tokens),
            overlap=self.defined(self.overlap / self.tokens),
            cosine=self.defined(_ratio(self.cosine, self.with_codes)),
            l0=self.defined(self.active / self.tokens),
        )


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else math.nan


@dataclass(frozen=True)
class NoiseFit:
    """
    Reconstruction of clean or noisy activations with one threshold.

    Args:
        fve (float): Fraction of variance explained, the authors' `fve`.
        l0 (float): Active features per token.
        not_finite (int): Tokens with a reconstruction or codes that are not finite; then both are NaN.
    """

    fve: float
    l0: float
    not_finite: int = 0


@dataclass(frozen=True)
class NormNoise:
    """
    Reconstruction when every token's length is multiplied by a random factor.

    Args:
        tokens (int): Tokens measured.
        low (float): Smallest factor.
        high (float): Largest factor; they are uniform between these.
        seed (int): Of the factors.
        clean (NoiseFit): Activations as they are, the SAE as it is.
        noisy (NoiseFit): Activations times their factors, the SAE as it is: its L0 changes too.
        clean_refitted (NoiseFit | None): As `clean`, with one threshold for all features that gives `clean.l0`. It differs from `clean` only where features had thresholds of their own. None for an SAE without thresholds.
        noisy_refitted (NoiseFit | None): As `noisy`, with one threshold that gives `clean.l0` there.
        drop (float): `clean.fve - noisy.fve`, in absolute FVE as in experiment 31.
        drop_refitted (float | None): The same at equal L0, from the refitted ones.
    """

    tokens: int
    low: float
    high: float
    seed: int
    clean: NoiseFit
    noisy: NoiseFit
    clean_refitted: NoiseFit | None
    noisy_refitted: NoiseFit | None
    drop: float
    drop_refitted: float | None


@torch.no_grad()
def norm_noise(
    sae: SAE[Any],
    activations: torch.Tensor,
    low: float = NOISE[0],
    high: float = NOISE[1],
    seed: int = 0,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> NormNoise:
    """Reconstruct activations whose lengths are multiplied by random factors, with the threshold as it is and fitted again.

    A threshold is one number, fitted on the tokens that it is measured on.

    Args:
        sae: any SAELens SAE; an inference form, or a training form in eval mode, which has no threshold to fit. Left alone.
        activations: `[tokens, d_in]`.
        low: smallest factor.
        high: largest.
        seed: of the factors.
        on_progress: called with what is being done, measurements done, and measurements in all.

    Raises:
        ValueError: no activations, factors that are not positive or in the wrong order, or an SAE of another kind.
    """
    if not 0 < low <= high < math.inf:
        raise ValueError(f"low={low}, high={high}: 0 < low <= high is needed.")
    factors = torch.rand(len(activations), 1, generator=torch.Generator().manual_seed(seed)) * (high - low) + low
    kinds = {"clean": activations, "noisy": activations * factors.to(activations)}
    refits = hasattr(sae, "threshold") and not isinstance(sae, TrainingSAE)
    total = 4 if refits else 2
    measured: list[NoiseFit] = []
    for name, x in kinds.items():
        _report(on_progress, f"Reconstructing {name} activations", len(measured), total)
        measured.append(_fit(sae, x))
    clean, noisy = measured
    refitted: list[NoiseFit] = []
    fits = 0 < clean.l0 < sae.cfg.d_sae and not clean.not_finite and not noisy.not_finite
    for name, x in kinds.items() if refits and fits else ():
        _report(on_progress, f"Fitting the threshold to {name} activations", 2 + len(refitted), total)
        refitted.append(_fit(with_threshold_for(sae, x, clean.l0)[0], x))
    _report(on_progress, "Reconstructing noisy activations", total, total)
    return NormNoise(
        tokens=len(activations),
        low=low,
        high=high,
        seed=seed,
        clean=clean,
        noisy=noisy,
        clean_refitted=refitted[0] if refitted else None,
        noisy_refitted=refitted[1] if refitted else None,
        drop=clean.fve - noisy.fve,
        drop_refitted=refitted[0].fve - refitted[1].fve if refitted else None,
    )


def with_threshold_for(sae: SAE[Any], activations: torch.Tensor, target_l0: float) -> tuple[SAE[Any], Threshold]:
    """The SAE with one threshold that gives an L0 on these activations. It shares every tensor but the threshold with `sae`."""
    shared: dict[int, Any] = {id(p): p for name, p in sae.named_parameters() if name != "threshold"}
    refitted = copy.deepcopy(sae, shared)
    with on_flat_tokens(refitted):
        return refitted, fit_threshold(refitted, activations, target_l0)


def _fit(sae: SAE[Any], activations: torch.Tensor) -> NoiseFit:
    measured = evaluate_reconstruction(sae, activations)
    return NoiseFit(measured.fve, measured.l0, measured.not_finite)


def _report(on_progress: Callable[[str, int, int], None] | None, what: str, done: int, total: int) -> None:
    if on_progress is not None:
        on_progress(what, done, total)

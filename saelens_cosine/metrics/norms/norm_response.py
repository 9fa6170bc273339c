"""What the length of an input does to an SAE's codes.

A token x is scaled about a point that stays where it is. About b_dec, `b_dec + s (x - b_dec)`, the length alone of what an SAE
scores changes: this says whether its score depends on norms, and one of exponent 0 keeps its active features exactly. About
zero, `s x`, as in the released code, b_dec does not go along, and what is scored turns: by how much is a matter of
`||b_dec|| / ||x||`, whatever the score. With a b_dec of three quarters of the median norm, sets of active features overlapped at
half the scale by 0.21 (cosine) and 0.30 (inner product) about zero, by 0.86 and 0.27 about b_dec: from the first alone one would
conclude the opposite. An SAE that does not subtract b_dec (`apply_b_dec_to_input=False`) scores x itself: about zero is its own,
and about b_dec, the decoder's bias, turns what it scores. `scores_about` says which.

Source: arXiv 2606.15054, released code.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from sae_lens.saes.sae import SAE

from saelens_cosine.kernels.codes import EntryCodes
from saelens_cosine.metrics.codes import entry_codes, tokens_at_once
from saelens_cosine.metrics.flat_tokens import on_flat_tokens

SCALES = (0.5, 2.0, 5.0)
"""The authors' factors."""

SCALING_NOTE = (
    "About b_dec the length alone of what an SAE scores changes: overlap there says how little its score depends on norms. About 0 "
    "b_dec stays as it is and what is scored turns: overlap there says how long b_dec is beside x. (The other way round for an SAE "
    "that does not subtract b_dec.)"
)
"""For a reader of tables and charts that have both."""

PER_TOKEN = ("layer_norm", "constant_norm_rescale")
"""SAELens' `normalize_activations` that take a token's norm out."""

SCALED_AT_ONCE = 2**22
"""Codes, zeros among them, that are compared at a time, or those of 1,024 tokens: of long inputs nearly every feature may be active."""

About = Literal["zero", "b_dec"]
"""What stays in place: "zero" for `s * x`, "b_dec" for `b_dec + s * (x - b_dec)`."""


@dataclass(frozen=True)
class ResponseAtScale:
    """
    Codes of `s * x` beside codes of `x`, on the same tokens. Sizes of codes, for selectors that keep signs.

    Args:
        scale (float): s.
        code_ratio (float): Mean active code at `s * x` by mean active code at `x`, the authors' measure. Features near their threshold come and go with s, which moves it. NaN if there are none at `x` or `s * x`.
        joint_code_ratio (float): The same over codes that are active at both, as sums; NaN if there are none.
        expected_ratio (float): What `joint_code_ratio` is by the exponents a_i alone: `s^a_i` averaged with the weight of feature i's codes at `x`. Exact where b_enc is 0 and scaling is about what the SAE scores about. s for standard SAEs, 1 where the input is normalised token by token.
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
        scores_about (str | None): About which of these the length alone of what this SAE scores changes, see `scores_about`. About the other one its direction does too.
        bias_ratio (float): `||b_dec|| / median ||x||`, which decides how far it turns; NaN where the SAE normalises token by token.
        l0 (float): Active features per token at `x`.
        mean_code (float): Mean size of an active code at `x`, in the SAE's units; NaN if there are none.
        at_scales (tuple[ResponseAtScale, ...]): One for each scale.
    """

    tokens: int
    not_finite: int
    about: About
    scores_about: About | None
    bias_ratio: float
    l0: float
    mean_code: float
    at_scales: tuple[ResponseAtScale, ...]


@torch.no_grad()
def norm_response(
    sae: SAE[Any], activations: torch.Tensor, scales: Sequence[float] = SCALES, about: About = "zero"
) -> NormResponse:
    """Compare codes of scaled activations with those of the activations as they are.

    Args:
        sae: any SAELens SAE; an inference form, or a training form in eval mode.
        activations: `[tokens, d_in]`, as the SAE takes them.
        scales: factors, positive.
        about: what stays in place. "zero" is the authors' and turns what a centred SAE scores; "b_dec" changes its length alone.

    Raises:
        ValueError: no activations, a scale that is not positive, `about="b_dec"` with an SAE whose b_dec is in other units than
            the activations, or an SAE that does not take single tokens.
    """
    if len(activations) == 0 or not all(0 < s < math.inf for s in scales):
        raise ValueError(
            f"{len(activations)} tokens and scales={tuple(scales)}: tokens and positive scales are needed."
        )
    centre = centre_of(sae, about)
    norms = activations.float().norm(dim=-1).double()
    at_scales = [_ScaledCodes(scale, sae) for scale in scales]
    base = _ScaledCodes(1.0, sae)
    with on_flat_tokens(sae):
        for x in activations.split(min(max(1024, SCALED_AT_ONCE // sae.cfg.d_sae), tokens_at_once(sae, activations))):
            x = x.to(sae.device)
            codes = entry_codes(sae, x)
            base.add(codes, codes)
            for scaled in at_scales:
                scaled.add(codes, entry_codes(sae, centre + scaled.scale * (x - centre)))
    return NormResponse(
        tokens=len(activations),
        not_finite=max(scaled.not_finite for scaled in (base, *at_scales)),
        about=about,
        scores_about=scores_about(sae),
        bias_ratio=math.nan
        if scores_about(sae) is None
        else _ratio(sae.b_dec.detach().double().norm().item(), norms.quantile(0.5).item()),
        l0=base.defined(base.active / len(activations)),
        mean_code=base.mean_code,
        at_scales=tuple(scaled.response(base.mean_code) for scaled in at_scales),
    )


def scores_about(sae: SAE[Any]) -> About | None:
    """What must stay in place for the length alone of what an SAE scores to change.

    "b_dec", which is subtracted first; "zero" with `apply_b_dec_to_input=False`; None where the input is normalised token by token
    and its length is not seen at all.
    """
    if sae.cfg.normalize_activations in PER_TOKEN:
        return None
    return "b_dec" if sae.cfg.apply_b_dec_to_input else "zero"


def centre_of(sae: SAE[Any], about: About) -> torch.Tensor:
    """`[d_in]`, what stays in place.

    Raises:
        ValueError: an `about` of another name, or "b_dec" with an SAE whose b_dec is in other units than its activations.
    """
    if about == "zero":
        return torch.zeros_like(sae.b_dec)
    if about != "b_dec":
        raise ValueError(f"about={about!r} is neither 'zero' nor 'b_dec'.")
    if sae.cfg.normalize_activations in PER_TOKEN:
        raise ValueError(
            f"about='b_dec' does not go with normalize_activations={sae.cfg.normalize_activations!r}, where b_dec is subtracted "
            "from normalised activations. Use about='zero'."
        )
    return sae.b_dec.detach()


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

    def add(self, before: EntryCodes, after: EntryCodes) -> None:
        (token, place, size), (token_after, place_after, size_after) = map(_sizes, (before, after))
        n = len(before)
        at = torch.searchsorted(place_after, place).clamp_max(max(0, len(place_after) - 1))
        both = place_after[at] == place if len(place_after) else torch.zeros_like(place, dtype=torch.bool)
        joint, joint_before = size_after[at[both]], size[both]

        def by_token(of: torch.Tensor, values: torch.Tensor | None = None) -> torch.Tensor:
            return torch.bincount(of, values, minlength=n)

        shared = by_token(token[both])
        either = by_token(token) + by_token(token_after) - shared
        wrong = by_token(torch.cat([token[~size.isfinite()], token_after[~size_after.isfinite()]]))
        self.tokens += n
        self.not_finite += int((wrong > 0).sum())
        self.active += len(place_after)
        self.total += size_after.sum().item()
        self.joint += joint.sum().item()
        self.joint_before += joint_before.sum().item()
        self.joint_expected += (joint_before * self.gain[before.entries.features.cpu()[both]]).sum().item()
        self.identical += int((shared == either).sum())
        self.overlap += (shared.double() / either).nan_to_num(1.0).sum().item()
        self.with_codes += int((either > 0).sum())
        lengths = (by_token(token, size.square()) * by_token(token_after, size_after.square())).sqrt()
        self.cosine += (by_token(token[both], joint_before * joint) / lengths)[lengths != 0].sum().item()

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


def _sizes(codes: EntryCodes) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, flat places, ascending, and sizes of the entries, `[N]` each, int64, int64 and float64 on the CPU."""
    tokens, features = codes.entries.tokens.cpu(), codes.entries.features.cpu()
    return tokens, tokens * codes.entries.d_sae + features, codes.values.cpu().double().abs()


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else math.nan

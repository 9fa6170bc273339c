"""What random lengths of the inputs do to an SAE's reconstructions.

Source: arXiv 2606.15054, experiment 31. There SAEs are trained with noise and measured without; here one trained SAE is measured
with and without, each at the same L0 too. `norm_response` says what scaling about zero and about b_dec tells.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from sae_lens.saes.sae import SAE, TrainingSAE

from saelens_cosine.metrics.norms.norm_response import About, centre_of
from saelens_cosine.metrics.reconstruction.by_norm import evaluate_reconstruction
from saelens_cosine.metrics.threshold import Threshold, fit_threshold

NOISE = (0.5, 2.0)
"""The authors' range of random factors, uniform."""


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
    Reconstruction when every token is scaled by a random factor.

    Args:
        tokens (int): Tokens measured.
        about (str): What stays in place, as in `NormResponse`. About "zero" the loss is that of tokens that turn as seen from b_dec, too.
        low (float): Smallest factor.
        high (float): Largest factor; they are uniform between these.
        seed (int): Of the factors.
        clean (NoiseFit): Activations as they are, the SAE as it is.
        noisy (NoiseFit): Activations scaled by their factors, the SAE as it is: its L0 changes too.
        clean_refitted (NoiseFit | None): As `clean`, with one threshold for all features that gives `clean.l0`. It differs from `clean` only where features had thresholds of their own. None for an SAE without thresholds.
        noisy_refitted (NoiseFit | None): As `noisy`, with one threshold that gives `clean.l0` there.
        drop (float): `clean.fve - noisy.fve`, in absolute FVE as in experiment 31.
        drop_refitted (float | None): The same at equal L0, from the refitted ones.
    """

    tokens: int
    about: About
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
    about: About = "zero",
    clean_of: NormNoise | None = None,
) -> NormNoise:
    """Reconstruct activations that are scaled by random factors, with the threshold as it is and fitted again.

    A threshold is one number, fitted on the tokens that it is measured on.

    Args:
        sae: any SAELens SAE; an inference form, or a training form in eval mode, which has no threshold to fit. Left alone.
        activations: `[tokens, d_in]`.
        low: smallest factor.
        high: largest.
        seed: of the factors.
        about: what stays in place, as in `norm_response`.
        clean_of: what was found of this SAE on these activations before: what does not depend on factors is taken from there.

    Raises:
        ValueError: no activations, factors that are not positive or in the wrong order, `about="b_dec"` as in `norm_response`, or
            an SAE of another kind.
    """
    if not 0 < low <= high < math.inf:
        raise ValueError(f"low={low}, high={high}: 0 < low <= high is needed.")
    factors = torch.rand(len(activations), 1, generator=torch.Generator().manual_seed(seed)) * (high - low) + low
    centre = centre_of(sae, about).to(activations)
    scaled = centre + (activations - centre) * factors.to(activations)
    refits = hasattr(sae, "threshold") and not isinstance(sae, TrainingSAE)
    clean, noisy = clean_of.clean if clean_of else _fit(sae, activations), _fit(sae, scaled)
    fits = 0 < clean.l0 < sae.cfg.d_sae and not clean.not_finite and not noisy.not_finite
    clean_refitted = noisy_refitted = None
    if refits and fits:
        known = clean_of.clean_refitted if clean_of else None
        clean_refitted = known or _refit(sae, activations, clean.l0)
        noisy_refitted = _refit(sae, scaled, clean.l0)
    return NormNoise(
        tokens=len(activations),
        about=about,
        low=low,
        high=high,
        seed=seed,
        clean=clean,
        noisy=noisy,
        clean_refitted=clean_refitted,
        noisy_refitted=noisy_refitted,
        drop=clean.fve - noisy.fve,
        drop_refitted=clean_refitted.fve - noisy_refitted.fve if clean_refitted and noisy_refitted else None,
    )


def with_threshold_for(sae: SAE[Any], activations: torch.Tensor, target_l0: float) -> tuple[SAE[Any], Threshold]:
    """The SAE with one threshold that gives an L0 on these activations. It shares every tensor but the threshold with `sae`."""
    shared: dict[int, Any] = {id(p): p for name, p in sae.named_parameters() if name != "threshold"}
    refitted = copy.deepcopy(sae, shared)
    return refitted, fit_threshold(refitted, activations, target_l0)


def _fit(sae: SAE[Any], activations: torch.Tensor) -> NoiseFit:
    measured = evaluate_reconstruction(sae, activations)
    return NoiseFit(measured.fve, measured.l0, measured.not_finite)


def _refit(sae: SAE[Any], activations: torch.Tensor, target_l0: float) -> NoiseFit:
    return _fit(with_threshold_for(sae, activations, target_l0)[0], activations)

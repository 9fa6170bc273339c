"""AFA and epsilon-LBO: does the norm of an SAE's features match the norm of what it reads?

Source: "Evaluating and Designing Sparse Autoencoders by Approximating Quasi-Orthogonality" (arXiv 2503.24277) and its released
code. If a vector is a combination of nearly orthogonal unit directions, its norm, AFA, is nearly that of its coefficients. For
directions with cosines within +-eps,

    | ||z||^2 - ||f||^2 |  <=  eps (||f||_1^2 - ||f||^2)  <=  eps (K - 1) ||f||^2  <=  eps (h - 1) ||f||^2

with K of the h coefficients f not 0. Solved for eps, each is a lower bound of the largest cosine between directions if f adds up
to z; with an SAE's input for z it also counts what the SAE does not reconstruct. The paper's epsilon-LBO is the last form. It is
far below any real dictionary's largest cosine and depends on h, so the scale-free value eps (h - 1) stands beside it.

A value depends on `||f|| / ||z||` alone: too small a ratio costs without bound, too large a one 1 at most, and scaling the codes
makes it 0 for any SAE. It says nothing of an SAE that is trained to match norms, as `top_afa` is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from sae_lens.saes.sae import SAE

from saelens_cosine.metrics.codes import code_units, reconstruct, tokens_at_once
from saelens_cosine.metrics.flat_tokens import on_flat_tokens
from saelens_cosine.metrics.not_finite import finite_rows
from saelens_cosine.score import wide

AFAReference = Literal["input", "reconstruction"]
"""What z is: the SAE's input, as in the paper, or its reconstruction, which the coefficients add up to exactly."""

Bias = Literal["augment", "center", "ignore"]
"""What b_dec is: one more direction with its norm as coefficient, as in the paper; subtracted from z, as top-AFA selects; nothing."""

MEASURED_AT_ONCE = 2**21
"""Numbers of inputs and of reconstructions that are held in float64, or those of 1,024 tokens."""

WINSORISED_AT = 0.99
"""Values above this quantile count as that quantile in `winsorised_mean`, as in the paper's plots."""


def afa(x: torch.Tensor) -> torch.Tensor:
    """Approximate feature activation, `||x||`: `[..., d_in] -> [...]`, float32 or wider. It needs no SAE."""
    return torch.linalg.vector_norm(x, dim=-1, dtype=wide(x.dtype))


@dataclass(frozen=True)
class AFATokens:
    """
    Norms of tokens and of their features, in the space that the decoder writes to. Tensors, float64 on the CPU.

    Args:
        afa (torch.Tensor): `[tokens]`, `||z||`.
        feature_norm (torch.Tensor): `[tokens]`, `||f||`, f the coefficients on unit decoder directions and, with `bias="augment"`, `||b_dec||`.
        l1 (torch.Tensor): `[tokens]`, `||f||_1`.
        active (torch.Tensor): `[tokens]`, K: entries of f that are not 0.
        normalized_mse (torch.Tensor): `[tokens]`, `||x - x_hat||^2 / ||x||^2`; NaN where x is 0.
        finite (torch.Tensor): `[tokens]` booleans, False where the token, its codes or its reconstruction are NaN or infinite.
        d_sae (int): h.
        bias_norm (float): `||b_dec||`. With `bias="augment"` no feature norm is below it.
        reference (AFAReference): What z is.
        bias (Bias): What b_dec is.
    """

    afa: torch.Tensor
    feature_norm: torch.Tensor
    l1: torch.Tensor
    active: torch.Tensor
    normalized_mse: torch.Tensor
    finite: torch.Tensor
    d_sae: int
    bias_norm: float
    reference: AFAReference
    bias: Bias

    @property
    def scale_free(self) -> torch.Tensor:
        """`[tokens]`, eps (h - 1) = `| ||z||^2 / ||f||^2 - 1 |`; NaN where f is 0."""
        return torch.where(self.feature_norm > 0, (self.afa / self.feature_norm).square() - 1, torch.nan).abs()

    @property
    def epsilon_lbo(self) -> torch.Tensor:
        """`[tokens]`, the paper's `| ||z||^2 - ||f||^2 | / ((h - 1) ||f||^2)`; NaN where f is 0."""
        return _divide(self.scale_free, torch.full_like(self.afa, self.d_sae - 1))

    @property
    def epsilon_active(self) -> torch.Tensor:
        """`[tokens]`, with K - 1 for h - 1; NaN where K is less than 2."""
        return _divide(self.scale_free, self.active - 1)

    @property
    def epsilon_l1(self) -> torch.Tensor:
        """`[tokens]`, `| ||z||^2 - ||f||^2 | / (||f||_1^2 - ||f||^2)`, the tightest; NaN where K is less than 2."""
        pairs = self.l1.square() - self.feature_norm.square()
        gap = (self.afa.square() - self.feature_norm.square()).abs()
        return _divide(gap, torch.where(self.active >= 2, pairs, 0))

    @property
    def signed_gap(self) -> torch.Tensor:
        """`[tokens]`, `(||f|| - ||z||) / ||z||`: negative where the features fall short; NaN where z is 0."""
        return _divide(self.feature_norm - self.afa, self.afa)


@dataclass(frozen=True)
class Distribution:
    """
    Values over tokens.

    Args:
        tokens (int): Tokens that have a value.
        undefined (int): Tokens that have none and are left out.
        lower_quartile (float): 25 % are below. This and what follows: NaN if no token has a value.
        median (float): Half are below.
        upper_quartile (float): 75 % are below.
        percentile_99 (float): 99 % are below.
        winsorised_mean (float): Mean with values above `percentile_99` set to it.
    """

    tokens: int
    undefined: int
    lower_quartile: float
    median: float
    upper_quartile: float
    percentile_99: float
    winsorised_mean: float


@dataclass(frozen=True)
class AFADistributions:
    """
    Norms of tokens beside norms of their features (arXiv 2503.24277). The paper compares distributions, not means.

    Args:
        tokens (int): Tokens measured.
        not_finite (int): Of these, with codes, a reconstruction or an activation that are not finite. With any, nothing below is known, and all is NaN.
        d_sae (int): h.
        reference (str): What z is: "input" (the paper) or "reconstruction".
        bias (str): What b_dec is: "augment" (the paper), "center" or "ignore".
        bias_norm (float): `||b_dec||`, which no feature norm is below with "augment".
        without_features (int): Tokens with f = 0, which have no epsilon.
        share_below (float): Share of the tokens with `||f|| < ||z||`, under-activated in the paper's words.
        afa (Distribution): `||z||`.
        feature_norm (Distribution): `||f||`.
        signed_gap (Distribution): `(||f|| - ||z||) / ||z||`.
        scale_free (Distribution): eps (h - 1) = `| ||z||^2 / ||f||^2 - 1 |`, comparable between dictionaries of any size.
        epsilon_lbo (Distribution): The paper's eps, with h - 1.
        epsilon_active (Distribution): With K - 1 in place of h - 1, K the entries of f that are not 0.
        epsilon_l1 (Distribution): With `||f||_1^2 / ||f||^2 - 1` in place of h - 1, the tightest.
        normalized_mse (Distribution): `||x - x_hat||^2 / ||x||^2`, the paper's companion measure.
    """

    tokens: int
    not_finite: int
    d_sae: int
    reference: str
    bias: str
    bias_norm: float
    without_features: int
    share_below: float
    afa: Distribution
    feature_norm: Distribution
    signed_gap: Distribution
    scale_free: Distribution
    epsilon_lbo: Distribution
    epsilon_active: Distribution
    epsilon_l1: Distribution
    normalized_mse: Distribution


@torch.no_grad()
def measure_afa(
    sae: SAE[Any], activations: torch.Tensor, reference: AFAReference = "input", bias: Bias = "augment"
) -> AFATokens:
    """Norms of `activations [tokens, d_in]` and of their features, token by token.

    The paper takes the last token of each of 1,000 contexts: `sample.where(sample.positions == sample.positions.max())`. If
    the SAE normalises its input, z is the normalised one, which is what its decoder writes.

    Args:
        sae: any SAELens SAE; an inference form, or a training form in eval mode. Not a transcoder.
        activations: as the SAE takes them, heads flattened.
        reference: what z is.
        bias: what b_dec is.

    Raises:
        ValueError: no activations, a reference or bias of another name, or an SAE of another kind (see `on_flat_tokens`).
    """
    if reference not in ("input", "reconstruction"):
        raise ValueError(f"reference={reference!r} is neither 'input' nor 'reconstruction'.")
    if bias not in ("augment", "center", "ignore"):
        raise ValueError(f"bias={bias!r} is none of 'augment', 'center', 'ignore'.")
    if len(activations) == 0:
        raise ValueError("There are no tokens to measure on.")
    b_dec = sae.b_dec.detach().cpu().double()
    bias_norm = b_dec.norm().item()
    parts: list[torch.Tensor] = []
    with on_flat_tokens(sae):
        for chunk in activations.split(
            min(max(1024, MEASURED_AT_ONCE // sae.cfg.d_in), tokens_at_once(sae, activations))
        ):
            x, x_hat, f = _in_decoder_space(sae, chunk.to(sae.device))
            z = x if reference == "input" else x_hat
            z = z - b_dec if bias == "center" else z
            mse = (x - x_hat).square().sum(dim=-1) / x.square().sum(dim=-1)
            finite = finite_rows(x, x_hat, f).double()
            parts.append(torch.cat([z.norm(dim=-1, keepdim=True), f, torch.stack([mse, finite], dim=-1)], dim=-1))
    z_norm, squares, l1, active, mse, finite = torch.cat(parts).T
    if bias == "augment" and bias_norm > 0:
        squares, l1, active = squares + bias_norm**2, l1 + bias_norm, active + 1
    mse = torch.where(mse.isfinite(), mse, torch.nan)
    return AFATokens(z_norm, squares.sqrt(), l1, active, mse, finite > 0, sae.cfg.d_sae, bias_norm, reference, bias)


def summarize_afa(tokens: AFATokens) -> AFADistributions:
    """Distributions of `measure_afa`'s values."""
    not_finite = int((~tokens.finite).sum())
    if not_finite:  # quantiles of the rest would be those of another SAE
        nothing = torch.full_like(tokens.afa, torch.nan)
        tokens = replace(tokens, afa=nothing, feature_norm=nothing, l1=nothing, normalized_mse=nothing)
    return AFADistributions(
        tokens=len(tokens.afa),
        not_finite=not_finite,
        d_sae=tokens.d_sae,
        reference=tokens.reference,
        bias=tokens.bias,
        bias_norm=tokens.bias_norm,
        without_features=int((tokens.feature_norm == 0).sum()),
        share_below=math.nan if not_finite else (tokens.feature_norm < tokens.afa).double().mean().item(),
        afa=distribution(tokens.afa),
        feature_norm=distribution(tokens.feature_norm),
        signed_gap=distribution(tokens.signed_gap),
        scale_free=distribution(tokens.scale_free),
        epsilon_lbo=distribution(tokens.epsilon_lbo),
        epsilon_active=distribution(tokens.epsilon_active),
        epsilon_l1=distribution(tokens.epsilon_l1),
        normalized_mse=distribution(tokens.normalized_mse),
    )


def distribution(values: torch.Tensor) -> Distribution:
    """Quantiles of the values `[tokens]` that are not NaN."""
    defined = values[~values.isnan()].double()
    if len(defined) == 0:
        return Distribution(0, len(values), *[float("nan")] * 5)
    levels = torch.tensor([0.25, 0.5, 0.75, WINSORISED_AT], dtype=torch.float64)
    low, median, high, top = torch.quantile(defined, levels).tolist()
    winsorised = defined.clamp_max(top).mean().item()
    return Distribution(len(defined), len(values) - len(defined), low, median, high, top, winsorised)


def _in_decoder_space(sae: SAE[Any], x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Inputs and reconstructions `[tokens, d_in]` as the decoder writes them, and of the coefficients on unit directions
    `[tokens, 3]`: sum of squares, sum of sizes, how many are not 0. Float64 on the CPU."""
    normalised = sae.run_time_activation_norm_fn_in(x.float())
    seen: list[torch.Tensor] = []
    with sae.hooks(fwd_hooks=[("hook_sae_recons", lambda out, hook: seen.append(out))]):  # noqa: ARG005
        codes, _ = reconstruct(sae, x)
    coefficients = codes.values.cpu().double() * code_units(sae)[codes.entries.features.cpu()]
    sums = torch.zeros(len(x), 3, dtype=torch.float64)
    terms = [coefficients.square(), coefficients.abs(), (coefficients != 0).double()]
    sums.index_add_(0, codes.entries.tokens.cpu(), torch.stack(terms, dim=-1))
    return normalised.cpu().double(), seen[0].cpu().double(), sums


def _divide(values: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
    return torch.where(by > 0, values / by, torch.nan)

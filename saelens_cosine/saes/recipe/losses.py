"""Reconstruction losses beside SAELens' squared error, as a function that SAELens calls in its place.

Source: the released code of arXiv 2606.15054. Cosine loss: experiments 10 and 12; post-norm loss: 14, 18 and 22; its
mixture with the squared error: 21; token weights: 59.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from sae_lens.saes.sae import mse_loss
from torch.nn import functional as F

from saelens_cosine.saes.choices import check_choices
from saelens_cosine.score import NORM_FLOOR, centred_norm, wide

TokenWeighting = Literal["none", "inverse_norm", "inverse_squared_norm"]
"""What each token's squared error is divided by: nothing, its centred norm, or that norm squared."""


def squared_error(x_hat: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """`||x - x_hat||^2` of each token, float32 or wider: `[..., d_in] -> [...]`, in squared units of the activations."""
    return (_wide(x) - _wide(x_hat)).pow(2).sum(dim=-1)


def cosine_loss(x_hat: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """`1 - cos(x, x_hat)` of each token, float32 or wider: `[..., d_in] -> [...]`, between 0 and 2.

    Of the activations as they are, not centred by `b_dec` (experiments 10 and 12; 39 centres). 1 where either is zero.
    It says nothing about the length of `x_hat`.
    """
    return 1 - F.cosine_similarity(_wide(x), _wide(x_hat), dim=-1, eps=NORM_FLOOR)


def rms_norm(x: torch.Tensor, gain: torch.Tensor, eps: float) -> torch.Tensor:
    """`R(x) = gain * x * (mean_j x_j^2 + eps)^(-1/2)`, float32 or wider: `[..., d_in] -> [..., d_in]`."""
    x = _wide(x)
    return gain * x * (x.pow(2).mean(dim=-1, keepdim=True) + eps).rsqrt()


def post_norm_loss(x_hat: torch.Tensor, x: torch.Tensor, gain: torch.Tensor, eps: float) -> torch.Tensor:
    """`||R(x) - R(x_hat)||^2` of each token: the squared error where the next RMS norm of the model has been.

    Args:
        x_hat: `[..., d_in]`.
        x: `[..., d_in]`.
        gain: `[d_in]`, of that norm (`saelens_cosine.training.next_norm` reads it from a model).
        eps: of that norm.

    Returns:
        `[...]`, float32 or wider. Up to eps it does not see the length of `x_hat`.
    """
    return squared_error(rms_norm(x_hat, gain, eps), rms_norm(x, gain, eps))


def token_weights(x: torch.Tensor, b_dec: torch.Tensor, weighting: TokenWeighting) -> torch.Tensor:
    """Weights of mean 1 over all tokens of a batch, float32 or wider: `[..., d_in] -> [...]`. They carry no gradient.

    A token at `b_dec` has norm `NORM_FLOOR` here and outweighs every other.
    """
    power = get_args(TokenWeighting).index(weighting)
    x_centered = _wide(x.detach()) - b_dec.detach()
    weights = centred_norm(x_centered).squeeze(-1).pow(-power)
    return weights / weights.mean()


@dataclass(frozen=True)
class ReconstructionLoss:
    """
    A weighted sum of squared error, cosine loss and post-norm loss.

    Args:
        mse_weight (float): Weight of the squared error.
        cosine_weight (float): Weight of the cosine loss.
        post_norm_weight (float): Weight of the post-norm loss.
        token_weighting (TokenWeighting): Divide each token's squared error by its centred norm, or by that squared. The two other terms do not grow with the norm and are left alone.
        post_norm_eps (float): eps of the next norm; the paper's model has 1e-6.

    Raises:
        ValueError: a weight is negative or not finite, all are 0, or an option has nothing to act on.
    """

    mse_weight: float = 1.0
    cosine_weight: float = 0.0
    post_norm_weight: float = 0.0
    token_weighting: TokenWeighting = "none"
    post_norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        check_choices(self)
        weights = {name: getattr(self, name) for name in ("mse_weight", "cosine_weight", "post_norm_weight")}
        for name, weight in weights.items():
            if not (math.isfinite(weight) and weight >= 0):
                raise ValueError(f"{name}={weight} must be a finite number, 0 or above.")
        if not any(weights.values()):
            raise ValueError(f"{', '.join(weights)} are all 0, which leaves nothing to learn from; give one a weight.")
        if self.token_weighting != "none" and self.mse_weight == 0:
            raise ValueError(
                f"token_weighting={self.token_weighting!r} weights the squared error, which mse_weight=0 leaves out; "
                "set token_weighting='none' or a mse_weight."
            )
        if not self.post_norm_eps > 0:
            raise ValueError(f"post_norm_eps={self.post_norm_eps} must be positive, as the next norm's is.")

    @property
    def is_mse(self) -> bool:
        """Whether this is SAELens' own loss."""
        return self == ReconstructionLoss(post_norm_eps=self.post_norm_eps)

    def per_token(
        self, sae_out: torch.Tensor, sae_in: torch.Tensor, b_dec: torch.Tensor, gain: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Loss of each token, float32 or wider: `[..., d_in] -> [...]`. Arguments as in `__call__`."""
        total = torch.zeros((), dtype=wide(sae_in.dtype), device=sae_in.device)
        if self.mse_weight:
            error = squared_error(sae_out, sae_in)
            if self.token_weighting != "none":
                error = error * token_weights(sae_in, b_dec, self.token_weighting)
            total = total + self.mse_weight * error
        if self.cosine_weight:
            total = total + self.cosine_weight * cosine_loss(sae_out, sae_in)
        if self.post_norm_weight:
            if gain is None:
                raise ValueError(
                    f"post_norm_weight={self.post_norm_weight} needs the gain of the norm after the hook; read it from the "
                    "model with saelens_cosine.training.next_norm.next_norm(model, hook_name)."
                )
            total = total + self.post_norm_weight * post_norm_loss(sae_out, sae_in, gain, self.post_norm_eps)
        return total

    def __call__(
        self, sae_out: torch.Tensor, sae_in: torch.Tensor, b_dec: torch.Tensor, gain: torch.Tensor | None = None
    ) -> torch.Tensor:
        """What SAELens' `mse_loss_fn` returns: summed over the last dimension and averaged over tokens, it is the loss.

        Args:
            sae_out: `[tokens, d_in]`, the reconstruction.
            sae_in: `[tokens, d_in]`, the activations.
            b_dec: `[d_in]`, the centre that token weights measure norms from.
            gain: `[d_in]`, needed for the post-norm loss only.

        Returns:
            `[tokens, d_in]`. SAELens' `mse_loss` itself for the squared error alone; otherwise each token's loss, spread
            evenly over its dimensions.

        Raises:
            ValueError: post_norm_weight is set and there is no gain.
        """
        if self.is_mse:
            return mse_loss(sae_out, sae_in)
        d_in = sae_in.shape[-1]
        per_token = self.per_token(sae_out, sae_in, b_dec, gain)
        return (per_token / d_in).unsqueeze(-1).expand(*sae_in.shape)


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x.to(wide(x.dtype))

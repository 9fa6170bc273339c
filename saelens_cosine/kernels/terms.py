"""A score by what makes it of the encoder's product, entry by entry."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class ScoreTerms:
    """
    A score whose entries can be computed one by one from `<u_b, w_i>`, the product of unit input and encoder column:

        pre_bi = exp(a_i log n_b + c_i) * gain_i * <u_b, w_i> + bias_i

    Args:
        norm_exponent (torch.Tensor): a, `[]` or `[F]`, float32 or wider.
        log_scale (torch.Tensor): c, `[]` or `[F]`.
        gain (torch.Tensor): positive factor per feature `[F]`: 1 / ||w_i|| where the score is by direction.
        bias (torch.Tensor): `[F]`.
        signed (bool): Whether a score counts by its size, whatever its sign, instead of rectified.
    """

    norm_exponent: torch.Tensor
    log_scale: torch.Tensor
    gain: torch.Tensor
    bias: torch.Tensor
    signed: bool = False

    def factor(self, log_norm: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """`exp(a log n + c) * gain` of entries, all arguments and the result `[N]`."""
        exponent = _at(self.norm_exponent, features) * log_norm + _at(self.log_scale, features)
        return exponent.exp() * self.gain.index_select(0, features)


def _at(parameter: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    return parameter if parameter.ndim == 0 else parameter.index_select(0, features)

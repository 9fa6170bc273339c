"""The cosine score: the one definition that everything else in this package is tested against.

    x_c   = x - b_dec                                    centred input
    n     = max(||x_c||, 1e-8)
    cos_i = <x_c / n, w_i / ||w_i||>                     w_i is column i of W_enc
    pre_i = exp(a_i * log n + b_i) * cos_i + b_enc_i     a: norm_exponent, b: log_scale

`a = 0` scores by cosine, `a = 1, b = 0` by inner product with unit encoder rows. Source: "Size Doesn't Matter:
Cosine-Scored Sparse Autoencoders" (arXiv 2606.15054), the global and the per-feature adaptive encoders.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

NORM_FLOOR = 1e-8
"""Smallest norm that is told apart from zero; keeps the score and its gradients finite at `x = b_dec`."""


class ScoreParameters(NamedTuple):
    """
    A score as a choice of parameters, which is all that the fast path (`saelens_cosine.kernels`) needs to know of it.

    Args:
        norm_exponent (torch.Tensor): a, `[]` or `[d_sae]`; 1 for an inner product.
        log_scale (torch.Tensor): b, `[]` or `[d_sae]`; 0 where columns carry the scale.
        unit_columns (bool): Whether encoder columns count by their direction alone.
    """

    norm_exponent: torch.Tensor
    log_scale: torch.Tensor
    unit_columns: bool


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype that norms, exponents, scales and thresholds are kept in: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def centred_norm(x_centered: torch.Tensor) -> torch.Tensor:
    """Norm of each centred input, float32 or wider: `[..., d_in] -> [..., 1]`, never below `NORM_FLOOR`."""
    x_centered = x_centered.to(wide(x_centered.dtype))
    return x_centered.norm(dim=-1, keepdim=True).clamp_min(NORM_FLOOR)


def multiplies_in_float16(weights: torch.Tensor) -> bool:
    """Whether a product with these weights is made in float16, by their own dtype or by autocast.

    There the product of an activation of norm 1,000 and a column of length 1,000 is out of range (65,504), so inputs are
    divided by their norms before it instead of after. bfloat16 has float32's range.
    """
    device = weights.device.type
    if (
        device != "meta" and weights.dtype != torch.float64 and torch.is_autocast_enabled(device)
    ):  # leaves float64 alone
        return torch.get_autocast_dtype(device) == torch.float16
    return weights.dtype == torch.float16


def cosine_score(
    x_centered: torch.Tensor,
    W_enc: torch.Tensor,
    b_enc: torch.Tensor,
    norm_exponent: torch.Tensor,
    log_scale: torch.Tensor,
) -> torch.Tensor:
    """Pre-activations of a cosine-scored SAE, training form.

    Args:
        x_centered: `[..., d_in]`, the input after `b_dec` is subtracted.
        W_enc: `[d_in, d_sae]`. Only the direction of each column matters.
        b_enc: `[d_sae]`, added outside the scale.
        norm_exponent: `a`, `[]` or `[d_sae]`.
        log_scale: `b`, `[]` or `[d_sae]`.

    Returns:
        `[..., d_sae]` in the dtype of `x_centered`. Norm, exponent and scale are computed in float32 or wider.
    """
    norm = centred_norm(x_centered)
    direction = (x_centered / norm).to(W_enc.dtype)
    column_norm = W_enc.to(wide(W_enc.dtype)).norm(dim=0).clamp_min(NORM_FLOOR)
    cosine = (direction @ W_enc) / column_norm
    scale = torch.exp(norm_exponent * norm.log() + log_scale)
    return (scale * cosine + b_enc).to(x_centered.dtype)


def folded_score(
    x_centered: torch.Tensor,
    W_enc: torch.Tensor,
    b_enc: torch.Tensor,
    norm_exponent: torch.Tensor,
    norm: torch.Tensor | None = None,
) -> torch.Tensor:
    """The same pre-activations from the inference form, `n^(a_i - 1) * <x_c, W_enc column i> + b_enc_i`.

    Here column i of `W_enc` is `exp(b_i) * w_i / ||w_i||` (`fold_scale` makes it), so nothing is normalised at inference
    and the columns' lengths mean what they mean in any other SAE. At `a = 1` this is the inner-product score, bit for bit but
    in float16, where it is `n^a_i * <x_c / n, W_enc column i> + b_enc_i` (`multiplies_in_float16`).

    Args and result: as in `cosine_score`; `norm` is `centred_norm(x_centered)`, for a caller that has it already.
    """
    norm = centred_norm(x_centered) if norm is None else norm
    if multiplies_in_float16(W_enc):
        exponent, operand = norm_exponent * norm.log(), x_centered / norm
    else:
        exponent, operand = (norm_exponent - 1) * norm.log(), x_centered
    product = operand.to(W_enc.dtype) @ W_enc
    if not torch.is_grad_enabled() and product.dtype == exponent.dtype == x_centered.dtype == b_enc.dtype:
        return product.mul_(exponent.exp_()).add_(b_enc)  # the same, in place
    gain = torch.exp(exponent)
    return (gain * product + b_enc).to(x_centered.dtype)


def fold_scale(W_enc: torch.Tensor, log_scale: torch.Tensor) -> torch.Tensor:
    """`W_enc` of the inference form: `[d_in, d_sae]` columns of length `exp(log_scale)`, in the dtype of `W_enc`."""
    columns = W_enc.to(wide(W_enc.dtype))
    return (columns * (log_scale.exp() / columns.norm(dim=0).clamp_min(NORM_FLOOR))).to(W_enc.dtype)

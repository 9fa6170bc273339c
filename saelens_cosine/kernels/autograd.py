"""Scores and reconstructions of the active entries alone, with gradients made from these entries.

`kernels/README.md` derives the formulas. Everything costs O(N D) for N active entries, save two passes over the encoder.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from typing_extensions import override

from saelens_cosine.kernels import operations
from saelens_cosine.kernels.entries import Entries
from saelens_cosine.score import NORM_FLOOR


@dataclass(frozen=True)
class ScoredBatch:
    """
    What the selection has computed already and the gradients need again; none of it carries gradients.

    Args:
        entries (Entries): the active ones.
        product (torch.Tensor): `[N]`, `<u_b, w_i>`.
        factor (torch.Tensor): `[N]`, what the score multiplies it with.
        unit (torch.Tensor): `[B, D]`, centred inputs at length 1.
        log_norm (torch.Tensor): `[B]`.
        inverse_square (torch.Tensor | None): `[F]`, 1 / ||w_i||^2 where the score is by direction, else None.
        signed (bool): Whether codes keep the sign of their scores.
    """

    entries: Entries
    product: torch.Tensor
    factor: torch.Tensor
    unit: torch.Tensor
    log_norm: torch.Tensor
    inverse_square: torch.Tensor | None
    signed: bool


class EntryScores(torch.autograd.Function):
    """`exp(a_i log n_b + c_i) gain_i <u_b, w_i> + bias_i` at the active entries, `[N]`, rectified unless signed."""

    @override
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        b_dec: torch.Tensor | None,
        W_enc: torch.Tensor,
        b_enc: torch.Tensor,
        norm_exponent: torch.Tensor,
        log_scale: torch.Tensor,
        batch: ScoredBatch,
    ) -> torch.Tensor:
        values = batch.factor * batch.product + b_enc.index_select(0, batch.entries.features)
        if not batch.signed:
            values.relu_()
        ctx.save_for_backward(W_enc, norm_exponent, log_scale, values)
        ctx.batch = batch
        return values

    @override
    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        W_enc, norm_exponent, log_scale, values = ctx.saved_tensors
        batch: ScoredBatch = ctx.batch
        gradient = gradients[0] if batch.signed else gradients[0] * (values > 0)
        entries, unit = batch.entries, batch.unit
        needs_x, needs_b_dec, needs_W_enc, needs_b_enc, needs_exponent, needs_scale, _ = ctx.needs_input_grad
        to_product = gradient * batch.factor
        to_exponent = to_product * batch.product  # dL / d(a log n + c)
        scale = entries.sum_by_feature(to_exponent)
        d_W_enc = d_exponent = d_x = d_b_dec = None
        if needs_W_enc:
            d_weight = operations.segment_sum(
                entries.tokens_by_feature, entries.feature_offsets, to_product.index_select(0, entries.by_feature), unit
            )
            if batch.inverse_square is not None:
                d_weight.addcmul_(W_enc.T, (scale * batch.inverse_square).unsqueeze(-1), value=-1)
            d_W_enc = d_weight.to(W_enc.dtype).T
        if needs_exponent:
            d_exponent = _shaped(
                entries.sum_by_feature(to_exponent * batch.log_norm.index_select(0, entries.tokens)), norm_exponent
            )
        if needs_x or needs_b_dec:
            inverse_norm = (-batch.log_norm).exp()
            exponent = norm_exponent if norm_exponent.ndim == 0 else norm_exponent.index_select(0, entries.features)
            radial = entries.sum_by_token((exponent - 1) * to_exponent) * inverse_norm
            radial = radial.where(batch.log_norm > math.log(NORM_FLOOR) + 1e-6, 0)  # a floored norm is constant
            weight = W_enc.T.to(unit.dtype)
            if needs_x:
                d_x = operations.segment_sum(entries.features, entries.token_offsets, to_product, weight)
                d_x = d_x * inverse_norm.unsqueeze(-1) + unit * radial.unsqueeze(-1)
                d_b_dec = -d_x.sum(dim=0)
            else:  # only the sum over tokens is wanted, which needs one product with a vector instead
                by_feature = entries.sum_by_feature(to_product * inverse_norm.index_select(0, entries.tokens))
                d_b_dec = -(by_feature @ weight + radial @ unit)
        return (
            d_x if needs_x else None,
            d_b_dec if needs_b_dec else None,
            d_W_enc,
            entries.sum_by_feature(gradient) if needs_b_enc else None,
            d_exponent,
            _shaped(scale, log_scale) if needs_scale else None,
            None,
        )


def _shaped(by_feature: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    return by_feature.sum() if parameter.ndim == 0 else by_feature


class EntryDecode(torch.autograd.Function):
    """`values @ W_dec` for codes that are zero but at the active entries: `[B, D]`."""

    @override
    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, W_dec: torch.Tensor, entries: Entries) -> torch.Tensor:
        ctx.save_for_backward(values, W_dec)
        ctx.entries = entries
        return operations.segment_sum(entries.features, entries.token_offsets, values, W_dec)

    @override
    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gradient = gradients[0].contiguous()
        values, W_dec = ctx.saved_tensors
        entries: Entries = ctx.entries
        needs_values, needs_W_dec, _ = ctx.needs_input_grad
        d_values = operations.sampled_product(entries, gradient, W_dec) if needs_values else None
        d_W_dec = None
        if needs_W_dec:
            d_W_dec = operations.segment_sum(
                entries.tokens_by_feature,
                entries.feature_offsets,
                values.index_select(0, entries.by_feature),
                gradient,
            )
        return d_values, d_W_dec, None

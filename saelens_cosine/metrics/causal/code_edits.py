"""What a change of an SAE's codes does to the activations that they were read from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from sae_lens.saes.sae import SAE

from saelens_cosine.metrics.codes import most_at_once, tokens_at_once
from saelens_cosine.metrics.codes import reconstruct as encode_and_decode
from saelens_cosine.metrics.flat_tokens import flat_heads

CodeChange = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""`change(codes, rows)`: dense codes `[rows, d_sae]` of the tokens with numbers `rows [rows]`, changed, not in place."""


@torch.no_grad()
def decoded_change(sae: SAE[Any], x: torch.Tensor, change: CodeChange) -> torch.Tensor:
    """By how much activations move when codes change: `decode(changed codes) - decode(codes)`.

    Added to `x` it leaves the SAE's error where it was. One feature's code times f moves them by `(f - 1) z_i d_i`.

    Args:
        sae: any SAELens SAE in its inference form.
        x: `[tokens, d_in]` float32 on the CPU.
        change: what is done to the codes.

    Returns:
        `[tokens, d_in]` float32 on the CPU; exactly 0 where no code changed.
    """
    moved = torch.zeros_like(x)
    with flat_heads(sae):
        for rows in torch.arange(len(x)).split(most_at_once(sae)):
            codes = sae.encode(x[rows].to(sae.device)).to_dense()
            changed = change(codes, rows)
            before, after = sae.decode(torch.stack([codes, changed]))  # one call: some SAEs decode once per encoding
            differs = (changed != codes).any(dim=-1, keepdim=True)
            moved[rows] = torch.where(differs, after - before, 0).float().cpu()
    return moved


def reconstruct(sae: SAE[Any]) -> Callable[[torch.Tensor], torch.Tensor]:
    """The function from activations `[tokens, d_in]` to an SAE's reconstructions of them, both float32 on the CPU."""

    @torch.no_grad()
    def reconstructed(x: torch.Tensor) -> torch.Tensor:
        with flat_heads(sae):
            parts = [encode_and_decode(sae, part)[1].float().cpu() for part in x.split(tokens_at_once(sae, x))]
        return torch.cat(parts)

    return reconstructed

"""The norm that reads the residual stream after a hook, for the post-norm loss (`saelens_cosine.saes.recipe.losses`).

Models disagree about names, about what a stored weight means (Gemma's gain is 1 + weight) and about which block has which
norm. So nothing is read off names: a forward pass shows which norm takes the activation, and inputs show what it does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from saelens_cosine.activations.bridges import restore_hook_names
from saelens_cosine.saes.recipe.losses import rms_norm

FOLDED = (
    "from_pretrained in TransformerLens folds it into the weights that follow (fold_ln), as enable_compatibility_mode does in "
    "a bridge; load the model with from_pretrained_no_processing"
)


@dataclass(frozen=True, eq=False)
class NextNorm:
    """
    An RMS norm, `gain * x * (mean_j x_j^2 + eps)^(-1/2)`.

    Args:
        gain (torch.Tensor): `[d_in]`, float32 or wider, what the normalised activation is multiplied by.
        eps (float): What the mean square is increased by, in squared units of the activations.
    """

    gain: torch.Tensor
    eps: float


@torch.no_grad()
def next_norm(model: Any, hook_name: str) -> NextNorm:
    """The RMS norm that reads the activation at a hook point of the residual stream.

    For the output of block L that is block L + 1's first norm, or the final norm after the last block; for
    `blocks.L.hook_resid_mid` the norm before the MLP.

    Args:
        model: a HookedTransformer, a TransformerBridge, or SAELens' wrapper of a Hugging Face model.
        hook_name: a hook point of it: `blocks.3.hook_resid_post`, `model.layers.3`.

    Raises:
        ValueError: no such hook; no norm reads what is there (an MLP's or attention's output, blocks that normalise only
            their outputs); the norm is not an RMS norm; or its gain is 1 everywhere, so it has been folded away.
    """
    if hook_name not in model.hook_dict:
        raise ValueError(f"The model has no hook point {hook_name!r}; model.hook_dict lists them.")
    norm, size = _norm_that_reads(model, hook_name)
    where = f"{type(norm).__name__} after {hook_name!r}"
    eps = _eps(norm, where)

    like = next(model.parameters())
    like = next(norm.parameters(), like)
    rng = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (size,), generator=rng).mul(2).sub(1).to(like)  # mean square exactly 1
    gain = _call(norm, signs) * signs * (1 + eps) ** 0.5

    # off-centre, once as long as an activation and once so short that eps decides
    vector = torch.randn(size, generator=rng).add(1).to(like)
    precision = 8 * torch.finfo(like.dtype).eps
    for x in (vector, vector * eps**0.5):
        output, expected = _call(norm, x), rms_norm(x, gain, eps)
        if not torch.allclose(output, expected, rtol=precision, atol=precision * gain.abs().max().item()):
            raise ValueError(
                f"{where} is not an RMS norm gain * x * (mean(x^2) + eps)^(-1/2) with eps={eps}: it subtracts a mean, as "
                "LayerNorm does, adds a bias, or does something else. The post-norm loss is defined for RMS norms; use "
                "another loss for this model."
            )
    if torch.allclose(gain, torch.ones_like(gain), rtol=0, atol=1e-4):
        raise ValueError(
            f"{where} has a gain of 1 in all {size} dimensions, so the model's own is gone or was never there: {FOLDED}. If "
            "the norm truly has none, pass NextNorm(torch.ones(d_in), eps) yourself."
        )
    return NextNorm(gain, eps)


def _norm_that_reads(model: Any, hook_name: str) -> tuple[nn.Module, int]:
    """The first norm whose input is the activation at the hook, once the hook has fired; the size of the activation."""
    seen: list[torch.Tensor] = []
    readers: list[nn.Module] = []

    def remember(activation: torch.Tensor, hook: Any) -> None:  # noqa: ARG001  (TransformerLens passes it by name)
        seen[:] = [activation.cpu().double()]

    def compare(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if seen and inputs and torch.equal(inputs[0].cpu().double(), seen[0]):
            readers.append(module)

    norms = [module for module in model.modules() if "norm" in type(module).__name__.lower()]
    handles = [norm.register_forward_pre_hook(compare) for norm in norms]
    tokens = torch.tensor([[0, 1]], device=next(model.parameters()).device)
    restore_hook_names(model)
    try:
        model.run_with_hooks(tokens, fwd_hooks=[(hook_name, remember)])
    finally:
        for handle in handles:
            handle.remove()
    if not readers:
        raise ValueError(
            f"No norm of the model reads what is at {hook_name!r}, so it has no post-norm loss. In most models one reads the "
            "residual stream: blocks.L.hook_resid_pre, hook_resid_mid and hook_resid_post in TransformerLens, the path of a "
            "block (model.layers.L) in a Hugging Face model. Where blocks normalise only their outputs, as in OLMo 2, only "
            "the last block's output is read by one."
        )
    return readers[0], seen[0].shape[-1]


def _eps(norm: nn.Module, where: str) -> float:
    for part in norm.modules():  # a bridge holds the model's own norm
        for name in ("eps", "variance_epsilon"):
            eps = getattr(part, name, None)
            if eps is not None:
                return float(eps)
    raise ValueError(f"{where} does not say its eps; pass NextNorm(gain, eps) yourself.")


def _call(norm: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """`[d_in] -> [d_in]` in float32 or wider, by way of the model's `[batch, position, d_in]`."""
    output = norm(x[None, None])[0, 0]
    return output.to(torch.promote_types(output.dtype, torch.float32))


def take_next_norms(runner: Any) -> None:
    """Give each SAE of a SAELens runner (single or multi-SAE, built but not run) that has a post-norm loss its next norm.

    Raises:
        ValueError: as `next_norm`.
    """
    saes = runner.saes.values() if hasattr(runner, "saes") else [runner.sae]
    for sae in saes:
        if getattr(sae.cfg, "post_norm_loss_weight", 0):
            norm = next_norm(runner.model, sae.cfg.metadata.hook_name)
            sae.set_next_norm(norm.gain, norm.eps)

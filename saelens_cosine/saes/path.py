"""Which path a call takes, and why."""

from __future__ import annotations

import importlib.util
import logging
from functools import lru_cache
from typing import Any

import torch

from saelens_cosine.saes.scored_encoder import ScoredEncoder

logger = logging.getLogger(__name__)

SPARSE_ENOUGH = 8
"""By default the fast path is taken when at most one in this many codes is active: its work grows with their number."""


GPU_WORTH = 2**27
"""By default a GPU takes the fast path where a batch's scores, tokens times features, fill this many bytes in the product's
precision: 2^25 scores in float32, 2^26 in bfloat16.

The fast step costs five to six milliseconds however small the batch, which is how long the host takes to launch some 180
operations; the reference path costs four or more, plus its work on the scores. On an H200 the fast step took 1.05 to 1.13 of
the reference's time at 2^25 scores in bfloat16 and 0.57 in float32, 0.64 and 0.33 at 2^26, 1.27 and 1.29 at 2^24.
"""


def use_fast_path(sae: ScoredEncoder, x: torch.Tensor) -> bool:
    """Whether this training call takes the fast path.

    With `kernels="auto"` that is where it is exact, where at most one code in `SPARSE_ENOUGH` is active, and on a GPU where
    the batch's scores fill `GPU_WORTH` bytes.

    Raises:
        RuntimeError: it is demanded (`kernels="fast"`) and impossible.
    """
    wanted = getattr(sae.cfg, "kernels", "reference")
    if wanted == "reference" or not sae.training:
        return False
    reason = decline_reason(sae, x)
    if reason is None and getattr(sae.cfg, "use_sparse_activations", False):
        reason = "use_sparse_activations=True asks for SAELens' sparse tensors"
    if wanted == "fast" and reason is not None:
        raise RuntimeError(f'kernels="fast" is impossible here: {reason}. Use kernels="auto" or "reference".')
    k = getattr(sae.cfg, "k", 0)
    if reason is None and wanted == "auto" and k * SPARSE_ENOUGH > sae.cfg.d_sae:
        reason = f"k={k} of d_sae={sae.cfg.d_sae} is too dense to gain from the fast one"
    if reason is None and wanted == "auto" and x.device.type == "cuda" and _score_bytes(sae, x) < GPU_WORTH:
        reason = f"{x.shape[0]} tokens of {sae.cfg.d_sae} features are too few for a GPU to gain from the fast one"
    if reason is not None:
        _log_once(f"{sae.cfg.architecture()} takes the reference path: {reason}.")
    return reason is None


def _score_bytes(sae: ScoredEncoder, x: torch.Tensor) -> int:
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else sae.dtype
    return x.shape[0] * sae.cfg.d_sae * dtype.itemsize


@lru_cache(maxsize=256)
def _log_once(message: str) -> None:
    logger.info(message)


def decline_reason(sae: ScoredEncoder, x: torch.Tensor) -> str | None:
    """Why codes of `x` cannot be computed entry by entry, in a few words; None when they can."""
    for method, form in (("score", "score_parameters"), ("select", "entry_selector")):
        if not defined_together(sae, method, form):
            return f"{_owner(sae, method).__name__} defines {method} without {form}"
    if sae.entry_selector(x.shape[0]) is None:
        return f"{type(sae.activation_fn).__name__} has no selection by entries"
    if has_hooks(sae):
        return "a hook asks for dense scores or codes"
    if x.ndim != 2:
        return f"activations have shape {tuple(x.shape)}, not [tokens, d_in]"
    if sae.dtype not in (torch.float32, torch.float64):
        return f"parameters are {sae.dtype}, not float32 or float64"
    if x.device.type == "cuda" and not _has_triton():
        return "triton is not installed"
    if x.device.type not in ("cpu", "cuda"):
        return f"there are no kernels for {x.device.type}"
    return None


def has_hooks(sae: ScoredEncoder) -> bool:
    """Whether a hook sees, and may change, scores or codes."""
    points = (sae.hook_sae_acts_pre, sae.hook_sae_acts_post)
    return any(vars(point)["_forward_hooks"] or vars(point)["_backward_hooks"] for point in points)


@lru_cache(maxsize=1)
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def defined_together(sae: ScoredEncoder, method: str, form: str) -> bool:
    """Whether one class defines a method and its other form, so that no subclass has changed one of them alone."""
    return hasattr(sae, form) and _owner(sae, method) is _owner(sae, form)


def _owner(sae: ScoredEncoder, method: str) -> type[Any]:
    return next(c for c in type(sae).__mro__ if method in vars(c))

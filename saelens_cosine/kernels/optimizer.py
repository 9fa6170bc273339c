"""One pass over the parameters instead of a dozen: SAELens' own Adam, told to use PyTorch's fused step.

SAELens' trainer makes its `Adam` where no one can pass it an option, with `fused` and `foreach` left open. The fused step is
the same arithmetic, so the option is set on that very object, before its first step and only if it is still open.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

FUSED_DEVICES = ("cpu", "cuda")


def fuse_adam_of(parameter: torch.nn.Parameter) -> RemovableHandle:
    """Fuse the Adam or AdamW that is the next to step `parameter`.

    An optimizer of another kind, or whose `fused` or `foreach` was chosen by someone, stays as it is; so does one that has
    stepped before, whose state the fused step could not read.

    Returns:
        What ends the watch over optimizers, which cannot end itself.
    """
    watched = weakref.ref(parameter)

    def fuse(optimizer: Any, _args: Any, _kwargs: Any) -> None:
        if type(optimizer) not in (torch.optim.Adam, torch.optim.AdamW):
            return
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        if not any(p is watched() for p in parameters):
            return
        if not optimizer.state and all(p.device.type in FUSED_DEVICES for p in parameters):
            for group in optimizer.param_groups:
                if group["fused"] is None and group["foreach"] is None and not group["differentiable"]:
                    group["fused"] = True
        collect = optimizer._init_group
        if all(group["fused"] for group in optimizer.param_groups) and not isinstance(collect, _Turning):
            optimizer._init_group = _Turning(collect)

    handle = register_optimizer_step_pre_hook(fuse)
    weakref.finalize(parameter, handle.remove)
    return handle


class _Turning:
    """Adam's own collecting of tensors for a step, with every feature-major matrix seen as the `[d_sae, d_in]` that it is.

    PyTorch's fused Adam on the CPU copies a tensor that is not contiguous, and back: three times the work of the step. Views
    change nothing that anyone else sees; the method is PyTorch's, private but the same since 2.0. The fused step also leaves
    no trace in the tensors' versions, which it does here.
    """

    def __init__(self, init_group: Callable[..., Any]):
        self.init_group = init_group

    def __call__(self, group: dict[str, Any], *lists: list[torch.Tensor]) -> Any:
        result = self.init_group(group, *lists)
        for tensors in lists:
            tensors[:] = map(_held, tensors)
        parameters, gradients, *moments = lists
        for i, parameter in enumerate(parameters):
            torch.autograd.graph.increment_version(parameter)
            matrices = [m for m in moments if i < len(m) and m[i].ndim == 2]
            if parameter.ndim == 2 and all(_feature_major(t) for t in (parameter, *(m[i] for m in matrices))):
                gradients[i] = gradients[i].T.contiguous()
                for tensors in (parameters, *matrices):
                    tensors[i] = tensors[i].T
        return result


def _held(tensor: Any) -> torch.Tensor:
    """Of a DTensor the part that this rank holds, whose step is its own."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _feature_major(matrix: torch.Tensor) -> bool:
    return not matrix.is_contiguous() and matrix.T.is_contiguous()

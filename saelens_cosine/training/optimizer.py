"""One pass over the parameters instead of a dozen: SAELens' own Adam, told to use PyTorch's fused step.

SAELens' trainer makes its `Adam` where no one can pass it an option, with `fused` and `foreach` left open. The fused step is
the same arithmetic, so the option is set on that very object, before its first step and only if it is still open.
"""

from __future__ import annotations

import weakref
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

    return register_optimizer_step_pre_hook(fuse)


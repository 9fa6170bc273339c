"""Whether something can run on a device, said before anything is loaded."""

from __future__ import annotations

import torch


def check_device(device: str, name: str = "device") -> None:
    """Put a number there and read it back.

    Raises:
        ValueError: `device` is none of PyTorch's, or not there; `name` is what the setting is called.
    """
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
        reason = str(error).partition("\n")[0].removesuffix(".")
        raise ValueError(
            f"{name}={device!r} cannot be used: {reason}. PyTorch {torch.__version__} finds these here: {', '.join(['cpu', *gpus])}."
        ) from None

"""What is not finite stays so: no figure of the tokens that are left passes for one of all tokens."""

from __future__ import annotations

import torch


class NotFiniteError(ValueError):
    """
    Something that a diagnostic reads of an SAE or a model is NaN or infinite, so that it has no figure.

    Args:
        what (str): What is not.
        bad (int): How many of them.
        of (int): Out of how many.
        each (str): What is counted.
    """

    def __init__(self, what: str, bad: int, of: int, each: str = "tokens"):
        super().__init__(
            f"{what} are not finite: {bad:,} of {of:,} {each}. Float16 ends at 65,504: load the SAE in bfloat16 or float32, "
            "and look at its weights."
        )
        self.bad = bad

    @classmethod
    def check(cls, what: str, values: torch.Tensor, each: str = "tokens") -> None:
        """Raise it if any of `values [n, ...]` is not finite."""
        bad = int((~values.isfinite()).flatten(1).any(dim=-1).sum() if values.ndim > 1 else (~values.isfinite()).sum())
        if bad:
            raise cls(what, bad, len(values), each)


def finite_rows(*rows: torch.Tensor) -> torch.Tensor:
    """`[n]` booleans of `[n, ...]` tensors: whether a row is finite in all of them."""
    return torch.stack([part.isfinite().flatten(1).all(dim=-1).cpu() for part in rows]).all(dim=0)

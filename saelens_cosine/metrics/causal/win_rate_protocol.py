"""How the win rate chooses features, ablates them and judges: the paper's experiments do it in three ways, which give different numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args, get_origin, get_type_hints


@dataclass(frozen=True)
class WinRateProtocol:
    """
    How features are chosen, ablated and judged.

    Args:
        context (Literal["alone", "text"]): `text`: the effect on the last token of each text. `alone`: active tokens, each put in place of the only token of a one-token context.
        ablated (Literal["all", "read"]): In a text, the direction is removed at all tokens that the sample holds, or only at the one whose prediction is read.
        chosen_by (Literal["firing_rate", "mean_code"]): Features with the highest share of active tokens, or the highest mean |code|.
        chosen_on (int | None): The first so many contexts decide that; None: all.
        features (int): Features compared, if so many are active.
        samples (int): Tokens (`alone`, drawn from a feature's active ones) or texts per feature, at most.
        min_active (int): Active tokens that a feature must have in the sample to be chosen.
        compared (Literal["correlations", "absolute_correlations", "absolute_predictors"]): Correlations as they are, their absolute values, or correlations with |cosine| and |inner product|.
        removed (Literal["inner_product", "cosine"]): What is subtracted along the unit direction: `<x, d>`, all of it, or the sample's median norm times the cosine.
    """

    context: Literal["alone", "text"]
    ablated: Literal["all", "read"]
    chosen_by: Literal["firing_rate", "mean_code"]
    chosen_on: int | None
    features: int
    samples: int
    min_active: int
    compared: Literal["correlations", "absolute_correlations", "absolute_predictors"]
    removed: Literal["inner_product", "cosine"] = "inner_product"

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self)).items():
            if get_origin(hint) is Literal and getattr(self, name) not in get_args(hint):
                raise ValueError(f"{name}={getattr(self, name)!r} is none of {', '.join(map(repr, get_args(hint)))}.")


PROTOCOLS = {
    "A": WinRateProtocol("alone", "read", "firing_rate", None, 30, 50, 20, "absolute_correlations"),
    "B": WinRateProtocol("text", "all", "mean_code", None, 100, 200, 1, "correlations"),
    "C": WinRateProtocol("text", "read", "mean_code", 50, 100, 200, 1, "absolute_predictors"),
}
"""The paper's: A of experiments 5 to 39, 41 and 42; B of 40 and 42c, which chose features without sinks; C of 43 and 45 to 48, with them."""

"""What a comparison is asked."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from saelens_cosine.activations.contexts import check_context_size
from saelens_cosine.activations.norm_filter import check_max_norm_multiple
from saelens_cosine.bundled import BUNDLED
from saelens_cosine.registry import check_training_architecture
from saelens_cosine.training.recipe import get_recipe

Value = TypeVar("Value", bound=int | float | str)

DEFAULT_ARMS = ("inner_product_batchtopk", "cosine_batchtopk", "per_feature_cosine_batchtopk")


@dataclass
class ComparisonSettings:
    """
    What to train and how to compare it. `layer`, `hook`, `k` and `lr` take one value or several; several span a grid.

    Args:
        arms (tuple[str, ...]): Architectures registered for training; the first is what the others are compared with.
        model (str): `bundled`, `smollm2`, a TransformerLens or Hugging Face name, or a local folder or `.gguf` file.
        dataset (str): `bundled`, `sae-probes`, a Hugging Face name, or a local file, folder or saved dataset.
        layer (int | tuple[int, ...] | None): Blocks whose residual output is hooked; the middle one if None.
        hook (str | tuple[str, ...] | None): Hook points by name instead of layers.
        tokens (int): Training tokens of each SAE.
        k (int | tuple[int, ...]): Active features per token (BatchTopK: on average).
        lr (float | tuple[float, ...] | None): Learning rate; None for the recipe's. Of several, each arm gets the one that it does best with at each hook, see `rates`.
        d_sae (int): Features.
        seeds (int): Runs with different initialisation and data order.
        recipe (str): A name in `RECIPES`: `paper` or `saelens`.
        max_norm_multiple (float | None): Drop tokens above this multiple of their batch's median norm, in training and evaluation. None keeps them all in both.
        plant_sinks (bool): Whether the first position of each context becomes an attention sink of 30 to 300 times the median norm (`planted.plant_sinks`). The default filter drops these, None trains on them.
        device (str): Where everything runs.
        context_size (int): Tokens per context, as far as the model allows.
        activations (Path | None): Folder of activations that are computed once and read by every training, and by later commands (`activations.cache`). Without one, a grid keeps its own while it runs.
        eval_tokens (int): Held-out tokens for reconstruction, in contexts from all held-out documents; also the window of the dead fraction.
        eval_prompts (int): Of their contexts, those for the cross-entropy.
    """

    arms: tuple[str, ...] = DEFAULT_ARMS
    model: str = BUNDLED
    dataset: str = BUNDLED
    layer: int | tuple[int, ...] | None = None
    hook: str | tuple[str, ...] | None = None
    tokens: int = 1_000_000
    k: int | tuple[int, ...] = 32
    lr: float | tuple[float, ...] | None = None
    d_sae: int = 2048
    seeds: int = 1
    recipe: str = "paper"
    max_norm_multiple: float | None = 10.0
    plant_sinks: bool = False
    device: str = "cpu"
    context_size: int = 128
    activations: Path | None = None
    eval_tokens: int = 100_000
    eval_prompts: int = 128

    def __post_init__(self) -> None:
        self.arms = tuple(check_training_architecture(arm) for arm in self.arms)
        if not self.arms or len(set(self.arms)) < len(self.arms):
            raise ValueError(f"arms={self.arms} must name at least one architecture, each once.")
        rates = tuple(float(f"{rate:g}") for rate in self.rates)  # as names of trainings and tables tell them apart
        for name, values in (("k", self.ks), ("lr", rates), ("layer", self.layers), ("hook", self.hooks)):
            if len(set(values)) < len(values):
                raise ValueError(f"{name}={values} names one twice.")
        if not self.ks:
            raise ValueError("k names no number of active features.")
        self.k, self.lr = self.ks if len(self.ks) > 1 else max(self.ks), _or_one(self.rates)
        self.layer, self.hook = _or_one(self.layers), _or_one(self.hooks)
        if self.layer is not None and self.hook is not None:
            raise ValueError(f"layer={self.layer} and hook={self.hook!r} both say where to hook; give one.")
        batch = get_recipe(self.recipe, self.tokens).runner["train_batch_size_tokens"]
        if self.tokens < 2 * batch:
            raise ValueError(f"tokens={self.tokens} is less than two training steps of {batch} tokens.")
        for k in self.ks:
            if not 0 < k <= self.d_sae:
                raise ValueError(f"k={k} features cannot be active out of d_sae={self.d_sae}.")
        for rate in self.rates:
            if not (math.isfinite(rate) and rate > 0):
                raise ValueError(f"lr={rate} must be a positive number.")
        if self.seeds < 1:
            raise ValueError(f"seeds={self.seeds} must be at least 1.")
        if self.eval_tokens < 1 or self.eval_prompts < 1:
            raise ValueError(f"eval_tokens={self.eval_tokens}, eval_prompts={self.eval_prompts} must be positive.")
        check_context_size(self.context_size)
        check_max_norm_multiple(self.max_norm_multiple)

    @property
    def ks(self) -> tuple[int, ...]:
        """All values of `k`, ascending."""
        return tuple(sorted(_all(self.k)))

    @property
    def rates(self) -> tuple[float, ...]:
        """All values of `lr`, ascending; none for the recipe's."""
        return tuple(sorted(_all(self.lr)))

    @property
    def layers(self) -> tuple[int, ...]:
        """All values of `layer`, none for the middle one or for hooks by name."""
        return _all(self.layer)

    @property
    def hooks(self) -> tuple[str, ...]:
        """All values of `hook`."""
        return _all(self.hook)

    @property
    def is_grid(self) -> bool:
        """Whether anything but the seed and the arm takes several values."""
        return any(len(values) > 1 for values in (self.ks, self.rates, self.layers, self.hooks))


def _all(value: Value | tuple[Value, ...] | None) -> tuple[Value, ...]:
    if isinstance(value, tuple):
        return value
    return () if value is None else (value,)


def _or_one(values: tuple[Value, ...]) -> Value | tuple[Value, ...] | None:
    """As it is kept: what takes one value is no tuple."""
    return None if not values else values[0] if len(values) == 1 else values

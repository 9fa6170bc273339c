"""What a comparison is asked."""

from __future__ import annotations

from dataclasses import dataclass

from saelens_cosine.activations.contexts import check_context_size
from saelens_cosine.activations.norm_filter import check_max_norm_multiple
from saelens_cosine.bundled import BUNDLED
from saelens_cosine.registry import check_training_architecture
from saelens_cosine.training.recipe import get_recipe

DEFAULT_ARMS = ("inner_product_batchtopk", "cosine_batchtopk", "per_feature_cosine_batchtopk")


@dataclass
class ComparisonSettings:
    """
    What to train and how to compare it.

    Args:
        arms (tuple[str, ...]): Architectures registered for training; the first is what the others are compared with.
        model (str): `bundled`, `smollm2`, a TransformerLens or Hugging Face name, or a local folder or `.gguf` file.
        dataset (str): `bundled`, a Hugging Face name, or a local file or saved dataset with a text column.
        layer (int | None): Block whose residual output is hooked; the middle one if None.
        hook (str | None): A hook point by name instead of a layer.
        tokens (int): Training tokens of each SAE.
        k (int): Active features per token (BatchTopK: on average).
        d_sae (int): Features.
        seeds (int): Runs with different initialisation and data order.
        recipe (str): `paper` or `saelens`.
        max_norm_multiple (float | None): Drop tokens above this multiple of their batch's median norm, in training and evaluation. None keeps them all in both.
        plant_sinks (bool): Whether the first position of each context becomes an attention sink of 30 to 300 times the median norm (`planted.plant_sinks`). The default filter drops these, None trains on them.
        device (str): Where everything runs.
        context_size (int): Tokens per context, as far as the model allows.
        eval_tokens (int): Held-out tokens for reconstruction, in contexts from all held-out documents; also the window of the dead fraction.
        eval_prompts (int): Of their contexts, those for the cross-entropy.
    """

    arms: tuple[str, ...] = DEFAULT_ARMS
    model: str = BUNDLED
    dataset: str = BUNDLED
    layer: int | None = None
    hook: str | None = None
    tokens: int = 1_000_000
    k: int = 32
    d_sae: int = 2048
    seeds: int = 1
    recipe: str = "paper"
    max_norm_multiple: float | None = 10.0
    plant_sinks: bool = False
    device: str = "cpu"
    context_size: int = 128
    eval_tokens: int = 100_000
    eval_prompts: int = 128

    def __post_init__(self) -> None:
        self.arms = tuple(check_training_architecture(arm) for arm in self.arms)
        if not self.arms or len(set(self.arms)) < len(self.arms):
            raise ValueError(f"arms={self.arms} must name at least one architecture, each once.")
        batch = get_recipe(self.recipe, self.tokens).runner["train_batch_size_tokens"]
        if self.tokens < 2 * batch:
            raise ValueError(f"tokens={self.tokens} is less than two training steps of {batch} tokens.")
        if not 0 < self.k <= self.d_sae:
            raise ValueError(f"k={self.k} features cannot be active out of d_sae={self.d_sae}.")
        if self.seeds < 1:
            raise ValueError(f"seeds={self.seeds} must be at least 1.")
        if self.eval_tokens < 1 or self.eval_prompts < 1:
            raise ValueError(f"eval_tokens={self.eval_tokens}, eval_prompts={self.eval_prompts} must be positive.")
        check_context_size(self.context_size)
        check_max_norm_multiple(self.max_norm_multiple)

"""What a benchmark measures."""

from __future__ import annotations

from dataclasses import dataclass

from sae_lens.registry import get_sae_training_class

from saelens_cosine.registry import check_training_architecture
from saelens_cosine.saes.recipe.training_sae import TopKRecipeConfig

SELECTORS = ("matryoshka_batchtopk", "batchtopk", "abstopk", "topk")
"""SAELens' selectors that have a fast path; an architecture's is the first that its name ends in."""

SAELENS_ARMS = (*(f"saelens_{selector}" for selector in SELECTORS), "saelens_topk_sparse")
"""SAELens' own classes; the last with `use_sparse_activations=True` and without rescaling by decoder norms."""

MATRYOSHKA_LEVELS = (1 / 8, 1 / 4, 1 / 2, 1)
"""Widths of the nested reconstructions, as shares of d_sae."""

FAST_ARCHITECTURES = (
    *(
        f"{score}_{selector}"
        for selector in ("batchtopk", "topk")
        for score in ("inner_product", "cosine", "per_feature_cosine")
    ),
    "cosine_abstopk",
    "cosine_matryoshka_batchtopk",
    "magnitude_bypass_batchtopk",
)

DEFAULT_ARMS = (
    *SAELENS_ARMS,
    *(f"{name}/{path}" for name in FAST_ARCHITECTURES for path in ("reference", "fast")),
)

DTYPES = ("float32", "tf32", "bfloat16")
"""float32 throughout, float32 with TF32 products (CUDA), or bfloat16 autocast; parameters are float32 in each."""


@dataclass(frozen=True)
class BenchmarkSettings:
    """
    What to measure.

    Args:
        arms (tuple[str, ...]): `saelens_<selector>`, `saelens_topk_sparse`, or `<architecture>/<kernels>`.
        d_in (int): Size of the activations.
        d_sae (int): Number of features.
        batch (int): Tokens per step.
        k (int): Active features per token.
        device (str): Where to measure.
        dtype (str): `float32`, `tf32` or `bfloat16` (autocast).
        repeats (int): Timed steps of each arm, after warm-up.
    """

    arms: tuple[str, ...] = DEFAULT_ARMS
    d_in: int = 512
    d_sae: int = 8192
    batch: int = 1024
    k: int = 32
    device: str = "cpu"
    dtype: str = "float32"
    repeats: int = 7

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype={self.dtype!r} is none of {', '.join(DTYPES)}.")
        for name in ("d_in", "d_sae", "batch", "k", "repeats"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be positive.")
        if self.k > self.d_sae:
            raise ValueError(f"k={self.k} features cannot be active out of d_sae={self.d_sae}.")
        for arm in self.arms:
            architecture, _, kernels = arm.partition("/")
            if arm in SAELENS_ARMS:
                continue
            config = get_sae_training_class(check_training_architecture(architecture))[1]
            if kernels not in ("reference", "fast") or not issubclass(config, TopKRecipeConfig):
                raise ValueError(
                    f"Unknown arm {arm!r}. There are {', '.join(SAELENS_ARMS)}, and <architecture>/reference or "
                    f"<architecture>/fast for those of this package that end in {', '.join(SELECTORS)}."
                )

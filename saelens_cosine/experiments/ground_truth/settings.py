"""What to train on data whose features are known, and how it is scored."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from sae_lens.synthetic import SyntheticModelConfig

from saelens_cosine.experiments.compare.settings import DEFAULT_ARMS
from saelens_cosine.experiments.ground_truth.planted import small_model
from saelens_cosine.registry import check_training_architecture

SYNTH_SAE_BENCH_16K = "decoderesearch/synth-sae-bench-16k-v1"
"""The published benchmark on the Hub. Its authors train 4,096 features on it, with k=25 and 200 million samples."""


@dataclass(frozen=True)
class GroundTruthSettings:
    """
    What to train, on what, and how it is scored.

    Args:
        arms (tuple[str, ...]): Architectures registered for training; the first is what the others are compared with.
        model (SyntheticModelConfig | str): What makes the activations: a config, built anew with each seed added to its own, or what `SyntheticModel.load_from_source` takes (a folder, or a name on the Hub such as SYNTH_SAE_BENCH_16K), the same for all seeds.
        norm_spreads (tuple[float, ...]): Standard deviations of a token's log norm factor; 0 leaves the data alone.
        seeds (int): Runs with different model, initialisation and samples.
        samples (int): Training samples of each SAE.
        d_sae (int | None): Features of each SAE; None for as many as there are to find.
        k (float | None): Active features per token; None for as many as are, on average.
        recipe (str): A name in `RECIPES`: `paper` or `saelens`.
        batch (int): Samples per training step.
        sink_share (float): Share of the tokens that are sinks; 0 plants none.
        train_on_sinks (bool): Whether SAEs see sinks in training. False is what a perfect filter would do.
        eval_samples (int): Samples that each SAE is scored on, the same for all arms; also the window of dead features.
        device (str): Where everything runs.
    """

    arms: tuple[str, ...] = DEFAULT_ARMS
    model: SyntheticModelConfig | str = field(default_factory=small_model)
    norm_spreads: tuple[float, ...] = (0.0, 0.5, 1.0)
    seeds: int = 3
    samples: int = 100_000
    d_sae: int | None = None
    k: float | None = None
    recipe: str = "paper"
    batch: int = 512
    sink_share: float = 0.0
    train_on_sinks: bool = False
    eval_samples: int = 20_000
    device: str = "cpu"

    def __post_init__(self) -> None:
        for arm in self.arms:
            check_training_architecture(arm)
        if not self.arms or len(set(self.arms)) < len(self.arms):
            raise ValueError(f"arms={self.arms} must name at least one architecture, each once.")
        if not self.norm_spreads or not all(math.isfinite(spread) and spread >= 0 for spread in self.norm_spreads):
            raise ValueError(f"norm_spreads={self.norm_spreads} must be at least one finite number, none below 0.")
        if self.d_sae is not None and self.d_sae < 1:
            raise ValueError(
                f"d_sae={self.d_sae} must be positive, or None (no --d-sae) for as many as there are to find."
            )
        if self.k is not None and not 0 < self.k <= (self.d_sae or math.inf):
            raise ValueError(
                f"k={self.k} must be positive and at most d_sae, or None (no --k) for as many as are active."
            )
        if self.seeds < 1 or self.eval_samples < 1 or self.samples < 2 * self.batch:
            raise ValueError(
                f"seeds={self.seeds}, eval_samples={self.eval_samples}: at least 1; samples={self.samples}: at least two "
                f"steps of batch={self.batch}."
            )
        if not 0 <= self.sink_share < 0.5:
            raise ValueError(f"sink_share={self.sink_share} must be at least 0 and below 0.5.")

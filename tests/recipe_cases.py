"""What test_recipe_parts and its neighbours share."""

from __future__ import annotations

from pathlib import Path

import torch
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.registry import get_sae_training_class
from sae_lens.saes.sae import SAEMetadata, TrainStepInput
from sae_lens.training.sae_trainer import SAETrainer

import saelens_cosine

SCORES = ["inner_product", "cosine", "per_feature_cosine"]
BATCHTOPK = [f"{score}_batchtopk" for score in SCORES]
TOPK = [f"{score}_topk" for score in SCORES]
HOOK = "blocks.3.hook_resid_post"


assert set(BATCHTOPK + TOPK) <= set(saelens_cosine.TRAINING_ARCHITECTURES)


def make_config(architecture: str, **settings):
    defaults = {"d_in": 4, "d_sae": 6, "k": 2, "dtype": "float64", "metadata": SAEMetadata(hook_name=HOOK)}
    return get_sae_training_class(architecture)[1](**{**defaults, **settings})


def make_sae(architecture: str, **settings):
    torch.manual_seed(0)
    return get_sae_training_class(architecture)[0](make_config(architecture, **settings))


def gaussian(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def step_input(x: torch.Tensor, step: int = 1, logging: bool = False) -> TrainStepInput:
    return TrainStepInput(x, coefficients={}, dead_neuron_mask=None, n_training_steps=step, is_logging_step=logging)


def run_trainer(sae, batches: list[torch.Tensor], path: Path | None = None, n_checkpoints: int = 0):
    """SAELens' trainer, once over the batches."""
    config = SAETrainerConfig(
        total_training_samples=sum(map(len, batches)),
        train_batch_size_samples=len(batches[0]),
        lr=0.01,
        lr_end=0.001,
        n_checkpoints=n_checkpoints,
        checkpoint_path=str(path) if path else None,
        logger=LoggingConfig(log_to_wandb=False),
    )
    return SAETrainer(config, sae, iter(batches)).fit()

"""Named recipes: the paper's settings, or SAELens' own, as SAELens runner configs.

A recipe has two halves: fields of the SAE's config, which the classes in `saelens_cosine.saes` act on, and fields of
SAELens' runner config. Source of `paper`: experiment 40 of the released code of arXiv 2606.15054 (the dictionary_learning
recipe), made for 244,140 steps of 2,048 tokens and scaled here to other budgets.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from sae_lens import LanguageModelSAERunnerConfig, MultiSAETrainingRunnerConfig
from sae_lens.registry import get_sae_training_class
from sae_lens.saes.sae import TrainingSAEConfig

from saelens_cosine.registry import check_training_architecture
from saelens_cosine.saes.recipe.training_sae import RecipeConfig

PAPER_BATCH = 2048
"""Tokens per training step in the paper's recipe."""


@dataclass(frozen=True)
class Recipe:
    """
    Settings that a name stands for, at one token budget.

    Args:
        sae (dict[str, Any]): Fields of the SAE's training config; a config without such a field keeps its own way.
        runner (dict[str, Any]): Fields that both of SAELens' runner configs have.
    """

    sae: dict[str, Any]
    runner: dict[str, Any]


def paper(training_tokens: int, batch: int = PAPER_BATCH) -> Recipe:
    """The paper's recipe. At 500 million tokens every number is the authors' own.

    For smaller budgets:

    - Warm-up and the threshold's averaging span are 5 % of the run, at most 1000 steps each.
    - The learning rate grows so that the sum of its steps, which bounds how far Adam can move a weight or an exponent,
      stays that of 50 million tokens, the authors' smallest run with this recipe; at most 5e-3.
    - Below 50 million tokens the scale starts at the mean norm instead of sqrt(d_in). The authors found that better at 5
      million tokens (experiment 27) and worse from 50 million on (34, 41).
    - A feature is dead after 20 % of the run without firing, at most 10 million tokens.

    The recipe's token filter is `filter_high_norm_tokens`. One deviation: SAELens' warm-up starts at lr / warm_up, the
    authors' at 0, which makes their first step a wasted one.
    """
    steps = max(1, training_tokens // batch)
    warm_up = min(1000, max(1, steps // 20))
    return Recipe(
        sae={
            "unit_decoder": True,
            "decoder_init_norm": 1.0,
            "rescale_acts_by_decoder_norm": False,
            "b_dec_init": "geometric_median",
            "normalize_aux_loss": True,
            "aux_loss_coefficient": 1 / 32,
            "dead_feature_window_tokens": min(10_000_000, max(batch, training_tokens // 5)),
            "log_scale_from_data": training_tokens < 50_000_000,
            "topk_threshold_start_step": warm_up,
            "topk_threshold_lr": 1 / warm_up,
        },
        runner={
            "lr": min(5e-3, 5e-5 * max(1.0, 50_000_000 / training_tokens)),
            "lr_scheduler_name": "constant",
            "lr_warm_up_steps": warm_up,
            "lr_decay_steps": steps // 5,
            "train_batch_size_tokens": batch,
            "adam_beta1": 0.9,
            "adam_beta2": 0.999,
        },
    )


def saelens(_training_tokens: int, batch: int = 4096) -> Recipe:
    """SAELens' own defaults, for those who want only the score changed.

    What stays ours: the threshold's average starts at the first batch's value instead of 0, and deadness is counted in
    tokens.
    """
    return Recipe(
        sae={
            "unit_decoder": False,
            "decoder_init_norm": 0.1,
            "rescale_acts_by_decoder_norm": True,
            "b_dec_init": "zeros",
            "normalize_aux_loss": False,
            "aux_loss_coefficient": 1.0,
            "dead_feature_window_tokens": 1000 * batch,  # SAELens counts 1000 steps
        },
        runner={"train_batch_size_tokens": batch},
    )


RECIPES: dict[str, Callable[..., Recipe]] = {"paper": paper, "saelens": saelens}


def get_recipe(name: str, training_tokens: int, batch: int | None = None) -> Recipe:
    """A recipe by name, for this many training tokens.

    Raises:
        ValueError: unknown name, or a budget below one batch.
    """
    if name not in RECIPES:
        raise ValueError(f"Unknown recipe {name!r}; there are {', '.join(map(repr, RECIPES))}.")
    if training_tokens < 1:
        raise ValueError(f"training_tokens={training_tokens} must be positive.")
    return RECIPES[name](training_tokens) if batch is None else RECIPES[name](training_tokens, batch)


def sae_config(architecture: str, recipe: Recipe, **settings: Any) -> TrainingSAEConfig:
    """A training config of any registered architecture, with the recipe's settings and then `settings`.

    `k` becomes `target_l0` for our JumpReLU and is left out for an architecture that has neither (`standard` and `gated` are set
    by their coefficients, `top_afa` by its own). Matryoshka levels that are not given are an eighth, a quarter, half and all
    of the features.

    The recipe applies to architectures with a `RecipeConfig`, except for what such a config keeps (`keeps`). SAELens' own keep
    their defaults: their fields share names with ours but not meanings (SAELens' auxiliary loss is not divided by the residual's
    variance).
    """
    config_class = get_sae_training_class(check_training_architecture(architecture))[1]
    known = {field.name for field in fields(config_class)}
    ours = {}
    if issubclass(config_class, RecipeConfig):
        ours = {key: value for key, value in recipe.sae.items() if key in known - config_class.keeps}
    if "k" not in known:
        k = settings.pop("k", None)
        if "target_l0" in known and issubclass(config_class, RecipeConfig):
            settings.setdefault("target_l0", k)
    if "matryoshka_widths" in known and not settings.get("matryoshka_widths"):
        d_sae = settings["d_sae"]
        settings["matryoshka_widths"] = sorted({max(1, d_sae // 8), max(1, d_sae // 4), max(1, d_sae // 2), d_sae})
    return config_class(**ours | settings)


def runner_config(
    architecture: str,
    *,
    d_in: int,
    d_sae: int,
    k: float,
    training_tokens: int,
    recipe: str = "paper",
    sae: Mapping[str, Any] | None = None,
    **runner: Any,
) -> LanguageModelSAERunnerConfig[TrainingSAEConfig]:
    """SAELens' runner config for one SAE under a named recipe.

    Args:
        architecture: any architecture registered for training.
        d_in: size of the activations at the hook.
        d_sae: number of features.
        k: active features per token (BatchTopK, JumpReLU: on average).
        training_tokens: the budget that the recipe is scaled to.
        recipe: `"paper"` or `"saelens"`.
        sae: further fields of the SAE's config, over the recipe's.
        runner: further fields of `LanguageModelSAERunnerConfig` (`model_name`, `hook_name`, `dataset_path`, ...), over
            the recipe's.
    """
    settings = get_recipe(recipe, training_tokens, runner.get("train_batch_size_tokens"))
    config = sae_config(architecture, settings, d_in=d_in, d_sae=d_sae, k=k, **(sae or {}))
    return LanguageModelSAERunnerConfig(sae=config, training_tokens=training_tokens, **(settings.runner | runner))


def multi_runner_config(
    architectures: Mapping[str, str],
    *,
    d_in: int,
    d_sae: int,
    k: float,
    training_tokens: int,
    recipe: str = "paper",
    sae: Mapping[str, Any] | None = None,
    **runner: Any,
) -> MultiSAETrainingRunnerConfig:
    """SAELens' multi-SAE runner config: one activation stream, one SAE per entry of `{name: architecture}`.

    Other arguments as in `runner_config`; `hook_names` takes the place of `hook_name`.
    """
    settings = get_recipe(recipe, training_tokens, runner.get("train_batch_size_tokens"))
    saes = {
        name: sae_config(architecture, settings, d_in=d_in, d_sae=d_sae, k=k, **(sae or {}))
        for name, architecture in architectures.items()
    }
    return MultiSAETrainingRunnerConfig(saes=saes, training_tokens=training_tokens, **(settings.runner | runner))

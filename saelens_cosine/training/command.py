"""`saelens-cosine train`: SAELens' command line with our architectures, the token filter and the bundled model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sae_lens.llm_sae_training_runner import (
    LanguageModelSAETrainingRunner,
    _parse_cfg_args,  # pyright: ignore[reportPrivateUsage]  (SAELens' parser has no public name)
)

from saelens_cosine.bundled import BUNDLED
from saelens_cosine.data import load_text
from saelens_cosine.models import context_size, load_hooked_model, size_at_hook
from saelens_cosine.training.next_norm import take_next_norms
from saelens_cosine.training.norm_filter import HighNormFilter, check_max_norm_multiple, filter_high_norm_tokens
from saelens_cosine.training.recorded import record_training


def train(arguments: Sequence[str], max_norm_multiple: float | None = 10.0) -> HighNormFilter:
    """Parse SAELens' flags, train one SAE with SAELens' runner, and return the filter with its counts.

    Raises:
        ValueError: `max_norm_multiple` is no bound, `d_in` is not the size of the activations at the hook, contexts are longer than the model takes, there is no
            such hook or head, or the dataset is empty.
        argparse.ArgumentError: SAELens' parser does not accept the flags.
    """
    check_max_norm_multiple(max_norm_multiple)
    cfg = _parse_cfg_args(arguments)
    model = _bundled(cfg) if cfg.model_name == BUNDLED else None
    text = load_text(cfg.dataset_path, cfg.seed, cfg.streaming)
    try:
        runner = LanguageModelSAETrainingRunner(cfg, override_model=model, override_dataset=text.train)
    except StopIteration:
        raise ValueError(f"Dataset {cfg.dataset_path!r} is empty; there is nothing to train on.") from None
    _check_fit(cfg, runner.model)
    # cached activations are of a text that was chosen when they were made, and an SAE that goes on has read another
    elsewhere = cfg.use_cached_activations or cfg.from_pretrained_path is not None
    runner.sae.cfg.metadata.heldout_rule = None if elsewhere else text.rule
    take_next_norms(runner)
    norm_filter = filter_high_norm_tokens(runner, max_norm_multiple)
    record_training(runner.sae, cfg)
    runner.run()
    return norm_filter


def _bundled(cfg: Any) -> Any:
    """The bundled model, whose class, hook and settings go into the SAE's metadata as they are."""
    hooked = load_hooked_model(
        BUNDLED,
        cfg.llm_device or cfg.device,
        hook=cfg.hook_name,
        class_name=cfg.model_class_name,
        kwargs=cfg.model_from_pretrained_kwargs,
    )
    cfg.model_class_name, cfg.hook_name, cfg.model_from_pretrained_kwargs = (
        hooked.class_name,
        hooked.hook_name,
        hooked.kwargs,
    )
    _check_fit(cfg, hooked.model)  # before any text is read
    return hooked.model


def _check_fit(cfg: Any, model: Any) -> None:
    longest = context_size(model)
    if longest is not None and cfg.context_size > longest:
        raise ValueError(
            f"context_size={cfg.context_size} is more than the {longest} tokens that {cfg.model_name} takes; "
            f"pass --context_size {longest} or less."
        )
    size = size_at_hook(model, cfg.hook_name, cfg.hook_head_index)
    if size != cfg.sae.d_in:
        head = "" if cfg.hook_head_index is None else f", head {cfg.hook_head_index},"
        raise ValueError(
            f"d_in={cfg.sae.d_in} but the activations of {cfg.model_name} at {cfg.hook_name}{head} have size {size}; "
            f"pass --d_in {size}."
        )

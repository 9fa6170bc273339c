"""`saelens-cosine train`: SAELens' command line with our architectures, the token filter and the bundled model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sae_lens.llm_sae_training_runner import (
    LanguageModelSAETrainingRunner,
    _parse_cfg_args,  # pyright: ignore[reportPrivateUsage]  (SAELens' parser has no public name)
)

from saelens_cosine.bundled import BUNDLED, load_bundled_model
from saelens_cosine.data import load_text
from saelens_cosine.models import size_at_hook
from saelens_cosine.training.next_norm import take_next_norms
from saelens_cosine.training.norm_filter import HighNormFilter, filter_high_norm_tokens


def train(arguments: Sequence[str], max_norm_multiple: float | None = 10.0) -> HighNormFilter:
    """Parse SAELens' flags, train one SAE with SAELens' runner, and return the filter with its counts.

    Raises:
        ValueError: `d_in` is not the size of the activations at the hook, or the dataset is empty.
        argparse.ArgumentError: SAELens' parser does not accept the flags.
    """
    cfg = _parse_cfg_args(arguments)
    model: Any = load_bundled_model(cfg.llm_device or cfg.device) if cfg.model_name == BUNDLED else None
    # cached activations are of a text that was chosen when they were made
    text = None if cfg.use_cached_activations else load_text(cfg.dataset_path, cfg.seed, cfg.streaming)
    try:
        runner = LanguageModelSAETrainingRunner(cfg, override_model=model, override_dataset=text and text.train)
    except StopIteration:
        raise ValueError(f"Dataset {cfg.dataset_path!r} is empty; there is nothing to train on.") from None
    size = size_at_hook(runner.model, cfg.hook_name)
    if cfg.hook_head_index is None and size != cfg.sae.d_in:
        raise ValueError(
            f"d_in={cfg.sae.d_in} but the activations of {cfg.model_name} at {cfg.hook_name} have size {size}; "
            f"pass --d_in {size}."
        )
    if text is not None:
        runner.sae.cfg.metadata.heldout_rule = text.rule
    take_next_norms(runner)
    norm_filter = filter_high_norm_tokens(runner, max_norm_multiple)
    runner.run()
    return norm_filter

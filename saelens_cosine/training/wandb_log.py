"""Keep a training of SAELens going when Weights & Biases does not.

SAELens has no seam around it: its modules call `wandb`. While a run lasts, that name means a stand-in in the two that a single
run uses, and the upload of checkpoints is the logger's own method.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import sae_lens.llm_sae_training_runner
import sae_lens.training.sae_trainer
import wandb
from sae_lens import LoggingConfig

from saelens_cosine.files.secrets import without_secrets

MODULES = (sae_lens.llm_sae_training_runner, sae_lens.training.sae_trainer)


@contextmanager
def wandb_never_stops(logger: LoggingConfig) -> Generator[None]:
    """While the block lasts, the first call of W&B that fails is told of, and the run goes on without W&B.

    Args:
        logger: of the run's config, which its trainer shares.
    """
    if not logger.log_to_wandb:
        yield
        return
    before: list[Any] = [module.wandb for module in MODULES]
    for module in MODULES:
        vars(module)["wandb"] = _StandIn(logger)
    vars(logger)["log"] = _kept_going(logger.log, logger)
    try:
        yield
    finally:
        for module, its in zip(MODULES, before, strict=True):
            vars(module)["wandb"] = its
        del vars(logger)["log"]


class _StandIn:
    def __init__(self, logger: LoggingConfig):
        self._logger = logger

    def __getattr__(self, name: str) -> Any:
        return _histogram if name == "Histogram" else _kept_going(getattr(wandb, name), self._logger)


def _histogram(values: Any) -> Any:
    """W&B's, or None where numpy finds no bins: values that differ by less than 64 floats, or that are not finite."""
    try:
        return wandb.Histogram(values)
    except ValueError as error:
        warnings.warn(f"A histogram for W&B is left out: {error}", stacklevel=2)
    return None


def _kept_going(call: Callable[..., Any], logger: LoggingConfig) -> Callable[..., Any]:
    @functools.wraps(call)
    def kept_going(*args: Any, **kwargs: Any) -> Any:
        if not logger.log_to_wandb:
            return None
        try:
            return call(*args, **kwargs)
        except Exception as error:  # W&B's own, the network's, its files': none is worth a run
            logger.log_to_wandb = False
            warnings.warn(
                f"W&B has failed ({type(error).__name__}: {without_secrets(str(error))}); the run goes on without it. "
                "Its figures until here are where W&B keeps them (wandb/).",
                stacklevel=2,
            )

    return kept_going

"""Cosine-scored sparse autoencoders for SAELens. Importing this package registers their architectures in SAELens."""

from saelens_cosine.loading import CheckpointError, from_pretrained
from saelens_cosine.metrics.threshold import fit_threshold
from saelens_cosine.registry import (
    INFERENCE_ARCHITECTURES,
    TRAINING_ARCHITECTURES,
    register_inference,
    register_training,
)
from saelens_cosine.rescoring import rescore
from saelens_cosine.saes import *  # noqa: F403
from saelens_cosine.saes import __all__ as _architectures
from saelens_cosine.score import cosine_score, folded_score

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "INFERENCE_ARCHITECTURES",
    "TRAINING_ARCHITECTURES",
    "cosine_score",
    "fit_threshold",
    "folded_score",
    "from_pretrained",
    "register_inference",
    "register_training",
    "rescore",
]
__all__ += _architectures  # pyright: ignore[reportUnsupportedDunderAll]

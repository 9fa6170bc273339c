"""Cosine-scored sparse autoencoders for SAELens. Importing this package registers their architectures in SAELens."""

from saelens_cosine.registry import (
    INFERENCE_ARCHITECTURES,
    TRAINING_ARCHITECTURES,
    register_inference,
    register_training,
)
from saelens_cosine.saes import (
    CosineBatchTopKTrainingSAE,
    CosineBatchTopKTrainingSAEConfig,
    CosineJumpReLUSAE,
    CosineJumpReLUSAEConfig,
    CosineTopKSAE,
    CosineTopKSAEConfig,
    CosineTopKTrainingSAE,
    CosineTopKTrainingSAEConfig,
    InnerProductBatchTopKTrainingSAE,
    InnerProductBatchTopKTrainingSAEConfig,
    InnerProductTopKTrainingSAE,
    InnerProductTopKTrainingSAEConfig,
    PerFeatureCosineBatchTopKTrainingSAE,
    PerFeatureCosineBatchTopKTrainingSAEConfig,
    PerFeatureCosineJumpReLUSAE,
    PerFeatureCosineJumpReLUSAEConfig,
    PerFeatureCosineTopKSAE,
    PerFeatureCosineTopKSAEConfig,
    PerFeatureCosineTopKTrainingSAE,
    PerFeatureCosineTopKTrainingSAEConfig,
)
from saelens_cosine.score import cosine_score, folded_score

__version__ = "0.1.0"

__all__ = [
    "INFERENCE_ARCHITECTURES",
    "TRAINING_ARCHITECTURES",
    "cosine_score",
    "folded_score",
    "register_inference",
    "register_training",
    "CosineBatchTopKTrainingSAE",
    "CosineBatchTopKTrainingSAEConfig",
    "CosineJumpReLUSAE",
    "CosineJumpReLUSAEConfig",
    "CosineTopKSAE",
    "CosineTopKSAEConfig",
    "CosineTopKTrainingSAE",
    "CosineTopKTrainingSAEConfig",
    "InnerProductBatchTopKTrainingSAE",
    "InnerProductBatchTopKTrainingSAEConfig",
    "InnerProductTopKTrainingSAE",
    "InnerProductTopKTrainingSAEConfig",
    "PerFeatureCosineBatchTopKTrainingSAE",
    "PerFeatureCosineBatchTopKTrainingSAEConfig",
    "PerFeatureCosineJumpReLUSAE",
    "PerFeatureCosineJumpReLUSAEConfig",
    "PerFeatureCosineTopKSAE",
    "PerFeatureCosineTopKSAEConfig",
    "PerFeatureCosineTopKTrainingSAE",
    "PerFeatureCosineTopKTrainingSAEConfig",
]

"""SAE architectures, one file per selector. Importing this package registers them in SAELens."""

from saelens_cosine.saes.batchtopk_sae import (
    CosineBatchTopKTrainingSAE,
    CosineBatchTopKTrainingSAEConfig,
    InnerProductBatchTopKTrainingSAE,
    InnerProductBatchTopKTrainingSAEConfig,
    PerFeatureCosineBatchTopKTrainingSAE,
    PerFeatureCosineBatchTopKTrainingSAEConfig,
)
from saelens_cosine.saes.jumprelu_sae import (
    CosineJumpReLUSAE,
    CosineJumpReLUSAEConfig,
    PerFeatureCosineJumpReLUSAE,
    PerFeatureCosineJumpReLUSAEConfig,
)
from saelens_cosine.saes.topk_sae import (
    CosineTopKSAE,
    CosineTopKSAEConfig,
    CosineTopKTrainingSAE,
    CosineTopKTrainingSAEConfig,
    InnerProductTopKTrainingSAE,
    InnerProductTopKTrainingSAEConfig,
    PerFeatureCosineTopKSAE,
    PerFeatureCosineTopKSAEConfig,
    PerFeatureCosineTopKTrainingSAE,
    PerFeatureCosineTopKTrainingSAEConfig,
)

__all__ = [
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

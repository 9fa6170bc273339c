"""What is scored where features are known: SAELens' metrics, and F1 when each feature may be claimed once.

SAELens' F1 lets every latent detect the feature that its decoder row is nearest to, so that several may claim one feature and
the others go without anybody noticing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from sae_lens.saes.sae import SAE
from sae_lens.synthetic import ActivationGenerator, FeatureDictionary, SyntheticDataEvalResult
from sae_lens.synthetic.evals import ClassificationMetricsCalculator
from sae_lens.util import cosine_similarities
from scipy.optimize import linear_sum_assignment


@dataclass
class Recovery(SyntheticDataEvalResult):
    """
    SAELens' own metrics, and what they leave out.

    Args:
        f1_one_to_one (float): Mean F1 with each feature claimed by one latent at most, see `f1_one_to_one`. In SAELens' `classification.f1_score` several latents may claim one feature.
    """

    f1_one_to_one: float


MEASURES: Mapping[str, Callable[[Recovery], float]] = {
    "mcc": lambda result: result.mcc,
    "f1": lambda result: result.classification.f1_score,
    "f1_one_to_one": lambda result: result.f1_one_to_one,
    "explained_variance": lambda result: result.explained_variance,
    "dead": lambda result: float(result.dead_latents),
    "l0": lambda result: result.sae_l0,
}


@torch.no_grad()
def f1_one_to_one(
    sae: SAE[Any], dictionary: FeatureDictionary, generator: ActivationGenerator, samples: int, batch: int
) -> float:
    """Mean F1 of latents paired with features of their own: the pairs that SAELens' MCC is the mean cosine of.

    As many pairs as there are latents or features, whichever are fewer. A latent fires where its code is not 0.

    Args:
        sae: an inference form.
        dictionary: what turns features into activations.
        generator: draws the features' activations.
        samples: how many to draw.
        batch: how many at a time.
    """
    cosines = cosine_similarities(sae.W_dec, dictionary.feature_vectors).abs()
    latents, features = map(torch.from_numpy, linear_sum_assignment(cosines.cpu().numpy(), maximize=True))
    counts = ClassificationMetricsCalculator(sae.W_dec[latents], dictionary.feature_vectors)
    counts.best_matches = features.to(sae.W_dec.device)
    for start in range(0, samples, batch):
        feature_acts = generator.sample(min(batch, samples - start))
        counts.add_batch(sae.encode(dictionary(feature_acts)).to_dense()[:, latents], feature_acts)
    return counts.compute().f1_score

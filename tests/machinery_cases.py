"""What test_saelens_machinery and its neighbours share."""

import torch
from helpers import (
    CONTEXT,
    HOOK,
    ONE_PER_SELECTOR,
    VOCABULARY,
    make_config,
    tiny_dataset,
    tiny_runner_config,
)
from sae_lens import LanguageModelSAETrainingRunner

D, F = 16, 32
SOME = [*ONE_PER_SELECTOR, "cosine_batchtopk", "inner_product_topk", "magnitude_bypass_batchtopk"]
"""Every selector and every score, for what SAELens does without asking which."""
TOKENS = torch.randint(1, len(VOCABULARY), (4, CONTEXT), generator=torch.Generator().manual_seed(5))


def small(name, **overrides):
    return make_config(name, d_in=D, d_sae=F, k=4, **overrides)


def state(sae):
    return {key: tensor.detach().clone() for key, tensor in sae.state_dict().items()}


def run_tiny(model, sae_config, path, **overrides):
    runner = LanguageModelSAETrainingRunner(
        tiny_runner_config(sae_config, path, **overrides), override_dataset=tiny_dataset(), override_model=model
    )
    start = state(runner.sae)
    return runner.run(), start


def model_activations(model, hook=HOOK):
    with torch.no_grad():
        return model.run_with_cache(TOKENS)[1][hook]

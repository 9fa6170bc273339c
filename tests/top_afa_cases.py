"""What test_top_afa and its neighbours share."""

import torch
from helpers import (
    make_activations,
)

from saelens_cosine.saes.top_afa_sae import (
    TopAFATrainingSAE,
    TopAFATrainingSAEConfig,
)

D_IN, D_SAE = 7, 40
EXACT = 1e-12
RAW_CODES = {"rescale_acts_by_decoder_norm": False}
UNIT = {"rescale_acts_by_decoder_norm": False, "unit_decoder": True}
DECODERS = [{}, RAW_CODES, UNIT]


def make_top_afa(**overrides) -> TopAFATrainingSAE:
    """float64, random weights, decoder rows of norm 0.2 to 3 unless they are to be 1; about half the features positive."""
    config = TopAFATrainingSAEConfig(**{"d_in": D_IN, "d_sae": D_SAE, "dtype": "float64", **overrides})
    sae = TopAFATrainingSAE(config)
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(0.15 * torch.randn(parameter.shape, generator=rng, dtype=torch.float64))
        sae.W_dec.div_(sae.W_dec.norm(dim=-1, keepdim=True))
        if not config.unit_decoder:
            sae.W_dec.mul_(torch.linspace(0.2, 3, config.d_sae, dtype=torch.float64).unsqueeze(-1))
    return sae.eval()


def doubles(*shape: int, seed: int = 0) -> torch.Tensor:
    return make_activations(*shape, seed=seed, dtype=torch.float64)

"""An SAE on attention heads is measured on flat tokens, as every other, and is left as it was."""

import pytest
import torch
from helpers import make_activations
from sae_lens import JumpReLUSAE, JumpReLUSAEConfig

from saelens_cosine.metrics.causal.code_edits import reconstruct
from saelens_cosine.metrics.codes import canonical_codes
from saelens_cosine.metrics.norms.encoder_gradients import encoder_gradients
from saelens_cosine.metrics.norms.norm_noise import norm_noise
from saelens_cosine.metrics.norms.norm_response import norm_response
from saelens_cosine.metrics.reconstruction.afa import measure_afa, summarize_afa
from saelens_cosine.metrics.reconstruction.by_norm import diagnose_reconstruction
from saelens_cosine.metrics.threshold import fit_threshold

X = make_activations(60, 6)


def an_sae(**config):
    """Tokens of three heads with two entries each."""
    torch.manual_seed(0)
    config = JumpReLUSAEConfig(d_in=6, d_sae=8, **config)
    config.metadata.hook_name = "blocks.0.attn.hook_z"
    sae = JumpReLUSAE(config)
    sae.W_enc.data.normal_()
    sae.threshold.data.fill_(0.1)
    return sae


@pytest.mark.parametrize(
    "measure",
    [
        lambda sae: canonical_codes(sae, X).toarray().tolist(),
        lambda sae: reconstruct(sae)(X).tolist(),
        lambda sae: diagnose_reconstruction(sae, X),
        lambda sae: norm_response(sae, X),
        lambda sae: norm_noise(sae, X),
        lambda sae: encoder_gradients(sae, X),
        lambda sae: summarize_afa(measure_afa(sae, X)),
        lambda sae: fit_threshold(sae, X, 2.5),
    ],
)
def test_it_is_measured_as_one_that_knows_no_heads(measure):
    heads = an_sae(reshape_activations="hook_z")
    assert measure(heads) == measure(an_sae())
    assert heads.hook_z_reshaping_mode
    assert heads.decode(heads.encode(X.view(60, 3, 2))).shape == (60, 3, 2)

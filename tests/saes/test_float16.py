"""float16 has no number above 65,504: reconstructions of long activations, in every inference form, by every way into it.

The tokens have norms around 1,000 and sinks of 25,000, and the SAEs the scale that training gives them there: codes are of
the size of the norm. What differs by less than 2 % of a token's float32 reconstruction is float16's rounding.
"""

import pytest
import torch
from helpers import COSINE, FREE_DECODER, OURS, make_activations, make_sae, middle_score, save_inference
from sae_lens import SAE

import saelens_cosine
from saelens_cosine.score import folded_score

D_IN, D_SAE, K = 64, 96, 8

LOADERS = {
    "SAE.load_from_disk": lambda path: SAE.load_from_disk(path, dtype="float16"),
    "from_pretrained": lambda path: saelens_cosine.from_pretrained(path, dtype=torch.float16),
    "to": lambda path: SAE.load_from_disk(path).to(torch.float16),
    "half": lambda path: SAE.load_from_disk(path).half(),
}


def long_activations():
    x = make_activations(200, D_IN, spread=0.2, seed=4)
    x = x / x.norm(dim=-1).mean() * 1000
    x[::20] *= 25
    return x


@torch.no_grad()
def sae_of_long_activations(name, **overrides):
    """A training SAE with codes of the size of the norm: exp(b) n^a is n at n = 1,000, for any a."""
    sae = make_sae(name, d_in=D_IN, d_sae=D_SAE, k=K, **overrides)
    sae.W_enc.div_(sae.W_enc.norm(dim=0))
    sae.b_dec.mul_(100)
    if hasattr(sae, "log_scale"):
        # with exponents from -0.2 to 1.2
        sae.norm_exponent.mul_(0.7).add_(0.15 if sae.norm_exponent.ndim else 0.0)
        sae.log_scale.copy_((1 - sae.norm_exponent) * torch.log(torch.tensor(1000.0)))
    x = long_activations()[1::20]
    if hasattr(sae, "topk_threshold"):
        sae.topk_threshold.copy_(middle_score(sae, x, K))
    elif hasattr(sae, "threshold_unit"):
        sae.threshold.copy_(middle_score(sae, x, K) / sae.threshold_unit / sae.cfg.threshold_lr_multiplier)
    return sae


def assert_within_two_percent(output, codes, wanted, wanted_codes):
    assert output.isfinite().all()
    # where two scores are equal to float16, it may choose the other one
    same = ((codes != 0) == (wanted_codes != 0)).all(dim=-1)
    assert same.float().mean() > 0.8
    error = (output.double() - wanted.double()).norm(dim=-1) / wanted.double().norm(dim=-1)
    assert error[same].max() < 0.02


@pytest.mark.parametrize("name", OURS)
@torch.no_grad()
def test_reconstructions_of_a_saved_sae(name, tmp_path):
    sae, x = save_inference(sae_of_long_activations(name), tmp_path), long_activations()
    codes = sae.encode(x)
    wanted = sae.decode(codes)
    assert (codes[::20] != 0).any(dim=-1).all()
    for how, load in LOADERS.items():
        narrow = load(tmp_path)
        assert narrow.W_enc.dtype == narrow.dtype == torch.float16, how
        assert_within_two_percent(narrow(x.half()), narrow.encode(x.half()), wanted, codes)
        found = narrow.encode_sparse(x.half())
        again = torch.zeros(len(x), D_SAE, dtype=torch.float16).scatter_add_(-1, found.indices, found.values)
        assert torch.equal(again, narrow.encode(x.half())), how
    with torch.enable_grad():
        assert_within_two_percent(narrow(x.half()).detach(), narrow.encode(x.half()).detach(), wanted, codes)


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("gradients", [False, True])
def test_reconstructions_under_autocast(name, gradients, tmp_path):
    sae, x = save_inference(sae_of_long_activations(name), tmp_path), long_activations()
    with torch.set_grad_enabled(gradients):
        codes = sae.encode(x)
        wanted = sae.decode(codes)
        with torch.autocast("cpu", dtype=torch.float16):
            assert_within_two_percent(sae(x), sae.encode(x), wanted, codes)


@pytest.mark.parametrize("name", ["cosine_topk", "magnitude_bypass_topk", "top_afa"])
def test_decoder_norms_and_training_forms(name):
    sae, x = sae_of_long_activations(name, **FREE_DECODER), long_activations()
    with torch.no_grad():
        sae.W_dec.mul_(3 / sae.W_dec.norm(dim=-1, keepdim=True))
        codes = sae.encode(x)
        wanted = sae.decode(codes)
        sae.half()
        assert_within_two_percent(sae(x.half()), sae.encode(x.half()), wanted, codes)


def test_float16_score_by_hand():
    # x_c = (30,000, 40,000): n = 50,000. Column (600, 800): exp(b) = 1,000, cosine 1. <x_c, w> = 5e7, beyond float16.
    # a = 0.1: n^0.1 = exp(0.1 * 10.8198) = 2.9506, times 1,000, and 2 of b_enc: 2952.6
    x_c, W_enc = torch.tensor([[30000.0, 40000.0]]), torch.tensor([[600.0], [800.0]], dtype=torch.float16)
    score = folded_score(x_c, W_enc, torch.tensor([2.0], dtype=torch.float16), torch.tensor(0.1))
    assert score.dtype == torch.float32
    assert score.item() == pytest.approx(2952.6, rel=2e-3)


@pytest.mark.parametrize("name", ["cosine_jumprelu", "per_feature_cosine_topk"])
def test_other_dtypes_keep_their_score(name, tmp_path):
    """The product before the division, as in SAELens: float32 bit for bit at a = 1, and bfloat16, whose range is float32's."""
    assert name in COSINE
    sae = save_inference(make_sae(name), tmp_path)
    sae.norm_exponent.data.fill_(1.0)
    for dtype in (torch.float32, torch.bfloat16):
        sae.to(dtype)
        x_c = sae.process_sae_in(make_activations(5, 7, dtype=dtype))
        assert torch.equal(sae.score(x_c), (x_c.to(dtype) @ sae.W_enc).float() + sae.b_enc)

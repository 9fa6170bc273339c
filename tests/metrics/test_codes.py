"""Codes of many tokens as their active entries."""

import pytest
import torch
from encode_sparse_cases import ALL, D, F, make  # noqa: F401
from helpers import assert_close, make_activations, make_sae, save_inference
from sae_lens import JumpReLUSAE, JumpReLUSAEConfig

from saelens_cosine.kernels.codes import EntryCodes
from saelens_cosine.kernels.entries import Entries
from saelens_cosine.metrics import codes
from saelens_cosine.metrics.codes import reconstruct, scored_form, sparse_codes
from saelens_cosine.metrics.not_finite import NotFiniteError
from saelens_cosine.saes.path import decline_reason
from saelens_cosine.saes.scored_sae import ScoredSAE

TOKENS = 60


@pytest.mark.parametrize("at_once", [16, 64])
@pytest.mark.parametrize("name", [name for name in ALL if name.endswith("saved")])
def test_codes_of_a_saved_sae_are_the_dense_ones(name, at_once, make, monkeypatch):
    sae, x = make(name), make_activations(TOKENS, D)
    with torch.no_grad():
        expected = sae.encode(x)
    monkeypatch.setattr(codes, "ENTRY_TOKENS", at_once)
    if decline_reason(sae, x) is None:  # entry by entry: nothing dense is made
        monkeypatch.setattr(ScoredSAE, "encode", None)
    found = sparse_codes(sae, x)
    assert found.shape == (TOKENS, F)
    assert found.indices.dtype == "int32"
    assert_close(torch.from_numpy(found.toarray()), expected, 1e-6)
    assert found.nnz == expected.count_nonzero()


@pytest.mark.parametrize("name", ["cosine_topk, saved", "per_feature_cosine_batchtopk, saved"])
def test_what_has_no_entries_of_its_own_is_left_to_encode(name, make):
    sae, x = make(name), make_activations(TOKENS, D)
    x[7, 1] = torch.nan  # the filter of entries lets none of this token's pass
    with pytest.raises(NotFiniteError, match="1 of 60 tokens"):
        sparse_codes(sae, x)
    ones = torch.ones(TOKENS, F)
    vars(sae)["encode"] = lambda x: ones[: len(x)]  # somebody's own
    assert sparse_codes(sae, x[:7]).nnz == 7 * F
    del vars(sae)["encode"]
    sae.__class__ = type("Mine", (type(sae),), {"encode": lambda self, x: ones[: len(x)]})
    assert sparse_codes(sae, x[:7]).nnz == 7 * F


@pytest.mark.parametrize("architecture", ["cosine_topk", "magnitude_bypass_batchtopk", "inner_product_batchtopk"])
@pytest.mark.parametrize("k", [3, 60], ids=["few", "many"])
def test_reconstructions_are_those_of_dense_codes(architecture, k, tmp_path):
    sae = save_inference(make_sae(architecture, d_in=D, d_sae=F, k=k), tmp_path).to(torch.float64)
    x = make_activations(TOKENS, D, dtype=torch.float64)
    with torch.no_grad():
        dense = sae.encode(x)
        expected = sae.decode(dense)
    found, x_hat = reconstruct(sae, x)
    assert_close(x_hat, expected, 1e-12)
    assert_close(found.to_dense(), dense, 1e-12)
    assert len(found.values) == dense.count_nonzero()


def test_a_code_of_zero_is_none():
    entries = Entries(torch.tensor([0, 0, 2]), torch.tensor([1, 4, 0]), 3, 5)
    found = codes._compressed(EntryCodes(entries, torch.tensor([2.0, 0.0, torch.nan])))
    assert found.entries.tokens.tolist() == [0, 2]
    assert found.entries.features.tolist() == [1, 0]
    assert found.values[0] == 2


@pytest.mark.parametrize("centred", [True, False])
def test_saelens_own_jumprelu_is_encoded_entry_by_entry(centred, monkeypatch):
    sae = JumpReLUSAE(JumpReLUSAEConfig(d_in=D, d_sae=61, apply_b_dec_to_input=centred))
    rng = torch.Generator().manual_seed(3)
    for name, parameter in sae.named_parameters():
        parameter.data = torch.randn(parameter.shape, generator=rng) * (0.3 if name == "b_enc" else 1)
    sae.threshold.data = torch.linspace(-1, 6, 61)
    x = make_activations(500, D, seed=5, spread=1.0)
    x_c = (x - sae.b_dec if centred else x).double()
    scores = x_c @ sae.W_enc.double() + sae.b_enc.double()
    expected = scores.relu() * (scores > sae.threshold.double())
    encode = JumpReLUSAE.encode
    monkeypatch.setattr(JumpReLUSAE, "encode", lambda *_: pytest.fail("all codes were made"))
    found = torch.from_numpy(sparse_codes(sae, x).toarray())
    assert_close(found, expected.float(), 1e-5)
    entries, x_hat = reconstruct(sae, x)
    assert_close(x_hat, (expected @ sae.W_dec.double() + sae.b_dec.double()).float(), 1e-5)
    assert len(entries.values) == int((expected != 0).sum())
    with sae.hooks(fwd_hooks=[("hook_sae_input", lambda x, hook: 2 * x)]):
        twice = sparse_codes(sae, x / 2)
    assert_close(torch.from_numpy(twice.toarray()), expected.float(), 1e-5)
    assert scored_form(sae, x[:255]) is None  # few tokens are not worth preparing its encoder
    # what is not this function, or is seen by somebody, is asked itself
    monkeypatch.setattr(JumpReLUSAE, "encode", encode)
    seen = []
    with sae.hooks(fwd_hooks=[("hook_sae_acts_post", lambda codes, hook: seen.append(codes))]):
        sparse_codes(sae, x)
    assert seen
    normalised = JumpReLUSAE(JumpReLUSAEConfig(d_in=D, d_sae=61, normalize_activations="layer_norm"))
    assert scored_form(normalised, x) is None
    assert scored_form(sae.bfloat16(), x) is None

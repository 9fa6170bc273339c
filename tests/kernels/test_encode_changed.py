"""Encoding after weights have changed, and in chunks."""

import copy

import pytest
import torch
from encode_sparse_cases import (
    ALL,
    CHANGES,
    SAVED,
    B,
    D,
    F,
    K,
    Sizes,
    assert_same_codes,
    dense_codes,
    double,
    fold_decoder,
    in_place,
    make,  # noqa: F401
    scattered,
)
from helpers import (
    FREE_DECODER,
    GLOBAL,
    SELECTORS,
    assert_close,
    make_activations,
    make_sae,
    read_config,
    save_inference,
    selector_of,
)
from sae_lens import SAE
from safetensors.torch import load_file

from saelens_cosine.saes import encoding


@pytest.mark.parametrize(("name", "change"), CHANGES, ids=lambda v: v if isinstance(v, str) else v.__name__)
def test_codes_follow_the_weights(name, change, make):
    sae, x = make(name, **FREE_DECODER), make_activations(B, D)
    with torch.no_grad():  # the norms that a fold moves; a saved SAE may have none
        sae.W_dec.mul_(torch.linspace(0.5, 2, F).unsqueeze(-1))
    before = assert_same_codes(sae, x)
    try:
        change(sae)
    except NotImplementedError:  # one log-scale, or none, cannot hold a norm per feature
        assert change is fold_decoder
        assert name in GLOBAL or "bypass" in name
        return
    after = assert_same_codes(sae, x.to(sae.dtype))
    # with rescaling, codes count in decoder norms already, folded or not
    in_norms = getattr(sae.cfg, "rescale_acts_by_decoder_norm", False)
    if change is not double and not (change is fold_decoder and in_norms):
        assert not torch.allclose(after, before)


def test_a_model_that_was_loaded_for_inference_alone(make, tmp_path):
    make("cosine_topk, saved")
    with torch.inference_mode():
        sae = SAE.load_from_disk(tmp_path).eval()
        assert_same_codes(sae, make_activations(B, D))


def test_copies_keep_their_own_rows(make):
    sae, x = make("cosine_topk"), make_activations(B, D)
    sae.encode_sparse(x)
    other = copy.deepcopy(sae)
    in_place(other)
    with torch.no_grad():
        other.b_enc.zero_()
    assert_same_codes(other, x)
    assert_same_codes(sae, x)


def set_chunk(monkeypatch, entries):
    monkeypatch.setattr(encoding, "CHUNK_ENTRIES", entries)  # of some tokens and all features
    monkeypatch.setattr(encoding, "CPU_TILE", entries)  # of many tokens and some features


@pytest.mark.parametrize("tokens", [8, 61])
@pytest.mark.parametrize("name", SAVED)
def test_chunks_change_nothing(name, tokens, make, monkeypatch):
    sae, x = make(name, **FREE_DECODER), make_activations(tokens, D)
    with torch.no_grad():
        expected = sae.encode_with_hidden_pre(x)[0]
    for chunk in (1, F, 8 * F + 1, 2**22):
        set_chunk(monkeypatch, chunk)
        codes = dense_codes(sae, x)
        assert torch.equal(codes != 0, expected != 0)
        assert_close(codes, expected, 1e-6)


@pytest.mark.parametrize("name", SAVED)
def test_a_chunk_is_all_that_is_held_of_the_scores(name, make, monkeypatch):
    set_chunk(monkeypatch, 16 * 2048)
    sae, x = make(name, d_in=8, d_sae=2048, k=2), make_activations(512, 8)
    with Sizes() as sizes:
        codes = dense_codes(sae, x)
    assert sizes.largest_but(codes) == 16 * 2048
    with Sizes() as sizes:
        sae.encode(x)  # with gradients: all at once
    assert sizes.largest_but(codes) == 512 * 2048


@pytest.mark.parametrize("name", ALL)
def test_encode_is_differentiable(name, make):
    sae = make(name)
    inputs = [make_activations(B, D).requires_grad_() for _ in range(2)]
    gradients = []
    for x, codes in zip(inputs, (sae.encode(inputs[0]), sae.encode_with_hidden_pre(inputs[1])[0]), strict=True):
        sae.zero_grad()
        codes.square().sum().backward()
        gradients.append([x.grad, *(p.grad for p in sae.parameters() if p.grad is not None)])
        assert len(gradients[-1]) >= 3  # W_enc and b_dec at least
    for one, other in zip(*gradients, strict=True):
        assert_close(one, other, 0)


@pytest.mark.parametrize("name", ALL)
def test_encode_goes_through_hooks(name, make, monkeypatch):
    set_chunk(monkeypatch, F)
    sae, x, seen = make(name), make_activations(B, D), {}

    def change(tensor, hook):
        seen[hook.name] = tensor.shape
        return tensor * 0 + 2 if hook.name.endswith("post") else tensor

    points = ["hook_sae_input", "hook_sae_acts_pre", "hook_sae_acts_post"]
    plain = dense_codes(sae, x)
    with sae.hooks(fwd_hooks=[(point, change) for point in points]):
        assert torch.equal(dense_codes(sae, x), torch.full((B, F), 2.0))
    assert seen == {"hook_sae_input": (B, D), "hook_sae_acts_pre": (B, F), "hook_sae_acts_post": (B, F)}
    assert torch.equal(dense_codes(sae, x), plain)


@pytest.mark.parametrize(("tokens", "d_sae"), [(200, F), (4096, 129)])  # the second does not fill its last tile
@pytest.mark.parametrize(
    "name", ["cosine_topk", "per_feature_cosine_batchtopk", "cosine_abstopk", "per_feature_cosine_standard"]
)
def test_exponent_one_is_saelens_own_class_bit_for_bit(name, tokens, d_sae, tmp_path):
    sae = make_sae(name, d_in=D, d_sae=d_sae, k=K)
    sae.norm_exponent.data.fill_(1.0)
    ours = save_inference(sae, tmp_path)
    tensors = load_file(tmp_path / "sae_weights.safetensors")
    del tensors["norm_exponent"]
    stock = SAE.from_dict({**read_config(tmp_path), "architecture": SELECTORS[selector_of(name)].saved_as})
    stock.load_state_dict(tensors)
    x = make_activations(tokens, D)
    assert torch.equal(ours.encode(x), stock.encode(x))
    with torch.no_grad():
        assert torch.equal(ours.encode(x), stock.encode(x))
        assert_close(scattered(ours, ours.encode_sparse(x)), stock.encode(x), 1e-6)
    assert stock.encode(x).any()

"""`encode_sparse`: the codes of `encode`, without the dense tensor."""

import pytest
import torch
from encode_sparse_cases import (
    ALL,
    SAVED,
    TRAINED,
    B,
    D,
    F,
    K,
    Sizes,
    assert_same_codes,
    dense_codes,
    make,  # noqa: F401
    scattered,
    selects_per_token,
)
from helpers import (
    BATCHTOPK,
    FREE_DECODER,
    SELECTORS,
    assert_close,
    make_activations,
    make_sae,
    save_inference,
    selector_of,
)

from saelens_cosine.kernels import filter
from saelens_cosine.saes import encoding


def entries_only(names):
    """Those whose selection the kernels make entry by entry."""
    return [name for name in names if SELECTORS[selector_of(name.removesuffix(", saved"))].entries]


@pytest.mark.parametrize("options", [{}, FREE_DECODER], ids=["unit", "free"])
@pytest.mark.parametrize("name", ALL)
def test_codes_are_the_dense_ones(name, options, make):
    sae = make(name, **options)
    l0 = (assert_same_codes(sae, make_activations(200, D)) != 0).sum(-1).float().mean().item()
    assert l0 == K if selects_per_token(sae) else 1 <= l0 < (10 if name in entries_only(ALL) else F)
    sae.to(torch.float64)
    assert_same_codes(sae, make_activations(200, D, dtype=torch.float64), 1e-13)


@pytest.mark.parametrize("shape", [(), (1,), (B,), (4, 15), (2, 1, 3), (0,), (2, 0)], ids=str)
@pytest.mark.parametrize("name", ALL)
def test_any_leading_shape(name, shape, make):
    assert_same_codes(make(name), make_activations(*shape, D))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", ["cosine_topk", "per_feature_cosine_batchtopk, saved"])
def test_activations_of_another_dtype(name, dtype, make):
    assert_same_codes(make(name), make_activations(B, D, dtype=dtype))


@pytest.mark.parametrize("n_on", [0, 2], ids=["none", "some"])
@pytest.mark.parametrize(
    "name", [name for name in ALL if not any(part in name for part in ("abstopk", "gated", "afa"))]
)
def test_fewer_positive_scores_than_wanted(name, n_on, make):
    sae = make(name)
    with torch.no_grad():
        sae.b_enc.fill_(-1e4)
        sae.b_enc[7 : 7 + n_on] = 1e4
    codes = assert_same_codes(sae, make_activations(B, D))
    assert (codes != 0).sum() == n_on * B


@pytest.mark.parametrize("name", [name for name in TRAINED if name in BATCHTOPK])
@pytest.mark.parametrize("k", [5, 2.5])
def test_a_batchtopk_without_a_threshold_selects_over_the_batch(name, k, make):
    sae = make(name, k=k)
    sae.topk_threshold.zero_()
    codes = assert_same_codes(sae, make_activations(4, 15, D))
    assert (codes != 0).sum() == int(k * 60)


@pytest.mark.parametrize("name", ["cosine_batchtopk, saved", "per_feature_cosine_batchtopk, saved"])
def test_a_threshold_per_feature(name, make):
    sae = make(name)
    x = make_activations(B, D)
    with torch.no_grad():
        pre = sae.encode_with_hidden_pre(x)[1]
        sae.threshold.copy_(torch.linspace(-1, 0.99, F) * pre.abs().max(dim=0).values)
    expected = torch.where((pre > 0) & (pre > sae.threshold), pre, 0)
    assert torch.equal(assert_same_codes(sae, x), expected)
    kept, positive = (expected > 0).sum(dim=0), (pre > 0).sum(dim=0)
    assert torch.equal(kept[:150], positive[:150])  # a threshold below 0 lets through what is positive
    assert 0 < kept[150:].sum() < positive[150:].sum() / 2


@pytest.mark.parametrize("name", ALL)
def test_a_token_that_is_not_finite_leaves_the_others_alone(name, make):
    sae = make(name)
    x = make_activations(B, D)
    clean = scattered(sae, sae.encode_sparse(x))
    x[3, 1] = torch.nan
    sae.floor_hint = None
    found = scattered(sae, sae.encode_sparse(x))
    others = torch.arange(B) != 3
    assert torch.equal(found[others] != 0, clean[others] != 0)
    assert_close(found[others], clean[others])
    x[3, 1] = 0
    assert_same_codes(sae, x)


@pytest.mark.parametrize("hint", [None, 0.0, 1e30, torch.nan])
@pytest.mark.parametrize("name", ["cosine_topk", "per_feature_cosine_topk, saved", "cosine_batchtopk"])
def test_the_hint_changes_no_result(name, hint, make):
    sae = make(name)
    if name in BATCHTOPK:
        sae.topk_threshold.zero_()
    for seed in range(3):
        sae.floor_hint = None if hint is None else torch.tensor(hint)
        assert_same_codes(sae, make_activations(B, D, seed=seed))


def test_heads_are_flattened_as_in_encode(tmp_path):
    trained = make_sae("per_feature_cosine_batchtopk", d_in=D, d_sae=F, k=K, reshape_activations="hook_z")
    sae = save_inference(trained, tmp_path).eval()
    z = make_activations(2, 9, D).view(2, 9, 4, 6)
    codes = sae.encode_sparse(z)
    assert_close(scattered(sae, codes), dense_codes(sae, z), 1e-6)
    assert_close(dense_codes(sae, z), dense_codes(trained, z.view(2, 9, D)))


def test_a_wrong_size_is_named(make):
    with pytest.raises(ValueError, match=r"d_in=24\b.* size 5\b"):
        make("cosine_topk, saved").encode_sparse(torch.zeros(2, 5))


@pytest.mark.parametrize("chunk", [F - 1, 7 * F, 2**22])
@pytest.mark.parametrize("name", ALL)
def test_a_bfloat16_sae(name, chunk, make, monkeypatch):
    monkeypatch.setattr(encoding, "CHUNK_ENTRIES", chunk)
    sae = make(name)
    sae.to(torch.bfloat16)
    x = make_activations(3, 20, D)
    expected = assert_same_codes(sae, x, tolerance=2**-8)
    assert expected.dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["cosine_topk", *SAVED])
def test_hooks_do_not_see_sparse_codes(name, make):
    sae, x, called = make(name), make_activations(B, D), []
    clean = sae.encode_sparse(x)
    for point in (sae.hook_sae_acts_pre, sae.hook_sae_acts_post):
        point.add_hook(lambda tensor, hook: called.append(hook.name) or tensor * 0)
    codes = sae.encode_sparse(x)
    assert called == []
    assert torch.equal(codes.indices, clean.indices)
    assert_close(codes.values, clean.values)


@pytest.mark.parametrize("name", entries_only(ALL))
def test_sparse_codes_take_the_memory_of_the_active_ones(name, make, monkeypatch):
    monkeypatch.setattr(filter, "TILE_TOKENS", 64)
    monkeypatch.setattr(filter, "TILE_BYTES", 2**13)
    sae = make(name, d_in=8, d_sae=2048, k=2)
    x = make_activations(512, 8, spread=0.1)
    with Sizes() as sizes:
        sae.encode_sparse(x)
    assert sizes.largest_but() < 512 * 2048 / 4

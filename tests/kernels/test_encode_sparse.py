"""Inference by entries and in chunks: the same codes as the dense encode, for any shape, before and after weights change."""

import copy

import pytest
import torch
from helpers import (
    BATCHTOPK,
    FREE_DECODER,
    GLOBAL,
    ONE_PER_SCORE,
    ONE_PER_SELECTOR,
    SELECTORS,
    assert_close,
    make_activations,
    make_sae,
    read_config,
    save_inference,
    selector_of,
    train_step,
)
from sae_lens import SAE
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from saelens_cosine.kernels import filter
from saelens_cosine.saes import encoding

D, F, K, B = 24, 300, 5, 60
TRAINED = sorted({*ONE_PER_SCORE, *ONE_PER_SELECTOR, "cosine_topk", "magnitude_bypass_topk"})
SAVED = [
    f"{name}, saved" for name in TRAINED if "inner" not in name and "matryoshka" not in name and "jumprelu" not in name
]
ALL = [*TRAINED, *SAVED]


@pytest.fixture
def make(tmp_path):
    """An SAE in eval mode by its name, trained or saved and loaded."""

    def make(name, **options):
        size = {"d_in": D, "d_sae": F, "k": K, **options}
        trained = make_sae(name.removesuffix(", saved"), **size)
        return (save_inference(trained, tmp_path) if name in SAVED else trained).eval()

    return make


def selects_per_token(sae):
    return selector_of(sae.cfg.architecture()) in ("topk", "abstopk")


def entries_only(names):
    """Those whose selection the kernels make entry by entry."""
    return [name for name in names if SELECTORS[selector_of(name.removesuffix(", saved"))].entries]


def dense_codes(sae, x):
    with torch.no_grad():
        return sae.encode(x)


def scattered(sae, codes):
    zeros = torch.zeros(*codes.values.shape[:-1], sae.cfg.d_sae, dtype=codes.values.dtype)
    return zeros.scatter_add(-1, codes.indices, codes.values)


def assert_same_codes(sae, x, tolerance=1e-6):
    """`encode_sparse` holds exactly what `encode` gives, in its documented form; returns the dense codes."""
    codes, expected = sae.encode_sparse(x), dense_codes(sae, x)
    found = scattered(sae, codes)
    assert found.shape == expected.shape == (*x.shape[:-1], sae.cfg.d_sae)
    assert torch.equal(found != 0, expected != 0)
    if expected.any():
        assert_close(found, expected, tolerance)
    counts = (expected != 0).sum(dim=-1)
    largest = int(counts.max()) if counts.numel() else 0
    width = codes.values.shape[-1]
    assert width == (sae.cfg.k if selects_per_token(sae) else largest)
    assert codes.indices.shape == codes.values.shape
    assert codes.indices.dtype == torch.int64
    assert codes.values.dtype == sae.dtype
    assert not codes.values.requires_grad
    active = torch.arange(width) < counts.unsqueeze(-1)
    assert torch.equal(codes.values != 0, active)
    assert not codes.indices[~active].any()
    ascending = codes.indices.diff(dim=-1) > 0
    assert (ascending | ~active[..., 1:]).all()
    return expected


class Sizes(TorchDispatchMode):
    """Sizes of whatever operations return, views of one tensor left out."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves(result) if isinstance(t, torch.Tensor) and t.layout == torch.strided]
        self.made += [(t.untyped_storage().data_ptr(), t.numel()) for t in tensors]
        return result

    def largest_but(self, *tensors):
        known = {t.untyped_storage().data_ptr() for t in tensors}
        return max(size for place, size in self.made if place not in known)


# --- the same codes ---


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


# --- where entries cannot be computed: dense, in chunks ---


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


# --- weights that change ---


def in_place(sae):
    with torch.no_grad():
        sae.W_enc.copy_(sae.W_enc.flip(0))


def by_data(sae):
    sae.W_enc.data[0] *= -1  # as SAELens' own folds write


def new_data(sae):
    sae.W_enc.data = sae.W_enc.data.flip(1).contiguous()


def load(sae):
    other = make_sae("cosine_topk", seed=5, d_in=D, d_sae=F, k=K)
    sae.load_state_dict({**sae.state_dict(), "W_enc": other.W_enc.detach()})


def fold_input_scale(sae):
    sae.fold_activation_norm_scaling_factor(0.3)


def fold_decoder(sae):
    sae.fold_W_dec_norm()


def optimizer(fused):
    def train(sae):
        sae.train()
        train_step(sae, make_activations(B, D, seed=3), step=1).loss.backward()
        torch.optim.Adam(sae.parameters(), lr=0.1, fused=fused).step()
        sae.eval()

    train.__name__ = "fused Adam" if fused else "Adam"
    return train


def double(sae):
    sae.to(torch.float64)


ANY_FORM = [in_place, by_data, new_data, load, fold_input_scale, fold_decoder, double]
CHANGES = [(name, c) for name in ALL for c in ANY_FORM]
CHANGES += [(name, optimizer(fused)) for name in TRAINED for fused in (False, True)]


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


# --- encode in chunks ---


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

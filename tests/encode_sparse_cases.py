"""What test_encode_sparse and its neighbours share."""

import pytest
import torch
from helpers import (
    ONE_PER_SCORE,
    ONE_PER_SELECTOR,
    assert_close,
    make_activations,
    make_sae,
    save_inference,
    selector_of,
    train_step,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

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

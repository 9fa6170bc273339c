"""When the fast path is declined, and why."""

import copy
import logging
import re
from typing import NamedTuple

import pytest
import torch
from fast_path_cases import (
    B,
    D,
    F,
    K,
    _reasons_not_logged_yet,  # noqa: F401
    dense,
    is_fast,
    make,
    with_hook,
)
from helpers import (
    FAST,
    assert_close,
    make_activations,
    train_step,
)
from sae_lens.saes.topk_sae import TopK, TopKTrainingSAE

import saelens_cosine
from saelens_cosine.saes import path
from saelens_cosine.saes.recipe.training_sae import RecipeTrainingSAE
from saelens_cosine.saes.scored_sae import ScoredSAE


class L1Score(ScoredSAE):
    """A third party's score without the form that the fast path needs."""

    def score(self, x_centered):
        share = x_centered / x_centered.abs().sum(dim=-1, keepdim=True).clamp_min(1e-8)
        return share @ self.W_enc + self.b_enc


class L1TopK(L1Score, RecipeTrainingSAE, TopKTrainingSAE): ...


class EverySecond(saelens_cosine.CosineBatchTopKTrainingSAE):
    """A third party's selector, likewise."""

    def select(self, hidden_pre):
        return super().select(hidden_pre) * (torch.arange(F) % 2)


class NoisyTopK(TopK): ...


def with_class(cls):
    def change(sae):
        sae.__class__ = cls

    return change


def with_activation(sae):
    sae.activation_fn = NoisyTopK(K)


def unchanged(sae):
    pass


DECLINED = {  # architecture, options, what happens to the SAE, shape of the batch, reason
    "hook before": ("cosine_batchtopk", {}, with_hook("hook_sae_acts_pre"), (B, D), "a hook asks for dense"),
    "hook behind": ("cosine_topk", {}, with_hook("hook_sae_acts_post"), (B, D), "a hook asks for dense"),
    "gradient hook": ("cosine_topk", {}, with_hook("hook_sae_acts_post", "bwd"), (B, D), "a hook asks for dense"),
    "three dimensions": ("cosine_batchtopk", {}, unchanged, (4, 16, D), r"shape \(4, 16, 24\), not \[tokens, d_in\]"),
    "one dimension": ("cosine_topk", {}, unchanged, (D,), r"shape \(24,\), not \[tokens, d_in\]"),
    "bfloat16": ("cosine_batchtopk", {"dtype": "bfloat16"}, unchanged, (B, D), "parameters are torch.bfloat16"),
    "score": ("inner_product_topk", {}, with_class(L1TopK), (B, D), "L1Score defines score without score_parameters"),
    "selector": ("cosine_batchtopk", {}, with_class(EverySecond), (B, D), "EverySecond defines select without entry_sel"),
    "activation": ("inner_product_topk", {}, with_activation, (B, D), "NoisyTopK has no selection by entries"),
    "sparse": ("cosine_topk", {"use_sparse_activations": True}, unchanged, (B, D), "use_sparse_activations=True"),
}  # fmt: skip


def reasons(caplog):
    return [r.getMessage() for r in caplog.records if r.name == "saelens_cosine.saes.path"]


def assert_reference_result(sae, x):
    reference = copy.deepcopy(sae)
    reference.cfg.kernels = "reference"
    for found, expected in zip(sae.encode_with_hidden_pre(x), reference.encode_with_hidden_pre(x), strict=True):
        assert type(found) is torch.Tensor
        assert torch.equal(found.to_dense(), expected.to_dense())
        assert found.to_dense().any()


@pytest.mark.parametrize("case", DECLINED)
def test_a_declined_call_takes_the_reference_path_and_says_why_once(case, caplog):
    name, options, change, shape, reason = DECLINED[case]
    caplog.set_level(logging.INFO, logger="saelens_cosine.saes.path")
    sae = make(name, **options)
    change(sae)
    x = make_activations(*shape)
    for _ in range(3):
        assert_reference_result(sae, x)
    (message,) = reasons(caplog)
    assert re.search(f"{name} takes the reference path: .*{reason}", message)
    assert caplog.records[-1].levelno == logging.INFO

    sae.cfg.kernels = "fast"
    with pytest.raises(RuntimeError, match=rf'kernels="fast" is impossible here: .*{reason}.*"auto"'):
        sae.encode_with_hidden_pre(x)


def test_auto_declines_what_is_too_dense_to_gain(caplog):
    caplog.set_level(logging.INFO, logger="saelens_cosine.saes.path")
    x = make_activations(B, D)
    assert is_fast(train_step(make("cosine_topk", d_sae=40), x, step=1))  # 5 of 40 is an eighth
    assert reasons(caplog) == []
    assert_reference_result(make("cosine_topk", d_sae=39), x)
    (message,) = reasons(caplog)
    assert "k=5 of d_sae=39 is too dense" in message
    assert is_fast(train_step(make("cosine_topk", "fast", d_sae=39), x, step=1))


def test_auto_declines_on_a_gpu_what_is_too_little_to_gain(caplog, monkeypatch):
    class Batch(NamedTuple):
        """What is asked of a batch: a device that is not here."""

        shape: tuple[int, int]
        device: torch.device
        ndim: int = 2

    caplog.set_level(logging.INFO, logger="saelens_cosine.saes.path")
    monkeypatch.setattr(path, "_has_triton", lambda: True)
    monkeypatch.setattr(path, "GPU_WORTH", 9 * 40 * 4)
    sae, gpu = make("cosine_topk", d_sae=40).train(), torch.device("cuda")
    assert path.use_fast_path(sae, Batch((9, D), gpu))
    assert reasons(caplog) == []
    assert not path.use_fast_path(sae, Batch((8, D), gpu))
    (message,) = reasons(caplog)
    assert "8 tokens of 40 features are too few for a GPU" in message
    with monkeypatch.context() as patched:  # torch.autocast does nothing without the device
        patched.setattr(torch, "is_autocast_enabled", lambda device: device == "cuda")
        patched.setattr(torch, "get_autocast_dtype", lambda device: torch.bfloat16)
        assert not path.use_fast_path(sae, Batch((17, D), gpu))  # half the bytes
        assert path.use_fast_path(sae, Batch((18, D), gpu))
    assert path.use_fast_path(sae, Batch((8, D), torch.device("cpu")))
    sae.cfg.kernels = "fast"
    assert path.use_fast_path(sae, Batch((8, D), gpu))


def test_the_reference_path_and_eval_mode_give_no_reasons(caplog):
    caplog.set_level(logging.INFO, logger="saelens_cosine.saes.path")
    x = make_activations(B, D)
    for sae in (
        make("cosine_batchtopk", "reference"),
        make("cosine_batchtopk").eval(),
        make("cosine_topk", "fast").eval(),
    ):
        with_hook("hook_sae_acts_pre")(sae)
        assert_reference_result(sae, x)
        assert type(sae.encode(x)) is torch.Tensor
    assert reasons(caplog) == []


def test_an_unknown_path_is_refused():
    with pytest.raises(ValueError, match="kernels='quick'"):
        make("cosine_topk", "quick")


@pytest.mark.parametrize("name", FAST)
def test_hooks_see_dense_tensors_and_may_change_them(name):
    sae, x = make(name), make_activations(B, D)
    plain = train_step(copy.deepcopy(sae), x, step=1)
    seen = {}

    def add_one(codes, hook):
        seen[hook.name] = codes
        codes = codes.clone()
        codes[:, 2] += 1
        return codes

    def lift(scores, hook):
        seen[hook.name] = scores
        return scores.index_fill(1, torch.tensor([7]), 1e4)

    with sae.hooks(fwd_hooks=[("hook_sae_acts_post", add_one)]):
        changed = train_step(sae, x, step=1)
    assert torch.allclose(changed.sae_out - plain.sae_out, sae.W_dec[2], atol=1e-4)
    assert is_fast(train_step(sae, x, step=2))  # the hook is gone
    with sae.hooks(fwd_hooks=[("hook_sae_acts_pre", lift)]):
        lifted = train_step(sae, x, step=3)
    # a magnitude bypass makes codes of any scale from it
    assert (lifted.feature_acts[:, 7] == 1e4).sum() == B or ("bypass" in name and (lifted.feature_acts[:, 7] > 0).all())
    assert all(type(tensor) is torch.Tensor and tensor.shape == (B, F) for tensor in seen.values())
    assert set(seen) == {"hook_sae_acts_pre", "hook_sae_acts_post"}
    assert is_fast(train_step(sae, x, step=4))


@pytest.mark.parametrize("name", FAST)
def test_run_with_cache_in_training_mode(name):
    sae, x = make(name), make_activations(B, D)
    codes = train_step(copy.deepcopy(sae), x, step=1).feature_acts
    _, cache = sae.run_with_cache(x)
    assert cache["hook_sae_acts_pre"].shape == (B, F)
    assert type(cache["hook_sae_acts_post"]) is torch.Tensor
    assert_close(cache["hook_sae_acts_post"], dense(codes))
    assert is_fast(train_step(sae, x, step=1))

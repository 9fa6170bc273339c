"""What the fast path spares, how W_enc lies in memory and in files, torch.compile and the optimizer."""

import copy
import gc

import pytest
import torch
from fast_path_cases import (
    AUX,
    B,
    D,
    F,
    _reasons_not_logged_yet,  # noqa: F401
    assert_equal,
    dense,
    descend,
    gradients,
    is_fast,
    make,
    run,
    with_hook,
)
from helpers import (
    FAST,
    FREE_DECODER,
    OURS,
    SELECTORS,
    Batches,
    assert_close,
    make_activations,
    make_sae,
    make_trainer,
    selector_of,
    train_step,
)
from sae_lens import SAE, TrainingSAE
from sae_lens.registry import get_sae_class
from safetensors.torch import load_file
from torch.optim import optimizer as torch_optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from saelens_cosine.kernels import filter
from saelens_cosine.saes.recipe.lagged_count import LaggedCount


class Sizes(TorchDispatchMode):
    """The largest number of elements of anything that an operation returns."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
        sizes = [t.numel() if t.layout == torch.strided else t._nnz() for t in tensors]
        self.largest = max(self.largest, *sizes, 0)
        return result


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("n_dead", [0, 200])  # so many that some stay dead
def test_no_tensor_of_all_scores_is_made(name, n_dead, monkeypatch):
    monkeypatch.setattr(filter, "TILE_TOKENS", 128)
    monkeypatch.setattr(filter, "TILE_BYTES", 2**16)
    sae = make_sae(name, seed=None, d_in=8, d_sae=4096, k=4)
    sae.tokens_since_fired[:n_dead] = 10**9
    data = Batches(lambda i: make_activations(512, 8, seed=i, spread=0.3))
    trainer = make_trainer(sae, data, steps=5, batch=512)
    for step in range(3):
        with Sizes() as sizes:
            output = trainer.step(next(data))
        trainer.n_training_steps += 1
        assert is_fast(output)
        assert (output.losses[AUX] > 0) == (n_dead > 0)
        assert 2 * 4 * 512 < sizes.largest < 512 * 4096 / 4, step
    with_hook("hook_sae_acts_post")(sae)
    with Sizes() as sizes:
        trainer.step(next(data))
    assert sizes.largest == 512 * 4096


@pytest.mark.parametrize("name", FAST)
def test_encoder_columns_stay_in_one_piece(name, tmp_path):
    def check(sae):
        assert sae.W_enc.shape == (16, 160)
        assert sae.W_enc.stride() == (1, 16)

    trainer = run(name, "auto", n=3)
    sae = trainer.sae
    check(sae)
    trainer.fit()
    assert trainer.fast == [True] * 3
    assert trainer.optimizer.param_groups[0]["fused"]
    for each in (sae, copy.deepcopy(sae), copy.deepcopy(sae).to(torch.float64), copy.deepcopy(sae).to(torch.bfloat16)):
        check(each)
    for options in ({"seed": None}, {"dtype": "float64"}, FREE_DECODER):
        check(make_sae(name, **{"d_in": 16, "d_sae": 160, "k": 4, **options}))

    sae.save_model(tmp_path / "training")
    sae.save_inference_model(tmp_path / "inference")
    again = TrainingSAE.load_from_disk(tmp_path / "training")
    check(again)
    assert torch.equal(again.W_enc, sae.W_enc)
    fresh = make_sae(name, d_in=16, d_sae=160, k=4)
    fresh.load_weights_from_checkpoint(tmp_path / "training")
    check(fresh)
    assert torch.equal(fresh.W_enc, sae.W_enc)
    if name in OURS:
        check(SAE.load_from_disk(tmp_path / "inference"))


@pytest.mark.parametrize("name", FAST)
def test_files_hold_plain_tensors(name, tmp_path):
    sae = make(name)
    sae.save_model(tmp_path / "training")
    sae.save_inference_model(tmp_path / "inference")
    trained, saved = (
        load_file(tmp_path / form / "sae_weights.safetensors")["W_enc"] for form in ("training", "inference")
    )
    assert trained.is_contiguous()
    assert saved.is_contiguous()
    assert torch.equal(trained, sae.W_enc)
    if name in OURS:  # exp(b_i) * w_i / ||w_i||, with b = 0 in a magnitude bypass
        W_enc, log_scale = sae.W_enc.double(), getattr(sae, "log_scale", torch.zeros(()))
        assert_close(saved, log_scale.double().exp() * W_enc / W_enc.norm(dim=0), 1e-6)
        return
    assert torch.equal(saved, sae.W_enc)
    stock = SAE.load_from_disk(tmp_path / "inference")
    assert type(stock) is get_sae_class(SELECTORS[selector_of(name)].saved_as)[0]
    assert torch.equal(stock.W_enc, sae.W_enc)
    assert_close(stock.encode(make_activations(B, D)), sae.eval().encode(make_activations(B, D)))


@pytest.mark.parametrize("name", ["cosine_batchtopk", "per_feature_cosine_topk"])
def test_a_compiled_step_takes_the_fast_path_as_it_is(name):
    eager = make(name, dead_feature_window_tokens=100)
    compiled = copy.deepcopy(eager)
    compiled.training_forward_pass = torch.compile(compiled.training_forward_pass, backend="eager")
    for step in (1, 2, 3):
        outputs = [train_step(sae, make_activations(B, D, seed=step), step=step) for sae in (eager, compiled)]
        assert all(map(is_fast, outputs))
        for output in outputs:
            output.loss.backward()
        assert torch.equal(outputs[1].loss, outputs[0].loss)
        assert_equal(gradients(compiled), gradients(eager))
        descend(eager)
        descend(compiled)
    assert outputs[0].losses[AUX] > 0


def watchers():
    gc.collect()
    return len(torch_optimizer._global_optimizer_pre_hooks)


@pytest.mark.parametrize("name", ["cosine_batchtopk", "per_feature_cosine_topk"])
@pytest.mark.parametrize(("kernels", "fused"), [("auto", True), ("fast", True), ("reference", None)])
def test_saelens_adam_is_fused(name, kernels, fused):
    before = watchers()
    other = torch.optim.Adam([torch.nn.Parameter(torch.ones(2))])
    trainer = run(name, kernels, n=3)
    for _ in range(2):
        trainer.step(next(trainer.data_provider))
        other.param_groups[0]["params"][0].grad = torch.ones(2)
        other.step()
        trainer.n_training_steps += 1
    assert [group["fused"] for group in trainer.optimizer.param_groups] == [fused]
    assert other.param_groups[0]["fused"] is None
    assert watchers() == before


@pytest.mark.parametrize("options", [{"foreach": False}, {"fused": False}, {"foreach": True}])
def test_a_choice_that_was_made_is_kept(options):
    sae = make("cosine_batchtopk")
    optimizer = torch.optim.Adam(sae.parameters(), **options)
    before = {key: value for key, value in optimizer.param_groups[0].items() if key != "params"}
    for step in (0, 1):
        train_step(sae, make_activations(B, D), step=step).loss.backward()
        optimizer.step()
    assert {key: value for key, value in optimizer.param_groups[0].items() if key != "params"} == before


def test_an_optimizer_that_has_stepped_or_is_another_kind_stays():
    sae = make("cosine_batchtopk")
    adam, sgd = torch.optim.AdamW(sae.parameters()), torch.optim.SGD(sae.parameters(), lr=1e-3)
    for parameter in sae.parameters():
        parameter.grad = torch.ones_like(parameter)
    adam.step()
    for optimizer in (adam, sgd):
        train_step(sae, make_activations(B, D), step=0).loss.backward()
        optimizer.step()
        assert not optimizer.param_groups[0]["fused"]
    train_step(sae, make_activations(B, D), step=1)


def test_the_watch_over_optimizers_ends_with_its_sae():
    before = watchers()
    trainer = run("cosine_topk", "auto")
    trainer.step(next(trainer.data_provider))  # a run of a single step
    del trainer
    gc.collect()
    assert watchers() == before


def test_the_fused_step_is_adams():
    # by the formula, on the first step: every parameter moves by lr * g / (|g| + eps), whatever its layout
    sae = make("per_feature_cosine_batchtopk", dtype="float64", unit_decoder=False)
    sae.initialized_from_data.fill_(True)
    optimizer = torch.optim.Adam(sae.parameters(), lr=0.01)
    before = {name: p.detach().clone() for name, p in sae.named_parameters()}
    train_step(sae, make_activations(B, D, dtype=torch.float64), step=0).loss.backward()
    optimizer.step()
    assert optimizer.param_groups[0]["fused"]
    for name, p in sae.named_parameters():
        assert_close(p.detach() - before[name], -0.01 * p.grad / (p.grad.abs() + 1e-8), 1e-9)
        assert optimizer.state[p]["exp_avg"].shape == p.shape
    train_step(sae, make_activations(B, D, dtype=torch.float64), step=1)


def aux_loss(sae, x, output, dead):
    """The paper's auxiliary loss from its definition, token by token."""
    e = (x - output.sae_out).detach()
    z = torch.zeros(len(x), F, dtype=torch.float64)
    scores = dense(output.hidden_pre).detach().relu()
    for token in range(len(x)):
        ranked = scores[token].masked_fill(~dead, -1).argsort(descending=True)
        top = ranked[: min(D // 2, int(dead.sum()))]
        z[token, top] = scores[token, top]
    variance = ((e - e.mean(0)) ** 2).sum(1).mean()
    return ((e - z @ sae.W_dec.detach()) ** 2).sum(1).mean() / variance / 32


@pytest.mark.parametrize("kernels", ["reference", "fast"])
@pytest.mark.parametrize("name", ["per_feature_cosine_batchtopk", "cosine_topk"])
@pytest.mark.parametrize("lag", [True, False])
def test_dead_features_with_batches_that_grow_and_shrink(name, kernels, lag, monkeypatch):
    known = []
    get = LaggedCount.get
    monkeypatch.setattr(LaggedCount, "get", lambda *args: known.append(get(*args) if lag else None) or known[-1])
    window = 150
    sae = make(name, kernels, dtype="float64", dead_feature_window_tokens=window)
    since = torch.zeros(F, dtype=torch.int64)
    n_dead = []
    for step, n in enumerate([8, 16, 40, 40, 40, 12, 3, 30, 50, 2, 20, 20], start=1):
        if step == 4:  # someone changes the counts, by hand and by a checkpoint
            sae.tokens_since_fired[:5] = since[:5] = window
        if step == 11:
            sae.load_state_dict(copy.deepcopy(sae.state_dict()) | {"tokens_since_fired": torch.full((F,), window)})
            since = torch.full((F,), window)
        x = make_activations(n, D, seed=step, dtype=torch.float64)
        output = train_step(sae, x, step=step)
        fired = (dense(output.feature_acts) != 0).any(dim=0)
        since = torch.where(fired, 0, since + n)
        dead = since >= window
        n_dead.append(int(dead.sum()))
        assert torch.equal(sae.tokens_since_fired, since)
        assert torch.equal(sae.dead_features, dead)
        expected = aux_loss(sae, x, output, dead).item() if dead.any() else 0.0
        assert output.losses[AUX].item() == pytest.approx(expected, rel=1e-10)
        output.loss.backward()
        descend(sae)
    assert 0 in n_dead
    assert any(0 < n <= D // 2 for n in n_dead)
    assert max(n_dead) > D // 2
    assert (sum(count is not None for count in known) >= 3) == lag

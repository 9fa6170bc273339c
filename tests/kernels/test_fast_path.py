"""Training by the active codes alone: what the dense formula gives, wherever SAELens looks, and never silently otherwise."""

import copy
import gc
import logging
import math
import re
from typing import NamedTuple

import pytest
import torch
from helpers import (
    BATCHTOPK,
    FAST,
    FREE_DECODER,
    OURS,
    SELECTORS,
    Batches,
    assert_close,
    make_activations,
    make_sae,
    make_trainer,
    planted_batches,
    randomize,
    selector_of,
    train_step,
)
from sae_lens import SAE, TrainingSAE
from sae_lens.registry import get_sae_class
from sae_lens.saes.topk_sae import TopK, TopKTrainingSAE
from sae_lens.training.sae_trainer import SAETrainer
from safetensors.torch import load_file
from torch.optim import optimizer as torch_optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import saelens_cosine
from saelens_cosine.kernels import filter
from saelens_cosine.kernels.codes import EntryCodes, ScoresOnDemand
from saelens_cosine.saes import path
from saelens_cosine.saes.recipe.lagged_count import LaggedCount
from saelens_cosine.saes.recipe.training_sae import RecipeTrainingSAE
from saelens_cosine.saes.scored_sae import ScoredSAE

D, F, K, B = 24, 300, 5, 64
AUX = "auxiliary_reconstruction_loss"
SIZE = {"d_in": D, "d_sae": F, "k": K}


RECTIFIED = [name for name in FAST if "abstopk" not in name and "bypass" not in name]
"""With codes that b_enc can turn on and off."""


@pytest.fixture(autouse=True)
def _reasons_not_logged_yet():
    path._log_once.cache_clear()


def make(name, kernels="auto", seed=1, **options):
    """Training SAE in training mode, of a size that takes the fast path."""
    return make_sae(name, seed=seed, kernels=kernels, **{**SIZE, **options}).train()


def twin(sae, kernels):
    """A deep copy that computes its steps the other way."""
    other = copy.deepcopy(sae)
    other.cfg.kernels = kernels
    return other


def dense(tensor):
    return tensor.dense() if isinstance(tensor, EntryCodes | ScoresOnDemand) else tensor


def is_fast(output):
    return isinstance(output.feature_acts, EntryCodes) and isinstance(output.hidden_pre, ScoresOnDemand)


def gradients(sae):
    return {name: p.grad for name, p in sae.named_parameters() if p.requires_grad}


@torch.no_grad()
def descend(sae):
    """A step that depends on the gradient's direction alone, so that rounding does not grow."""
    for parameter in sae.parameters():
        if parameter.grad is not None:
            parameter -= 0.01 * parameter.grad / parameter.grad.abs().max().clamp_min(1e-30)
            parameter.grad = None


def steps(sae, batches, start=1):
    """A training step on each batch; every loss and all tensors at the end."""
    losses = []
    for i, x in enumerate(batches):
        output = train_step(sae, x, step=start + i)
        output.loss.backward()
        descend(sae)
        losses.append(output.loss.detach())
    return {"losses": torch.stack(losses), **sae.state_dict()}


def assert_equal(one, other):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(other[name], tensor), name


class Sizes(TorchDispatchMode):
    """The largest number of elements of anything that an operation returns."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
        sizes = [t.numel() if t.layout == torch.strided else t._nnz() for t in tensors]
        self.largest = max(self.largest, *sizes, 0)
        return result


# --- one step is the dense formula's step ---

AUX_CASES = {
    "none dead": {},
    "dead": {"dead_feature_window_tokens": 100},  # 64 tokens a batch: from the second on
    "dead, not normalised": {"dead_feature_window_tokens": 100, "normalize_aux_loss": False},
}


@torch.no_grad()
def gap_at_the_cut(sae, x):
    """How far the last score that is kept is above the first that is not, relative to it; the smallest over all cuts."""
    scores = sae.rescale(sae.score(sae.process_sae_in(x)))
    if sae.signed_codes:
        scores = scores.abs()
    k = K
    if sae.cfg.architecture() in BATCHTOPK:
        scores, k = scores.flatten(), K * len(x)
    top = scores.topk(k + 1, dim=-1).values
    return ((top[..., k - 1] - top[..., k]) / top[..., k - 1]).min()


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("aux", AUX_CASES)
@pytest.mark.parametrize("decoder", [{}, FREE_DECODER], ids=["unit", "free"])
@pytest.mark.parametrize("name", FAST)
def test_steps_are_the_reference_paths(name, decoder, aux, dtype):
    tolerance = 1e-12 if dtype == "float64" else 5e-6 if "bypass" in name else 2e-6  # one norm more
    sae = make(name, "reference", dtype=dtype, **decoder, **AUX_CASES[aux])
    saes = [sae, twin(sae, "fast")]
    for step in (1, 2, 3):
        batches = (make_activations(B, D, seed=seed, dtype=sae.dtype) for seed in range(step, 100, 3))
        x = next(x for x in batches if gap_at_the_cut(sae, x) > 1e-5)  # else rounding may choose another code
        expected, output = (train_step(each, x, step=step) for each in saes)
        assert is_fast(output)
        assert type(expected.feature_acts) is type(expected.hidden_pre) is torch.Tensor
        assert output.feature_acts.shape == output.hidden_pre.shape == (B, F)
        assert (expected.losses[AUX] > 0) == (aux != "none dead" and step > 1)
        for key in ("mse_loss", AUX):
            assert output.losses[key].item() == pytest.approx(expected.losses[key].item(), rel=tolerance)
        assert torch.equal(dense(output.feature_acts) != 0, expected.feature_acts != 0)
        for key in ("feature_acts", "hidden_pre", "sae_out"):
            assert_close(dense(getattr(output, key)), getattr(expected, key), tolerance)
        for each in (expected, output):
            each.loss.backward()
        for key, gradient in gradients(sae).items():
            assert_close(gradients(saes[1])[key], gradient, tolerance)
        for each in saes:
            descend(each)
        assert torch.equal(saes[1].tokens_since_fired, sae.tokens_since_fired)
        if name in BATCHTOPK:
            assert saes[1].topk_threshold.item() == pytest.approx(sae.topk_threshold.item(), rel=tolerance)


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize(
    ("tokens", "options"),
    [
        (1, {}),
        (201, {"d_sae": 501, "k": 1}),
        (9, {"d_in": 7, "d_sae": 13, "k": 3}),  # too dense for auto, not for fast
        (9, {"d_in": 7, "d_sae": 13, "k": 13}),
        (9, {"d_in": 1, "d_sae": 20, "k": 2}),
    ],
    ids=["one token", "k 1", "small", "all features", "one input"],
)
def test_awkward_sizes(name, tokens, options):
    if options.get("d_in") == 1 and "bypass" in name:
        pytest.skip("all cosines of one input are 1 or -1, and torch.topk takes any of them")
    size = {**SIZE, **options}
    sae = make(name, "reference", dtype="float64", dead_feature_window_tokens=1, **{**options, "k": 1})
    sae.cfg.k = sae.activation_fn.k = size["k"]
    saes = [sae, twin(sae, "fast")]
    x = make_activations(tokens, size["d_in"], dtype=torch.float64)
    outputs = [train_step(each, x, step=1) for each in saes]
    assert is_fast(outputs[1])
    assert_close(dense(outputs[1].feature_acts), outputs[0].feature_acts, 1e-12)
    for output in outputs:
        output.losses["mse_loss"].backward()
    largest = max(gradient.abs().max() for gradient in gradients(sae).values())
    for key, gradient in gradients(sae).items():
        assert (gradients(saes[1])[key] - gradient).abs().max() <= 1e-12 * largest, key


@pytest.mark.parametrize("name", BATCHTOPK)
def test_a_fraction_of_a_code_per_token(name):
    # int(2.5 * 7) = 17 of 7 tokens
    output = train_step(make(name, "fast", k=2.5), make_activations(7, D), step=1)
    assert (dense(output.feature_acts) > 0).sum() == 17


@pytest.mark.parametrize("name", RECTIFIED)
@pytest.mark.parametrize("n_on", [0, 2], ids=["none", "some"])
def test_fewer_positive_scores_than_wanted(name, n_on):
    sae = make(name, "reference", dtype="float64", dead_feature_window_tokens=1)
    with torch.no_grad():
        sae.b_enc.fill_(-1e4)
        sae.b_enc[:n_on] = 1e4
    saes = [sae, twin(sae, "fast")]
    results = []
    for each in saes:
        output = train_step(each, make_activations(B, D, dtype=torch.float64), step=1)
        output.loss.backward()
        assert (dense(output.feature_acts) != 0).sum() == n_on * B
        results.append(
            {"loss": output.loss, "threshold": getattr(each, "topk_threshold", torch.ones(())), **gradients(each)}
        )
    for key, tensor in results[0].items():
        torch.testing.assert_close(
            results[1][key], tensor, rtol=1e-11, atol=1e-11, msg=lambda m, key=key: f"{key}: {m}"
        )


@pytest.mark.parametrize("name", ["inner_product_topk", "cosine_batchtopk", "per_feature_cosine_topk"])
@pytest.mark.parametrize("options", [{}, {"apply_b_dec_to_input": False}, FREE_DECODER], ids=["centred", "raw", "free"])
def test_gradient_of_the_input(name, options):
    sae = make(name, "reference", dtype="float64", **options)
    with torch.no_grad():
        sae.b_enc[0] = 100  # active on every token
    saes = [sae, twin(sae, "fast")]
    x = make_activations(B, D, dtype=torch.float64)
    x[3] = sae.b_dec.detach() * sae.cfg.apply_b_dec_to_input  # norm 0, where the score is flat along the norm
    inputs = [x.clone().requires_grad_() for _ in saes]
    for each, given in zip(saes, inputs, strict=True):
        output = train_step(each, given, step=1)
        output.loss.backward()
    assert is_fast(output)
    size = inputs[0].grad.abs().amax(dim=1)
    assert (size > 0).all()
    assert ((inputs[1].grad - inputs[0].grad).abs().amax(dim=1) <= 1e-11 * size).all()
    assert (gradients(saes[1])["b_dec"] - gradients(sae)["b_dec"]).abs().max() <= 1e-11 * size.max()


@pytest.mark.parametrize("frozen", ["W_enc", "b_enc", "W_dec", "b_dec", "norm_exponent", "log_scale"])
def test_a_frozen_parameter_gets_no_gradient_and_changes_no_other(frozen):
    sae = make("per_feature_cosine_batchtopk", "reference", dtype="float64", dead_feature_window_tokens=1)
    sae.get_parameter(frozen).requires_grad_(False)
    saes = [sae, twin(sae, "fast")]
    for each in saes:
        train_step(each, make_activations(B, D, dtype=torch.float64), step=1).loss.backward()
        assert each.get_parameter(frozen).grad is None
    for key, gradient in gradients(sae).items():
        assert_close(gradients(saes[1])[key], gradient, 1e-12)


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("options", [{}, FREE_DECODER, AUX_CASES["dead"]], ids=["unit", "free", "dead"])
def test_autocast_loses_no_more_than_the_reference_path(name, options):
    x = make_activations(B, D)
    sae = make(name, "reference", **options)
    exact = train_step(copy.deepcopy(sae).to(torch.float64), x.double(), step=1).loss.item()
    errors = []
    for kernels in ("reference", "fast"):
        each = twin(sae, kernels)
        with torch.autocast("cpu", torch.bfloat16):
            output = train_step(each, x, step=1)
        output.loss.backward()
        assert all(gradient.isfinite().all() for gradient in gradients(each).values())
        assert output.loss.dtype == torch.float32
        errors.append(abs(output.loss.item() - exact))
    assert is_fast(output)
    assert errors[1] <= errors[0] + 1e-6 * exact


# --- SAELens' trainer sees no difference ---


class Recording(SAETrainer):
    """SAELens' trainer, keeping each step's log and which path it took."""

    def step(self, batch):
        output = super().step(batch)
        self.logs = [*getattr(self, "logs", []), self.build_train_step_log_dict(output, self.n_training_samples)]
        self.fast = [*getattr(self, "fast", []), is_fast(output)]
        return output


def run(name, kernels, n=30, start=0, batch=32, **options):
    """SAELens' trainer before it has run, at small size, with features that die soon."""
    options = {"d_in": 16, "d_sae": 160, "k": 4, "dead_feature_window_tokens": 100, **options}
    sae = make_sae(name, seed=None, kernels=kernels, **options)
    data = planted_batches(d_in=16, n_features=24, active=3, batch=batch)
    data.position = start
    trainer = make_trainer(sae, data, steps=n, batch=batch, lr=3e-3)
    trainer.__class__ = Recording
    return trainer


RUNS = {
    "default": {},
    "free": FREE_DECODER,
    "scaled": {"normalize_activations": "expected_average_only_in"},
    "raw": {"apply_b_dec_to_input": False},
}


@pytest.mark.parametrize(
    ("name", "options"),
    [(name, RUNS["default"]) for name in FAST]
    + [(name, options) for name in ("inner_product_topk", "per_feature_cosine_batchtopk") for options in list(RUNS.values())[1:]],
    ids=lambda value: value if isinstance(value, str) else next((k for k, v in RUNS.items() if v is value), None),
)  # fmt: skip
def test_a_run_of_saelens_trainer_is_the_same(name, options):
    trainers = [run(name, kernels, dtype="float64", **options) for kernels in ("reference", "fast")]
    expected, found = trainers
    for trainer in trainers:
        trainer.fit()
    assert expected.fast == [False] * 30
    assert found.fast == [True] * 30
    assert sum(log[f"losses/{AUX}"] > 0 for log in expected.logs) > 15
    for key, tensor in expected.sae.state_dict().items():
        assert_close(found.sae.state_dict()[key] + 1, tensor + 1, 1e-9)  # a b_enc that is not trained is 0
    for counter in ("act_freq_scores", "n_forward_passes_since_fired", "n_frac_active_samples"):
        torch.testing.assert_close(getattr(found, counter), getattr(expected, counter), rtol=0, atol=0)
    assert found.log_feature_sparsity.isfinite().all()
    for one, other in zip(found.logs, expected.logs, strict=True):
        assert one == pytest.approx(other, rel=1e-8)
    assert 3 < expected.logs[-1]["metrics/l0"] < 4.001  # k, or less where a token has fewer positive scores


@pytest.mark.parametrize("name", ["per_feature_cosine_batchtopk", "cosine_topk"])
def test_one_seed_gives_one_result(name):
    results = [run(name, "fast", n=8).fit().state_dict() for _ in range(2)]
    assert_equal(*results)


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("saved_after", [1, 7])
def test_resumed_equals_uninterrupted(name, saved_after, tmp_path):
    whole, first = run(name, "fast", n=12), run(name, "fast", n=12)
    whole.fit()
    first.checkpoint_thresholds = [saved_after * 32 - 1]
    first.cfg.checkpoint_path = str(tmp_path)
    first.fit()
    second = run(name, "fast", n=12, start=saved_after)
    randomize(second.sae, seed=4)  # whatever is not restored shows
    second.load_trainer_state(tmp_path / str(saved_after * 32))
    second.sae.load_weights_from_checkpoint(tmp_path / str(saved_after * 32))
    second.fit()
    assert second.fast == [True] * (12 - saved_after)
    for trainer in (whole, second):
        assert all(group["fused"] for group in trainer.optimizer.param_groups)
        assert trainer.logs[-1][f"losses/{AUX}"] > 0
    assert_equal(second.sae.state_dict(), whole.sae.state_dict())
    assert second.logs == whole.logs[saved_after:]


def test_a_resumed_run_notices_its_steps(tmp_path):
    first, second = run("cosine_batchtopk", "fast", n=4), run("cosine_batchtopk", "fast", n=4, start=2)
    for _ in range(2):
        first.step(next(first.data_provider))
        first.n_training_steps += 1
    first.save_checkpoint("two", tmp_path)
    second.load_trainer_state(tmp_path / "two")
    second.sae.load_weights_from_checkpoint(tmp_path / "two")
    for trainer in (first, second):
        output = trainer.step(next(trainer.data_provider))
        assert trainer.optimizer.param_groups[0]["fused"]
        with pytest.raises(RuntimeError, match='kernels="reference"'):
            output.hidden_pre[:, 3]


@pytest.mark.parametrize("name", FAST)
def test_a_copy_trains_on_like_the_original(name):
    sae = make(name, "fast", dead_feature_window_tokens=100)
    batches = [make_activations(B, D, seed=i) for i in range(6)]
    steps(sae, batches[:3])
    other = copy.deepcopy(sae)
    assert_equal(steps(other, batches[3:], start=4), steps(sae, batches[3:], start=4))
    assert (sae.tokens_since_fired >= 100).any()


@pytest.mark.parametrize("hint", [None, 0.0, -1.0, 1e-3, 1e30, math.inf, math.nan])
@pytest.mark.parametrize("name", ["inner_product_batchtopk", "cosine_topk", "per_feature_cosine_batchtopk", "per_feature_cosine_topk"])  # fmt: skip
def test_the_hint_changes_no_result(name, hint):
    sae = make(name, "fast")
    other = copy.deepcopy(sae)
    for step in (1, 2, 3):
        outputs = [train_step(each, make_activations(B, D, seed=step), step=step) for each in (sae, other)]
        assert torch.equal(dense(outputs[1].feature_acts), dense(outputs[0].feature_acts))
        assert (dense(outputs[0].feature_acts) > 0).sum() == K * B
        other.floor_hint = None if hint is None else torch.tensor(hint)


@pytest.mark.parametrize("name", ["per_feature_cosine_batchtopk", "cosine_topk"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("bad_step", [0, 13])
def test_non_finite_activations_stop_training_by_name(name, value, bad_step):
    data = planted_batches(d_in=16, n_features=24, active=3, batch=32)
    batches = [next(data) for _ in range(25)]
    batches[bad_step][3, 1] = value
    trainer = run(name, "fast", n=25)
    trainer.data_provider = iter(batches)
    with pytest.raises(FloatingPointError, match=f"training step {0 if bad_step == 0 else 20}, .*{name}"):
        trainer.fit()


def test_gradients_flow_from_whatever_reads_the_codes():
    # a penalty on the codes and one on the pre-activations, of a user's own: neither has a shortcut
    sae = make("per_feature_cosine_batchtopk", "reference", dtype="float64")
    saes = [sae, twin(sae, "fast")]
    for each in saes:
        output = train_step(each, make_activations(B, D, dtype=torch.float64), step=1)
        (output.feature_acts.sqrt().clamp_max(1).sum() + output.hidden_pre.relu().pow(2).mean()).backward()
    assert is_fast(output)
    for key, gradient in gradients(sae).items():
        if gradient is not None and gradient.any():
            assert_close(gradients(saes[1])[key], gradient, 1e-10)


@pytest.mark.parametrize("options", [{}, {"foreach": False}], ids=["fused", "plain"])
def test_pre_activations_of_an_earlier_step_are_refused(options):
    sae = make("cosine_batchtopk", "fast", **FREE_DECODER)
    optimizer = torch.optim.Adam(sae.parameters(), lr=0.1, **options)
    for step in (0, 1):
        output = train_step(sae, make_activations(B, D), step=step)
        output.loss.backward()
        assert output.hidden_pre[:, 3].isfinite().all()
        optimizer.step()
        assert bool(optimizer.param_groups[0]["fused"]) == (not options)
        with pytest.raises(RuntimeError, match='kernels="reference"'):
            output.hidden_pre[:, 3]
        assert (output.feature_acts > 0).sum() == K * B  # the codes are still there


# --- when the fast path is declined ---


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


def with_hook(point, direction="fwd"):
    return lambda sae: getattr(sae, point).add_hook(lambda *_, **__: None, dir=direction)


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


# --- nobody pays for what nobody asked for ---


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


# --- how W_enc lies in memory ---


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


# --- torch.compile, and the optimizer ---


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


# --- dead features, counted a step late and never wrong ---


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

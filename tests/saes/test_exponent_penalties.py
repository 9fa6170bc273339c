"""Penalties on exponents, and exponents that training steps drop, by hand."""

import copy
import math

import pytest
import torch
from helpers import (
    PER_FEATURE,
    Batches,
    assert_close,
    assert_same_function,
    make_activations,
    make_config,
    make_sae,
    make_trainer,
    save_inference,
    train_step,
)

NAME = "per_feature_cosine_batchtopk"


def make(name=NAME, **options):
    return make_sae(name, dtype="float64", **options)


def start(**options):
    """A new SAE: exponents and log-scales are at their starts."""
    return make_sae(NAME, seed=None, dtype="float64", **options)


def set_exponents(sae, *values):
    with torch.no_grad():
        sae.norm_exponent.copy_(torch.tensor(values, dtype=torch.float64))


# --- penalties ---

X = make_activations(16, 7, dtype=torch.float64)
VALUES = [0.5, -0.5, 1.0] + [0.0] * 10  # squares: 0.25 + 0.25 + 1 = 1.5; mean 1/13


def losses_at(step=1, values=VALUES, **options):
    sae = start(**options).train()
    set_exponents(sae, *values)
    return train_step(sae, X, step=step).losses


def test_l2_by_hand():
    assert losses_at(norm_exponent_l2=0.1)["norm_exponent_l2_loss"].item() == pytest.approx(0.15)
    # effective exponents: twice as large, four times the squares
    doubled = losses_at(norm_exponent_l2=0.1, norm_exponent_lr_multiplier=2.0)
    assert doubled["norm_exponent_l2_loss"].item() == pytest.approx(0.6)
    # groups of 4, 4 and 5 features at 1, 2, 3: 4 + 16 + 45
    groups = losses_at(values=[1.0, 2.0, 3.0], norm_exponent_l2=0.1, exponent_sharing="groups", n_exponent_groups=3)
    assert groups["norm_exponent_l2_loss"].item() == pytest.approx(6.5)
    assert "norm_exponent_l2_loss" not in losses_at()


def test_l2_of_the_global_exponent_counts_it_once():
    sae = make_sae("cosine_batchtopk", seed=None, norm_exponent_init=0.5, norm_exponent_l2=2.0).train()
    assert train_step(sae, X.float(), step=1).losses["norm_exponent_l2_loss"].item() == pytest.approx(0.5)


def test_variance_by_hand():
    # unbiased: (1.5 - 13 (1/13)^2) / 12 = (1.5 - 1/13) / 12
    variance = (1.5 - 1 / 13) / 12
    loss = losses_at(norm_exponent_variance_penalty=0.1)["norm_exponent_variance_loss"]
    assert loss.item() == pytest.approx(0.1 * variance)
    # a base that all share changes nothing
    sae = start(norm_exponent_variance_penalty=0.1, exponent_sharing="base_delta").train()
    set_exponents(sae, *VALUES)
    sae.norm_exponent_base.data.fill_(9.0)
    assert train_step(sae, X / 10, step=1).losses["norm_exponent_variance_loss"].item() == pytest.approx(0.1 * variance)


@pytest.mark.parametrize("step, share", [(0, 1), (20, 1), (40, 2 / 3), (50, 0.5), (79, 1 / 60), (80, 0), (1000, 0)])
def test_the_variances_weight_is_constant_and_then_falls_to_zero(step, share):
    options = {"norm_exponent_variance_constant_steps": 20, "norm_exponent_variance_end_step": 80}
    losses = losses_at(step=step, norm_exponent_variance_penalty=1.0, b_dec_init="zeros", **options)
    expected = share * (1.5 - 1 / 13) / 12
    assert ("norm_exponent_variance_loss" in losses) == (share > 0)
    if share:
        assert losses["norm_exponent_variance_loss"].item() == pytest.approx(expected)


def test_the_papers_schedule_is_the_default():
    cfg = make_config(NAME)
    assert (cfg.norm_exponent_variance_constant_steps, cfg.norm_exponent_variance_end_step) == (2000, 8000)


@pytest.mark.parametrize("option", ["norm_exponent_l2", "norm_exponent_variance_penalty"])
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_relative_penalties_are_shares_of_the_reconstruction_loss(option, scale):
    sae = start(**{option: 0.1, "relative_exponent_penalties": True}, b_dec_init="zeros").train()
    set_exponents(sae, *VALUES)
    losses = train_step(sae, scale * X, step=1).losses
    absolute = 0.15 if option == "norm_exponent_l2" else 0.1 * (1.5 - 1 / 13) / 12
    name = f"{option.removesuffix('_penalty')}_loss"
    assert losses[name].item() == pytest.approx(losses["mse_loss"].item() * absolute, rel=1e-12)
    # the reconstruction is not asked to grow smaller for the penalty's sake
    (gradient,) = torch.autograd.grad(losses[name], sae.norm_exponent, retain_graph=True)
    assert gradient.abs().max() > 0
    assert torch.autograd.grad(losses[name], sae.W_dec, allow_unused=True)[0] is None


@pytest.mark.parametrize("name", PER_FEATURE)
def test_penalties_are_in_the_loss_of_every_selector(name):
    options = {"norm_exponent_l2": 0.5, "norm_exponent_variance_penalty": 0.25}
    sae = make_sae(name, dtype="float64", **options).train()
    output = train_step(sae, X, step=1)
    a = sae.norm_exponent.detach()
    mean = a.sum() / 13
    assert output.losses["norm_exponent_l2_loss"].item() == pytest.approx(0.5 * (a * a).sum().item())
    assert output.losses["norm_exponent_variance_loss"].item() == pytest.approx(
        0.25 * ((a - mean) ** 2).sum().item() / 12
    )
    total = sum(loss.sum().item() for loss in output.losses.values())
    assert output.loss.item() == pytest.approx(total)


# --- dropout ---


def used_exponents(sae, x):
    """The exponent that each feature's scores have at two tokens of one direction and norms 1 and e: log of their ratio."""
    pair = torch.stack([x, math.e * x]) + sae.b_dec.detach()
    with torch.no_grad():
        low, high = sae.score(sae.process_sae_in(pair))
    return (high / low).log()


def test_a_step_drops_exponents_of_features_for_all_its_tokens():
    p = 0.4
    sae = make(d_sae=500, norm_exponent_dropout=p, kernels="reference").train()
    with torch.no_grad():
        sae.norm_exponent.copy_(torch.linspace(0.5, 1.5, 500))
        sae.b_enc.zero_()
    direction = torch.nn.functional.normalize(torch.randn(7, dtype=torch.float64), dim=0)
    masks = []
    for step in (1, 2):
        twin = copy.deepcopy(sae)
        for each in (sae, twin):
            train_step(each, make_activations(40, 7, dtype=torch.float64), step=step)
        used = used_exponents(sae, direction)
        kept = used.abs() > 1e-9
        torch.testing.assert_close(used[kept], sae.norm_exponent.detach()[kept])
        assert torch.equal(used_exponents(twin, direction), used)  # chance is part of the state
        masks.append(kept)
        assert 0.5 < kept.double().mean() < 0.7
    assert not torch.equal(masks[0], masks[1])
    torch.testing.assert_close(used_exponents(sae.eval(), direction), (1 - p) * sae.norm_exponent.detach())


@pytest.mark.parametrize("kernels", ["reference", "fast"])
def test_a_dropped_exponent_gets_no_gradient(kernels):
    sae = make(d_sae=200, norm_exponent_dropout=0.5, kernels=kernels).train()
    with torch.no_grad():  # small, so that features fire with and without them
        sae.norm_exponent.copy_(torch.linspace(-0.1, 0.1, 200))
        sae.b_enc.zero_()
    output = train_step(sae, make_activations(60, 7, dtype=torch.float64), step=3)
    output.loss.backward()
    kept = used_exponents(sae, torch.nn.functional.normalize(X[0], dim=0)).abs() > 1e-9
    fired = (output.feature_acts.to_dense() > 0).any(dim=0)
    assert torch.equal(sae.norm_exponent.grad != 0, kept & fired)
    assert (kept & fired).sum() > 10
    assert (~kept & fired).sum() > 10


def test_both_paths_drop_alike():
    gradients = []
    for kernels in ("reference", "fast"):
        sae = make(d_sae=200, norm_exponent_dropout=0.3, kernels=kernels, dead_feature_window_tokens=1).train()
        output = train_step(sae, make_activations(60, 7, dtype=torch.float64), step=3)
        output.loss.backward()
        gradients.append([output.loss, *(p.grad for p in sae.parameters())])
    for one, other in zip(*gradients, strict=True):
        assert_close(one, other, 1e-11)


@pytest.mark.parametrize("name", ["per_feature_cosine_topk", "per_feature_cosine_gated", NAME])
def test_the_saved_form_has_the_mean_exponents(name, tmp_path):
    sae = make(name, norm_exponent_dropout=0.2).train()
    train_step(sae, X, step=5)
    saved = save_inference(sae, tmp_path)  # saved in training mode, right after a step that dropped some
    assert_close(saved.norm_exponent.detach(), 0.8 * sae.norm_exponent.detach(), 1e-14)
    assert_same_function(saved, sae.eval(), X, 1e-12)


@pytest.mark.parametrize(
    "options",
    [{}, {"exponent_sharing": "base_delta", "norm_exponent_lr_multiplier": 3.0}],
    ids=["independent", "base and delta"],
)
@pytest.mark.parametrize("saved_after", [1, 5])
def test_a_resumed_run_drops_what_an_uninterrupted_one_does(options, saved_after, tmp_path):
    def trainer(first=0):
        sae = make_sae(NAME, seed=None, d_sae=39, norm_exponent_dropout=0.4, **options)
        return make_trainer(sae, Batches(lambda i: make_activations(32, 7, seed=i), first), steps=8, batch=32, lr=1e-2)

    whole, interrupted = trainer(), trainer()
    whole.fit()
    interrupted.checkpoint_thresholds = [saved_after * 32 - 1]
    interrupted.cfg.checkpoint_path = str(tmp_path)
    interrupted.fit()
    resumed = trainer(first=saved_after)
    resumed.load_trainer_state(tmp_path / str(saved_after * 32))
    resumed.sae.load_weights_from_checkpoint(tmp_path / str(saved_after * 32))
    resumed.fit()
    for key, tensor in whole.sae.state_dict().items():
        assert torch.equal(resumed.sae.state_dict()[key], tensor), key

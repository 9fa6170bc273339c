"""What features share of their exponents, where these start and how fast they are learned, by hand."""

import math

import pytest
import torch
from helpers import (
    COSINE,
    D_SAE,
    Batches,
    assert_close,
    assert_same_function,
    codes_and_output,
    make_activations,
    make_config,
    make_sae,
    make_trainer,
    save_inference,
    train_step,
)
from safetensors.torch import load_file

NAME = "per_feature_cosine_batchtopk"
SELECTED = ["per_feature_cosine_batchtopk", "per_feature_cosine_topk", "per_feature_cosine_gated"]


def make(name=NAME, **options):
    return make_sae(name, dtype="float64", **options)


def start(**options):
    """A new SAE: exponents and log-scales are at their starts."""
    return make_sae(NAME, seed=None, dtype="float64", **options)


def set_exponents(sae, *values):
    with torch.no_grad():
        sae.norm_exponent.copy_(torch.tensor(values, dtype=torch.float64))


def effective(sae):
    exponent, log_scale, unit_columns = sae.score_parameters()
    assert unit_columns
    return exponent.detach(), log_scale.detach()


def scores_of_formula(sae, x, a, b):
    """The definition, with exponents and log-scales given."""
    x_c = x - sae.b_dec.detach()
    n = x_c.square().sum(-1, keepdim=True).sqrt()
    W_enc = sae.W_enc.detach()
    cosine = (x_c / n) @ (W_enc / W_enc.square().sum(0).sqrt())
    return (a * n.log() + b).exp() * cosine + sae.b_enc.detach()


# --- sharing ---

# d_sae = 13: of groups of 13 // 5 = 2, the last has the three that are left over too
GROUPS = [
    (1, [0] * 13),
    (2, [0] * 6 + [1] * 7),
    (5, [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 4, 4, 4]),
    (7, [0, 1, 2, 3, 4, 5] + [6] * 7),
    (13, list(range(13))),
]


@pytest.mark.parametrize("n_groups, group", GROUPS)
def test_groups_are_blocks_and_the_last_has_the_remainder(n_groups, group):
    sae = start(exponent_sharing="groups", n_exponent_groups=n_groups)
    assert sae.norm_exponent.shape == sae.log_scale.shape == (n_groups,)
    with torch.no_grad():
        sae.norm_exponent.copy_(torch.arange(n_groups) / 10)
        sae.log_scale.copy_(1 + torch.arange(n_groups) / 3)
    exponent, log_scale = effective(sae)
    torch.testing.assert_close(exponent, torch.tensor(group, dtype=torch.float64) / 10)
    torch.testing.assert_close(log_scale, 1 + torch.tensor(group, dtype=torch.float64) / 3)


def test_a_base_and_a_difference_add_up():
    sae = start(exponent_sharing="base_delta", norm_exponent_init=0.25)
    assert sae.norm_exponent_base.item() == 0.25
    assert not sae.norm_exponent.any()
    assert effective(sae)[0].tolist() == [0.25] * D_SAE
    set_exponents(sae, *([0.5, -0.25] + [0.0] * 11))
    assert effective(sae)[0].tolist() == [0.75, 0.0] + [0.25] * 11


SHARED = {
    "independent": {},
    "base and delta": {"exponent_sharing": "base_delta"},
    "groups": {"exponent_sharing": "groups", "n_exponent_groups": 4},
    "fast": {"norm_exponent_lr_multiplier": 10.0, "log_scale_lr_multiplier": 4.0},
    "dropout": {"norm_exponent_dropout": 0.3},
    "all": {
        "exponent_sharing": "base_delta", "norm_exponent_lr_multiplier": 0.5, "log_scale_lr_multiplier": 3.0,
        "norm_exponent_dropout": 0.25,
    },
}  # fmt: skip


def exponents_by_hand(sae):
    """Effective exponents and log-scales in eval mode, from the parameters and the config alone."""
    cfg = sae.cfg
    a, b = (
        sae.norm_exponent.detach() * cfg.norm_exponent_lr_multiplier,
        sae.log_scale.detach() * cfg.log_scale_lr_multiplier,
    )
    if cfg.exponent_sharing == "base_delta":
        a = a + sae.norm_exponent_base.item() * cfg.norm_exponent_lr_multiplier
    if cfg.exponent_sharing == "groups":
        size = D_SAE // cfg.n_exponent_groups
        of = [min(i // size, cfg.n_exponent_groups - 1) for i in range(D_SAE)]
        a, b = a[of], b[of]
    return a * (1 - cfg.norm_exponent_dropout), b


@pytest.mark.parametrize("options", SHARED.values(), ids=SHARED)
@pytest.mark.parametrize("name", ["per_feature_cosine_batchtopk", "per_feature_cosine_topk"])
def test_scores_of_every_way_to_share(name, options):
    sae, x = make(name, **options), make_activations(20, 7, dtype=torch.float64)
    assert_close(sae.encode_with_hidden_pre(x)[1].detach(), scores_of_formula(sae, x, *exponents_by_hand(sae)), 1e-12)


@pytest.mark.parametrize("options", SHARED.values(), ids=SHARED)
@pytest.mark.parametrize("name", SELECTED)
def test_the_saved_form_has_the_effective_values(name, options, tmp_path):
    sae = make(name, **options)
    saved = save_inference(sae, tmp_path)
    a, b = exponents_by_hand(sae)
    tensors = load_file(tmp_path / "sae_weights.safetensors")
    assert_close(tensors["norm_exponent"], a, 1e-14)
    assert "norm_exponent_base" not in tensors
    assert tensors["norm_exponent"].shape == (D_SAE,)
    assert_close(tensors["W_enc"], b.exp() * sae.W_enc.detach() / sae.W_enc.detach().norm(dim=0), 1e-12)
    assert_same_function(saved, sae, make_activations(50, 7, dtype=torch.float64), 1e-12)


@pytest.mark.parametrize("options", SHARED.values(), ids=SHARED)
@pytest.mark.parametrize("s", [0.2, 5.0])
def test_input_scale_is_folded_exactly(options, s):
    sae, x = make(**options), make_activations(50, 7, dtype=torch.float64)
    codes, output = codes_and_output(sae, s * x)
    sae.fold_activation_norm_scaling_factor(s)
    for one, other in zip(codes_and_output(sae, x), (codes, output / s), strict=True):
        assert_close(one, other, 1e-12)


FREE = {"unit_decoder": False, "rescale_acts_by_decoder_norm": True}


@pytest.mark.parametrize("sharing", ["independent", "base and delta", "fast", "dropout", "all"])
def test_decoder_norms_are_folded_exactly(sharing):
    sae, x = make(**SHARED[sharing], **FREE), make_activations(50, 7, dtype=torch.float64)
    expected = codes_and_output(sae, x)
    sae.fold_W_dec_norm()
    assert_close(sae.W_dec.norm(dim=1), torch.ones(D_SAE), 1e-12)
    for one, other in zip(codes_and_output(sae, x), expected, strict=True):
        assert_close(one, other, 1e-12)


def test_a_scale_of_a_group_cannot_hold_decoder_norms():
    sae = make(**SHARED["groups"], **FREE)
    before = {key: tensor.clone() for key, tensor in sae.state_dict().items()}
    with pytest.raises(NotImplementedError, match="one log_scale for each group.*save_inference_model"):
        sae.fold_W_dec_norm()
    assert all(torch.equal(tensor, before[key]) for key, tensor in sae.state_dict().items())


def fit(sae, steps=6, start=0, **overrides):
    data = Batches(lambda i: make_activations(32, sae.cfg.d_in, seed=i, dtype=torch.float64), start)
    trainer = make_trainer(sae, data, steps=steps, batch=32, **{"lr": 1e-2, "lr_end": 1e-2, **overrides})
    trainer.fit()
    return sae


def test_one_group_trains_as_the_global_score_and_d_sae_groups_as_independent_ones():
    options = {"seed": None, "dtype": "float64", "d_sae": 39}
    one = fit(make_sae(NAME, exponent_sharing="groups", n_exponent_groups=1, **options))
    every = fit(make_sae(NAME, exponent_sharing="groups", n_exponent_groups=39, **options))
    # all for one: gradients of shared parameters are sums over features
    for grouped, plain in ((one, "cosine_batchtopk"), (every, NAME)):
        expected = fit(make_sae(plain, **options)).state_dict()
        for key, tensor in grouped.state_dict().items():
            torch.testing.assert_close(tensor.reshape(expected[key].shape), expected[key], rtol=1e-9, atol=1e-12)


def test_a_base_without_differences_trains_as_the_global_exponent():
    # with differences that are not learned, and log-scales that are not, the base has the global exponent's gradient
    options = {"seed": None, "dtype": "float64", "learn_log_scale": False, "log_scale_init": 1.0}
    shared, plain = make_sae(NAME, exponent_sharing="base_delta", **options), make_sae("cosine_batchtopk", **options)
    shared.norm_exponent.requires_grad_(False)
    fit(shared), fit(plain)
    assert plain.norm_exponent.abs() > 1e-3
    assert shared.norm_exponent_base.item() == pytest.approx(plain.norm_exponent.item(), rel=1e-9)
    torch.testing.assert_close(shared.W_enc, plain.W_enc, rtol=1e-9, atol=1e-12)


def test_the_base_has_the_sum_of_the_differences_gradients():
    sae = make(exponent_sharing="base_delta").train()
    train_step(sae, make_activations(30, 7, dtype=torch.float64), step=1).loss.backward()
    assert sae.norm_exponent.grad.abs().max() > 0
    assert sae.norm_exponent_base.grad.item() == pytest.approx(sae.norm_exponent.grad.sum().item(), rel=1e-12)


@pytest.mark.parametrize("kernels", ["reference", "fast"])
@pytest.mark.parametrize("options", SHARED.values(), ids=SHARED)
def test_both_paths_give_the_same_gradients(options, kernels):
    """Of a loss computed from the definition, by autograd through exponents made by hand."""
    sae = make(d_sae=39, kernels=kernels, aux_loss_coefficient=0.0, **{**options, "norm_exponent_dropout": 0.0}).train()
    x = make_activations(30, 7, dtype=torch.float64)
    output = train_step(sae, x, step=1)
    output.loss.backward()
    mask = output.feature_acts.to_dense().detach() != 0
    a, b = (p.clone().requires_grad_() for p in effective(sae))
    x_c = x - sae.b_dec.detach()
    n = x_c.norm(dim=1, keepdim=True)
    W_enc = sae.W_enc.detach()
    pre = (a * n.log() + b).exp() * ((x_c / n) @ (W_enc / W_enc.norm(dim=0))) + sae.b_enc.detach()
    ((pre * mask) @ sae.W_dec.detach() + sae.b_dec.detach() - x).square().sum(1).mean().backward()
    d_a, d_b = a.grad * sae.cfg.norm_exponent_lr_multiplier, b.grad * sae.cfg.log_scale_lr_multiplier
    if sae.cfg.exponent_sharing == "groups":
        d_a, d_b = (torch.stack([part.sum() for part in (g[:9], g[9:18], g[18:27], g[27:])]) for g in (d_a, d_b))
    assert_close(sae.norm_exponent.grad, d_a, 1e-11)
    assert_close(sae.log_scale.grad, d_b, 1e-11)


# --- starts ---


def test_a_gaussian_start():
    torch.manual_seed(0)
    sae = make_sae(NAME, seed=None, d_sae=20_000, norm_exponent_init=0.3, norm_exponent_init_std=0.05)
    assert sae.norm_exponent.mean().item() == pytest.approx(0.3, abs=0.002)  # 0.05 / sqrt(20000) = 0.00035
    assert sae.norm_exponent.std().item() == pytest.approx(0.05, rel=0.03)
    assert effective(sae)[1].unique().numel() == 1


@pytest.mark.parametrize("c", [0.1, 20.0])
@pytest.mark.parametrize(
    "sharing", [{}, {"exponent_sharing": "base_delta"}, {"exponent_sharing": "groups", "n_exponent_groups": 3}]
)
def test_multipliers_change_no_start(c, sharing):
    sae = start(
        norm_exponent_lr_multiplier=c, log_scale_lr_multiplier=c, norm_exponent_init=0.3, log_scale_init=1.5, **sharing
    )
    exponent, log_scale = effective(sae)
    torch.testing.assert_close(exponent, torch.full((D_SAE,), 0.3, dtype=torch.float64))
    torch.testing.assert_close(log_scale, torch.full((D_SAE,), 1.5, dtype=torch.float64))
    spread = start(norm_exponent_lr_multiplier=c, norm_exponent_init_std=0.5, **sharing)
    unit = start(norm_exponent_init_std=0.5, **sharing)
    torch.testing.assert_close(effective(spread)[0], effective(unit)[0])


@pytest.mark.parametrize("c", [1.0, 5.0])
def test_a_scale_from_data_is_the_effective_one(c):
    # norms 4 and 16, mean 10
    sae = start(d_in=2, log_scale_from_data=True, log_scale_lr_multiplier=c, b_dec_init="zeros")
    sae.initialize_from_data(torch.tensor([[4.0, 0.0], [0.0, 16.0]], dtype=torch.float64))
    torch.testing.assert_close(effective(sae)[1], torch.full((D_SAE,), math.log(10), dtype=torch.float64))


# --- how far an optimizer moves them ---


@pytest.mark.parametrize(
    "name", ["cosine_batchtopk", "per_feature_cosine_topk", "cosine_standard", "per_feature_cosine_jumprelu"]
)
@pytest.mark.parametrize("which", ["norm_exponent", "log_scale"])
@pytest.mark.parametrize("c", [0.1, 10.0])
def test_the_first_step_is_the_learning_rate_times_the_multiplier(name, which, c):
    # Adam's first step is lr g / (|g| + eps) of the parameter, which counts c times in the effective value
    lr = 1e-3
    sae = make_sae(name, seed=None, dtype="float64", **{f"{which}_lr_multiplier": c})
    place = ["norm_exponent", "log_scale"].index(which)
    before = sae.score_parameters()[place].detach().clone()
    trainer = make_trainer(
        sae,
        Batches(lambda i: make_activations(32, 7, seed=i, dtype=torch.float64)),
        steps=1,
        batch=32,
        lr=lr,
        lr_end=lr,
    )
    gradients = []
    trainer.optimizer.register_step_pre_hook(lambda *_: gradients.append(getattr(sae, which).grad.clone()))
    trainer.fit()
    (gradient,) = gradients
    assert gradient.any()
    moved = sae.score_parameters()[place].detach() - before
    torch.testing.assert_close(moved, -c * lr * gradient / (gradient.abs() + 1e-8), rtol=1e-9, atol=1e-12)


def test_several_steps_are_those_of_adam_on_the_effective_exponent():
    # Adam moves the parameter by lr m / (sqrt(v) + eps) of the gradient c g, which c drops out of, and the exponent c times
    # as far. Worked out here for the gradients g that the run has had.
    lr, c = 1e-4, 7.0
    sae = make_sae("cosine_batchtopk", seed=None, dtype="float64", norm_exponent_lr_multiplier=c)
    trainer = make_trainer(
        sae,
        Batches(lambda i: make_activations(64, 7, seed=i, dtype=torch.float64)),
        steps=6,
        batch=64,
        lr=lr,
        lr_end=lr,
    )
    gradients, exponents = [], []
    trainer.optimizer.register_step_pre_hook(lambda *_: gradients.append(sae.norm_exponent.grad.item() / c))
    for _ in range(6):
        trainer.step(next(trainer.data_provider))
        trainer.n_training_steps += 1
        exponents.append(sae.score_parameters()[0].item())
    a = m = v = 0.0
    for t, g in enumerate(gradients, start=1):
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        a -= c * lr * (m / (1 - 0.9**t)) / (math.sqrt(v / (1 - 0.999**t)) + 1e-8 / c)
        assert exponents[t - 1] == pytest.approx(a, rel=1e-4)


@pytest.mark.parametrize("name", COSINE)
def test_the_saved_exponent_is_the_effective_one(name, tmp_path):
    sae = make_sae(name, norm_exponent_lr_multiplier=4.0, log_scale_lr_multiplier=0.5)
    saved = save_inference(sae, tmp_path)
    torch.testing.assert_close(saved.norm_exponent, 4 * sae.norm_exponent)
    torch.testing.assert_close(saved.W_enc.norm(dim=0), (sae.log_scale / 2).exp().expand(D_SAE))
    assert_same_function(saved, sae, make_activations(30, 7))


def test_logs_show_effective_values():
    sae = start(exponent_sharing="base_delta", norm_exponent_lr_multiplier=2.0, log_scale_lr_multiplier=3.0)
    set_exponents(sae, *([0.25] * 6 + [-0.5] * 7))
    sae.norm_exponent_base.data.fill_(0.1)
    sae.log_scale.data.fill_(0.5)
    metrics = {key: value.item() for key, value in sae.training_metrics().items()}
    # 2 (0.1 + 0.25) = 0.7 six times, 2 (0.1 - 0.5) = -0.8 seven times
    assert metrics["norm_exponent_max"] == pytest.approx(0.7)
    assert metrics["norm_exponent_min"] == pytest.approx(-0.8)
    assert metrics["norm_exponent_mean"] == pytest.approx((6 * 0.7 - 7 * 0.8) / 13)
    assert metrics["norm_exponent_share_above_0.5"] == pytest.approx(6 / 13)
    assert metrics["log_scale_mean"] == pytest.approx(1.5)


# --- refusals ---

REFUSED = [  # settings, and the change that makes them possible
    ({"exponent_sharing": "groups"}, {"n_exponent_groups": 4}),
    ({"n_exponent_groups": 4}, {"exponent_sharing": "groups"}),
    ({"exponent_sharing": "base_delta", "n_exponent_groups": 4}, {"n_exponent_groups": None}),
    ({"exponent_sharing": "groups", "n_exponent_groups": 0}, {"n_exponent_groups": 1}),
    ({"exponent_sharing": "groups", "n_exponent_groups": D_SAE + 1}, {"n_exponent_groups": D_SAE}),
    ({"exponent_sharing": "pairs"}, {"exponent_sharing": "independent"}),
    ({"norm_exponent_dropout": 1.0}, {"norm_exponent_dropout": 0.99}),
    ({"norm_exponent_dropout": -0.1}, {"norm_exponent_dropout": 0.0}),
    ({"norm_exponent_variance_constant_steps": 8000}, {"norm_exponent_variance_constant_steps": 7999}),
    ({"norm_exponent_variance_penalty": 0.1, "learn_norm_exponent": False}, {"learn_norm_exponent": True}),
]
REFUSED_EVERYWHERE = [
    ({"norm_exponent_lr_multiplier": 0.0}, {"norm_exponent_lr_multiplier": 0.01}),
    ({"log_scale_lr_multiplier": -1.0}, {"log_scale_lr_multiplier": 1.0}),
    ({"norm_exponent_l2": 0.1, "learn_norm_exponent": False}, {"learn_norm_exponent": True}),
]


@pytest.mark.parametrize(
    "name, settings, way_out",
    [(NAME, *case) for case in REFUSED + REFUSED_EVERYWHERE] + [("cosine_topk", *case) for case in REFUSED_EVERYWHERE],
)
def test_impossible_combinations_are_refused_by_name(name, settings, way_out):
    with pytest.raises(ValueError, match="|".join(rf"\b{name}=" for name in settings)):
        make_config(name, **settings)
    make_config(name, **{**settings, **way_out})


@pytest.mark.parametrize("option", ["exponent_sharing", "norm_exponent_dropout", "norm_exponent_variance_penalty"])
def test_a_global_exponent_has_nothing_to_share(option):
    with pytest.raises(TypeError, match=option):
        make_config("cosine_batchtopk", **{option: "base_delta"})

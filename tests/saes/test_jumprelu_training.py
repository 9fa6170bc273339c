"""JumpReLU in training: starts, units, straight-through gradients and losses, against formulas written here."""

import pytest
import torch
from helpers import (
    assert_close,
    assert_same_function,
    make_activations,
    make_config,
    make_sae,
    make_trainer,
    planted_batches,
    save_inference,
    train_step,
)
from sae_lens.saes.jumprelu_sae import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig
from sae_lens.saes.sae import TrainStepInput

from saelens_cosine.saes.jumprelu_training_sae import UNIT_RATE, root_mean_square_positive

NAMES = [f"{score}_jumprelu" for score in ("inner_product", "cosine", "per_feature_cosine")]
D, F, K, B = 12, 40, 4, 64


def make(name, seed=1, **options):
    return make_sae(name, seed=seed, **{"dtype": "float64", "d_in": D, "d_sae": F, "k": K, **options}).train()


def x_of(tokens=B, seed=0):
    return make_activations(tokens, D, seed=seed, dtype=torch.float64)


def scores(sae, x):
    with torch.no_grad():
        return sae.score(sae.process_sae_in(x))


@pytest.mark.parametrize(
    "values, expected", [([3.0, -9.0, 4.0, 0.0], (25 / 2) ** 0.5), ([[2.0], [-1.0]], 2.0), ([-1.0, 0.0], 0.0)]
)
def test_root_mean_square_of_positive_scores(values, expected):
    found = root_mean_square_positive(torch.tensor(values))
    assert found.item() == pytest.approx(expected, rel=1e-6, abs=1e-30)
    assert found > 0


# --- start ---


@pytest.mark.parametrize("c", [0.5, 1.0, 8.0])
@pytest.mark.parametrize("scale", [0.01, 1.0, 300.0])
@pytest.mark.parametrize("name", NAMES)
def test_l0_starts_at_its_target_whatever_the_scale(name, scale, c):
    sae, x = make(name, seed=None, threshold_lr_multiplier=c), scale * x_of(200)
    output = train_step(sae, x, step=0)
    l0 = (output.feature_acts > 0).sum().item() / 200
    assert K - 1 / 200 <= l0 <= K  # the threshold is a score itself
    expected = scores(sae, x).flatten().sort(descending=True).values[K * 200 - 1].item()
    starts = (sae.threshold * c).detach()
    assert starts.unique().numel() == 1
    assert sae.threshold.dtype == torch.float32  # as SAELens has it
    before_the_step = root_mean_square_positive(scores(sae, x)).item()
    assert starts[0].item() * before_the_step == pytest.approx(expected, rel=1e-5)


def test_a_start_without_a_target_is_in_units_of_scores():
    options = {"target_l0": None, "jumprelu_sparsity_loss_mode": "step", "jumprelu_init_threshold": 0.25}
    sae, x = make("cosine_jumprelu", seed=None, **options), x_of()
    sae.initialize_from_data(x)
    unit = root_mean_square_positive(scores(sae, x)).item()
    assert sae.threshold_unit.item() == pytest.approx(unit, rel=1e-6)
    assert sae.score_thresholds().detach().tolist() == pytest.approx([0.25 * unit] * F, rel=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_a_target_that_needs_negative_scores_keeps_every_positive_one(name):
    sae, x = make(name, seed=None, k=F - 1), x_of()
    output = train_step(sae, x, step=0)
    assert not sae.threshold.any()
    assert torch.equal(output.feature_acts.detach(), scores(sae, x).relu())


def test_the_unit_is_a_running_one_and_thresholds_follow_it():
    sae = make("cosine_jumprelu")
    sae.threshold_unit.fill_(2.0)
    before = sae.score_thresholds().detach().clone()
    x = x_of()
    now = root_mean_square_positive(scores(sae, x)).item()
    output = train_step(sae, x, step=1)
    expected = 2.0 + UNIT_RATE * (now - 2.0)
    assert sae.threshold_unit.item() == pytest.approx(expected, rel=1e-6)
    assert_close(sae.score_thresholds().detach(), before * expected / 2, 1e-6)
    # the step itself has used the old ones
    pre = scores(sae, x)
    assert torch.equal(output.feature_acts > 0, pre > before)


# --- gradients ---

MODES = ["step", "tanh", "quadratic"]


def by_formula(sae, x, weight):
    """Losses and gradients of the rectangle estimator, in float64, without autograd through a threshold.

    A score s within half a window w of its threshold T moves it: by -T / w times the gradient of its code, and by -1 / w times
    that of its count. With ste_to_input the score gets the opposite. `weight [B, d_in]` is dL / d x_hat.
    """
    cfg = sae.cfg
    pre = scores(sae, x)
    unit = cfg.threshold_lr_multiplier * sae.threshold_unit.double()
    T = sae.threshold.detach().double() * unit
    w = cfg.jumprelu_bandwidth * sae.threshold_unit.double()
    near = ((pre - T).abs() < w / 2).double() / w
    on = (pre > T).double()
    codes = pre * on
    W_dec, x_hat = sae.W_dec.detach(), codes @ sae.W_dec.detach() + sae.b_dec.detach()
    mse = (x - x_hat).square().sum(1).mean()
    d_codes = (2 / len(x) * (x_hat - x)) @ W_dec.T
    size = mse if cfg.relative_l0_loss else 1.0
    if cfg.jumprelu_sparsity_loss_mode == "tanh":
        norms = W_dec.square().sum(1).sqrt()
        through = torch.tanh(cfg.jumprelu_tanh_scale * codes * norms)
        loss = weight * size * through.sum(1).mean()
        d_codes = d_codes + weight * size / len(x) * cfg.jumprelu_tanh_scale * norms * (1 - through**2)
        d_count = torch.zeros_like(pre)
    else:
        l0 = on.sum(1).mean()
        if cfg.jumprelu_sparsity_loss_mode == "step":
            loss, slope = weight * size * l0, weight * size
        else:
            loss = weight * size * 2 / cfg.target_l0 * (l0 - cfg.target_l0) ** 2
            slope = weight * size * 4 / cfg.target_l0 * (l0 - cfg.target_l0)
        d_count = torch.full_like(pre, float(slope) / len(x))
    estimator = near * (T * d_codes + d_count)
    d_pre = on * d_codes + (estimator if cfg.jumprelu_ste_to_input else 0)
    return {"mse": mse, "l0": loss, "threshold": -unit * estimator.sum(0), "b_enc": d_pre.sum(0), "near": near.sum()}


@pytest.mark.parametrize("to_input", [False, True])
@pytest.mark.parametrize("relative", [True, False])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_the_rectangle_estimators(name, mode, relative, to_input):
    sae = make(
        name, jumprelu_sparsity_loss_mode=mode, relative_l0_loss=relative, jumprelu_ste_to_input=to_input,
        threshold_lr_multiplier=2.5, l0_coefficient=0.3, aux_loss_coefficient=0.0, jumprelu_tanh_scale=0.2,
        target_l0=K + 2,
    )  # fmt: skip
    x = x_of()
    expected = by_formula(sae, x, weight=0.3)
    assert expected["near"] > 20 / sae.threshold_unit  # the window holds some scores
    output = train_step(sae, x, step=1)
    output.loss.backward()
    assert output.losses["mse_loss"].item() == pytest.approx(expected["mse"].item(), rel=1e-10)
    assert output.losses["l0_loss"].item() == pytest.approx(expected["l0"].item(), rel=1e-6)
    assert output.loss.item() == pytest.approx((expected["mse"] + expected["l0"]).item(), rel=1e-6)
    assert_close(sae.threshold.grad, expected["threshold"], 1e-5)
    assert_close(sae.b_enc.grad, expected["b_enc"], 1e-5)


def test_by_hand():
    # scores 3 and 1 of two features at one token, thresholds 2 and 2, unit 4, bandwidth 0.75: window 3, so both are near.
    # L0 = 1, target 1.5: loss 2 / 1.5 * 0.25 = 1/3, slope 4 / 1.5 * -0.5 = -4/3; thresholds' part of it: -slope / 3 = 4/9
    sae = make_sae(
        "inner_product_jumprelu", seed=None, d_in=2, d_sae=2, dtype="float64", target_l0=1.5, jumprelu_bandwidth=0.75,
        threshold_lr_multiplier=1.0, relative_l0_loss=False, aux_loss_coefficient=0.0, b_dec_init="zeros",
    ).train()  # fmt: skip
    with torch.no_grad():
        sae.W_enc.copy_(torch.eye(2))
        sae.W_dec.copy_(torch.eye(2))
        sae.threshold_unit.fill_(4.0)
        sae.threshold.fill_(0.5)
    x = torch.tensor([[3.0, 1.0]], dtype=torch.float64)
    output = train_step(sae, x, step=1)
    assert output.feature_acts.tolist() == [[3.0, 0.0]]
    assert output.losses["l0_loss"].item() == pytest.approx(1 / 3)
    assert output.losses["mse_loss"].item() == pytest.approx(1.0)
    output.loss.backward()
    # x_hat = (3, 0): dL/dcode = (0, -2); code's part: -(2 / 3) (0, -2) = (0, 4/3); all times the unit
    assert sae.threshold.grad.tolist() == pytest.approx([4 * 4 / 9, 4 * (4 / 9 + 4 / 3)])


@pytest.mark.parametrize("mode", MODES)
def test_the_penalty_is_a_share_of_the_reconstruction_loss(mode):
    # at ten times the activations, thresholds in units of the scores and all: the same share
    shares = []
    for scale in (1.0, 10.0):
        sae = make(
            "cosine_jumprelu", seed=None, jumprelu_sparsity_loss_mode=mode, norm_exponent_init=1.0, log_scale_init=0.0
        )
        if mode == "tanh":
            sae.cfg.jumprelu_tanh_scale = 0.1 / scale
        losses = train_step(sae, scale * x_of(), step=0).losses
        shares.append((losses["l0_loss"] / losses["mse_loss"]).item())
    assert shares[1] == pytest.approx(shares[0], rel=1e-5)


@pytest.mark.parametrize("mode", ["step", "tanh"])
@pytest.mark.parametrize("pre_act", [None, 0.01])
@pytest.mark.parametrize("to_input", [False, True])
def test_with_saelens_settings_a_step_is_saelens_own(mode, pre_act, to_input):
    options = {
        "d_in": D, "d_sae": F, "dtype": "float64", "l0_coefficient": 0.2, "jumprelu_sparsity_loss_mode": mode,
        "jumprelu_bandwidth": 0.8, "jumprelu_ste_to_input": to_input, "pre_act_loss_coefficient": pre_act,
    }  # fmt: skip
    stock = JumpReLUTrainingSAE(JumpReLUTrainingSAEConfig(**options, decoder_init_norm=0.4))
    ours = make(
        "inner_product_jumprelu", unit_decoder=False, b_dec_init="zeros", relative_l0_loss=False, aux_loss_coefficient=0.0,
        threshold_lr_multiplier=1.0, target_l0=None, **options,
    )  # fmt: skip
    ours.threshold_unit.fill_(1.0)
    stock.load_state_dict(ours.state_dict(), strict=False)
    dead = torch.arange(F) < 9
    outputs = []
    for sae in (ours, stock):
        step_input = TrainStepInput(x_of(), {"l0": 0.2}, dead, 1, False)
        outputs.append(sae.training_forward_pass(step_input))
        outputs[-1].loss.backward()
    mine, theirs = outputs
    assert theirs.losses.keys() <= mine.losses.keys()
    for key, loss in theirs.losses.items():
        torch.testing.assert_close(mine.losses[key], loss, rtol=1e-6, atol=1e-9)
    assert ("pre_act_loss" in mine.losses) == (pre_act is not None)
    for name, parameter in stock.named_parameters():
        assert_close(ours.get_parameter(name).grad, parameter.grad, 1e-6)


# --- eval mode, saving, training ---


@pytest.mark.parametrize("name", NAMES)
def test_negative_thresholds_count_as_zero_in_eval_mode_and_in_the_file(name, tmp_path):
    sae = make(name)
    with torch.no_grad():
        sae.threshold[::2] = -3.0
    sae.eval()
    x, thresholds = x_of(), sae.score_thresholds().detach().clamp_min(0)
    pre = scores(sae, x)
    assert torch.equal(sae.encode(x).detach(), pre * (pre > thresholds))
    assert (sae.encode(x) >= 0).all()
    saved = save_inference(sae, tmp_path)
    assert torch.equal(saved.threshold.detach(), thresholds.to(saved.threshold.dtype))
    assert_same_function(saved, sae, x, 1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_the_start_of_a_step_clamps_thresholds(name):
    sae = make(name)
    with torch.no_grad():
        sae.threshold[3] = -1.0
    train_step(sae, x_of(), step=1)
    assert sae.threshold[3] == 0


@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_l0_stays_near_its_target_in_training_and_in_the_saved_sae(scale, tmp_path):
    sae = make_sae("cosine_jumprelu", seed=None, d_in=16, d_sae=64, k=4)
    data = planted_batches(d_in=16, n_features=32, active=3, batch=512, spread=0.5, scale=scale)
    make_trainer(sae, data, steps=400, batch=512, lr=1e-3, lr_end=1e-4, lr_decay_steps=100).fit()
    saved = save_inference(sae, tmp_path)
    with torch.no_grad():
        x = torch.cat([data.sample(100_000 + i) for i in range(8)])
        l0 = (saved.encode(x) > 0).sum(1).float().mean().item()
        fve = 1 - (saved(x) - x).var() / x.var()
    assert l0 == pytest.approx(4, rel=0.1)
    assert fve > 0.5


def test_logs_show_thresholds_in_units_of_scores():
    sae = make("cosine_jumprelu", threshold_lr_multiplier=2.0)
    sae.threshold_unit.fill_(5.0)
    sae.threshold.data.copy_(torch.linspace(0.1, 0.3, F))
    metrics = sae.training_metrics()
    for key, expected in (("min", 1.0), ("mean", 2.0), ("max", 3.0)):
        assert metrics[f"threshold_{key}"].item() == pytest.approx(expected, rel=1e-5)


REFUSED = [
    ({"target_l0": 0}, "target_l0=0 "),
    ({"target_l0": 13}, "target_l0=13 .*d_sae=13"),
    ({"target_l0": None}, "'quadratic' needs a target_l0"),
    ({"jumprelu_bandwidth": 0.0}, "jumprelu_bandwidth=0.0"),
    ({"threshold_lr_multiplier": -1.0}, "threshold_lr_multiplier=-1.0"),
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("settings, message", REFUSED)
def test_impossible_settings_are_refused_by_name(name, settings, message):
    with pytest.raises(ValueError, match=message):
        make_config(name, **settings)

"""Gated against SAELens' own class, and the cosine's gate, magnitude and losses against formulas written here."""

import pytest
import torch
from helpers import assert_close, assert_same_function, make_activations, make_sae, save_inference, train_step
from sae_lens.saes.gated_sae import GatedTrainingSAE, GatedTrainingSAEConfig
from sae_lens.saes.sae import TrainStepInput

NAMES = [f"{score}_gated" for score in ("inner_product", "cosine", "per_feature_cosine")]
AUX = "auxiliary_reconstruction_loss"
D, F, B = 7, 13, 20


def x_of(seed=0):
    return make_activations(B, D, seed=seed, dtype=torch.float64)


def score_of(sae, x):
    """Scores without a bias, from the definition."""
    x_c, W_enc = x - sae.b_dec, sae.W_enc
    if not hasattr(sae, "norm_exponent"):
        return x_c @ W_enc
    n = x_c.square().sum(1, keepdim=True).sqrt()
    return (sae.norm_exponent * n.log() + sae.log_scale).exp() * ((x_c / n) @ (W_enc / W_enc.square().sum(0).sqrt()))


def twin_of(ours):
    """SAELens' own, with the same parameters."""
    stock = GatedTrainingSAE(GatedTrainingSAEConfig(d_in=D, d_sae=F, dtype="float64", l1_coefficient=0.3))
    stock.load_state_dict(ours.state_dict(), strict=False)
    return stock


@pytest.mark.parametrize("unit_decoder", [True, False])
def test_the_control_is_saelens_gated(unit_decoder):
    ours = make_sae("inner_product_gated", dtype="float64", l1_coefficient=0.3, unit_decoder=unit_decoder).train()
    stock, x = twin_of(ours), x_of()
    for one, other in zip(ours.encode_with_hidden_pre(x), stock.encode_with_hidden_pre(x), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours.encode(x), stock.encode(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours(x), stock(x), rtol=1e-12, atol=1e-12)
    step_input = TrainStepInput(x, {"l1": 0.3}, None, 1, False)
    mine, theirs = ours.training_forward_pass(step_input), stock.training_forward_pass(step_input)
    assert mine.losses.pop(AUX) == 0  # no feature is dead
    # SAELens calls the second auxiliary_reconstruction_loss, which is the recipe's name for another
    names = {"mse_loss": "mse_loss", "l1_loss": "l1_loss", "auxiliary_reconstruction_loss": "gate_reconstruction_loss"}
    assert theirs.losses.keys() == names.keys()
    for theirs_name, ours_name in names.items():
        torch.testing.assert_close(mine.losses[ours_name], theirs.losses[theirs_name], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(mine.loss, theirs.loss, rtol=1e-12, atol=1e-12)
    mine.loss.backward()
    theirs.loss.backward()
    for name, parameter in stock.named_parameters():
        gradient = parameter.grad
        if name == "W_dec" and unit_decoder:  # tangent to the sphere
            rows = stock.W_dec.detach()
            gradient = gradient - (gradient * rows).sum(1, keepdim=True) * rows
        torch.testing.assert_close(ours.get_parameter(name).grad, gradient, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", NAMES)
def test_codes_and_losses_by_their_formula(name):
    sae, x = make_sae(name, dtype="float64", l1_coefficient=0.3).train(), x_of()
    output = train_step(sae, x, step=1)
    score = score_of(sae, x).detach()
    gate, magnitude = score + sae.b_gate.detach(), score * sae.r_mag.detach().exp() + sae.b_mag.detach()
    codes = torch.where(gate > 0, magnitude.clamp_min(0), 0)
    assert_close(output.feature_acts.detach(), codes, 1e-12)
    assert_close(output.hidden_pre.detach(), magnitude, 1e-12)
    assert ((gate > 0) & (magnitude < 0)).any()  # both conditions have cases
    assert ((gate < 0) & (magnitude > 0)).any()
    W_dec, b_dec, opened = sae.W_dec.detach(), sae.b_dec.detach(), gate.clamp_min(0)
    expected = {
        "mse_loss": (codes @ W_dec + b_dec - x).square().sum(1).mean(),
        "l1_loss": 0.3 * (opened * W_dec.norm(dim=1)).sum(1).mean(),
        "gate_reconstruction_loss": (opened @ W_dec + b_dec - x).square().sum(1).mean(),
        AUX: torch.zeros(()),
    }
    assert output.losses.keys() == expected.keys()
    for key, loss in expected.items():
        assert output.losses[key].item() == pytest.approx(loss.item(), rel=1e-12), key
    assert output.loss.item() == pytest.approx(sum(loss.item() for loss in expected.values()), rel=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_learns(name):
    sae = make_sae(name, dtype="float64").train()
    train_step(sae, x_of(), step=1).loss.backward()
    for key, parameter in sae.named_parameters():
        assert parameter.grad.abs().max() > 0, key


def test_a_cosine_gate_is_saelens_at_exponent_one_with_unit_columns():
    sae, x = make_sae("cosine_gated", dtype="float64").train(), x_of()
    with torch.no_grad():
        sae.norm_exponent.fill_(1.0)
        sae.log_scale.zero_()
        sae.W_enc.div_(sae.W_enc.norm(dim=0))
    torch.testing.assert_close(sae.encode(x), twin_of(sae).encode(x), rtol=1e-12, atol=1e-12)


def test_dead_features_predict_the_residual_from_their_magnitudes():
    # feature 1 is dead, its gate closed: it predicts from the magnitude that it would have
    sae = make_sae("inner_product_gated", dtype="float64", seed=None, d_in=2, d_sae=2, aux_loss_coefficient=1.0).train()
    with torch.no_grad():
        sae.W_enc.copy_(torch.eye(2))
        sae.W_dec.copy_(torch.eye(2))
        sae.b_gate.copy_(torch.tensor([0.0, -100.0]))
        sae.b_mag[1] = 1.0
    sae.tokens_since_fired[1] = 10**9
    x = torch.tensor([[3.0, 4.0], [1.0, -2.0]], dtype=torch.float64)
    # codes (3, 0) and (1, 0); residuals (0, 4) and (0, -2), mean (0, 1): variance 9
    # magnitudes of feature 1: 4 + 1 = 5, and -2 + 1 rectified: errors 1 and 4
    losses = train_step(sae, x, step=1).losses
    assert losses[AUX].item() == pytest.approx(2.5 / 9, rel=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_hooks_see_magnitudes_before_the_relu(name, tmp_path):
    sae = make_sae(name, dtype="float64")
    x, score = x_of(), score_of(sae, x_of()).detach()
    for each in (sae, save_inference(sae, tmp_path)):
        _, cache = each.run_with_cache(x)
        assert_close(cache["hook_sae_acts_pre"], score * sae.r_mag.detach().exp() + sae.b_mag.detach(), 1e-12)
    assert_same_function(each, sae, x, 1e-12)


@pytest.mark.parametrize("name", NAMES[1:])
def test_decoder_norms_reach_gate_and_magnitude(name, tmp_path):
    # r = 3: both conditions keep their signs, codes are three times as large
    saved = save_inference(make_sae(name, dtype="float64"), tmp_path)
    x = x_of()
    codes, output = saved.encode(x), saved(x)
    saved.W_dec.data.mul_(3)
    saved.fold_W_dec_norm()
    assert_close(saved.encode(x).detach(), 3 * codes.detach(), 1e-12)
    saved.W_dec.data.div_(3)
    assert_close(saved(x).detach(), output.detach(), 1e-12)

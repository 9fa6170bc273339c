"""ReLU and L1 against SAELens' own class, and the cosine's penalty against its formula."""

import pytest
import torch
from helpers import assert_close, make_activations, make_config, make_sae, train_step
from sae_lens.saes.sae import TrainStepInput
from sae_lens.saes.standard_sae import StandardTrainingSAE, StandardTrainingSAEConfig

NAMES = [f"{score}_standard" for score in ("inner_product", "cosine", "per_feature_cosine")]
AUX = "auxiliary_reconstruction_loss"


def x_of(seed=0):
    return make_activations(20, 7, seed=seed, dtype=torch.float64)


@pytest.mark.parametrize("lp_norm", [1.0, 0.7])
@pytest.mark.parametrize("unit_decoder", [True, False])
def test_the_control_is_saelens_standard(unit_decoder, lp_norm):
    options = {"dtype": "float64", "l1_coefficient": 0.3, "lp_norm": lp_norm}
    ours = make_sae("inner_product_standard", unit_decoder=unit_decoder, **options).train()
    stock = StandardTrainingSAE(StandardTrainingSAEConfig(d_in=7, d_sae=13, **options))
    stock.load_state_dict(ours.state_dict(), strict=False)
    step_input = TrainStepInput(x_of(), {"l1": 0.3}, None, 1, False)
    mine, theirs = ours.training_forward_pass(step_input), stock.training_forward_pass(step_input)
    torch.testing.assert_close(mine.feature_acts, theirs.feature_acts, rtol=1e-12, atol=1e-12)
    assert mine.losses.pop(AUX) == 0
    torch.testing.assert_close(mine.losses, theirs.losses, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(mine.loss, theirs.loss, rtol=1e-12, atol=1e-12)
    mine.loss.backward()
    theirs.loss.backward()
    for name, parameter in stock.named_parameters():
        gradient = parameter.grad
        if name == "W_dec" and unit_decoder:
            rows = stock.W_dec.detach()
            gradient = gradient - (gradient * rows).sum(1, keepdim=True) * rows
        torch.testing.assert_close(ours.get_parameter(name).grad, gradient, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("lp_norm", [1.0, 2.0])
@pytest.mark.parametrize("name", NAMES)
def test_the_penalty_by_its_formula(name, lp_norm):
    sae, x = make_sae(name, dtype="float64", unit_decoder=False, l1_coefficient=0.3, lp_norm=lp_norm).train(), x_of()
    output = train_step(sae, x, step=1)
    codes, W_dec = output.feature_acts.detach(), sae.W_dec.detach()
    weighted = codes * W_dec.square().sum(1).sqrt()
    expected = 0.3 * (weighted.abs() ** lp_norm).sum(1).pow(1 / lp_norm).mean().item()
    assert output.losses["l1_loss"].item() == pytest.approx(expected, rel=1e-12)
    assert_close(output.feature_acts.detach(), output.hidden_pre.detach().clamp_min(0), 0)
    mse = (codes @ W_dec + sae.b_dec.detach() - x).square().sum(1).mean().item()
    assert output.loss.item() == pytest.approx(mse + expected, rel=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_the_auxiliary_loss_is_off_until_asked_for(name):
    assert make_config(name).aux_loss_coefficient == 0
    for coefficient in (0.0, 0.5):
        sae = make_sae(
            name,
            dtype="float64",
            aux_loss_coefficient=coefficient,
            normalize_aux_loss=False,
            dead_feature_window_tokens=1,
        ).train()
        with torch.no_grad():
            sae.b_enc[4] = -1e6
        losses = train_step(sae, x_of(), step=1).losses
        assert (losses[AUX] > 0) == (coefficient > 0)
    # SAELens' form sees scores below 0, the paper's rectified ones: no gradient for a dead ReLU feature
    (gradient,) = torch.autograd.grad(losses[AUX], sae.b_enc)
    assert gradient.nonzero().flatten().tolist() == [4]

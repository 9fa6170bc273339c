"""Matryoshka BatchTopK against SAELens' own class, and its levels from active codes against dense ones."""

import copy

import pytest
import torch
from helpers import FREE_DECODER, assert_close, make_activations, make_config, make_sae, train_step
from sae_lens.saes.matryoshka_batchtopk_sae import (
    MatryoshkaBatchTopKTrainingSAE,
    MatryoshkaBatchTopKTrainingSAEConfig,
)
from sae_lens.saes.sae import TrainStepInput

from saelens_cosine.kernels.codes import EntryCodes

NAMES = [f"{score}_matryoshka_batchtopk" for score in ("inner_product", "cosine", "per_feature_cosine")]
AUX = "auxiliary_reconstruction_loss"
D, F, K, B = 8, 60, 3, 40
WIDTHS = [7, 20, 21, 60]
SIZE = {"d_in": D, "d_sae": F, "k": K, "dtype": "float64"}


def make(name, **options):
    return make_sae(name, **{**SIZE, "matryoshka_widths": list(WIDTHS), **options}).train()


def x_of(tokens=B, seed=0, d_in=D):
    return make_activations(tokens, d_in, seed=seed, dtype=torch.float64)


def step_input(x, dead=None, step=1):
    return TrainStepInput(x, coefficients={}, dead_neuron_mask=dead, n_training_steps=step, is_logging_step=False)


@pytest.mark.parametrize("kernels", ["reference", "fast"])
@pytest.mark.parametrize("name", NAMES)
def test_inner_losses_by_their_formula(name, kernels):
    sae, x = make(name, kernels=kernels), x_of()
    output = train_step(sae, x, step=1)
    codes = output.feature_acts.to_dense().detach()
    assert isinstance(output.feature_acts, EntryCodes) == (kernels == "fast")
    assert [key for key in output.losses if key.startswith("inner")] == [f"inner_mse_loss_{w}" for w in WIDTHS[:-1]]
    total = output.losses["mse_loss"].item()
    for width in WIDTHS[:-1]:
        nested = codes[:, :width] @ sae.W_dec.detach()[:width] + sae.b_dec.detach()
        expected = (x - nested).square().sum(1).mean().item()
        assert output.losses[f"inner_mse_loss_{width}"].item() == pytest.approx(expected, rel=1e-12)
        total += expected
    assert output.loss.item() == pytest.approx(total, rel=1e-12)


@pytest.mark.parametrize("by_level", [False, True])
@pytest.mark.parametrize("n_dead", [0, 1, 5, 30])
@pytest.mark.parametrize("rescale", [False, True])
def test_with_saelens_settings_a_step_is_saelens_own(by_level, n_dead, rescale):
    options = {"rescale_acts_by_decoder_norm": rescale, "decoder_init_norm": 0.4, "aux_loss_coefficient": 0.7}
    options["use_matryoshka_aux_loss"] = by_level
    recipe = {"unit_decoder": False, "normalize_aux_loss": False, "b_dec_init": "zeros"}
    ours = make("inner_product_matryoshka_batchtopk", **recipe, **options)
    stock = MatryoshkaBatchTopKTrainingSAE(
        MatryoshkaBatchTopKTrainingSAEConfig(**SIZE, matryoshka_widths=list(WIDTHS), **options)
    )
    dead = torch.zeros(F, dtype=torch.bool)
    dead[torch.arange(n_dead) * 2] = True  # of several levels
    with torch.no_grad():
        ours.b_enc[dead] = -50.0  # they do not fire
    stock.load_state_dict(ours.state_dict(), strict=False)
    ours.tokens_since_fired[dead] = 10**9
    x = x_of()
    mine, theirs = ours.training_forward_pass(step_input(x)), stock.training_forward_pass(step_input(x, dead))
    assert (theirs.losses[AUX] > 0) == (n_dead > 0)
    assert mine.losses.keys() == theirs.losses.keys()
    for key, loss in theirs.losses.items():
        torch.testing.assert_close(mine.losses[key], loss, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(mine.loss, theirs.loss, rtol=1e-10, atol=1e-10)
    mine.loss.backward()
    theirs.loss.backward()
    for name, parameter in stock.named_parameters():
        torch.testing.assert_close(ours.get_parameter(name).grad, parameter.grad, rtol=1e-9, atol=1e-9)


def test_saelens_settings_take_the_fast_path_too():
    sae = make("inner_product_matryoshka_batchtopk", kernels="fast", unit_decoder=False, normalize_aux_loss=False)
    assert isinstance(train_step(sae, x_of(), step=1).feature_acts, EntryCodes)


@pytest.mark.parametrize("by_level", [False, True])
@pytest.mark.parametrize("decoder", [{}, FREE_DECODER], ids=["unit", "free"])
@pytest.mark.parametrize("widths", [WIDTHS, [1, 60], [59, 60], [60]], ids=str)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore:WARNING. You have only set one")
def test_both_paths_give_the_same_steps(name, widths, decoder, by_level):
    options = {"matryoshka_widths": list(widths), "use_matryoshka_aux_loss": by_level, "dead_feature_window_tokens": 50}
    reference = make(name, kernels="reference", **options, **decoder)
    fast = copy.deepcopy(reference)
    fast.cfg.kernels = "fast"
    for step in (1, 2, 3):
        x = x_of(seed=step)
        outputs = [train_step(sae, x, step=step) for sae in (reference, fast)]
        assert isinstance(outputs[1].feature_acts, EntryCodes)
        assert (outputs[0].losses[AUX] > 0) == (step > 1)
        for key, loss in outputs[0].losses.items():
            assert outputs[1].losses[key].item() == pytest.approx(loss.item(), rel=1e-12), key
        for output in outputs:
            output.loss.backward()
        with torch.no_grad():
            for one, other in zip(fast.parameters(), reference.parameters(), strict=True):
                assert_close(one.grad, other.grad, 1e-11)
                for parameter in (one, other):
                    parameter -= 0.01 * parameter.grad / parameter.grad.abs().max()
                    parameter.grad = None
        assert torch.equal(fast.tokens_since_fired, reference.tokens_since_fired)
        assert fast.topk_threshold.item() == pytest.approx(reference.topk_threshold.item(), rel=1e-12)


def test_no_codes_at_all():
    for kernels in ("reference", "fast"):
        sae = make("cosine_matryoshka_batchtopk", kernels=kernels, use_matryoshka_aux_loss=True)
        with torch.no_grad():
            sae.b_enc.fill_(-1e5)
        x = x_of()
        losses = train_step(sae, x, step=1).losses
        expected = (x - sae.b_dec).square().sum(1).mean().item()
        for key in ("mse_loss", *(f"inner_mse_loss_{width}" for width in WIDTHS[:-1])):
            assert losses[key].item() == pytest.approx(expected, rel=1e-12)


def test_the_aux_loss_by_level_by_hand():
    # d_in = 2: one dead feature of each level and token predicts. Levels {0, 1} and {2, 3}; 1 and 3 are dead.
    # Token (4, 0): codes 3 of feature 0 along (1, 0) and 1 of feature 2 along (1, 0). After level 1 the residual is (1, 0),
    # after level 2 (0, 0); at token (0, 2) no codes, residuals (0, 2) and (0, 2).
    # Dead scores: feature 1 has 0.5 and 0 along (1, 0); feature 3 has 0 and 1 along (0, 1).
    # Level 1: errors (0.5, 0) and (0, 2): (0.25 + 4) / 2. Variance about (0.5, 1): 1.25 each.
    # Level 2: errors (0, 0) and (0, 1): (0 + 1) / 2. Variance about (0, 1): 1 each.
    sae = make_sae(
        "inner_product_matryoshka_batchtopk", seed=None, d_in=2, d_sae=4, k=1, dtype="float64", aux_loss_coefficient=1.0,
        matryoshka_widths=[2, 4], use_matryoshka_aux_loss=True,
    )  # fmt: skip
    with torch.no_grad():
        sae.W_dec.copy_(torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]))
    x = torch.tensor([[4.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
    codes = torch.tensor([[3.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    pre = torch.tensor([[3.0, 0.5, 1.0, 0.0], [-1.0, 0.0, -1.0, 1.0]], dtype=torch.float64)
    sae.tokens_since_fired[[1, 3]] = 10**9
    out = codes @ sae.W_dec.detach()
    loss = sae.calculate_aux_loss(step_input(x), codes, pre, out)[AUX]
    assert loss.item() == pytest.approx(4.25 / 2 / 1.25 + 0.5 / 1, rel=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_levels_are_checked_by_saelens(name):
    with pytest.raises(ValueError, match="must not be empty"):
        make_sae(name, matryoshka_widths=[])
    with pytest.raises(ValueError, match="strictly increasing"):
        make_sae(name, matryoshka_widths=[5, 5, 13])
    with pytest.warns(UserWarning, match="A final matryoshka level"):
        assert make_sae(name, matryoshka_widths=[5]).cfg.matryoshka_widths == [5, 13]


@pytest.mark.parametrize("name", NAMES)
def test_the_threshold_follows_batchtopk(name):
    # the average starts at the first batch's smallest code; SAELens' starts at 0
    sae = make(name, kernels="reference", topk_threshold_lr=0.5)
    sae.topk_threshold.zero_()
    smallest = []
    for step in (1, 2):
        codes = train_step(sae, x_of(seed=step), step=step).feature_acts
        smallest.append(codes[codes > 0].min().item())
    assert sae.topk_threshold.item() == pytest.approx(sum(smallest) / 2, rel=1e-12)
    assert make_config(name).topk_threshold_lr == 0.2

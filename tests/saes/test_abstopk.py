"""AbsTopK: the largest scores of either sign, signs kept, on both paths, and what its auxiliary loss sees."""

import copy

import pytest
import torch
from helpers import assert_close, assert_same_function, make_activations, make_sae, save_inference, train_step
from sae_lens.saes.abstopk_sae import AbsTopKTrainingSAE, AbsTopKTrainingSAEConfig
from sae_lens.saes.sae import TrainStepInput

from saelens_cosine.kernels.codes import EntryCodes

NAMES = [f"{score}_abstopk" for score in ("inner_product", "cosine", "per_feature_cosine")]
AUX = "auxiliary_reconstruction_loss"
D, F, K, B = 10, 60, 4, 40


def make(name, **options):
    return make_sae(name, **{"d_in": D, "d_sae": F, "k": K, "dtype": "float64", **options}).train()


def x_of(tokens=B, seed=0):
    return make_activations(tokens, D, seed=seed, dtype=torch.float64)


def largest(scores, k):
    """The k largest of each row by size, the others set to 0, token by token."""
    codes = torch.zeros_like(scores)
    for row, out in zip(scores, codes, strict=True):
        for i in sorted(range(len(row)), key=lambda i: -abs(row[i].item()))[:k]:
            out[i] = row[i]
    return codes


@pytest.mark.parametrize("kernels", ["reference", "fast"])
@pytest.mark.parametrize("name", NAMES)
def test_codes_are_the_largest_by_size_with_their_signs(name, kernels):
    sae, x = make(name, kernels=kernels), x_of()
    output = train_step(sae, x, step=1)
    codes = output.feature_acts.to_dense().detach()
    assert isinstance(output.feature_acts, EntryCodes) == (kernels == "fast")
    assert_close(codes, largest(sae.score(sae.process_sae_in(x)).detach(), K), 1e-12)
    assert (codes < 0).any()
    assert (codes > 0).any()
    mse = (codes @ sae.W_dec.detach() + sae.b_dec.detach() - x).square().sum(1).mean()
    assert output.losses["mse_loss"].item() == pytest.approx(mse.item(), rel=1e-12)


def test_by_hand():
    sae = make_sae("inner_product_abstopk", seed=None, d_in=4, d_sae=4, k=2)
    with torch.no_grad():
        sae.W_enc.copy_(torch.eye(4))
        sae.W_dec.copy_(torch.eye(4))
    x = torch.tensor([[1.0, -5.0, 2.0, -2.5], [0.0, 0.0, -1.0, 0.5]])
    assert sae.encode(x).tolist() == [[0.0, -5.0, 0.0, -2.5], [0.0, 0.0, -1.0, 0.5]]
    assert sae(x).tolist() == [[0.0, -5.0, 0.0, -2.5], [0.0, 0.0, -1.0, 0.5]]


@pytest.mark.parametrize("n_dead", [0, 2, 20])
@pytest.mark.parametrize("rescale", [False, True])
def test_with_saelens_settings_a_step_is_saelens_own(n_dead, rescale):
    options = {"rescale_acts_by_decoder_norm": rescale, "decoder_init_norm": 0.4, "aux_loss_coefficient": 0.7}
    recipe = {"unit_decoder": False, "normalize_aux_loss": False, "b_dec_init": "zeros"}
    ours = make("inner_product_abstopk", **recipe, **options)
    stock = AbsTopKTrainingSAE(AbsTopKTrainingSAEConfig(d_in=D, d_sae=F, k=K, dtype="float64", **options))
    dead = torch.arange(F) < n_dead
    with torch.no_grad():
        ours.W_enc[:, dead] *= 1e-3  # small scores of either sign: never among the k largest
        ours.b_enc[dead] *= 1e-3
    stock.load_state_dict(ours.state_dict(), strict=False)
    ours.tokens_since_fired[dead] = 10**9
    outputs = [sae.training_forward_pass(TrainStepInput(x_of(), {}, dead, 1, False)) for sae in (ours, stock)]
    assert (outputs[1].losses[AUX] > 0) == (n_dead > 0)
    torch.testing.assert_close(outputs[0].losses, outputs[1].losses, rtol=1e-10, atol=1e-10)
    for output in outputs:
        output.loss.backward()
    for name, parameter in stock.named_parameters():
        torch.testing.assert_close(ours.get_parameter(name).grad, parameter.grad, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("normalized, expected", [(True, (10 + 4.25) / 2 / 3.25), (False, (1 + 4.25) / 2)])
def test_the_auxiliary_loss_rectifies_or_ranks_by_size(normalized, expected):
    # d_in = 2: one dead feature of each token. Scores of the dead features 0 and 1 are (-2, 1) and (0.5, -0.25); their rows are
    # (1, 0) and (0, 1). Residuals (-3, 0) and (0, 2): mean (-1.5, 1), variance (2.25 + 1) each = 3.25.
    sae = make_sae(
        "inner_product_abstopk", seed=None, d_in=2, d_sae=3, k=1, dtype="float64", aux_loss_coefficient=1.0,
        normalize_aux_loss=normalized,
    )  # fmt: skip
    with torch.no_grad():
        sae.W_dec.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]))
    sae.tokens_since_fired[:2] = 10**9
    residual = torch.tensor([[-3.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
    pre = torch.tensor([[-2.0, 1.0, 9.0], [0.5, -0.25, 9.0]], dtype=torch.float64)
    codes = torch.tensor([[0.0, 0.0, 9.0], [0.0, 0.0, 9.0]], dtype=torch.float64)
    out = torch.ones(2, 2, dtype=torch.float64)
    loss = sae.calculate_aux_loss(TrainStepInput(out + residual, {}, None, 1, False), codes, pre, out)[AUX]
    # rectified: (0, 1) and (0.5, 0): errors 9 + 1 = 10 and 0.25 + 4 = 4.25. By size: (-2, 0) and (0.5, 0): 1 and 4.25;
    # two are dead and d_in // 2 = 1, so the loss counts in full.
    assert loss.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_a_negative_code_is_a_firing(name):
    sae = make(name, dead_feature_window_tokens=B)
    codes = train_step(sae, x_of(), step=1).feature_acts.to_dense()
    fired = (codes != 0).any(dim=0)
    assert (fired & ~(codes > 0).any(dim=0)).any()  # some with negative codes alone
    assert torch.equal(sae.tokens_since_fired, torch.where(fired, 0, B))


@pytest.mark.parametrize("kernels", ["reference", "fast"])
def test_scores_of_zero_are_no_codes(kernels):
    sae = make("inner_product_abstopk", kernels=kernels)
    with torch.no_grad():
        sae.W_enc[:, 2:] = 0
        sae.b_enc.zero_()
    output = train_step(sae, x_of(), step=1)
    assert (output.feature_acts.to_dense() != 0).sum() == 2 * B
    output.loss.backward()
    assert sae.W_enc.grad.isfinite().all()


def test_both_paths_agree_where_few_scores_are_large_enough():
    # rows of like size but for some tokens: floors from the last batch are too high for them
    reference = make("per_feature_cosine_abstopk", kernels="reference")
    fast = copy.deepcopy(reference)
    fast.cfg.kernels = "fast"
    for step, scale in enumerate((1.0, 1e-3, 1e3, 1.0), start=1):
        x = x_of(seed=step) * scale
        outputs = [train_step(sae, x, step=step) for sae in (reference, fast)]
        assert_close(outputs[1].feature_acts.to_dense().detach(), outputs[0].feature_acts.detach(), 1e-11)


@pytest.mark.parametrize("name", NAMES)
def test_the_saved_form_keeps_signs(name, tmp_path):
    sae = make(name).eval()
    saved, x = save_inference(sae, tmp_path), x_of()
    assert_same_function(saved, sae, x, 1e-12)
    assert (saved.encode(x) < 0).any()
    assert torch.equal((saved.encode(x) != 0).sum(1), torch.full((B,), K))

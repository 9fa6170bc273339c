"""Top-AFA saved, folded and trained: its loss by hand, and normalised activations."""

import copy
import json
import math

import pytest
import torch
from helpers import (
    assert_close,
    codes_and_output,
    make_activations,
    make_trainer,
    planted_batches,
    read_config,
    save_inference,
    train_step,
)
from sae_lens import SAE, TrainingSAE, TrainingSAEConfig
from safetensors.torch import load_file
from top_afa_cases import D_IN, D_SAE, DECODERS, EXACT, RAW_CODES, UNIT, doubles, make_top_afa

from saelens_cosine.saes.top_afa_sae import (
    TopAFASAE,
    TopAFASAEConfig,
    TopAFATrainingSAE,
    TopAFATrainingSAEConfig,
)


@pytest.mark.parametrize("decoder", DECODERS)
def test_saved_sae_is_the_trained_sae(decoder, tmp_path):
    sae = make_top_afa(k_min=2, k_max=30, match="first_exceed", **decoder)
    before = copy.deepcopy(sae.state_dict())
    saved = save_inference(sae, tmp_path)
    x = doubles(100, D_IN)
    for one, other in zip(codes_and_output(saved, x), codes_and_output(sae, x), strict=True):
        assert_close(one, other, EXACT)
    assert set(load_file(tmp_path / "sae_weights.safetensors")) == {"W_enc", "b_enc", "W_dec", "b_dec"}
    assert type(saved) is TopAFASAE
    assert (saved.cfg.match, saved.cfg.k_min, saved.cfg.k_max) == ("first_exceed", 2, 30)
    assert "import saelens_cosine" in read_config(tmp_path)["metadata"]["requires"]
    if "rescale_acts_by_decoder_norm" not in decoder:
        assert_close(saved.W_dec.norm(dim=-1), torch.ones(D_SAE), EXACT)
    for name, tensor in sae.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_decoder_norms_fold_into_a_loaded_sae(tmp_path):
    saved = save_inference(make_top_afa(**RAW_CODES), tmp_path)
    norms = saved.W_dec.detach().norm(dim=-1)
    assert norms.max() > 2.9  # it was saved as it was
    x = doubles(100, D_IN)
    codes, output = codes_and_output(saved, x)
    saved.fold_W_dec_norm()
    folded = codes_and_output(saved, x)
    assert_close(folded[0], codes * norms, EXACT)
    assert_close(folded[1], output, EXACT)


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("scale", [0.1, 4.0])
@pytest.mark.parametrize("saved_first", [False, True])
def test_input_scale_folds(decoder, scale, saved_first, tmp_path):
    sae = make_top_afa(**decoder)
    x = doubles(100, D_IN)
    _, output = codes_and_output(sae, scale * x)
    support = sae.encode(scale * x) != 0
    each = save_inference(sae, tmp_path / "saved") if saved_first else sae
    each.fold_activation_norm_scaling_factor(scale)
    forms = [each] if saved_first else [each, save_inference(each, tmp_path / "folded")]
    for form in forms:
        assert_close(form(x), output / scale, EXACT)
        assert torch.equal(form.encode(x) != 0, support)


@pytest.mark.parametrize("config", [TopAFASAEConfig, TopAFATrainingSAEConfig])
def test_whitening_is_refused_in_configs(config):
    with pytest.raises(ValueError, match=r"normalize_activations='covariance_whitening'.*'top_afa'.*Mahalanobis"):
        config(d_in=D_IN, d_sae=D_SAE, normalize_activations="covariance_whitening")


def test_whitening_is_refused_before_anything_changes(tmp_path):
    sae = make_top_afa()
    for each in (sae, save_inference(sae, tmp_path)):
        before = copy.deepcopy(each.state_dict())
        with pytest.raises(NotImplementedError, match=r"'top_afa'.*Mahalanobis"):
            each.fold_activation_whitening(torch.ones(D_IN), 2 * torch.eye(D_IN), torch.eye(D_IN) / 2)
        assert all(torch.equal(tensor, before[name]) for name, tensor in each.state_dict().items())


def hand_sae(**overrides) -> TopAFATrainingSAE:
    """Two inputs, three features of decoder norms 2, 1 and 1; b_dec = (0, 1), so that x = (3, 4) has x - b_dec = (3, 3)."""
    settings = {"d_in": 2, "d_sae": 3, "dtype": "float64", "aux_loss_coefficient": 0.0, **overrides}
    sae = TopAFATrainingSAE(TopAFATrainingSAEConfig(**settings))
    with torch.no_grad():
        sae.W_enc.copy_(torch.tensor([[1.0, 0.0, -1.0], [0.0, 1.0, 0.0]]))
        sae.W_dec.copy_(torch.tensor([[2.0, 0.0], [0.0, 1.0], [1.0, 0.0]]))
        sae.b_dec.copy_(torch.tensor([0.0, 1.0]))
    return sae.train()


@pytest.mark.parametrize("target, norm", [("input", 5.0), ("centered", math.sqrt(18))])
def test_loss_by_hand(target, norm):
    # codes on unit directions (6, 3, 0), C = 6, 6.71, against 4.24: the first alone is kept, ||f|| = 6
    # x_hat = (6, 1), mse = 9 + 9 = 18; afa: d_in * 1/4 * (6 - norm)^2
    sae = hand_sae(afa_coefficient=0.25, afa_loss_target=target)
    output = train_step(sae, torch.tensor([[3.0, 4.0]], dtype=torch.float64), logging=True)
    assert output.feature_acts.tolist() == [[6.0, 0.0, 0.0]]
    assert output.losses["mse_loss"].item() == pytest.approx(18)
    assert output.losses["afa_loss"].item() == pytest.approx(0.5 * (6 - norm) ** 2)
    assert output.loss.item() == pytest.approx(18 + 0.5 * (6 - norm) ** 2)
    assert output.metrics["afa_squared_gap"].item() == pytest.approx((6 - norm) ** 2)
    output.losses["afa_loss"].backward()
    # d/df = 2 * 0.5 * (6 - norm), f = n (x_1 w_11 + ...): times n = 2 into b_enc, and no part of it through the target
    assert sae.b_enc.grad.tolist() == pytest.approx([2 * (6 - norm), 0, 0])
    assert sae.b_dec.grad.tolist() == pytest.approx([-2 * (6 - norm), 0])


def test_metrics_by_hand():
    # first token: one of two positive features, ||f|| = 6, target sqrt(18). second, x - b_dec = (-4, 3): features 2 and 3
    # with 3 and 4, norm 5 = target: every positive one. third, (0, -1): nothing positive, target 1.
    x = torch.tensor([[3.0, 4.0], [-4.0, 4.0], [0.0, 0.0]], dtype=torch.float64)
    metrics = train_step(hand_sae(), x, logging=True).metrics
    assert metrics["l0_mean"].item() == pytest.approx(1)
    assert (metrics["l0_min"].item(), metrics["l0_max"].item()) == (0, 2)
    assert metrics["saturated_share"].item() == pytest.approx(2 / 3)
    assert metrics["afa_relative_norm_gap"].item() == pytest.approx(((6 - 18**0.5) / 18**0.5 + 0 - 1) / 3)
    assert "l0_mean" not in train_step(hand_sae(), x).metrics


def test_coefficient_warms_up_and_is_logged_in_the_papers_units():
    sae = make_top_afa(afa_coefficient=0.5, afa_warm_up_steps=4, dtype="float32")
    trainer = make_trainer(sae, planted_batches(D_IN, 10, 2, 16), steps=6, batch=16)
    seen = []
    forward = sae.training_forward_pass
    sae.training_forward_pass = lambda step_input: (
        seen.append(step_input.coefficients["afa"]) or forward(step_input=step_input)
    )
    trainer.fit()
    assert seen[0] < 0.2
    assert sorted(seen) == seen
    assert seen[-1] == 0.5


def test_encoder_bias_can_be_left_out(tmp_path):
    sae = make_top_afa(use_encoder_bias=False, dtype="float32")
    sae.b_enc.data.zero_()
    make_trainer(sae, planted_batches(D_IN, 10, 2, 16), steps=3, batch=16, lr=1e-2).fit()
    assert not sae.b_enc.any()
    assert save_inference(sae, tmp_path / "inference").b_enc.shape == (D_SAE,)
    sae.save_model(tmp_path / "checkpoint")
    assert not TrainingSAE.load_from_disk(tmp_path / "checkpoint").b_enc.requires_grad


def layer_norm(x: torch.Tensor) -> torch.Tensor:
    return (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-5)


NORMALISATIONS = {
    "layer_norm": layer_norm,
    "constant_norm_rescale": lambda x: x * D_IN**0.5 / x.norm(dim=-1, keepdim=True),
}


@pytest.mark.parametrize("mode", NORMALISATIONS)
def test_training_on_normalised_activations_is_training_on_what_the_norm_makes_of_them(mode, tmp_path):
    # the auxiliary loss, the AFA loss, the start of b_dec and the MSE are all in that space, as in the paper
    settings = {"b_dec_init": "geometric_median", "dead_feature_window_tokens": 1, "aux_loss_coefficient": 1.0}
    normalising, plain = make_top_afa(normalize_activations=mode, **settings), make_top_afa(**settings)
    x = doubles(30, D_IN) + 1
    outputs = [train_step(normalising.train(), x), train_step(plain.train(), NORMALISATIONS[mode](x))]
    for name, loss in outputs[1].losses.items():
        assert outputs[0].losses[name].item() == pytest.approx(loss.item(), rel=1e-9)
        assert loss > 0
    for output in outputs:
        output.loss.backward()
    assert_close(normalising.b_dec, plain.b_dec, EXACT)
    assert_close(normalising.W_enc.grad, plain.W_enc.grad, 1e-9)
    # outside a step it takes and gives raw activations, saved or not
    assert normalising.cfg.normalize_activations == mode
    codes = plain.eval().encode(NORMALISATIONS[mode](x))
    saved = save_inference(normalising.eval(), tmp_path)
    for each in (normalising, saved):
        assert_close(each.encode(x), codes, 1e-10)
    reconstruction = plain.decode(codes)
    undone = x.norm(dim=-1, keepdim=True) / D_IN**0.5 * reconstruction
    if mode == "layer_norm":
        undone = x.std(-1, keepdim=True) * reconstruction + x.mean(-1, keepdim=True)
    for each in (normalising, saved):
        assert_close(each(x), undone, 1e-10)


def test_a_failing_step_leaves_the_normalisation_on():
    sae = make_top_afa(normalize_activations="layer_norm").train()
    with pytest.raises(ValueError, match=f"d_in={D_IN}"):
        train_step(sae, doubles(4, D_IN + 1))
    assert sae.cfg.normalize_activations == "layer_norm"
    x = doubles(4, D_IN)
    assert_close(sae.process_sae_in(x), layer_norm(x) - sae.b_dec.detach(), EXACT)


def test_config_survives_json():
    values = {"match": "first_exceed", "k_min": 2, "k_max": 9, "afa_coefficient": 0.5, "afa_warm_up_steps": 3}
    values |= {"afa_loss_target": "centered", "use_encoder_bias": False, "d_in": D_IN, "d_sae": D_SAE}
    config = TopAFATrainingSAEConfig(**values)
    again = TrainingSAEConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert type(again) is TopAFATrainingSAEConfig
    assert {name: getattr(again, name) for name in values} == values
    assert not hasattr(again, "k")


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"match": "squared"}, r"match='squared'.*'nearest'"),
        ({"k_min": 0}, r"k_min=0.*1 <= k_min"),
        ({"k_min": 5, "k_max": 4}, r"k_min=5, k_max=4"),
        ({"k_max": 41}, r"k_max=41, d_sae=40"),
        ({"afa_coefficient": -1.0}, r"afa_coefficient=-1.0"),
        ({"afa_warm_up_steps": -1}, r"afa_warm_up_steps=-1"),
        ({"afa_loss_target": "raw"}, r"afa_loss_target='raw'"),
        ({"unit_decoder": True}, r"unit_decoder=True.*rescale_acts_by_decoder_norm=True"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        TopAFATrainingSAEConfig(d_in=D_IN, d_sae=D_SAE, **settings)


def test_kernels_are_asked_for_in_vain_or_politely():
    x = doubles(8, D_IN)
    assert torch.equal(
        train_step(make_top_afa(kernels="auto").train(), x).loss, train_step(make_top_afa().train(), x).loss
    )
    with pytest.raises(RuntimeError, match='kernels="fast" is impossible'):
        train_step(make_top_afa(kernels="fast").train(), x)


def trained(coefficient: float, decoder: dict) -> tuple[float, float, SAE]:
    """Mean squared norm gap and FVE on held-out tokens after 250 steps on 40 planted features in 16 dimensions."""
    torch.manual_seed(0)
    settings = {"d_in": 16, "d_sae": 64, "afa_coefficient": coefficient, **decoder}
    sae = TopAFATrainingSAE(TopAFATrainingSAEConfig(**settings))
    data = planted_batches(d_in=16, n_features=40, active=3, batch=256)
    make_trainer(sae, data, steps=250, batch=256, lr=3e-3).fit()
    x = data.sample(10**6)
    codes, output = codes_and_output(sae.eval(), x)
    fve = 1 - (output - x).square().sum() / (x - x.mean(0)).square().sum()
    l0 = (codes != 0).sum(-1).double()
    assert 1 < l0.mean() < 32
    assert l0.std() > 2  # it adapts
    gap = sae.unit_coefficients(codes).norm(dim=-1) - x.norm(dim=-1)
    return gap.square().mean().item(), fve.item(), sae


@pytest.mark.parametrize("decoder", [{}, UNIT])
def test_training_reconstructs_and_the_coefficient_closes_the_norm_gap(decoder, tmp_path):
    (wide, low_fve, sae), (narrow, high_fve, _) = (trained(coefficient, decoder) for coefficient in (1 / 128, 1 / 2))
    assert low_fve > 0.85
    assert high_fve > 0.85
    assert narrow < 0.2 * wide
    x = make_activations(50, 16)
    assert_close(save_inference(sae, tmp_path)(x), sae(x), 1e-5)

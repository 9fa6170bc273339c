"""What the recipe refuses, notices and tells."""

from __future__ import annotations

import math
import warnings

import helpers
import pytest
import torch
from recipe_cases import BATCHTOPK, HOOK, TOPK, gaussian, make_config, make_sae, run_trainer, step_input
from sae_lens import TrainingSAE
from sae_lens.registry import get_sae_training_class
from sae_lens.saes.sae import TrainStepInput


@pytest.mark.parametrize("architecture", [a for a in TOPK + BATCHTOPK if "cosine" in a])
@pytest.mark.parametrize(("frozen", "other"), [("norm_exponent", "log_scale"), ("log_scale", "norm_exponent")])
def test_a_frozen_parameter_is_untouched_by_training(architecture, frozen, other):
    sae = make_sae(architecture, norm_exponent_init=0.25, log_scale_init=0.5, **{f"learn_{frozen}": False})
    before = {name: getattr(sae, name).detach().clone() for name in (frozen, other)}
    run_trainer(sae, [gaussian(8, 4, seed=i) for i in range(5)])
    assert torch.equal(getattr(sae, frozen), before[frozen])
    assert not torch.equal(getattr(sae, other), before[other])


REFUSED = [  # settings, and the change that makes them possible
    ({"unit_decoder": True, "rescale_acts_by_decoder_norm": True}, {"rescale_acts_by_decoder_norm": False}),
    ({"unit_decoder": True, "decoder_init_norm": 0.1}, {"unit_decoder": False}),
    ({"k": 7, "d_sae": 6}, {"k": 6}),
    ({"k": 0, "d_sae": 6}, {"k": 1}),
    ({"dead_feature_window_tokens": 0}, {"dead_feature_window_tokens": 1}),
]
REFUSED_SCALES = [({"log_scale_from_data": True, "log_scale_init": 1.0}, {"log_scale_init": None})]
REFUSED_RATES = [
    ({"topk_threshold_lr": 0.0}, {"topk_threshold_lr": 0.5}),
    ({"topk_threshold_lr": 1.5}, {"topk_threshold_lr": 1.0}),
]


@pytest.mark.parametrize(
    ("architecture", "settings", "way_out"),
    [(a, *case) for a in TOPK + BATCHTOPK for case in REFUSED]
    + [(a, *case) for a in TOPK + BATCHTOPK if "cosine" in a for case in REFUSED_SCALES]
    + [(a, *case) for a in BATCHTOPK for case in REFUSED_RATES],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_impossible_combinations_are_refused_by_name(architecture, settings, way_out):
    every_name = "".join(f"(?=.*{name}=)" for name in settings)
    with pytest.raises(ValueError, match=every_name):
        make_config(architecture, **settings)
    make_config(architecture, **{**settings, **way_out})


@pytest.mark.parametrize("architecture", TOPK + BATCHTOPK)
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(
    ("bad_step", "noticed", "cause", "checkpoints"),
    [
        (0, 0, "1 of 8 activations", []),
        (13, 20, "W_enc.* no longer: activations of an earlier batch", ["88"]),
        (20, 20, "1 of 8 activations", ["88"]),
    ],
)
def test_non_finite_activations_stop_training(architecture, value, bad_step, noticed, cause, checkpoints, tmp_path):
    """Checkpoints are due after 88, 168 and 248 of 320 tokens, that is in steps 10, 20 and 30."""
    batches = [gaussian(8, 4, seed=i) for i in range(40)]
    batches[bad_step][3, 1] = value
    assert noticed - bad_step <= 10
    with pytest.raises(FloatingPointError, match=cause) as stop:
        run_trainer(make_sae(architecture), batches, tmp_path, n_checkpoints=3)
    assert f"training step {noticed}," in str(stop.value)
    assert HOOK in str(stop.value)
    assert architecture in str(stop.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == checkpoints
    for name in checkpoints:
        sae = TrainingSAE.load_from_disk(tmp_path / name)
        assert all(tensor.isfinite().all() for tensor in sae.state_dict().values())
        assert sae.eval()(gaussian(8, 4)).isfinite().all()


@pytest.mark.parametrize("architecture", ["inner_product_topk", "cosine_batchtopk"])
def test_an_activation_beyond_the_squares_range_is_named_and_not_the_weights(architecture):
    x = gaussian(8, 4).float()
    x[3, 1] = 1e20  # finite; its square is not, in float32
    sae = make_sae(architecture, dtype="float32")
    with pytest.raises(FloatingPointError, match="reach 1e\\+20, whose square is not; filter_high_norm_tokens"):
        sae.training_forward_pass(step_input(x, step=0))


def test_a_checkpoint_between_two_checks_is_not_poisoned(tmp_path):
    """Checkpoints after 56 and 112 of 160 tokens, in steps 6 and 13; bad in step 12, before the check in step 20."""
    batches = [gaussian(8, 4, seed=i) for i in range(20)]
    batches[12][3, 1] = math.nan
    with pytest.raises(FloatingPointError, match=f"Not saved: .*W_enc.*{HOOK}"):
        run_trainer(make_sae("cosine_batchtopk"), batches, tmp_path, n_checkpoints=2)
    weights = [path.parent.name for path in tmp_path.rglob("*.safetensors") if path.name == "sae_weights.safetensors"]
    assert weights == ["56"]
    sae = TrainingSAE.load_from_disk(tmp_path / "56")
    assert all(tensor.isfinite().all() for tensor in sae.state_dict().values())


def test_a_logging_step_notices_at_once():
    x = gaussian(8, 4)
    x[2:5, 0] = math.inf
    make_sae("cosine_topk").training_forward_pass(step_input(x, step=3))  # neither logged nor every tenth
    with pytest.raises(FloatingPointError, match=r"step 3.*3 of 8 activations"):
        make_sae("cosine_topk").training_forward_pass(step_input(x, step=3, logging=True))


@pytest.mark.parametrize("save", ["save_model", "save_inference_model"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(
    ("architecture", "name"),
    [
        ("inner_product_topk", "b_dec"),
        ("cosine_topk", "norm_exponent"),
        ("per_feature_cosine_topk", "W_dec"),
        ("inner_product_batchtopk", "b_enc"),
        ("cosine_batchtopk", "topk_threshold"),
        ("per_feature_cosine_batchtopk", "W_enc"),
    ],
)
def test_a_poisoned_sae_is_not_saved(save, value, architecture, name, tmp_path):
    sae = make_sae(architecture)
    if hasattr(sae, "topk_threshold"):
        sae.topk_threshold.fill_(0.5)
    getattr(sae, save)(tmp_path / "healthy")
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a NaN threshold also counts as not learned
        tensor = getattr(sae, name)
        tensor[(0,) * tensor.ndim] = value
        with pytest.raises(FloatingPointError, match=f"Not saved: .*{name}.*{HOOK}"):
            getattr(sae, save)(tmp_path / "poisoned")
    assert (tmp_path / "healthy" / "sae_weights.safetensors").exists()
    assert [path for path in (tmp_path / "poisoned").rglob("*") if path.is_file()] == []


def expected_metrics(architecture: str) -> dict[str, float]:
    metrics = {"dead_features_in_token_window": 2, "dead_feature_window_tokens": 50}
    if "cosine" in architecture:
        low, mean, high, share, scale = (
            (-0.5, 0.4, 1.0, 1 / 3, 2.0) if architecture.startswith("per_feature") else (0.7, 0.7, 0.7, 1.0, 1.5)
        )
        metrics |= {
            "norm_exponent_min": low,
            "norm_exponent_mean": mean,
            "norm_exponent_max": high,
            "norm_exponent_share_above_0.5": share,
            "log_scale_mean": scale,
        }
    return metrics | ({"topk_threshold": 0.25} if architecture in BATCHTOPK else {})


@pytest.mark.parametrize("architecture", TOPK + BATCHTOPK)
def test_training_metrics(architecture):
    sae = make_sae(architecture, dead_feature_window_tokens=50)
    sae.tokens_since_fired.copy_(torch.tensor([0, 49, 50, 1000, 3, 7]))  # dead: 50 and 1000
    if architecture.startswith("per_feature"):
        # mean 2.4 / 6 = 0.4; 0.5 itself is not above 0.5, so 2 of 6 are
        sae.norm_exponent.data.copy_(torch.tensor([-0.5, 0.5, 0.9, 1.0, 0.2, 0.3]))
        sae.log_scale.data.copy_(torch.tensor([1.0, 3.0, 2.0, 2.0, 0.0, 4.0]))
    elif "cosine" in architecture:
        sae.norm_exponent.data.fill_(0.7)
        sae.log_scale.data.fill_(1.5)
    if architecture in BATCHTOPK:
        sae.topk_threshold.fill_(0.25)
    metrics = sae.training_metrics()
    assert {name: value.item() for name, value in metrics.items()} == pytest.approx(expected_metrics(architecture))
    assert all(value.ndim == 0 and not value.requires_grad for value in metrics.values())


@pytest.mark.parametrize("architecture", TOPK + BATCHTOPK)
def test_metrics_are_in_the_output_of_logging_steps(architecture):
    sae = make_sae(architecture, topk_threshold_start_step=4) if architecture in BATCHTOPK else make_sae(architecture)
    names = set(expected_metrics(architecture))
    assert not (names - {"topk_threshold"}) & set(sae.training_forward_pass(step_input(gaussian(8, 4))).metrics)
    for step in (2, 4):  # before and after the threshold's start
        logged = sae.training_forward_pass(step_input(gaussian(8, 4), step=step, logging=True)).metrics
        state = sae.training_metrics()
        assert names <= set(logged)
        assert all(torch.equal(logged[name], state[name]) for name in names)


@pytest.mark.parametrize("normalize_aux_loss", [True, False])
@pytest.mark.parametrize("architecture", helpers.FAST)
def test_a_bfloat16_sae_trains_with_dead_features(architecture, normalize_aux_loss):
    options = {"normalize_aux_loss": normalize_aux_loss, "dead_feature_window_tokens": 16}
    sae = helpers.make_sae(architecture, seed=None, d_in=8, d_sae=32, k=2, dtype="bfloat16", **options).train()
    sae.tokens_since_fired += 16
    x = torch.randn(8, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    output = sae.training_forward_pass(TrainStepInput(x, {}, None, 1, False))
    output.loss.backward()
    assert sae.dead_features.sum() >= 32 - 2 * 8
    assert output.losses["auxiliary_reconstruction_loss"] > 0
    assert sae.W_dec.grad.isfinite().all()


def test_a_scale_from_data_leaves_out_the_share_of_the_norm_that_the_exponent_brings():
    # norms 4 and 16, mean 10; with a = 0.5 the score has n ** 0.5 already: b = 0.5 log 10
    config = get_sae_training_class("cosine_topk")[1](
        d_in=2, d_sae=4, k=1, norm_exponent_init=0.5, log_scale_from_data=True, b_dec_init="zeros"
    )
    sae = get_sae_training_class("cosine_topk")[0](config)
    sae.initialize_from_data(torch.tensor([[4.0, 0.0], [0.0, 16.0]]))
    assert sae.log_scale.item() == pytest.approx(0.5 * math.log(10))

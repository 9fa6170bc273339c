"""What every registered architecture does, and a third party's that is registered the same way."""

import json

import pytest
import torch
from contract_cases import (
    ALL,
    TOYS,
    TRAINABLE,
    _third_party,  # noqa: F401
    saved_as,
)
from helpers import (
    COSINE,
    D_IN,
    D_SAE,
    EXPONENT,
    FAST,
    FREE_DECODER,
    PER_FEATURE,
    SELECTORS,
    TRAINING,
    make_activations,
    make_config,
    make_sae,
    read_config,
    save_inference,
    selector_of,
)
from sae_lens import TrainingSAEConfig
from sae_lens.registry import get_sae_class
from safetensors.torch import load_file

import saelens_cosine

SCORES = ["inner_product", "cosine", "per_feature_cosine"]
BYPASS = ["magnitude_bypass_topk", "magnitude_bypass_batchtopk"]
BASE = {"W_enc": (D_IN, D_SAE), "W_dec": (D_SAE, D_IN), "b_dec": (D_IN,)}
SHAPES = {"F": (D_SAE,), "": ()}


def of_shape(own):
    return {key: SHAPES[shape] for key, shape in own.items()}


def shapes(tensors):
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def test_registered_names():
    expected = {f"{score}_{selector}" for score in SCORES for selector in TRAINABLE} | {*BYPASS, "top_afa"}
    assert len(expected) == 24
    assert set(TRAINING) == expected
    assert set(saelens_cosine.TRAINING_ARCHITECTURES) == expected | set(TOYS)
    ours = {
        f"{score}_{saved}" for score in SCORES[1:] for saved in ("standard", "gated", "jumprelu", "topk", "abstopk")
    }
    ours |= {"magnitude_bypass_topk", "magnitude_bypass_jumprelu", "top_afa"}
    assert len(ours) == 13
    assert set(saelens_cosine.INFERENCE_ARCHITECTURES) == ours | set(TOYS)
    assert ours <= {saved_as(name) for name in TRAINING}


@pytest.mark.parametrize("name", ALL)
def test_saved_architecture(name, tmp_path):
    save_inference(make_sae(name), tmp_path)
    config = read_config(tmp_path)
    assert config["architecture"] == saved_as(name)
    assert config["metadata"]["training_architecture"] == name


@pytest.mark.parametrize("name", TRAINING)
def test_training_state_dict(name):
    expected = {**BASE, "tokens_since_fired": (D_SAE,), "initialized_from_data": ()}
    expected |= of_shape(SELECTORS[selector_of(name)].own)
    if name in COSINE:
        expected["norm_exponent"] = expected["log_scale"] = (D_SAE,) if name in PER_FEATURE else ()
    assert shapes(make_sae(name).state_dict()) == expected


@pytest.mark.parametrize("name", TRAINING)
def test_saved_tensors(name, tmp_path):
    save_inference(make_sae(name), tmp_path)
    expected = {**BASE, **of_shape(SELECTORS[selector_of(name)].saved)}
    if name in EXPONENT:
        expected["norm_exponent"] = (D_SAE,) if name in PER_FEATURE else ()
    assert shapes(load_file(tmp_path / "sae_weights.safetensors")) == expected


SPELLING = {"topk": "TopK", "abstopk": "AbsTopK", "batchtopk": "BatchTopK", "jumprelu": "JumpReLU", "afa": "AFA"}


@pytest.mark.parametrize("name", TRAINING)
def test_class_names_follow_saelens(name):
    # per_feature_cosine_batchtopk -> PerFeatureCosineBatchTopKTrainingSAE
    camel = "".join(SPELLING.get(part, part.capitalize()) for part in name.split("_"))
    sae = make_sae(name)
    assert type(sae).__name__ == f"{camel}TrainingSAE"
    assert type(sae.cfg).__name__ == f"{camel}TrainingSAEConfig"
    assert getattr(saelens_cosine, type(sae).__name__) is type(sae)
    assert getattr(saelens_cosine, type(sae.cfg).__name__) is type(sae.cfg)


@pytest.mark.parametrize("name", saelens_cosine.INFERENCE_ARCHITECTURES)
def test_inference_classes_are_public(name):
    for cls in get_sae_class(name):
        assert getattr(saelens_cosine, cls.__name__) is cls


CHANGED = {
    "norm_exponent_init": 0.25,
    "norm_exponent_lr_multiplier": 3.0,
    "log_scale_lr_multiplier": 0.5,
    "relative_exponent_penalties": True,
    "exponent_sharing": "groups",
    "n_exponent_groups": 4,
    "norm_exponent_variance_penalty": 0.1,
    "norm_exponent_dropout": 0.25,
    "jumprelu_bandwidth": 0.3,
    "jumprelu_sparsity_loss_mode": "tanh",
    "threshold_lr_multiplier": 2.0,
    "relative_l0_loss": False,
    "l1_coefficient": 0.3,
    "use_matryoshka_aux_loss": True,
    "unit_encoder": False,
    "restore_output_norm": False,
    "afa_coefficient": 0.5,
    "log_scale_init": -1.5,
    "learn_log_scale": False,
    "unit_decoder": False,
    "decoder_init_norm": 0.3,
    "b_dec_init": "zeros",
    "normalize_aux_loss": False,
    "aux_loss_coefficient": 0.7,
    "dead_feature_window_tokens": 1234,
    "rescale_acts_by_decoder_norm": True,
    "topk_threshold_lr": 0.4,
    "topk_threshold_start_step": 17,
    "k": 5,
}


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("changed", [False, True])
def test_training_config_survives_json(name, changed):
    config = make_config(name)
    if changed:
        config = make_config(name, **{key: value for key, value in CHANGED.items() if hasattr(config, key)})
    values = json.loads(json.dumps(config.to_dict()))
    again = TrainingSAEConfig.from_dict(values)
    assert type(again) is type(config)
    assert again.to_dict() == config.to_dict() == values
    for key in CHANGED:
        assert getattr(again, key, None) == getattr(config, key, None)


@pytest.mark.parametrize("name", ALL)
def test_inference_config_survives_json(name, tmp_path):
    config = save_inference(make_sae(name), tmp_path).cfg
    values = json.loads(json.dumps(config.to_dict()))
    assert type(config).from_dict(values).to_dict() == values
    assert values["metadata"] == read_config(tmp_path)["metadata"]


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("k", [0, -1, D_SAE + 1])
def test_impossible_k_is_refused(name, k):
    with pytest.raises(ValueError, match=rf"k={k}\b.*d_sae={D_SAE}\b"):
        make_config(name, k=k)


@pytest.mark.parametrize("name", FAST)
def test_k_of_all_features_is_allowed(name):
    sae = make_sae(name, seed=None, k=D_SAE)
    assert sae(make_activations(3, D_IN)).shape == (3, D_IN)


def pre_by_definition(name, sae, x):
    """The definition in `saelens_cosine.score`, from the training form's parameters; a gated SAE's magnitude."""
    x_c, W_enc = x - sae.b_dec, sae.W_enc
    n = x_c.square().sum(-1, keepdim=True).sqrt()
    product = x_c @ W_enc
    if name in EXPONENT:
        a, b = getattr(sae, "norm_exponent", 0.0), getattr(sae, "log_scale", 0.0)
        product = n ** (a - 1) * torch.exp(torch.as_tensor(b)) * product / W_enc.square().sum(0).sqrt()
    pre = product * sae.r_mag.exp() + sae.b_mag if "gated" in name else product + sae.b_enc
    return pre * sae.W_dec.square().sum(1).sqrt() if getattr(sae.cfg, "rescale_acts_by_decoder_norm", False) else pre


@pytest.mark.parametrize("options", [{}, FREE_DECODER], ids=["default", "free"])
@pytest.mark.parametrize("name", TRAINING)
@torch.no_grad()
def test_scores_are_those_of_the_definition(name, options, tmp_path):
    sae = make_sae(name, dtype="float64", **options)
    saved = save_inference(sae, tmp_path)
    x = make_activations(30, D_IN, dtype=torch.float64)
    expected = pre_by_definition(name, sae, x)
    torch.testing.assert_close(sae.encode_with_hidden_pre(x)[1], expected, rtol=1e-12, atol=1e-12)
    seen = saved.run_with_cache(x)[1]["hook_sae_acts_pre"]
    if getattr(saved.cfg, "rescale_acts_by_decoder_norm", False):
        seen = seen * saved.W_dec.norm(dim=-1)
    torch.testing.assert_close(seen, expected, rtol=1e-11, atol=1e-11)

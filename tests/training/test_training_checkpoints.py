"""A checkpoint of SAELens' training is no saved SAE: every command says so, in the same words, and how to make one."""

import json

import pytest
import torch
from helpers import TRAINING, assert_same_function, make_activations, make_sae
from sae_lens import SAE
from sae_lens.saes.standard_sae import StandardSAE, StandardSAEConfig
from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig

from saelens_cosine.cli import main
from saelens_cosine.loading import CheckpointError, from_pretrained, inference_form

OWN_NAME, SHARED_NAME = "cosine_batchtopk", "per_feature_cosine_gated"
"""Saved for use under another name (SAELens: a bare KeyError), and under its own (other tensors)."""


@pytest.mark.parametrize("name", TRAINING)
def test_from_pretrained_refuses_it_and_names_the_way(name, tmp_path):
    make_sae(name).save_model(tmp_path)
    with pytest.raises(CheckpointError, match=f"is a training checkpoint \\('{name}'\\).*inference_form"):
        from_pretrained(tmp_path)


def test_saelens_own_that_would_load_as_another_function_is_refused(tmp_path):
    TopKTrainingSAE(TopKTrainingSAEConfig(d_in=4, d_sae=16, k=2)).save_model(tmp_path)
    SAE.load_from_disk(tmp_path)  # SAELens takes it
    with pytest.raises(CheckpointError, match=r"training checkpoint \('topk'\)"):
        from_pretrained(tmp_path)


@pytest.mark.parametrize("name", [OWN_NAME, SHARED_NAME])
def test_all_commands_say_the_same(name, tmp_path, capsys):
    folder = tmp_path / "checkpoint"
    make_sae(name).save_model(folder)
    said = set()
    for command in (
        ["convert", str(folder), str(tmp_path / "out")],
        ["evaluate", str(folder), "--output", str(tmp_path / "out"), "--quiet"],
        ["share", str(folder), "--repo", "me/saes", "--output", str(tmp_path / "out")],
    ):
        assert main(command) == 2
        said.add(capsys.readouterr().err.strip().removeprefix(f"saelens-cosine {command[0]}: "))
    (sentence,) = said
    with pytest.raises(CheckpointError) as caught:
        from_pretrained(folder)
    assert str(caught.value) == sentence
    assert f'inference_form("{folder}").save_model(' in sentence


def test_other_folders_of_saelens_that_cannot_be_loaded(tmp_path):
    make_sae("cosine_topk").save_inference_model(tmp_path)
    config = json.loads((tmp_path / "cfg.json").read_text())
    for changes, message in (
        ({"architecture": "other"}, "'other', which SAELens does not know"),
        ({"d_sae": config["d_sae"] + 1}, "does not fit the cfg.json .*CosineTopKSAE"),
    ):
        (tmp_path / "cfg.json").write_text(json.dumps({**config, **changes}))
        with pytest.raises(CheckpointError, match=message):
            from_pretrained(tmp_path)


def test_a_config_from_before_saelens_6_is_of_use_whatever_it_holds(tmp_path):
    StandardSAE(StandardSAEConfig(d_in=4, d_sae=8)).save_model(tmp_path)
    old = {"d_in": 4, "d_sae": 8, "dtype": "float32", "hook_point": "blocks.1.hook_resid_post", "l1_coefficient": 1e-3}
    (tmp_path / "cfg.json").write_text(json.dumps(old))
    assert from_pretrained(tmp_path).cfg.metadata.hook_name == "blocks.1.hook_resid_post"


@pytest.mark.parametrize("name", TRAINING)
def test_the_inference_form_is_what_saelens_saves(name, tmp_path):
    sae = make_sae(name)
    sae.save_model(tmp_path / "checkpoint")
    sae.save_inference_model(tmp_path / "saved")
    form = inference_form(tmp_path / "checkpoint")
    form.save_model(tmp_path / "form")
    assert_same_function(
        from_pretrained(tmp_path / "form"), SAE.load_from_disk(tmp_path / "saved"), make_activations(50, sae.cfg.d_in)
    )


@pytest.mark.parametrize("name", ["per_feature_cosine_topk", "magnitude_bypass_topk", "inner_product_topk"])
def test_the_scale_that_training_put_on_its_activations_is_folded_in(name, tmp_path):
    sae = make_sae(name, normalize_activations="expected_average_only_in")
    sae.save_model(tmp_path)
    (tmp_path / "activation_scaler.json").write_text(json.dumps({"scaling_factor": 0.25}))
    x = make_activations(50, sae.cfg.d_in) * 4
    with torch.no_grad():
        seen_in_training = sae.eval()(0.25 * x) / 0.25
        raw = inference_form(tmp_path)(x)
    torch.testing.assert_close(raw, seen_in_training, rtol=1e-4, atol=1e-4)

"""A language model that is split over ranks as Transformers does it, while an SAE is split by features."""

import json

import pytest
import torch
from helpers import VOCABULARY, tiny_tokenizer
from test_train import assert_same_run, command
from transformers import LlamaConfig, LlamaForCausalLM

from saelens_cosine.cli import main


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "intermediate_size": 64, "vocab_size": len(VOCABULARY)}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    LlamaForCausalLM(LlamaConfig(**sizes, **heads)).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def on_llama(llama, text, output, *more):
    changes = {
        "model_name": llama,
        "model_class_name": "AutoModelForCausalLM",
        "hook_name": "model.layers.1",
        "d_in": 32,
        "training_tokens": 1024,
    }
    return command(text, output, *more, **changes)


@pytest.mark.parametrize(
    ("placing", "weights"), [(["--tp-plan", "auto"], "DTensor"), (["--device-map", "cpu"], "Parameter")]
)
def test_placed_models_train_the_same_sae(placing, weights, ranks, llama, text, tmp_path):
    assert main(on_llama(llama, text, tmp_path / "alone")) == 0
    found = ranks(*[on_llama(llama, text, tmp_path / "placed", *placing)] * 2, fault="tell_weights")
    assert found["statuses"] == [0, 0], found["told"]
    assert f"weights: {weights}\n" in found["told"][0]
    assert_same_run(tmp_path / "placed", tmp_path / "alone", exact=1e-5)
    for file in ("cfg.json", "runner_cfg.json"):
        content = json.loads((tmp_path / "placed" / file).read_text())
        kwargs = content.get("metadata", content)["model_from_pretrained_kwargs"]
        assert "tp_plan" not in kwargs
        assert "device_map" not in kwargs


@pytest.mark.parametrize("flag", ["--tp-plan", "--device-map"])
def test_models_that_transformers_does_not_place_are_refused(flag, text, tmp_path, capsys):
    assert main(command(text, tmp_path / "sae", flag, "auto")) == 2
    assert "--model_class_name AutoModelForCausalLM" in capsys.readouterr().err


def test_a_plan_without_ranks_is_refused(llama, text, tmp_path, capsys):
    assert main(on_llama(llama, text, tmp_path / "sae", "--tp-plan", "auto")) == 2
    assert "start it with torchrun" in capsys.readouterr().err

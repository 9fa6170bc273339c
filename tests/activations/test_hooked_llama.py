"""Llamas as HookedTransformers: Transformers' own logits whatever their config says, or a refusal that says why."""

import copy

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from saelens_cosine.bundled import model_folder
from saelens_cosine.hooked_transformer import LONGEST_CONTEXT, hooked_llama, hooked_transformer

pytestmark = pytest.mark.skipif(hooked_transformer() is None, reason="TransformerLens has no HookedTransformer")

TOKENS = torch.randint(1, 4096, (2, 30), generator=torch.Generator().manual_seed(0))


def llama(**changes):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(**{"vocab_size": 4096, **sizes, "num_key_value_heads": 4, "initializer_range": 0.3, **changes})
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:  # weights of norms are ones and biases zeros, in a new model
                parameter.copy_(torch.rand_like(parameter) + ("norm" in name))
    return model


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_key_value_heads": 2, "rope_parameters": {"rope_type": "default", "rope_theta": 300.0}},
        {"head_dim": 12, "tie_word_embeddings": True, "rms_norm_eps": 0.1},
        {"attention_bias": True, "num_key_value_heads": 1, "hidden_act": "gelu", "max_position_embeddings": 100_000},
    ],
)
def test_logits_and_stream_are_transformers_own(changes):
    source, tokenizer = llama(**changes), AutoTokenizer.from_pretrained(model_folder())
    model = hooked_llama(source, tokenizer, "mine", "cpu")
    with torch.no_grad():
        logits, cache = model.run_with_cache(TOKENS, names_filter=["blocks.0.hook_resid_post"])
        expected = source(TOKENS, output_hidden_states=True)
    torch.testing.assert_close(logits, expected.logits, rtol=0, atol=1e-4)
    torch.testing.assert_close(cache["blocks.0.hook_resid_post"], expected.hidden_states[1], rtol=1e-4, atol=1e-4)
    assert model.cfg.n_ctx == LONGEST_CONTEXT == 2048
    assert model.cfg.model_name == "mine"


def test_the_dtype_is_the_source_s():
    model = hooked_llama(llama().bfloat16(), AutoTokenizer.from_pretrained(model_folder()), "mine", "cpu")
    assert {parameter.dtype for parameter in model.parameters()} == {model.cfg.dtype} == {torch.bfloat16}


def test_texts_begin_with_bos_and_the_tokenizer_that_is_given_stays_as_it_is():
    tokenizer = AutoTokenizer.from_pretrained(model_folder())
    bare = copy.deepcopy(tokenizer)
    bare.add_bos_token = False
    bare.init_kwargs |= {
        "add_bos_token": False,
        "name_or_path": "nowhere",
    }  # as of a GGUF file: there is nothing to read again
    plain = bare("x = 1")["input_ids"]
    model = hooked_llama(llama(), bare, "mine", "cpu")
    assert model.tokenizer("x = 1")["input_ids"] == [tokenizer.bos_token_id, *plain]
    assert model.to_tokens("x = 1")[0].tolist() == [tokenizer.bos_token_id, *plain]
    model.tokenizer.truncation_side = "left"  # as sae-probes sets it
    assert (bare("x = 1")["input_ids"], bare.truncation_side) == (plain, "right")


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        (
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
            r"are scaled \(rope_type=linear\)",
        ),
        ({"mlp_bias": True}, "its MLPs have biases"),
    ],
)
def test_what_would_be_another_model_is_refused(changes, why):
    with pytest.raises(ValueError, match=f"mine is no model of TransformerLens' table.*{why}"):
        hooked_llama(llama(**changes), None, "mine", "cpu")


def test_another_architecture_is_refused_by_name():
    source = llama()
    source.config.model_type = "qwen3"
    with pytest.raises(ValueError, match="of others only a Llama.*its architecture is qwen3"):
        hooked_llama(source, None, "mine", "cpu")

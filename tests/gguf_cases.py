"""A small language model in a GGUF file: the bundled one's first blocks, written by the package `gguf` as llama.cpp has them."""

import json

import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from saelens_cosine.bundled import model_folder

BLOCKS = 3
_PARTS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def original() -> LlamaForCausalLM:
    """The model that is in the file, in float32."""
    model = AutoModelForCausalLM.from_pretrained(model_folder(), num_hidden_layers=BLOCKS, dtype=torch.float32)
    return model.eval()


def write_gguf(path, architecture="llama", quantised=False, without=()):
    """Write the file; `quantised` to 8 bits, `without` tensors whose names begin so."""
    import gguf

    model, writer = original(), gguf.GGUFWriter(path, architecture)
    config = model.config
    writer.add_block_count(BLOCKS)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    tokenizer = json.loads((model_folder() / "tokenizer.json").read_text())["model"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(sorted(tokenizer["vocab"], key=tokenizer["vocab"].get))
    writer.add_token_types([3] + [1] * (config.vocab_size - 1))  # the first is a control token
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in tokenizer["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    for name, tensor in model.state_dict().items():
        called = _called(name)
        if called is None or called.startswith(tuple(without)):
            continue
        heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(called.split(".")[-2])
        if heads is not None:  # pairs of rotated dimensions lie side by side
            tensor = tensor.view(heads, 2, -1, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
        array = tensor.numpy()
        if quantised and array.ndim == 2 and array.shape[1] % 32 == 0:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(called, gguf.quants.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(called, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _called(name: str) -> str | None:
    whole = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    if name in whole:
        return whole[name]
    if not name.startswith("model.layers."):
        return None  # the head is the embedding
    _, _, block, part = name.split(".", 3)
    return f"blk.{block}.{_PARTS[part.removesuffix('.weight')]}.weight"

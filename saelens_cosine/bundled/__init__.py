"""A small real language model and a real corpus that every install has: no network and no GPU needed.

The model is a Llama-style transformer of 2.8 million parameters trained on the source code of CPython's standard library;
`model/README.md` says how, and how well it predicts held-out files.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from saelens_cosine.bundled.corpus import stdlib_corpus

if TYPE_CHECKING:
    from sae_lens import HookedSAETransformer
    from transformer_lens.model_bridge import TransformerBridge

__all__ = ["BUNDLED", "load_bundled_bridge", "load_bundled_model", "model_folder", "stdlib_corpus"]

BUNDLED = "bundled"
"""What `--model` and `--dataset` call the model and the corpus that ship with the package."""


def model_folder() -> Path:
    """The model in Hugging Face format: `AutoModelForCausalLM.from_pretrained` and `AutoTokenizer` read this folder."""
    return Path(__file__).parent / "model"


def load_bundled_model(device: str = "cpu") -> HookedSAETransformer:
    """The bundled model as a TransformerLens `HookedTransformer` that SAEs can be attached to, float32, unprocessed.

    `HookedTransformer.from_pretrained` accepts only names from its own table, so the configuration is stated here and
    TransformerLens' own Llama conversion fills in the weights.
    """
    from sae_lens import HookedSAETransformer
    from transformer_lens import HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions.llama import convert_llama_weights
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = AutoModelForCausalLM.from_pretrained(model_folder()).float()
    llama = source.config
    cfg = HookedTransformerConfig(
        model_name=BUNDLED,
        original_architecture="LlamaForCausalLM",
        d_model=llama.hidden_size,
        n_layers=llama.num_hidden_layers,
        n_heads=llama.num_attention_heads,
        n_key_value_heads=llama.num_key_value_heads,
        d_head=llama.hidden_size // llama.num_attention_heads,
        d_mlp=llama.intermediate_size,
        n_ctx=llama.max_position_embeddings,
        d_vocab=llama.vocab_size,
        eps=llama.rms_norm_eps,
        act_fn=llama.hidden_act,
        normalization_type="RMS",
        final_rms=True,
        gated_mlp=True,
        positional_embedding_type="rotary",
        rotary_dim=llama.hidden_size // llama.num_attention_heads,
        rotary_adjacent_pairs=False,
        default_prepend_bos=True,
        init_weights=False,
        device=device,
    )
    model = HookedSAETransformer(cfg, AutoTokenizer.from_pretrained(model_folder()), move_to_device=False)
    model.load_and_process_state_dict(
        convert_llama_weights(source, cfg),
        fold_ln=False,
        center_writing_weights=False,
        center_unembed=False,
        fold_value_biases=False,
    )
    return model.to(device, print_details=False)


def load_bundled_bridge(device: str = "cpu") -> TransformerBridge:
    """The bundled model as a TransformerLens `TransformerBridge`, float32."""
    from transformer_lens.model_bridge import TransformerBridge

    return TransformerBridge.boot_transformers(str(model_folder()), device=device)

"""What TransformerLens 4 took away: imported here only, and not before it is asked for.

TransformerLens 4 has no `HookedTransformer`, no `HookedTransformerConfig`, no conversions of weights and no
`loading_from_pretrained`. Its models are `TransformerBridge`s, which TransformerLens 3 has too; they do whatever this package does
with a `HookedTransformer`, but run SAEBench 0.6 and start at a later layer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sae_lens import HookedSAETransformer

WAY_OUT = "TransformerLens has no HookedTransformer from version 4 on; pip install 'transformer-lens<4' brings it back."


def hooked_transformer() -> type[Any] | None:
    """The class; None where TransformerLens has none."""
    try:
        from transformer_lens import HookedTransformer
    except ImportError:
        return None
    return HookedTransformer


def is_hooked_transformer(model: Any) -> bool:
    """Whether a model is one, and so can start at a later layer and run SAEBench."""
    found = hooked_transformer()
    return found is not None and isinstance(model, found)


def official_model_name(name: str) -> str:
    """What Hugging Face calls a model of TransformerLens' table: `gpt2` for `gpt2-small`.

    Raises:
        ValueError: the table does not have it.
    """
    try:
        from transformer_lens.loading_from_pretrained import get_official_model_name
    except ImportError:
        from transformer_lens import supported_models

        return vars(supported_models)["get_official_model_name"](name)
    return get_official_model_name(name)


def hooked_llama(source: Any, tokenizer: Any, name: str, device: str) -> HookedSAETransformer:
    """A Hugging Face Llama as a `HookedTransformer` that SAEs can be attached to, in the source's dtype, unprocessed.

    `HookedTransformer.from_pretrained` accepts only names from its own table, so the configuration is stated here and
    TransformerLens' own Llama conversion fills in the weights.

    Raises:
        ImportError: TransformerLens has no HookedTransformer.
    """
    from sae_lens import HookedSAETransformer
    from transformer_lens import HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions.llama import convert_llama_weights

    llama = source.config
    cfg = HookedTransformerConfig(
        model_name=name,
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
    model = HookedSAETransformer(cfg, tokenizer, move_to_device=False)
    model.load_and_process_state_dict(
        convert_llama_weights(source, cfg),
        fold_ln=False,
        center_writing_weights=False,
        center_unembed=False,
        fold_value_biases=False,
    )
    return model.to(device, print_details=False)

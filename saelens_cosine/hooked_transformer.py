"""What TransformerLens 4 took away: imported here only, and not before it is asked for.

TransformerLens 4 has no `HookedTransformer`, no `HookedTransformerConfig`, no conversions of weights and no
`loading_from_pretrained`. Its models are `TransformerBridge`s, which TransformerLens 3 has too; they do whatever this package does
with a `HookedTransformer`, but run SAEBench 0.6 and start at a later layer. A Llama that is not in the table is made one here.
"""

from __future__ import annotations

import copy
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


LONGEST_CONTEXT = 2048
"""Tokens that a Llama takes as a HookedTransformer, at most: TransformerLens' own limit for models of longer contexts."""


def hooked_llama(source: Any, tokenizer: Any, name: str, device: str) -> HookedSAETransformer:
    """A Hugging Face Llama as a `HookedTransformer` that SAEs can be attached to, in the source's dtype, unprocessed.

    `HookedTransformer.from_pretrained` accepts only names from its own table, so the configuration is stated here and
    TransformerLens' own Llama conversion fills in the weights. The tokenizer is a copy that begins a text with the BOS token, as
    those of TransformerLens' models do.

    Raises:
        ImportError: TransformerLens has no HookedTransformer.
        ValueError: the model is no Llama, or one with biases in its MLPs or scaled rotary embeddings.
    """
    from sae_lens import HookedSAETransformer
    from transformer_lens import HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions.llama import convert_llama_weights

    llama = source.config
    theta = _rope_theta(llama, name)
    d_head = getattr(llama, "head_dim", None) or llama.hidden_size // llama.num_attention_heads
    cfg = HookedTransformerConfig(
        model_name=name,
        original_architecture="LlamaForCausalLM",
        d_model=llama.hidden_size,
        n_layers=llama.num_hidden_layers,
        n_heads=llama.num_attention_heads,
        n_key_value_heads=llama.num_key_value_heads,
        d_head=d_head,
        d_mlp=llama.intermediate_size,
        n_ctx=min(llama.max_position_embeddings, LONGEST_CONTEXT),
        d_vocab=llama.vocab_size,
        eps=llama.rms_norm_eps,
        act_fn=llama.hidden_act,
        normalization_type="RMS",
        final_rms=True,
        gated_mlp=True,
        positional_embedding_type="rotary",
        rotary_dim=d_head,
        rotary_base=theta,
        rotary_adjacent_pairs=False,
        default_prepend_bos=True,
        init_weights=False,
        dtype=source.dtype,
        device=device,
    )
    model = HookedSAETransformer(cfg, _with_bos(tokenizer), move_to_device=False)
    model.load_and_process_state_dict(
        {**convert_llama_weights(source, cfg), **_attention_biases(source, cfg)},
        fold_ln=False,
        center_writing_weights=False,
        center_unembed=False,
        fold_value_biases=False,
    )
    return model.to(device, print_details=False)


def _rope_theta(config: Any, name: str) -> float:
    """The base of a Llama's rotary embeddings.

    Raises:
        ValueError: the model is something else than `hooked_llama` makes.
    """
    rope: dict[str, Any] = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if config.model_type != "llama":
        unlike = f"its architecture is {config.model_type}"
    elif kind != "default":
        unlike = f"its rotary embeddings are scaled (rope_type={kind})"
    elif rope.get("partial_rotary_factor", 1) != 1:
        unlike = (
            f"its rotary embeddings turn a part of each head (partial_rotary_factor={rope['partial_rotary_factor']})"
        )
    elif getattr(config, "mlp_bias", False):
        unlike = "its MLPs have biases"
    else:
        return float(rope.get("rope_theta") or getattr(config, "rope_theta", None) or 10000.0)
    raise ValueError(
        f"{name} is no model of TransformerLens' table, and of others only a Llama, with plain rotary embeddings and without biases "
        f"in its MLPs, can be made a HookedTransformer: {unlike}."
    )


def _attention_biases(source: Any, cfg: Any) -> dict[str, Any]:
    """Those of a Llama that has them, by their names in TransformerLens, whose conversion leaves them out."""
    found: dict[str, Any] = {}
    for block, layer in enumerate(source.model.layers if source.config.attention_bias else ()):
        projections, to = layer.self_attn, f"blocks.{block}.attn"
        found[f"{to}.b_Q"] = projections.q_proj.bias.view(-1, cfg.d_head)
        found[f"{to}._b_K"] = projections.k_proj.bias.view(-1, cfg.d_head)
        found[f"{to}._b_V"] = projections.v_proj.bias.view(-1, cfg.d_head)
        found[f"{to}.b_O"] = projections.o_proj.bias
    return found


def _with_bos(tokenizer: Any) -> Any:
    """A copy that begins a text with BOS. TransformerLens would make it from files again, which it does not find in a GGUF file."""
    if tokenizer is None or tokenizer.bos_token is None:
        return tokenizer
    tokenizer = copy.deepcopy(tokenizer)
    if tokenizer("")["input_ids"][:1] != [tokenizer.bos_token_id]:
        tokenizer.add_bos_token = True
    tokenizer.init_kwargs["add_bos_token"] = True
    return tokenizer

"""How large the language model of a plan is, from its configuration alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from saelens_cosine.activations.gguf import gguf_file, is_gguf
from saelens_cosine.bundled import BUNDLED


@dataclass(frozen=True)
class ModelSize:
    """
    What a plan needs to know of a language model.

    Args:
        d_model (int): Size of its residual stream.
        layers (int): Blocks.
        per_layer (int): Weights of a block that a token is multiplied with.
    """

    d_model: int
    layers: int
    per_layer: int


def model_size(name: str) -> ModelSize:
    """Read from the configuration of a model that Transformers knows by this name or folder, of a GGUF file, or of the bundled one.

    Raises:
        ValueError: the configuration does not say its sizes.
        OSError: there is no such model.
    """
    if name == BUNDLED:
        from saelens_cosine.bundled import load_bundled_model

        cfg: Any = load_bundled_model().cfg
        return ModelSize(
            cfg.d_model, cfg.n_layers, 4 * cfg.d_model * cfg.n_heads * cfg.d_head + 2 * cfg.d_model * cfg.d_mlp
        )
    from transformers import AutoConfig

    file = gguf_file(name) if is_gguf(name) else None
    config: Any = (
        AutoConfig.from_pretrained(name)
        if file is None
        else AutoConfig.from_pretrained(str(file.parent), gguf_file=file.name)
    )
    config = getattr(config, "text_config", None) or config  # of a model that sees pictures too
    return _size(name, config)


def _size(name: str, config: Any) -> ModelSize:
    def first(*names: str) -> int | None:
        return next((int(value) for one in names if (value := getattr(config, one, None))), None)

    d_model, layers = first("hidden_size", "n_embd", "d_model"), first("num_hidden_layers", "n_layer", "n_layers")
    if d_model is None or layers is None:
        raise ValueError(f"The configuration of {name} does not say its size; pass --d-in and --model-parameters.")
    heads = first("num_attention_heads", "n_head", "n_heads") or 1
    head = first("head_dim") or d_model // heads
    keys = first("num_key_value_heads") or heads
    inner = first("intermediate_size", "n_inner", "ffn_dim", "d_ff") or 4 * d_model
    gated = any(
        word in str(getattr(config, "model_type", "")) for word in ("llama", "gemma", "qwen", "mistral", "phi3", "olmo")
    )
    experts = first("num_experts_per_tok", "top_k_experts") or 1
    attention = d_model * head * (2 * heads + 2 * keys)
    return ModelSize(d_model, layers, attention + experts * (3 if gated else 2) * d_model * inner)

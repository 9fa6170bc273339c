"""A small real language model and a real corpus that every install has: no network and no GPU needed.

The model is a Llama-style transformer of 2.8 million parameters trained on the source code of CPython's standard library;
`model/README.md` says how, and how well it predicts held-out files.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from saelens_cosine.bundled.corpus import stdlib_corpus
from saelens_cosine.hooked_transformer import hooked_llama, hooked_transformer

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
    """The bundled model as TransformerLens' hooked model that SAEs can be attached to, float32, unprocessed.

    A `HookedSAETransformer`; where TransformerLens has no HookedTransformer any more, SAELens' `SAETransformerBridge`, which is
    used in the same way.
    """
    if hooked_transformer() is None:
        from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge

        bridge: Any = SAETransformerBridge.boot_transformers(str(model_folder()), device=device)
        return bridge
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = AutoModelForCausalLM.from_pretrained(model_folder()).float()
    return hooked_llama(source, AutoTokenizer.from_pretrained(model_folder()), BUNDLED, device)


def load_bundled_bridge(device: str = "cpu") -> TransformerBridge:
    """The bundled model as a TransformerLens `TransformerBridge`, float32."""
    from transformer_lens.model_bridge import TransformerBridge

    return TransformerBridge.boot_transformers(str(model_folder()), device=device)

"""SAEs of EleutherAI/sparsify: `cfg.json` and `sae.safetensors`, in a folder named after the module.

Its encoder always subtracts `b_dec` and its `W_dec` is `[d_sae, d_in]`, as SAELens'. (SAELens 6.54's converter of this format
transposes that tensor and ties the subtraction to `normalize_decoder`; this one is tested against the library's formula.)
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from saelens_cosine.loading.errors import CheckpointError
from saelens_cosine.loading.formats.format import Converted, Format
from saelens_cosine.loading.reading import open_safetensors
from saelens_cosine.loading.tensor_file import positive_integer, read_config

WEIGHTS, CONFIG, RUN_CONFIG = "sae.safetensors", "cfg.json", "config.json"

_REFUSED = {
    "transcode": "a transcoder: SAELens' loaders for transcoders are the place for it",
    "skip_connection": "a linear skip connection, which no SAE class has",
    "embed_skip": "a skip connection from the embedding, which no SAE class has",
    "gram_lookup": "a table of n-gram means, which is not part of the weights",
}
_MODULES = {None: "hook_resid_post", "mlp": "hook_mlp_out", "attn": "hook_attn_out", "self_attn": "hook_attn_out"}


def convert(path: Path, device: str = "cpu", dtype: torch.dtype | None = None) -> Converted:
    """An SAE from a folder with `cfg.json` and `sae.safetensors`.

    Raises:
        CheckpointError: a file is damaged or missing, they disagree, or the SAE has parts that no SAE class has.
    """
    config = read_config(path / CONFIG)
    for name, reason in _REFUSED.items():
        if config.get(name):
            raise CheckpointError(f"{path / CONFIG} has {name}={config[name]!r}: {reason}.")
    if config.get("activation", "topk") != "topk":
        raise CheckpointError(
            f"{path / CONFIG} has activation={config['activation']!r}; only 'topk' has an equal here."
        )
    d_in, k = (positive_integer(config, name, path / CONFIG) for name in ("d_in", "k"))
    if config.get("num_latents"):
        d_sae = positive_integer(config, "num_latents", path / CONFIG)
    else:
        d_sae = d_in * positive_integer(config, "expansion_factor", path / CONFIG)
    if k > d_sae:
        raise CheckpointError(f"{path / CONFIG} has k={k} for {d_sae} features.")
    with open_safetensors(path / WEIGHTS) as file:
        file.expect(
            floats={
                "encoder.weight": (d_sae, d_in),
                "encoder.bias": (d_sae,),
                "W_dec": (d_sae, d_in),
                "b_dec": (d_in,),
            },
            integers={},
            optional=set(),
        )
        stored = {"W_enc": "encoder.weight", "b_enc": "encoder.bias", "W_dec": "W_dec", "b_dec": "b_dec"}
        tensors = {
            name: file.read(theirs, dtype=dtype, device=device, transposed=name == "W_enc")
            for name, theirs in stored.items()
        }
    # before August 2024 a signed SAE kept the k largest by magnitude
    architecture = "abstopk" if config.get("signed") else "topk"
    return Converted(architecture, tensors, {"k": k, "apply_b_dec_to_input": True}, _metadata(path))


def _metadata(path: Path) -> dict[str, Any]:
    """Hook from the folder's name, the rest from the run's config beside it. As SAELens' converter does, a BOS is assumed."""
    metadata: dict[str, Any] = {"prepend_bos": True}
    if path.name == "embed_tokens":
        metadata["hook_name"] = "hook_embed"
    module = re.search(r"(?:layers|blocks|h)[._](\d+)(?:[._](\w+))?$", path.name)
    if module and module[2] in _MODULES:
        metadata["hook_name"] = f"blocks.{module[1]}.{_MODULES[module[2]]}"
    run = read_config(path.parent / RUN_CONFIG) if (path.parent / RUN_CONFIG).is_file() else {}
    for name, theirs, kind in (
        ("model_name", "model", str),
        ("dataset_path", "dataset", str),
        ("context_size", "ctx_len", int),
    ):
        if isinstance(run.get(theirs), kind):
            metadata[name] = run[theirs]
    return metadata


SPARSIFY = Format("sparsify", (WEIGHTS, CONFIG), convert, config_of_repository=RUN_CONFIG)

"""SAEs of saprmarks/dictionary_learning: `ae.pt`, a flat state dict, and `config.json`, its trainer's settings.

Where the trainer scaled activations, the library scaled the biases and the threshold back before saving, so the weights
are for raw activations; the `norm_factor` that a config may name is history. What differs from SAELens' converter of this
format: files are read as data, a threshold that was never set is refused, and `AutoEncoderNew` keeps its raw input.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

import torch

from saelens_cosine.loading.errors import CheckpointError
from saelens_cosine.loading.formats.format import Converted, Format
from saelens_cosine.loading.reading import open_pt
from saelens_cosine.loading.tensor_file import TensorFile, positive_integer, read_config

WEIGHTS, CONFIG = "ae.pt", "config.json"


class _Dictionary(NamedTuple):
    """
    One of the library's classes.

    Args:
        architecture (str): SAELens' name for the same function.
        tensors (dict[str, tuple[str, str]]): SAELens' tensor -> its name in the file, and its shape there: F features, d inputs.
        centred (bool): Whether the decoder bias is subtracted from the input.
        integers (dict[str, str]): Other tensors and their shapes; g is any length.
        optional (frozenset[str]): Names that older files lack.
        ignored (dict[str, str]): Float tensors that the function does not use.
    """

    architecture: str
    tensors: dict[str, tuple[str, str]]
    centred: bool = True
    integers: dict[str, str] = {}  # noqa: RUF012  # never changed
    optional: frozenset[str] = frozenset()
    ignored: dict[str, str] = {}  # noqa: RUF012


_LINEAR = {"W_enc": ("encoder.weight", "Fd"), "b_enc": ("encoder.bias", "F"), "W_dec": ("decoder.weight", "dF")}
_PLAIN = {"W_enc": ("W_enc", "dF"), "b_enc": ("b_enc", "F"), "W_dec": ("W_dec", "Fd"), "b_dec": ("b_dec", "d")}
_K = {"k": ""}

DICTIONARIES: dict[str, _Dictionary] = {
    "BatchTopKSAE": _Dictionary(
        "jumprelu",
        {**_LINEAR, "b_dec": ("b_dec", "d"), "threshold": ("threshold", "")},
        integers=_K,
        optional=frozenset(_K),
    ),
    "MatryoshkaBatchTopKSAE": _Dictionary(
        "jumprelu",
        {**_PLAIN, "threshold": ("threshold", "")},
        integers={**_K, "group_sizes": "g"},
        optional=frozenset(_K),
    ),
    "AutoEncoderTopK": _Dictionary(
        "topk",
        {**_LINEAR, "b_dec": ("b_dec", "d")},
        integers=_K,
        optional=frozenset({"k", "threshold"}),
        ignored={"threshold": ""},
    ),
    "JumpReluAutoEncoder": _Dictionary("jumprelu", {**_PLAIN, "threshold": ("threshold", "F")}, centred=False),
    "AutoEncoder": _Dictionary("standard", {**_LINEAR, "b_dec": ("bias", "d")}),
    "AutoEncoderNew": _Dictionary("standard", {**_LINEAR, "b_dec": ("decoder.bias", "d")}, centred=False),
    "GatedAutoEncoder": _Dictionary(
        "gated",
        {
            "W_enc": ("encoder.weight", "Fd"),
            "b_gate": ("gate_bias", "F"),
            "r_mag": ("r_mag", "F"),
            "b_mag": ("mag_bias", "F"),
            "W_dec": ("decoder.weight", "dF"),
            "b_dec": ("decoder_bias", "d"),
        },
    ),
}
"""The library's classes. Codes are those of `encode` on the stored weights: `AutoEncoder.from_pretrained` there also folds
decoder norms into them, which SAELens' `fold_W_dec_norm()` does here."""

_HOOKS = {"resid_post": "hook_resid_post", "resid_pre": "hook_resid_pre", "mlp": "hook_mlp_out", "att": "hook_attn_out"}


def convert(path: Path, device: str = "cpu", dtype: torch.dtype | None = None) -> Converted:
    """An SAE from a folder with `ae.pt` and `config.json`.

    Raises:
        CheckpointError: a file is damaged or missing, they disagree, or the class is not a known one.
    """
    config = read_config(path / CONFIG)
    trainer: Any = config.get("trainer")
    if not isinstance(trainer, dict):
        raise CheckpointError(f"{path / CONFIG} has no 'trainer'; expected a dictionary_learning config.")
    kind = DICTIONARIES.get(str(trainer.get("dict_class")))
    if kind is None:
        raise CheckpointError(
            f"{path / CONFIG} names dict_class={trainer.get('dict_class')!r}; known are {', '.join(DICTIONARIES)}."
        )
    sizes = {
        "F": positive_integer(trainer, "dict_size", path / CONFIG),
        "d": positive_integer(trainer, "activation_dim", path / CONFIG),
    }
    with open_pt(path / WEIGHTS) as file:
        if any(name.startswith("optimizer/") for name in file.plain):
            raise CheckpointError(
                f"{file.path} is a backup made during training, whose biases may be in scaled units. Use the final ae.pt."
            )
        _check(file, kind, sizes)
        settings: dict[str, Any] = {"apply_b_dec_to_input": kind.centred}
        if kind.architecture == "topk":
            settings["k"] = _k(file, trainer, sizes["F"], path / CONFIG)
        scalar_threshold = kind.tensors.get("threshold", ("", "F"))[1] == ""
        threshold = _threshold(file) if scalar_threshold else None
        tensors = {
            name: file.read(stored, dtype=dtype, device=device, transposed=_is_transposed(name, shape))
            for name, (stored, shape) in kind.tensors.items()
            if shape
        }
    if threshold is not None:
        W_enc = tensors["W_enc"]
        tensors["threshold"] = torch.full((sizes["F"],), threshold, dtype=W_enc.dtype, device=device)
    return Converted(kind.architecture, tensors, settings, _metadata(config, trainer))


def _is_transposed(name: str, shape: str) -> bool:
    return shape == {"W_enc": "Fd", "W_dec": "dF"}.get(name)


def _check(file: TensorFile, kind: _Dictionary, sizes: dict[str, int]) -> None:
    def shape(letters: str, name: str) -> tuple[int, ...]:
        return file.shape(name, 1) if letters == "g" else tuple(sizes[letter] for letter in letters)

    floats = dict(kind.tensors.values()) | kind.ignored
    file.expect(
        floats={name: shape(letters, name) for name, letters in floats.items()},
        integers={name: shape(letters, name) for name, letters in kind.integers.items()},
        optional=set(kind.optional),
    )


def _k(file: TensorFile, trainer: dict[str, Any], d_sae: int, config: Path) -> int:
    """Active features per token: the file's, which must be the config's."""
    k = positive_integer(trainer, "k", config)
    stored = int(file.number("k")) if "k" in file.records else k
    if stored != k or k > d_sae:
        raise CheckpointError(f"{file.path} has k={stored}, its config k={k}, for {d_sae} features.")
    return k


def _threshold(file: TensorFile) -> float:
    threshold = file.number("threshold")
    if threshold < 0:
        raise CheckpointError(
            f"{file.path} has threshold {threshold:g}: it was never set (training ended before it was first measured), and with "
            "it the library's encode keeps every positive score, not k. Set 'threshold' to the score that k features per token "
            "exceed, and load that."
        )
    return threshold


def _metadata(config: dict[str, Any], trainer: dict[str, Any]) -> dict[str, Any]:
    """Model, hook and context. As SAELens' converter does, a beginning-of-sequence token is assumed."""
    metadata: dict[str, Any] = {"prepend_bos": True}
    if isinstance(trainer.get("lm_name"), str):
        metadata["model_name"] = trainer["lm_name"]
    module = trainer.get("submodule_name") or "resid_post"
    hook = next((hook for start, hook in _HOOKS.items() if re.match(start, str(module))), None)
    if type(trainer.get("layer")) is int and hook:
        metadata["hook_name"] = f"blocks.{trainer['layer']}.{hook}"
    buffer = config.get("buffer")
    if isinstance(buffer, dict) and type(buffer.get("ctx_len")) is int:
        metadata["context_size"] = buffer["ctx_len"]
    return metadata


DICTIONARY_LEARNING = Format("dictionary_learning", (WEIGHTS, CONFIG), convert)

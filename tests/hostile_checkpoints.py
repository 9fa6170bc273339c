"""Checkpoints that are damaged or lie: a good one of each layout, and what is done to it."""

from __future__ import annotations

import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import foreign
import torch
from helpers import make_sae
from safetensors.torch import load_file, save_file

Breakage = Callable[[Path], object]
"""Gets the folder of a good checkpoint."""


class Hostile(NamedTuple):
    layout: str
    breakage: Breakage
    says: str
    """What the message has, as a pattern."""


class Payload:
    """A pickle of it makes the file `ran` in the working directory when code is run."""

    def __reduce__(self) -> Any:
        return os.system, ("touch ran",)


WEIGHTS = {
    "saelens": "sae_weights.safetensors",
    "training": "sae_weights.safetensors",
    "perfeature": "sae_final.pt",
    "BatchTopKSAE": "ae.pt",
    "sparsify": "sae.safetensors",
}
CONFIGS = {"saelens": "cfg.json", "training": "cfg.json", "BatchTopKSAE": "config.json", "sparsify": "cfg.json"}


def write_good(layout: str, folder: Path) -> Path:
    """A checkpoint that loads; one of training is read by `inference_form`."""
    if layout in foreign.SOURCES:
        return foreign.write(layout, folder)
    sae = make_sae("cosine_topk")
    sae.cfg.metadata.model_name, sae.cfg.metadata.hook_name = "bundled", "blocks.3.hook_resid_post"
    sae.cfg.metadata.dataset_path = "bundled"
    sae.save_model(folder) if layout == "training" else sae.save_inference_model(folder)
    if layout == "training":
        (folder / "activation_scaler.json").write_text('{"scaling_factor": 2.0, "has_whitening": false}')
    return folder


def write_hostile(name: str, folder: Path) -> Path:
    hostile = HOSTILE[name]
    write_good(hostile.layout, folder)
    hostile.breakage(folder)
    return folder


def content(file: str, change: Callable[[bytes], bytes]) -> Breakage:
    return lambda folder: (folder / file).write_bytes(change((folder / file).read_bytes()))


def text(file: str, new: str | bytes) -> Breakage:
    return content(file, lambda _: new if isinstance(new, bytes) else new.encode())


def fields(file: str, **changes: Any) -> Breakage:
    """Fields of a JSON file, of its `trainer` or `metadata` where they are named `trainer__x`; `...` removes one."""

    def change(folder: Path) -> None:
        config = json.loads((folder / file).read_text())
        for name, value in changes.items():
            *within, last = name.split("__")
            inner = config
            for part in within:
                inner = inner[part]
            inner[last] = value
            if value is ...:
                del inner[last]
        (folder / file).write_text(json.dumps(config))

    return change


def tensors(layout: str, **changes: Callable[[torch.Tensor], torch.Tensor] | torch.Tensor | None) -> Breakage:
    """Tensors of the weights, replaced, changed, added or (None) removed."""

    def change(folder: Path) -> None:
        path = folder / WEIGHTS[layout]
        whole: Any = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
        state = whole.get("state_dict", whole)
        for name, value in changes.items():
            key = name.replace("__", ".")
            if value is None:
                del state[key]
            else:
                state[key] = value if isinstance(value, torch.Tensor) else value(state[key])
        save_file(whole, path) if path.suffix == ".safetensors" else torch.save(whole, path)

    return change


def instead(file: str, make: Callable[[Path], object]) -> Breakage:
    """Something else under the name of a file."""

    def change(folder: Path) -> None:
        (folder / file).unlink()
        make(folder / file)

    return change


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :]


def filled(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.clone()
        tensor.view(-1)[-1] = value
        return tensor

    return change


def header(text: bytes, size: int | None = None) -> bytes:
    return struct.pack("<Q", len(text) if size is None else size) + text


def of_weights(layout: str) -> dict[str, Hostile]:
    """What any weights file can suffer."""
    file = WEIGHTS[layout]
    matrix = {"BatchTopKSAE": "encoder__weight", "sparsify": "encoder__weight"}.get(layout, "W_enc")
    table: dict[str, tuple[Breakage, str]] = {
        "truncated": (content(file, lambda data: data[: len(data) // 2]), file),
        "empty": (text(file, b""), file),
        "no more than a header": (content(file, lambda data: data[:9]), file),
        "random bytes": (text(file, bytes(range(7, 256)) * 9), file),
        "flipped in its first byte": (content(file, lambda data: flipped(data, 0)), file),
        "a pickle with code": (text(file, pickle.dumps(Payload())), file),
        "a web page": (text(file, "<!DOCTYPE html><html>404</html>"), file),
        "NaN": (tensors(layout, b_dec=filled(float("nan"))), rf"b_dec.*{file}.*not finite"),
        "infinity": (tensors(layout, **{matrix: filled(float("inf"))}), f"{file}.*not finite"),
        "minus infinity": (tensors(layout, **{matrix: filled(-float("inf"))}), f"{file}.*not finite"),
        "a tensor missing": (tensors(layout, b_dec=None), rf"{file}.*b_dec"),
        "a tensor too many": (tensors(layout, surplus=torch.zeros(3)), rf"{file}.*surplus"),
        "a wrong shape": (tensors(layout, b_dec=torch.zeros(8)), r"b_dec"),
        "no elements": (tensors(layout, b_dec=torch.zeros(0)), r"b_dec"),
        "integers": (tensors(layout, b_dec=torch.zeros(7, dtype=torch.int64)), rf"b_dec.*{file}.*floating"),
        "booleans": (tensors(layout, b_dec=torch.zeros(7, dtype=torch.bool)), r"b_dec"),
        "complex": (tensors(layout, b_dec=torch.zeros(7, dtype=torch.complex64)), "C64|ComplexFloat|complex"),
        "transposed": (tensors(layout, **{matrix: lambda tensor: tensor.T.contiguous()}), "shape|size"),
        "a folder": (instead(file, Path.mkdir), file),
        "a dangling link": (instead(file, lambda path: path.symlink_to("nowhere")), file),
        "gone": (instead(file, lambda _: None), file),
    }
    if file.endswith(".safetensors"):
        big = b'{"W_enc": {"dtype": "F32", "shape": [1048576, 1048576], "data_offsets": [0, 4398046511104]}}'
        twice = b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "b": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}'
        table |= {
            "flipped in its header": (content(file, lambda data: flipped(data, 12)), file),
            "a header of an exabyte": (text(file, header(b"{}", 2**60)), file),
            "a header that is not JSON": (text(file, header(b"{not JSON")), file),
            "a header that is not UTF-8": (text(file, header(b"\xff\xfe\xfd")), file),
            "a header that is a list": (text(file, header(b"[1, 2]")), file),
            "a deep header": (text(file, header(b'{"a":' * 60_000 + b"1" + b"}" * 60_000)), file),
            "terabytes on its word": (text(file, header(big)), file),
            "tensors that overlap": (text(file, header(twice) + bytes(4)), file),
            "no tensors": (text(file, header(b"{}")), file),
        }
    return {f"{layout}: weights: {name}": Hostile(layout, *row) for name, row in table.items()}


def of_config(layout: str) -> dict[str, Hostile]:
    """What any JSON file can suffer."""
    file = CONFIGS[layout]
    table: dict[str, tuple[Breakage, str]] = {
        "empty": (text(file, ""), file),
        "truncated": (content(file, lambda data: data[: len(data) // 2]), file),
        "not JSON": (text(file, "{architecture: topk}"), file),
        "not UTF-8": (text(file, b'{"architecture": "\xff\xfe"}'), file),
        "a null byte": (text(file, b"\0"), file),
        "a list": (text(file, "[1, 2]"), file),
        "a string": (text(file, '"topk"'), file),
        "null": (text(file, "null"), file),
        "a number of 5000 digits": (text(file, "1" * 5000), file),
        "deeply nested": (text(file, '{"metadata": ' * 100_000 + "1" + "}" * 100_000), file),
        "deeply nested lists": (text(file, "[" * 100_000), file),
        "no fields": (text(file, "{}"), f"{file}|unknown|W_enc"),
        "two MB": (text(file, '{"a": "' + "x" * 2**21 + '"}'), file),
        "a folder": (instead(file, Path.mkdir), file),
        "a dangling link": (instead(file, lambda path: path.symlink_to("nowhere")), file),
        "gone": (instead(file, lambda _: None), file),
    }
    sizes = {"BatchTopKSAE": ("trainer__activation_dim", "trainer__dict_size")}.get(layout, ("d_in", "d_sae"))
    sizes = {"sparsify": ("d_in", "num_latents")}.get(layout, sizes)
    for size in sizes:
        says = size.partition("__")[2] or size
        for value in (-1, "7", True, 7.5, [7], 2**70, float("nan")):
            table[f"{says} {value!r}"] = (fields(file, **{size: value}), rf"{says}|{file}|expected \[.*\d{{22}}")
        table[f"{says} 10^12"] = (fields(file, **{size: 10**12}), f"10{{12}}|fit|{file}")
    return {f"{layout}: config: {name}": Hostile(layout, *row) for name, row in table.items()}


def of_saelens(layout: str) -> dict[str, Hostile]:
    """What SAELens' config says that cannot be."""
    metadata: dict[str, tuple[Any, ...]] = {
        "hook_name": (["blocks.3.hook_resid_post"], 3, {"a": 1}, True),
        "model_name": (["gpt2"], 2.5, False),
        "dataset_path": ({"a": 1}, 7),
        "context_size": ("32", [32], 1.5, True),
        "max_norm_multiple": ("ten", [10], float("nan")),
        "high_norm_share_dropped": ("much",),
        "model_from_pretrained_kwargs": ("dtype", [1]),
        "model_class_name": (7,),
        "hook_head_index": ("first", 1.5),
        "seqpos_slice": ("1:", 3, ["a"]),
        "exclude_special_tokens": ("yes", [["a"]]),
        "prepend_bos": ("no",),
        "training_architecture": ([],),
        "training_architecture_details": ("k",),
        "sae_lens_version": (6, "six", [6]),
    }
    table: dict[str, tuple[Breakage, str]] = {
        f"metadata {name} {value!r}": (fields("cfg.json", **{f"metadata__{name}": value}), "cfg.json")
        for name, values in metadata.items()
        for value in values
    }
    own: dict[str, tuple[Any, ...]] = {
        "architecture": ("nonsense", "", 7, ["topk"], None, {"a": 1}, "standard", "gated", "jumprelu", "temporal"),
        "dtype": ("nonsense", 32, None, ["float32"], "int64", {"a": 1}),
        "k": (0, -1, 14, "3", True, 2.5, None, 2**70, [3]),
        "metadata": ("text", 7, None, [1]),
        "normalize_activations": ("nonsense", 3),
        "apply_b_dec_to_input": ("yes", 1),
        "reshape_activations": (3, None),
    }
    table |= {
        f"{name} {value!r}": (fields("cfg.json", **{name: value}), f"cfg.json|{name}")
        for name, values in own.items()
        for value in values
    }
    table |= {
        f"{name} missing": (fields("cfg.json", **{name: ...}), "cfg.json|training") for name in ("d_in", "d_sae", "k")
    }
    return {f"{layout}: {name}": Hostile(layout, *row) for name, row in table.items()}


_SCALER = "activation_scaler.json"

HOSTILE: dict[str, Hostile] = {
    **{name: row for layout in WEIGHTS for name, row in of_weights(layout).items()},
    **{name: row for layout in CONFIGS for name, row in of_config(layout).items()},
    **of_saelens("saelens"),
    **of_saelens("training"),
    **{
        f"training: scale {new[:20]!r}": Hostile("training", text(_SCALER, new), _SCALER)
        for new in (
            "",
            "[]",
            "{}}",
            '{"scaling_factor": "2"}',
            '{"scaling_factor": -1}',
            '{"scaling_factor": NaN}',
            '{"scaling_factor": true}',
            "[" * 100_000,
            b"\xff",
        )
    },
    "training: scale a folder": Hostile("training", instead(_SCALER, Path.mkdir), _SCALER),
    **{
        f"BatchTopKSAE: {name} {value!r}": Hostile(
            "BatchTopKSAE", fields("config.json", **{name: value}), "config.json"
        )
        for name, value in (
            ("trainer", "text"),
            ("trainer", [1]),
            ("trainer", ...),
            ("trainer__dict_class", "Nonsense"),
            ("trainer__dict_class", ["BatchTopKSAE"]),
            ("trainer__dict_class", ...),
        )
    },
    **{
        f"sparsify: {name} {value!r}": Hostile("sparsify", fields("cfg.json", **{name: value}), "cfg.json")
        for name, value in (
            ("k", 0),
            ("k", "3"),
            ("k", 99),
            ("k", ...),
            ("activation", "nonsense"),
            ("activation", ["topk"]),
            ("transcode", True),
        )
    },
}

"""Checkpoints of the paper's own code (arXiv 2606.15054): a pickled dictionary with the state dict of their modules.

There is no config; the tensors tell the variant. `W_enc` and `W_dec` are both `[d_sae, d_in]`, one threshold serves all
features, and its comparison is strict. With `x_c`, `n`, `u = x_c / n` as in `saelens_cosine.score`:

| extra tensors | score | becomes |
| --- | --- | --- |
| none | `<x_c, w_i> + b_enc_i` | SAELens' `jumprelu` |
| `scale_a`, `scale_b`, both `[]` | `exp(b) n^a <u, w_i / ‖w_i‖> + b_enc_i` | `cosine_jumprelu` |
| both `[d_sae]` | the same with `a_i`, `b_i` | `per_feature_cosine_jumprelu` |
| both `[groups]` | feature i has those of group `i // (d_sae // groups)`, the last takes the rest | `per_feature_cosine_jumprelu` |
| `scale_a_base`, `scale_a_delta`, `scale_b` | `a_i = base + delta_i` | `per_feature_cosine_jumprelu` |
| no `b_enc` | `<u, w_i / ‖w_i‖>`, output restored to the norm `n` | `magnitude_bypass_jumprelu` |

Some ablations have the tensors of another variant and compute something else; only the file's name tells them apart, so a
name that says one of them is refused.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from saelens_cosine.loading.errors import CheckpointError
from saelens_cosine.loading.formats import Converted, Format
from saelens_cosine.loading.reading import open_pt
from saelens_cosine.loading.releases import RELEASES
from saelens_cosine.loading.tensor_file import TensorFile
from saelens_cosine.saes.cosine import PLUGIN_NOTE
from saelens_cosine.score import fold_scale, wide

WEIGHTS = "sae_final.pt"
FOLD_BLOCK = 2**20
"""Weights that are normalised at a time."""

_COSINE = frozenset({"b_enc", "scale_a", "scale_b"})
_BASE_DELTA = frozenset({"b_enc", "scale_a_base", "scale_a_delta", "scale_b"})
_STANDARD = frozenset({"b_enc"})
_BYPASS = frozenset[str]()
_VARIANTS = (_STANDARD, _COSINE, _BASE_DELTA, _BYPASS)
_TELLING = frozenset.union(*_VARIANTS)

_AMBIGUOUS = ("inner_unitenc", "standard_inputnorm", "perfeature_bd_no_enc_norm", "unnormed_perfeature_b", "noc_")
"""Starts of file names of ablations (experiments 46, 48, 63) that the tensors alone would take for another variant."""


def convert(path: Path, device: str = "cpu", dtype: torch.dtype | None = None) -> Converted:
    """An SAE from the authors' file, or a folder that holds it as `sae_final.pt`.

    Raises:
        CheckpointError: the file is damaged, is no such checkpoint, or has no threshold yet.
    """
    weights = path / WEIGHTS if path.is_dir() else path
    if not weights.is_file():
        raise CheckpointError(f"{weights} does not exist; the authors' layout has one {WEIGHTS} per folder.")
    if weights.name.startswith(_AMBIGUOUS):
        raise CheckpointError(
            f"{weights.name} names an ablation whose score no SAE class here has, though its tensors look like another's."
        )
    with open_pt(weights) as file:
        variant = _check(file)
        threshold = _threshold(file)
        d_sae, d_in = file.shape("state_dict/W_enc", 2)
        metadata = _metadata(weights, d_in, d_sae, variant)
        # weights first: while they are read and normalised nothing else is held
        architecture, tensors = _scored(file, variant, device, dtype)
        tensors["b_dec"] = file.read("state_dict/b_dec", dtype=dtype, device=device)
        # SAELens' class compares in the SAE's dtype, ours in float32 or wider
        kept = tensors["W_enc"].dtype if variant == _STANDARD else wide(tensors["W_enc"].dtype)
        tensors["threshold"] = torch.full((d_sae,), threshold, dtype=kept, device=device)
    if variant != _STANDARD:
        metadata["requires"] = PLUGIN_NOTE
    return Converted(architecture, tensors, {}, metadata)


def _check(file: TensorFile) -> frozenset[str]:
    """The variant, after all names, shapes and kinds were found to be its."""
    d_sae, d_in = file.shape("state_dict/W_enc", 2)
    variant = frozenset(name for name in _TELLING if f"state_dict/{name}" in file.records)
    if variant not in _VARIANTS:
        known = "; ".join(", ".join(sorted(names)) or "none" for names in _VARIANTS)
        raise CheckpointError(f"{file.path} has the score tensors {sorted(variant)}; known are: {known}.")
    shapes: dict[str, tuple[int, ...]] = {
        "W_enc": (d_sae, d_in),
        "W_dec": (d_sae, d_in),
        "b_dec": (d_in,),
        "threshold": (),
    }
    shapes |= dict.fromkeys(variant, (d_sae,))
    if variant == _COSINE:
        record = file.records["state_dict/scale_a"]
        if len(record.shape) > 1 or (record.shape and record.shape[0] > d_sae):
            raise CheckpointError(
                f"scale_a in {file.path} has shape {list(record.shape)}; expected [], [{d_sae}] or [groups] below that."
            )
        shapes["scale_a"] = shapes["scale_b"] = record.shape
    if variant == _BASE_DELTA:
        shapes["scale_a_base"] = ()
    file.expect(
        floats={f"state_dict/{name}": shape for name, shape in shapes.items()},
        integers={"num_tokens_since_fired": (d_sae,)},
        optional={"num_tokens_since_fired"},
        state="state_dict/",
    )
    return variant


def _threshold(file: TensorFile) -> float:
    threshold = file.number("state_dict/threshold")
    if threshold < 0:
        raise CheckpointError(
            f"{file.path} has threshold {threshold:g}, so it was never set (training ended before step 1000). The authors' "
            "code then selects across the evaluation batch, which no SAE class does. Set state_dict['threshold'] to the "
            "score that k features per token exceed on your activations, and load that."
        )
    return threshold


def _scored(
    file: TensorFile, variant: frozenset[str], device: str, dtype: torch.dtype | None
) -> tuple[str, dict[str, torch.Tensor]]:
    """Architecture and the tensors that make its score and its decoder."""

    def read(name: str, dtype: torch.dtype | None = dtype, **options: Any) -> torch.Tensor:
        return file.read(f"state_dict/{name}", dtype=dtype, device=device, **options)

    if variant == _STANDARD:
        # contiguous, because SAELens saves no views
        return "jumprelu", {"W_enc": read("W_enc", transposed=True), "b_enc": read("b_enc"), "W_dec": read("W_dec")}
    stored = file.records["state_dict/W_enc"].dtype
    precise = torch.promote_types(wide(stored), dtype or stored)
    rows = read("W_enc", precise)
    if variant == _BYPASS:
        _scale_rows(rows, rows.new_zeros(()))
        W_dec = read("W_dec", precise)
        _scale_rows(W_dec, W_dec.new_zeros(()))
        W_enc, W_dec = (weights.to(dtype or weights.dtype) for weights in (rows, W_dec))
        extra = {"b_enc": W_enc.new_zeros(len(W_enc)), "norm_exponent": rows.new_zeros(())}
        return "magnitude_bypass_jumprelu", {"W_enc": W_enc.T, "W_dec": W_dec, **extra}
    if variant == _BASE_DELTA:
        exponent = read("scale_a_base", precise) + read("scale_a_delta", precise)
    else:
        exponent = _ungrouped(read("scale_a", precise), len(rows))
    log_scale = _ungrouped(read("scale_b", precise), len(rows))
    if not log_scale.exp().isfinite().all():
        raise CheckpointError(
            f"scale_b in {file.path} goes up to {log_scale.max().item():g}, whose exponential is no {precise}."
        )
    _scale_rows(rows, log_scale)
    name = "per_feature_cosine_jumprelu" if exponent.ndim else "cosine_jumprelu"
    tensors = {"W_enc": rows.to(dtype or rows.dtype).T, "norm_exponent": exponent}  # a view: our classes keep it so
    return name, {**tensors, "b_enc": read("b_enc"), "W_dec": read("W_dec")}


def _scale_rows(rows: torch.Tensor, log_scale: torch.Tensor) -> None:
    """Give the rows of `[d_sae, d_in]` the lengths `exp(log_scale)`, in place and in blocks."""
    step = max(1, FOLD_BLOCK // rows.shape[1])
    for start in range(0, len(rows), step):
        block = slice(start, start + step)
        rows[block] = fold_scale(rows[block].T, log_scale[block] if log_scale.ndim else log_scale).T


def _ungrouped(values: torch.Tensor, d_sae: int) -> torch.Tensor:
    """`[]` as it is; `[groups]` to one value per feature, `[d_sae]` (experiment 37)."""
    if values.ndim == 0:
        return values
    group = torch.arange(d_sae, device=values.device) // (d_sae // len(values))
    return values[group.clamp_max(len(values) - 1)]


def _metadata(weights: Path, d_in: int, d_sae: int, variant: frozenset[str]) -> dict[str, Any]:
    """The release's, when name, sizes and variant are those of the published files; else what the name tells."""
    release = RELEASES["cosine-scored-saes-qwen3-8b"]
    published = next(iter(release.saes.values()))
    if weights.name == WEIGHTS and (d_in, d_sae) == (release.d_in, published.d_sae) and variant in (_STANDARD, _COSINE):
        return release.metadata_of(published.folder)
    layer = re.search(r"_L(\d+)_", weights.name)  # {variant}_L{layer}_final.pt, _step{n}.pt
    return {"hook_name": f"blocks.{layer[1]}.hook_resid_post"} if layer else {}


AUTHORS = Format("authors", (WEIGHTS,), convert)

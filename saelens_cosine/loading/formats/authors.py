"""Checkpoints of the paper's own code (arXiv 2606.15054): a pickled state dict of their modules, bare or with entries beside it.

`W_enc` and `W_dec` are both `[d_sae, d_in]`; a threshold is one for all features, and its comparison is strict. With `x_c`,
`n`, `u = x_c / n` as in `saelens_cosine.score`, `ŵ_i = w_i / ‖w_i‖`, and `b`, `a` from `scale_b` and `scale_a`, which are
`[]`, `[d_sae]`, or `[groups]` (feature i has those of group `i // (d_sae // groups)`, the last takes the rest):

| tensors of the score | score | becomes |
| --- | --- | --- |
| `b_enc` | `<x_c, w_i> + b_enc_i` | SAELens' `jumprelu` |
| `b_enc`, `scale_a`, `scale_b` | `exp(b) n^a <u, ŵ_i> + b_enc_i` | `cosine_jumprelu`, `per_feature_cosine_jumprelu` |
| `b_enc`, `scale_a_base`, `scale_a_delta`, `scale_b` | the same with `a_i = base + delta_i` | `per_feature_cosine_jumprelu` |
| `b_enc`, `scale_b` or `log_scale` | the same with `a = 0` | `cosine_jumprelu` |
| `b_enc`, `scale_a []`, `scale_b [d_sae]` or none | `exp(b_i) n^a <u, w_i> + b_enc_i` | `cosine_jumprelu` |
| none | `<u, ŵ_i>`, output restored to the norm `n` | `magnitude_bypass_jumprelu` |

Without a threshold it is `..._topk` or `..._abstopk`. Some of their experiments have the tensors of a row above and compute
something else. An entry beside the tensors says so, and is heard; where only the file's name does, the name is.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from sae_lens.registry import SAE_CLASS_REGISTRY

from saelens_cosine.loading.errors import CheckpointError
from saelens_cosine.loading.formats.authors_file import BASE_DELTA, BYPASS, COSINE, STANDARD, AuthorsFile, what_it_is
from saelens_cosine.loading.formats.format import Converted, Format
from saelens_cosine.loading.reading import open_pt
from saelens_cosine.loading.releases import RELEASES
from saelens_cosine.loading.tensor_file import TensorFile
from saelens_cosine.saes.cosine import PLUGIN_NOTE
from saelens_cosine.score import fold_scale, wide

WEIGHTS = "sae_final.pt"
FOLD_BLOCK = 2**20
"""Weights that are normalised at a time."""


def convert(path: Path, device: str = "cpu", dtype: torch.dtype | None = None, k: int | None = None) -> Converted:
    """An SAE from the authors' file, or a folder that holds it as `sae_final.pt`.

    Args:
        path: the file, or its folder.
        device: where the tensors shall be.
        dtype: of the weights; None is the file's.
        k: features per token of a TopK or AbsTopK file, which does not say it.

    Raises:
        CheckpointError: the file is damaged, is no such checkpoint, has an entry that is not known, no threshold yet, or no k.
    """
    weights = path / WEIGHTS if path.is_dir() else path
    with open_pt(weights) as file:
        said = what_it_is(file, k)
        d_sae, d_in = file.shape(f"{said.state}W_enc", 2)
        threshold = _threshold(file, said.state) if said.k is None else None
        # weights first: while they are read and normalised nothing else is held
        family, tensors = _scored(file, said, device, dtype)
        tensors["b_dec"] = file.read(f"{said.state}b_dec", dtype=dtype, device=device)
    architecture = family + said.selector
    if architecture not in SAE_CLASS_REGISTRY:
        raise CheckpointError(f"{weights} would be a {architecture!r}, which no SAE class here is.")
    if threshold is not None:
        # SAELens' class compares in the SAE's dtype, ours in float32 or wider
        kept = wide(tensors["W_enc"].dtype) if family else tensors["W_enc"].dtype
        tensors["threshold"] = torch.full((d_sae,), threshold, dtype=kept, device=device)
    settings: dict[str, Any] = {} if said.k is None else {"k": said.k}
    if said.tensors == BYPASS:
        settings["restore_output_norm"] = said.score.restored
    metadata = _metadata(weights, d_in, d_sae, said)
    if family:
        metadata["requires"] = PLUGIN_NOTE
    return Converted(architecture, tensors, settings, metadata)


def _threshold(file: TensorFile, state: str) -> float:
    threshold = file.number(f"{state}threshold")
    if threshold < 0:
        raise CheckpointError(
            f"{file.path} has threshold {threshold:g}, so it was never set (training ended before step 1000). The authors' "
            "code then selects across the evaluation batch, which no SAE class does. Set the threshold in its state dict "
            "to the score that k features per token exceed on your activations, and load that."
        )
    return threshold


def _scored(
    file: TensorFile, said: AuthorsFile, device: str, dtype: torch.dtype | None
) -> tuple[str, dict[str, torch.Tensor]]:
    """Start of the architecture's name, and the tensors that make its score and its decoder."""
    score = said.score

    def read(name: str, dtype: torch.dtype | None = dtype, **options: Any) -> torch.Tensor:
        return file.read(f"{said.state}{name}", dtype=dtype, device=device, **options)

    if score.inner and not score.unit_rows:
        # contiguous, because SAELens saves no views
        return "", {"W_enc": read("W_enc", transposed=True), "b_enc": read("b_enc"), "W_dec": read("W_dec")}
    stored = file.records[f"{said.state}W_enc"].dtype
    precise = torch.promote_types(wide(stored), dtype or stored)
    rows = read("W_enc", precise)
    exponent, log_scale = rows.new_zeros(()), rows.new_zeros(())
    if not score.inner:
        if said.tensors == BASE_DELTA:
            exponent = read("scale_a_base", precise) + read("scale_a_delta", precise)
        elif "scale_a" in said.tensors:
            exponent = _ungrouped(read("scale_a", precise), len(rows)) * score.kept
        for name in sorted(said.tensors & {"scale_b", "log_scale"}):
            log_scale = _ungrouped(read(name, precise), len(rows))
            if not log_scale.exp().isfinite().all():
                raise CheckpointError(
                    f"{name} in {file.path} goes up to {log_scale.max().item():g}, whose exponential is no {precise}."
                )
    _scale_rows(rows, log_scale, score.unit_rows)
    W_enc = rows.to(dtype or rows.dtype).T  # a view: our classes keep it so
    if score.inner:
        return "", {"W_enc": W_enc.contiguous(), "b_enc": read("b_enc"), "W_dec": read("W_dec")}
    tensors = {"W_enc": W_enc, "norm_exponent": exponent}
    if said.tensors != BYPASS:
        family = "per_feature_cosine_" if exponent.ndim else "cosine_"
        return family, {**tensors, "b_enc": read("b_enc"), "W_dec": read("W_dec")}
    W_dec = read("W_dec", precise)
    if score.unit_decoder:
        _scale_rows(W_dec, W_dec.new_zeros(()), unit=True)
    b_enc = W_enc.new_zeros(len(rows))
    return "magnitude_bypass_", {**tensors, "b_enc": b_enc, "W_dec": W_dec.to(dtype or W_dec.dtype)}


def _scale_rows(rows: torch.Tensor, log_scale: torch.Tensor, unit: bool) -> None:
    """Multiply the rows of `[d_sae, d_in]`, or their directions, by `exp(log_scale)`, in place and in blocks."""
    step = max(1, FOLD_BLOCK // rows.shape[1])
    for start in range(0, len(rows), step):
        block = slice(start, start + step)
        scale = log_scale[block] if log_scale.ndim else log_scale
        rows[block] = fold_scale(rows[block].T, scale).T if unit else (rows[block].T * scale.exp()).T


def _ungrouped(values: torch.Tensor, d_sae: int) -> torch.Tensor:
    """`[]` as it is; `[groups]` to one value per feature, `[d_sae]` (experiment 37)."""
    if values.ndim == 0:
        return values
    group = torch.arange(d_sae, device=values.device) // (d_sae // len(values))
    return values[group.clamp_max(len(values) - 1)]


def _metadata(weights: Path, d_in: int, d_sae: int, said: AuthorsFile) -> dict[str, Any]:
    """The release's, when name, sizes and variant are those of the published files; else what the name tells."""
    release = RELEASES["cosine-scored-saes-qwen3-8b"]
    published = next(iter(release.saes.values()))
    is_published = said.plain and said.k is None and said.tensors in (STANDARD, COSINE)
    if weights.name == WEIGHTS and (d_in, d_sae) == (release.d_in, published.d_sae) and is_published:
        return release.metadata_of(published.folder)
    layer = re.search(r"_L(\d+)[_.]", weights.name)  # {variant}_L{layer}.pt, _final.pt, _step{n}.pt, _k{k}_final.pt
    return {"hook_name": f"blocks.{layer[1]}.hook_resid_post"} if layer else {}


AUTHORS = Format("authors", (WEIGHTS,), convert, options=("k",))

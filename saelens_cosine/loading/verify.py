"""Does a converted SAE compute what its source does? Each foreign format's formula, once more, in plain torch and float64.

Nothing here uses the converters or the classes of this package: files are read with torch and safetensors, and formulas are
the publishers' (their `encode` and `decode`), so an error on one side shows as a difference.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from sae_lens.saes.sae import SAE
from safetensors.torch import load_file

from saelens_cosine.loading.errors import CheckpointError
from saelens_cosine.loading.pretrained import Located

FEATURE_BLOCK = 2048
"""Features whose weights are in float64 at a time."""


class Reference(NamedTuple):
    """
    What the source computes, in float64.

    Args:
        scores (torch.Tensor): `[tokens, d_sae]`, before the selection.
        bound (torch.Tensor): What a score must exceed to be selected; broadcasts to the scores.
        codes (torch.Tensor): `[tokens, d_sae]`.
        output (torch.Tensor): `[tokens, d_in]`.
    """

    scores: torch.Tensor
    bound: torch.Tensor
    codes: torch.Tensor
    output: torch.Tensor


@dataclass(frozen=True)
class Verification:
    """
    A converted SAE against its source's float64 formula.

    Args:
        tokens (int): Activations compared.
        active (float): Features active per token, in the source.
        codes_error (float): Largest difference of codes active on both sides, relative to the largest code.
        output_error (float): Largest difference of outputs of tokens with the same active features, relative to the largest entry.
        flips (int): Codes that are active on one side only.
        flip_margin (float): Largest distance of a flipped code's score from its bound, relative to the largest score. Rounding flips what lies on the bound.
        tolerance (float): Bound on the three errors: 1e-5, or 8 times the resolution of a dtype below float32.
    """

    tokens: int
    active: float
    codes_error: float
    output_error: float
    flips: int
    flip_margin: float
    tolerance: float

    @property
    def agrees(self) -> bool:
        """Whether some feature fired and no error is above the tolerance."""
        errors = (self.codes_error, self.output_error, self.flip_margin)
        return self.active > 0 and all(error <= self.tolerance for error in errors)

    def __str__(self) -> str:
        return (
            f"{self.tokens} tokens, {self.active:.1f} active features each: codes differ by at most {self.codes_error:.1e} of "
            f"the largest, outputs by {self.output_error:.1e}; {self.flips} codes active on one side only"
            + (f" (scores within {self.flip_margin:.1e} of their bound)" if self.flips else "")
        )


@torch.no_grad()
def verify(located: Located, sae: SAE[Any], activations: torch.Tensor | None = None, tokens: int = 256) -> Verification:
    """Compare a converted SAE with the formula of its source on the same activations.

    Args:
        located: the source's files.
        sae: what was made of them.
        activations: `[..., d_in]`; None takes `tokens` random ones, `b_dec` plus sums of decoder rows, at which features fire.
        tokens: number of random ones.

    Raises:
        ValueError: the activations have another size.
        CheckpointError: the source is in SAELens' own format, which has no other formula.
    """
    reference = _REFERENCES.get(located.format.name)
    if reference is None:
        raise CheckpointError(f"{located.path} is in SAELens' own format: there is no other formula to compare with.")
    x = _random_activations(sae, tokens) if activations is None else activations.reshape(-1, activations.shape[-1])
    if x.shape[-1] != sae.cfg.d_in:
        raise ValueError(
            f"The activations have size {x.shape[-1]} (shape {list(x.shape)}); the SAE has d_in={sae.cfg.d_in}."
        )
    x = x.to(device=sae.device, dtype=sae.dtype)
    codes = sae.encode(x)
    output = sae.decode(codes).double().cpu()
    codes = codes.double().cpu()
    expected = reference(located, x.double().cpu())
    both = (codes != 0) & (expected.codes != 0)
    flipped = (codes != 0) != (expected.codes != 0)
    same = ~flipped.any(dim=-1)
    margin = (expected.scores - expected.bound).abs()[flipped]
    return Verification(
        tokens=len(x),
        active=(expected.codes != 0).sum(dim=-1).double().mean().item(),
        codes_error=_largest((codes - expected.codes)[both], expected.codes),
        output_error=_largest((output - expected.output)[same], expected.output),
        flips=int(flipped.sum()),
        flip_margin=_largest(margin, expected.scores),
        tolerance=max(1e-5, 8 * torch.finfo(sae.dtype).eps),
    )


def _largest(difference: torch.Tensor, scale: torch.Tensor) -> float:
    if difference.numel() == 0:
        return 0.0
    return (difference.abs().max() / scale.abs().max()).item()


def _random_activations(sae: SAE[Any], tokens: int) -> torch.Tensor:
    """`b_dec` plus 32 random decoder rows, with weights that differ by feature and by token."""
    rng = torch.Generator().manual_seed(0)
    threshold = getattr(sae, "threshold", None)
    size = 1 + (threshold.float().mean().item() if threshold is not None else 0)
    features = torch.randint(sae.cfg.d_sae, (tokens, 32), generator=rng).to(sae.device)
    weights = size * torch.exp(torch.randn(tokens, 32, generator=rng) + torch.randn(tokens, 1, generator=rng))
    rows = sae.W_dec.float()[features]
    return sae.b_dec.float() + (weights.to(sae.device)[..., None] * rows).sum(dim=1)


def _load(path: Path) -> dict[str, Any]:
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def _product(x: torch.Tensor, rows: torch.Tensor, unit: bool = False) -> torch.Tensor:
    """`x @ rows.T` with rows `[d_sae, d_in]` in float64, normalised if asked."""
    parts: list[torch.Tensor] = []
    for block in rows.split(FEATURE_BLOCK):
        block = block.double()
        parts.append(x @ (torch.nn.functional.normalize(block, dim=-1) if unit else block).T)
    return torch.cat(parts, dim=-1)


def _sum_of_rows(codes: torch.Tensor, rows: torch.Tensor, unit: bool = False) -> torch.Tensor:
    """`codes @ rows` with rows `[d_sae, d_in]` in float64, normalised if asked."""
    total = codes.new_zeros(len(codes), rows.shape[1])
    for part, block in zip(codes.split(FEATURE_BLOCK, dim=-1), rows.split(FEATURE_BLOCK), strict=True):
        block = block.double()
        total += part @ (torch.nn.functional.normalize(block, dim=-1) if unit else block)
    return total


def _above(scores: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
    return scores.relu() * (scores > threshold)


def _authors(located: Located, x: torch.Tensor) -> Reference:
    """The paper's code at evaluation: BatchTopKSAE and its cosine variants, SelectorSAE, SwappableBatchTopKSAE, NoCFlexSAE."""
    path = located.path / "sae_final.pt" if located.path.is_dir() else located.path
    content = _load(path)
    state, said = (content["state_dict"], content) if "state_dict" in content else (content, content)
    tensors = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
    small = {name: value.double() for name, value in tensors.items() if name not in ("W_enc", "W_dec")}
    centred = x - small["b_dec"]
    norm = centred.norm(dim=-1, keepdim=True).clamp_min(1e-8)
    name = path.name.removeprefix("abs").removeprefix("topk_")
    if "b_enc" not in small:
        return _bypass(name, said.get("config"), tensors, small, centred, norm)
    scores = _authors_product(name, said.get("score_mode"), small, tensors["W_enc"], centred, norm) + small["b_enc"]
    if "threshold" in small:
        codes = _above(scores, small["threshold"])
        return Reference(scores, small["threshold"], codes, _sum_of_rows(codes, tensors["W_dec"]) + small["b_dec"])
    signed = said["selector"] == "abs_topk" if "selector" in said else path.name.startswith("abstopk_")
    k = said.get("k", located.k)
    assert k is not None  # or the converter had refused
    return _topk(scores, k, tensors["W_dec"], small["b_dec"], signed=signed)


def _authors_product(
    name: str,
    mode: str | None,
    small: dict[str, torch.Tensor],
    W_enc: torch.Tensor,
    centred: torch.Tensor,
    norm: torch.Tensor,
) -> torch.Tensor:
    """Scores without `b_enc`. The entry `score_mode` says which; the file's name, where there is none; then the tensors."""
    scaled = not {"scale_a", "scale_a_base", "scale_b", "log_scale"}.isdisjoint(small)
    if mode == "inner_unitenc" or (mode is None and name.startswith("inner_unitenc")):
        return _product(centred, W_enc, unit=True)
    if mode == "inner" or (mode is None and name.startswith("cos_then_inner_ft")):
        return _product(centred, W_enc)
    if not scaled:
        if name.startswith("standard_inputnorm"):
            return _product(centred / norm, W_enc)
        return _product(centred / norm, W_enc, unit=True) if name.startswith("cosine") else _product(centred, W_enc)
    a = small["scale_a_base"] + small["scale_a_delta"] if "scale_a_base" in small else small.get("scale_a")
    a = torch.zeros((), dtype=torch.float64) if a is None else a
    b = small.get("scale_b", small.get("log_scale"))
    free_rows = b is None or ("scale_a" in small and a.ndim < b.ndim) or name.startswith("inputnorm_standard")
    b = torch.zeros((), dtype=torch.float64) if b is None else b
    if a.ndim and name.startswith("dropout_p"):
        a = a * (1 - float(name.removeprefix("dropout_p").split("_")[0].removesuffix(".pt")))
    a, b = (_of_groups(value, len(W_enc)) for value in (a, b))
    return torch.exp(a * norm.log() + b) * _product(centred / norm, W_enc, unit=not free_rows)


def _of_groups(values: torch.Tensor, d_sae: int) -> torch.Tensor:
    if values.ndim == 0 or len(values) == d_sae:
        return values
    groups, size = len(values), d_sae // len(values)
    return values[torch.tensor([min(i // size, groups - 1) for i in range(d_sae)])]


def _bypass(
    name: str,
    config: dict[str, bool] | None,
    tensors: dict[str, torch.Tensor],
    small: dict[str, torch.Tensor],
    centred: torch.Tensor,
    norm: torch.Tensor,
) -> Reference:
    """No bias and no scale; three switches say what is normalised, in an entry or, by experiment 46's names, in the file's."""
    free_encoder = name.startswith(("noc_enc_free", "noc_input_only"))
    free_decoder = name.startswith(("noc_dec_free", "noc_input_only"))
    by_name = {
        "normalize_encoder": not free_encoder,
        "normalize_decoder": not free_decoder,
        "restore_output_norm": not (name.startswith("noc_") and "_no_restore" in name),
    }
    config = {**by_name, **(config or {})}
    scores = _product(centred / norm, tensors["W_enc"], unit=config["normalize_encoder"])
    raw = _above(scores, small["threshold"])
    output = _sum_of_rows(raw, tensors["W_dec"], unit=config["normalize_decoder"])
    # a code's share of the restored output, so that the output is linear in the codes
    gain = norm / output.norm(dim=-1, keepdim=True).clamp_min(1e-8) if config["restore_output_norm"] else 1.0
    return Reference(scores, small["threshold"], raw * gain, output * gain + small["b_dec"])


def _dictionary_learning(located: Located, x: torch.Tensor) -> Reference:
    """`encode` and `decode` of dictionary_learning's classes."""
    path = located.path
    state = _load(path / "ae.pt")
    kind = json.loads((path / "config.json").read_text())["trainer"]["dict_class"]
    encoder = state["encoder.weight"] if "encoder.weight" in state else state["W_enc"].T
    decoder = state["decoder.weight"].T if "decoder.weight" in state else state["W_dec"]
    names = ("b_dec", "bias", "decoder_bias", "decoder.bias")
    b_dec = next(state[name] for name in names if name in state).double()
    centred = x if kind in ("JumpReluAutoEncoder", "AutoEncoderNew") else x - b_dec
    product = _product(centred, encoder)
    if kind == "GatedAutoEncoder":
        scores, bound = product + state["gate_bias"].double(), torch.zeros(())
        magnitude = (state["r_mag"].double().exp() * product + state["mag_bias"].double()).relu()
        codes = (scores > 0) * magnitude
    else:
        scores = product + (state["encoder.bias"] if "encoder.bias" in state else state["b_enc"]).double()
        bound = state["threshold"].double() if "threshold" in state else torch.zeros(())
        if kind == "AutoEncoderTopK":
            return _topk(scores, int(state["k"]), decoder, b_dec)
        codes = _above(scores, bound)
    return Reference(scores, bound, codes, _sum_of_rows(codes, decoder) + b_dec)


def _sparsify(located: Located, x: torch.Tensor) -> Reference:
    """`SparseCoder.encode` and `decode` of sparsify, and `signed` of its versions before August 2024."""
    path = located.path
    state = load_file(path / "sae.safetensors")
    config = json.loads((path / "cfg.json").read_text())
    b_dec = state["b_dec"].double()
    scores = _product(x - b_dec, state["encoder.weight"]) + state["encoder.bias"].double()
    return _topk(scores, config["k"], state["W_dec"], b_dec, signed=config.get("signed", False))


def _topk(scores: torch.Tensor, k: int, decoder: torch.Tensor, b_dec: torch.Tensor, signed: bool = False) -> Reference:
    """The k largest of the rectified scores; signed: the k largest by magnitude."""
    ranked = scores.abs() if signed else scores.relu()
    best = ranked.topk(k, dim=-1)
    kept = scores if signed else ranked
    codes = torch.zeros_like(scores).scatter(-1, best.indices, kept.gather(-1, best.indices))
    return Reference(ranked, best.values[:, -1:], codes, _sum_of_rows(codes, decoder) + b_dec)


_REFERENCES: dict[str, Callable[[Located, torch.Tensor], Reference]] = {
    "authors": _authors,
    "dictionary_learning": _dictionary_learning,
    "sparsify": _sparsify,
}

"""SAEs as others publish them: random weights written in each layout, and each publisher's formula in float64.

The formulas read the files anew, with torch and safetensors alone.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file

D_IN, D_SAE, K, GROUPS = 7, 13, 3, 3


class Foreign(NamedTuple):
    format: str
    architecture: str
    weights: str


AUTHORS = {
    "standard": "jumprelu",
    "global-a": "cosine_jumprelu",
    "perfeature": "per_feature_cosine_jumprelu",
    "groups": "per_feature_cosine_jumprelu",
    "base-delta": "per_feature_cosine_jumprelu",
    "bypass": "magnitude_bypass_jumprelu",
    "pure-cosine": "cosine_jumprelu",
    "bare": "cosine_jumprelu",
    "free-rows": "cosine_jumprelu",
    "free-rows-scaled": "cosine_jumprelu",
    "score-mode": "jumprelu",
    "factorial": "magnitude_bypass_jumprelu",
}
DICTIONARIES = {
    "BatchTopKSAE": "jumprelu",
    "MatryoshkaBatchTopKSAE": "jumprelu",
    "AutoEncoderTopK": "topk",
    "JumpReluAutoEncoder": "jumprelu",
    "AutoEncoder": "standard",
    "AutoEncoderNew": "standard",
    "GatedAutoEncoder": "gated",
}
SPARSIFY = {"sparsify": "topk", "sparsify-signed": "abstopk"}

SOURCES: dict[str, Foreign] = {
    **{name: Foreign("authors", architecture, "sae_final.pt") for name, architecture in AUTHORS.items()},
    **{name: Foreign("dictionary_learning", architecture, "ae.pt") for name, architecture in DICTIONARIES.items()},
    **{name: Foreign("sparsify", architecture, "sae.safetensors") for name, architecture in SPARSIFY.items()},
}


def write(source: str, folder: Path, seed: int = 0, d_in: int = D_IN, d_sae: int = D_SAE) -> Path:
    """Write random weights in the layout of a source; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = torch.Generator().manual_seed(seed)
    if source in AUTHORS:
        torch.save(authors_file(source, rng, d_in, d_sae), folder / "sae_final.pt")
    elif source in DICTIONARIES:
        torch.save(dictionary_state(source, rng, d_in, d_sae), folder / "ae.pt")
        (folder / "config.json").write_text(json.dumps(dictionary_config(source, d_in, d_sae)))
    else:
        save_file(sparsify_state(rng, d_in, d_sae), folder / "sae.safetensors")
        (folder / "cfg.json").write_text(json.dumps(sparsify_config(source, d_in, d_sae)))
    return folder


def formula(source: str, folder: Path, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and output of the SAE in a folder, by its publisher's formula in float64."""
    if source in AUTHORS:
        content = torch.load(folder / "sae_final.pt", weights_only=True)
        return authors_formula(source, content.get("state_dict", content), x.double())
    if source in DICTIONARIES:
        trainer = json.loads((folder / "config.json").read_text())["trainer"]
        return dictionary_formula(trainer, torch.load(folder / "ae.pt", weights_only=True), x.double())
    config = json.loads((folder / "cfg.json").read_text())
    return sparsify_formula(config, load_file(folder / "sae.safetensors"), x.double())


def _normal(rng: torch.Generator, *shape: int, std: float = 1.0) -> torch.Tensor:
    return torch.randn(shape, generator=rng) * std


def _unit(rows: torch.Tensor) -> torch.Tensor:
    return rows / rows.norm(dim=-1, keepdim=True)


# --- the paper's authors ---


def authors_file(source: str, rng: torch.Generator, d_in: int = D_IN, d_sae: int = D_SAE) -> dict[str, Any]:
    """Encoder rows have drifted from length 1 to between 1/10 and 10."""
    state = {
        "W_enc": _unit(_normal(rng, d_sae, d_in)) * torch.logspace(-1, 1, d_sae)[:, None],
        "b_enc": _normal(rng, d_sae, std=0.1),
        "W_dec": _unit(_normal(rng, d_sae, d_in)),
        "b_dec": _normal(rng, d_in, std=0.5),
        "threshold": torch.tensor(0.7),
    }
    if source == "global-a":
        state |= {"scale_a": torch.tensor(0.3), "scale_b": torch.tensor(0.8)}
    elif source in ("perfeature", "groups"):
        n = d_sae if source == "perfeature" else GROUPS
        state |= {"scale_a": _normal(rng, n, std=0.3), "scale_b": 0.8 + _normal(rng, n, std=0.2)}
    elif source == "base-delta":
        state |= {
            "scale_a_base": torch.tensor(0.25),
            "scale_a_delta": _normal(rng, d_sae, std=0.1),
            "scale_b": 0.8 + _normal(rng, d_sae, std=0.2),
        }
    elif source in ("bypass", "factorial"):
        del state["b_enc"]
        state["W_dec"] = state["W_dec"] * torch.linspace(0.99, 1.01, d_sae)[:, None]  # normalised in their forward pass
        state["threshold"] = torch.tensor(0.2)
    elif source == "pure-cosine":
        state |= {"scale_b": torch.tensor(1.2)}
    elif source == "bare":
        return {**state, "log_scale": torch.tensor(1.2)}
    elif source == "free-rows":
        state |= {"scale_a": torch.tensor(0.3)}
    elif source == "free-rows-scaled":
        state |= {"scale_a": torch.tensor(0.3), "scale_b": 0.5 + _normal(rng, d_sae, std=0.2)}
    elif source == "score-mode":  # one class with both scores: the scale is there and not used
        state |= {"scale_a": torch.tensor(0.3), "scale_b": torch.tensor(0.8)}
        return {"state_dict": state, "score_mode": "inner"}
    fired = torch.arange(d_sae, dtype=torch.int64)
    content = {"state_dict": state, "num_tokens_since_fired": fired, "step": 244_140}
    if source == "factorial":
        cell = {"normalize_encoder": False, "normalize_decoder": True, "restore_output_norm": True}
        return {**content, "config": {**cell, "aux_k_enabled": True}}
    return content


def authors_formula(source: str, state: dict[str, torch.Tensor], x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    s = {name: tensor.double() for name, tensor in state.items()}
    centred = x - s["b_dec"]
    n = centred.norm(dim=-1, keepdim=True).clamp_min(1e-8)
    product, rows = (centred / n) @ s["W_enc"].T, s["W_enc"].norm(dim=-1)
    cosine = product / rows
    if "b_enc" not in s:
        scores = product if source == "factorial" else cosine
        codes = scores.relu() * (scores > s["threshold"])
        summed = codes @ _unit(s["W_dec"])
        gain = n / summed.norm(dim=-1, keepdim=True).clamp_min(1e-8)
        return codes * gain, gain * summed + s["b_dec"]
    if source in ("standard", "score-mode"):
        scores = n * product
    elif source == "free-rows":
        scores = n ** s["scale_a"] * product
    elif source == "free-rows-scaled":
        scores = torch.exp(s["scale_b"]) * n ** s["scale_a"] * product
    elif source in ("pure-cosine", "bare"):
        scores = torch.exp(s["log_scale"] if source == "bare" else s["scale_b"]) * cosine
    else:
        a = s["scale_a"] if "scale_a" in s else s["scale_a_base"] + s["scale_a_delta"]
        b = s["scale_b"]
        if a.shape == (GROUPS,):  # blocks of 13 // 3 = 4, the last takes the rest
            member = [0] * 4 + [1] * 4 + [2] * 5
            a, b = a[member], b[member]
        scores = torch.exp(b) * n**a * cosine
    scores = scores + s["b_enc"]
    codes = scores.relu() * (scores > s["threshold"])
    return codes, codes @ s["W_dec"] + s["b_dec"]


# --- dictionary_learning ---


def dictionary_state(kind: str, rng: torch.Generator, d_in: int = D_IN, d_sae: int = D_SAE) -> dict[str, torch.Tensor]:
    encoder, decoder = _normal(rng, d_sae, d_in), _unit(_normal(rng, d_sae, d_in))
    b_enc, b_dec = _normal(rng, d_sae, std=0.1), _normal(rng, d_in, std=0.5)
    k, threshold = torch.tensor(K, dtype=torch.int), torch.tensor(0.7)
    linear = {"encoder.weight": encoder, "encoder.bias": b_enc, "decoder.weight": decoder.T.contiguous()}
    # the library initialises W_enc as a transposed clone, and saves it with those strides
    plain = {"W_enc": encoder.T, "b_enc": b_enc, "W_dec": decoder, "b_dec": b_dec}
    if kind in ("BatchTopKSAE", "AutoEncoderTopK"):
        return {**linear, "b_dec": b_dec, "k": k, "threshold": threshold}
    if kind == "MatryoshkaBatchTopKSAE":
        return {**plain, "k": k, "threshold": threshold, "group_sizes": torch.tensor([5, d_sae - 5])}
    if kind == "JumpReluAutoEncoder":
        return {**plain, "threshold": 0.5 + _normal(rng, d_sae, std=0.3)}
    if kind == "AutoEncoder":
        return {**linear, "bias": b_dec}
    if kind == "AutoEncoderNew":
        return {**linear, "decoder.bias": b_dec}
    return {
        "decoder_bias": b_dec,
        "encoder.weight": encoder,
        "r_mag": _normal(rng, d_sae, std=0.3),
        "gate_bias": b_enc,
        "mag_bias": _normal(rng, d_sae, std=0.1),
        "decoder.weight": decoder.T.contiguous(),
    }


def dictionary_config(kind: str, d_in: int = D_IN, d_sae: int = D_SAE) -> dict[str, Any]:
    trainer = {
        "dict_class": kind,
        "activation_dim": d_in,
        "dict_size": d_sae,
        "k": K,
        "layer": 18,
        "lm_name": "Qwen/Qwen3-8B",
        "submodule_name": "resid_post_layer_18",
        "norm_factor": 17.0,  # history: weights are for raw activations
    }
    return {"trainer": trainer, "buffer": {"d_submodule": d_in, "io": "out", "ctx_len": 2048}}


def dictionary_formula(
    trainer: dict[str, Any], state: dict[str, torch.Tensor], x: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    kind = trainer["dict_class"]
    s = {name: tensor.double() for name, tensor in state.items()}
    if kind == "GatedAutoEncoder":
        product = (x - s["decoder_bias"]) @ s["encoder.weight"].T
        gate = (product + s["gate_bias"] > 0).double()
        codes = gate * (s["r_mag"].exp() * product + s["mag_bias"]).relu()
        return codes, codes @ s["decoder.weight"].T + s["decoder_bias"]
    if kind == "AutoEncoder":
        codes = ((x - s["bias"]) @ s["encoder.weight"].T + s["encoder.bias"]).relu()
        return codes, codes @ s["decoder.weight"].T + s["bias"]
    if kind == "AutoEncoderNew":
        codes = (x @ s["encoder.weight"].T + s["encoder.bias"]).relu()
        return codes, codes @ s["decoder.weight"].T + s["decoder.bias"]
    if kind == "JumpReluAutoEncoder":
        pre = x @ s["W_enc"] + s["b_enc"]
        codes = (pre * (pre > s["threshold"])).relu()
        return codes, codes @ s["W_dec"] + s["b_dec"]
    if kind == "MatryoshkaBatchTopKSAE":
        pre = ((x - s["b_dec"]) @ s["W_enc"] + s["b_enc"]).relu()
        codes = pre * (pre > s["threshold"])
        return codes, codes @ s["W_dec"] + s["b_dec"]
    pre = ((x - s["b_dec"]) @ s["encoder.weight"].T + s["encoder.bias"]).relu()
    codes = _keep_topk(pre, pre, trainer["k"]) if kind == "AutoEncoderTopK" else pre * (pre > s["threshold"])
    return codes, codes @ s["decoder.weight"].T + s["b_dec"]


# --- sparsify ---


def sparsify_state(rng: torch.Generator, d_in: int = D_IN, d_sae: int = D_SAE) -> dict[str, torch.Tensor]:
    return {
        "encoder.weight": _normal(rng, d_sae, d_in),
        "encoder.bias": _normal(rng, d_sae, std=0.1),
        "W_dec": _unit(_normal(rng, d_sae, d_in)),
        "b_dec": _normal(rng, d_in, std=0.5),
    }


def sparsify_config(source: str, d_in: int = D_IN, d_sae: int = D_SAE) -> dict[str, Any]:
    config = {"expansion_factor": 32, "normalize_decoder": True, "num_latents": d_sae, "k": K, "d_in": d_in}
    return {**config, "signed": True} if source == "sparsify-signed" else {**config, "activation": "topk"}


def sparsify_formula(
    config: dict[str, Any], state: dict[str, torch.Tensor], x: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    s = {name: tensor.double() for name, tensor in state.items()}
    pre = (x - s["b_dec"]) @ s["encoder.weight"].T + s["encoder.bias"]
    codes = (
        _keep_topk(pre, pre.abs(), config["k"]) if config.get("signed") else _keep_topk(pre.relu(), pre, config["k"])
    )
    return codes, codes @ s["W_dec"] + s["b_dec"]


def _keep_topk(values: torch.Tensor, rank: torch.Tensor, k: int) -> torch.Tensor:
    kept = torch.zeros_like(values)
    for row, best in enumerate(rank.topk(k, dim=-1).indices):
        kept[row, best] = values[row, best]
    return kept

"""What the authors' files say of their score is heard: entries beside the tensors, file names, and what only a caller knows."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from foreign import D_IN, D_SAE, authors_file, write
from helpers import codes_and_output, make_activations, make_sae
from sae_lens import SAE

from saelens_cosine.cli import main
from saelens_cosine.loading import (
    CheckpointError,
    authors_disk_loader,
    from_pretrained,
)
from saelens_cosine.loading.formats import authors_file as authors_file_module
from saelens_cosine.loading.pretrained import locate
from saelens_cosine.loading.verify import verify

X = make_activations(300, D_IN, seed=5, spread=0.7) * 3
K = 3
ONE, PER_FEATURE = torch.tensor(0.3), torch.linspace(-0.2, 0.4, D_SAE)
LOG_SCALE, LOG_SCALES = torch.tensor(0.8), torch.linspace(0.5, 1.1, D_SAE)


def unit(rows):
    return rows / rows.norm(dim=-1, keepdim=True)


class Inputs(NamedTuple):
    """
    What scores are made of, in float64.

    Args:
        s (dict[str, torch.Tensor]): The file's tensors.
        x (torch.Tensor): Centred inputs.
        n (torch.Tensor): Their norms.
        u (torch.Tensor): Their directions.
    """

    s: dict[str, torch.Tensor]
    x: torch.Tensor
    n: torch.Tensor
    u: torch.Tensor


def inner(i):
    return i.x @ i.s["W_enc"].T


def unit_inner(i):
    return i.x @ unit(i.s["W_enc"]).T


def cosine(i):
    return i.u @ unit(i.s["W_enc"]).T


def scaled(i):
    return torch.exp(i.s["scale_b"]) * i.n ** i.s["scale_a"] * cosine(i)


class Case(NamedTuple):
    """
    One file of theirs.

    Args:
        name (str): The file's.
        score (Callable[[Inputs], torch.Tensor]): Without b_enc, by their code.
        tensors (dict[str, torch.Tensor]): Beside the weights, b_enc and the threshold.
        entries (dict[str, Any] | None): Beside the state dict; None: it is bare.
        architecture (str): What it becomes.
        selects (str): "threshold", "topk", "abs_topk".
    """

    name: str
    score: Callable[[Inputs], torch.Tensor]
    tensors: dict[str, torch.Tensor]
    entries: dict[str, Any] | None
    architecture: str
    selects: str = "threshold"


GLOBAL = {"scale_a": ONE, "scale_b": LOG_SCALE}
DIRECT = {"scale_a": PER_FEATURE, "scale_b": LOG_SCALES}


def of_selectors(
    name: str, mode: str, selector: str, score: Any, tensors: dict[str, torch.Tensor], becomes: str
) -> Case:
    entries = {"score_mode": mode, "selector": selector, "step": 24_414}
    return Case(f"{name}_final.pt", score, tensors, entries, becomes, selector)


CASES = [
    # entries
    Case("sae_final.pt", inner, GLOBAL, {"score_mode": "inner"}, "jumprelu"),
    Case("cosine_final.pt", scaled, GLOBAL, {"score_mode": "cosine"}, "cosine_jumprelu"),
    Case("standard_L18_k10_final.pt", inner, {}, {"k": 10}, "jumprelu"),
    Case("grad_eq_mild_final.pt", inner, {}, {"step": 9, "log": [{"fve": 0.7}]}, "jumprelu"),
    of_selectors("topk_inner", "inner", "topk", inner, {}, "topk"),
    of_selectors("topk_inner_unitenc", "inner_unitenc", "topk", unit_inner, {}, "topk"),
    of_selectors("topk_cos_global", "cos_global", "topk", scaled, GLOBAL, "cosine_topk"),
    of_selectors("renamed", "cos_perfeature", "topk", scaled, DIRECT, "per_feature_cosine_topk"),
    of_selectors("abstopk_inner", "inner", "abs_topk", inner, {}, "abstopk"),
    of_selectors("abstopk_inner_unitenc", "inner_unitenc", "abs_topk", unit_inner, {}, "abstopk"),
    of_selectors("abstopk_cos_global", "cos_global", "abs_topk", scaled, GLOBAL, "cosine_abstopk"),
    of_selectors("renamed", "cos_perfeature", "abs_topk", scaled, DIRECT, "per_feature_cosine_abstopk"),
    # names
    Case("topk_cos_global.pt", scaled, GLOBAL, None, "cosine_topk", "topk"),
    Case("abstopk_inner_unitenc.pt", unit_inner, {}, None, "abstopk", "abs_topk"),
    Case("cosine_L18.pt", cosine, {}, None, "cosine_jumprelu"),
    Case("standard_inputnorm_L18_final.pt", lambda i: i.u @ i.s["W_enc"].T, {}, {"step": 9}, "cosine_jumprelu"),
    Case(
        "inputnorm_standard_L18_final.pt",
        lambda i: torch.exp(i.s["scale_b"]) * i.u @ i.s["W_enc"].T,
        {"scale_b": LOG_SCALE},
        None,
        "cosine_jumprelu",
    ),
    Case("inner_unitenc_L18_final.pt", unit_inner, {}, {}, "jumprelu"),
    Case("cos_then_inner_ft_final.pt", inner, GLOBAL, {}, "jumprelu"),
    Case("std_then_cosine_ft_final.pt", scaled, GLOBAL, {}, "cosine_jumprelu"),
    Case(
        "dropout_p0.3_L27_final.pt",  # 0.7 of each exponent is left
        lambda i: torch.exp(i.s["scale_b"]) * i.n ** (0.7 * i.s["scale_a"]) * cosine(i),
        DIRECT,
        None,
        "per_feature_cosine_jumprelu",
    ),
    # tensors
    Case("cosine_l2_L18.pt", lambda i: torch.exp(i.s["log_scale"]) * cosine(i), {"log_scale": LOG_SCALE}, None, "cosine_jumprelu"),
    Case("standard_L18_final.pt", inner, {}, None, "jumprelu"),
    Case("perfeature_l2_L27_step24414.pt", scaled, DIRECT, None, "per_feature_cosine_jumprelu"),
]  # fmt: skip


def save(path: Path, state: dict[str, torch.Tensor], entries: dict[str, Any] | None) -> Path:
    torch.save(state if entries is None else {"state_dict": state, **entries}, path)
    return path


def weights(seed: int = 0) -> dict[str, torch.Tensor]:
    return authors_file("standard", torch.Generator().manual_seed(seed))["state_dict"]


def keep_topk(values, rank):
    kept = torch.zeros_like(values)
    for row, best in enumerate(rank.topk(K, dim=-1).indices):
        kept[row, best] = values[row, best]
    return kept


def inputs_of(state):
    s = {name: tensor.double() for name, tensor in state.items()}
    x = X.double() - s["b_dec"]
    n = x.norm(dim=-1, keepdim=True)
    return Inputs(s, x, n, x / n)


def assert_close(ours, theirs):
    assert (ours.double() - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.name} {case.architecture}")
def test_the_score_is_the_one_that_the_file_means(case, tmp_path):
    state = {**weights(), **case.tensors}
    k = None
    if case.selects != "threshold":
        del state["threshold"]
        k = K
    path = save(tmp_path / case.name, state, case.entries)
    sae = from_pretrained(path, k=k)
    assert sae.cfg.architecture() == case.architecture

    inputs = inputs_of(state)
    scores = case.score(inputs) + inputs.s["b_enc"]
    expected = {
        "threshold": lambda: scores * (scores > 0.7),
        "topk": lambda: keep_topk(scores.relu(), scores),
        "abs_topk": lambda: keep_topk(scores, scores.abs()),
    }[case.selects]()
    assert 0.3 < (expected != 0).sum(-1).double().mean() < D_SAE - 1
    codes, output = codes_and_output(sae, X)
    assert_close(codes, expected)
    assert_close(output, expected @ inputs.s["W_dec"] + inputs.s["b_dec"])
    sae.save_model(tmp_path / "saved")
    assert_close(codes_and_output(SAE.load_from_disk(tmp_path / "saved"), X)[0], expected)
    # and the formula that --verify has of its own
    assert verify(locate(path, k=k), sae, X).agrees


CELLS = [(e, d, r) for e in (True, False) for d in (True, False) for r in (True, False)]
NAMES = {
    (True, True, True): "noc_baseline_aux",
    (True, False, True): "noc_dec_free_restore_aux",
    (True, False, False): "noc_dec_free_no_restore_noaux",
    (False, True, True): "noc_enc_free",
    (False, False, True): "noc_input_only_restore_noaux",
    (False, False, False): "noc_input_only_no_restore_aux",
}
"""The six cells that they ran."""


@pytest.mark.parametrize(
    ("cell", "said_by"), [*((cell, "entry") for cell in CELLS), *((cell, "name") for cell in NAMES)]
)
def test_all_cells_of_the_factorial(cell, said_by, tmp_path):
    encoder, decoder, restored = cell
    state = weights()
    del state["b_enc"]
    state["W_dec"] = state["W_dec"] * torch.linspace(0.5, 2, D_SAE)[:, None]
    state["threshold"] = torch.tensor(0.2)
    switches = dict(zip(("normalize_encoder", "normalize_decoder", "restore_output_norm"), cell, strict=True))
    entries = {"config": {**switches, "aux_k_enabled": False}} if said_by == "entry" else {"step": 3}
    name = "sae_final.pt" if said_by == "entry" else f"{NAMES[cell]}_L27_final.pt"
    path = save(tmp_path / name, state, entries)
    sae = from_pretrained(path)
    assert sae.cfg.architecture() == "magnitude_bypass_jumprelu"

    i = inputs_of(state)
    scores = i.u @ (unit(i.s["W_enc"]) if encoder else i.s["W_enc"]).T
    raw = scores * (scores > 0.2)
    output = raw @ (unit(i.s["W_dec"]) if decoder else i.s["W_dec"])
    gain = i.n / output.norm(dim=-1, keepdim=True).clamp_min(1e-8) if restored else 1.0
    codes, ours = codes_and_output(sae, X)
    assert_close(codes, raw * gain)
    assert_close(ours, output * gain + i.s["b_dec"])
    assert verify(locate(path), sae, X).agrees


@pytest.mark.parametrize("entries", [{"score_mode": "inner"}, {"selector": "topk", "k": K, "score_mode": "inner"}])
def test_verification_hears_the_file_and_not_the_converter(entries, tmp_path, monkeypatch, capsys):
    state = {**weights(), **GLOBAL}
    if "selector" in entries:
        del state["threshold"]
    path = save(tmp_path / "sae_final.pt", state, entries)
    assert main(["convert", str(path), str(tmp_path / "right"), "--verify"]) == 0
    modes = authors_file_module._OF_SCORE_MODES
    monkeypatch.setitem(modes, "inner", modes["cosine"])  # as it was read before
    assert main(["convert", str(path), str(tmp_path / "wrong"), "--verify"]) == 1
    assert "do not agree" in capsys.readouterr().out


def test_verification_hears_the_switches(tmp_path, monkeypatch):
    path = write("factorial", tmp_path) / "sae_final.pt"
    monkeypatch.setattr(authors_file_module, "_cell", lambda *_: authors_file_module._OF_TENSORS[frozenset()])
    assert not verify(locate(path), from_pretrained(path)).agrees


def test_a_module_s_own_state_dict(tmp_path):
    module = torch.nn.Module()
    for name, tensor in weights().items():
        module.register_buffer(name, tensor) if name == "threshold" else setattr(
            module, name, torch.nn.Parameter(tensor)
        )
    torch.save(module.state_dict(), tmp_path / "standard_L18.pt")
    sae = from_pretrained(tmp_path / "standard_L18.pt")
    assert sae.cfg.architecture() == "jumprelu"
    assert sae.cfg.metadata.hook_name == "blocks.18.hook_resid_post"


def test_k_through_saelens_and_the_command(tmp_path, capsys):
    state = weights()
    del state["threshold"]
    path = save(tmp_path / "topk_inner_final.pt", state, {"score_mode": "inner", "selector": "topk"})
    config, _ = authors_disk_loader(path, cfg_overrides={"k": K})
    assert (config["architecture"], config["k"]) == ("topk", K)
    assert main(["convert", str(path), str(tmp_path / "out"), "--verify"]) == 2
    assert "does not say k" in capsys.readouterr().err
    assert main(["convert", str(path), str(tmp_path / "out"), "--verify", "--k", str(K)]) == 0
    assert SAE.load_from_disk(tmp_path / "out").cfg.k == K


def test_a_k_in_the_file_is_enough(tmp_path):
    state = weights()
    del state["threshold"]
    path = save(tmp_path / "x.pt", state, {"selector": "topk", "k": K})
    assert from_pretrained(path).cfg.k == from_pretrained(path, k=K).cfg.k == K


BYPASS = {"b_enc": None, "threshold": torch.tensor(0.2)}
SWITCHES = {"normalize_encoder": True, "normalize_decoder": True, "restore_output_norm": True}
TOPK = {"threshold": None}


@pytest.mark.parametrize(
    ("name", "tensors", "entries", "k", "match"),
    [
        ("sae_final.pt", {}, {"temperature": 2.0}, None, r"not known: temperature\. Known are .*score_mode"),
        ("sae_final.pt", {}, {"config": {"gain": 2}}, None, "not known: config/gain"),
        ("sae_final.pt", {}, {"mean": torch.zeros(D_IN)}, None, "not known: mean"),
        ("sae_final.pt", {}, {"score_mode": torch.zeros(())}, None, "not known: score_mode"),
        ("sae_final.pt", GLOBAL, {"score_mode": "euclidean"}, None, "score_mode='euclidean'; known are .*inner"),
        ("sae_final.pt", GLOBAL, {"score_mode": ["inner"]}, None, r"score_mode=\['inner'\]; known are"),
        ("sae_final.pt", {}, {"score_mode": "cosine"}, None, r"score_mode='cosine'.* not go with \['b_enc'\]"),
        ("sae_final.pt", DIRECT, {"score_mode": "cos_global"}, None, "score_mode='cos_global'.* 1 dimensions"),
        ("sae_final.pt", GLOBAL, {"score_mode": "inner_unitenc"}, None, "not go with"),
        ("sae_final.pt", {}, {"score_mode": "inner", "config": SWITCHES}, None, "not go with .*normalize_encoder"),
        ("sae_final.pt", {}, {"config": SWITCHES}, None, r"normalize_encoder=True.* beside \['b_enc'\]"),
        ("sae_final.pt", BYPASS, {"config": {"normalize_encoder": False}}, None, "normalize_decoder=None.* three booleans"),
        ("sae_final.pt", BYPASS, {"config": dict.fromkeys(SWITCHES)}, None, "normalize_encoder=None.* three booleans"),
        ("sae_final.pt", BYPASS, {"config": {**SWITCHES, "normalize_encoder": "no"}}, None, "'no'.* three booleans"),
        ("sae_final.pt", TOPK, {"selector": "gated"}, K, "selector='gated'.*known are abs_topk, topk"),
        ("sae_final.pt", {}, {"selector": "topk"}, K, "selector='topk' and a threshold"),
        ("sae_final.pt", TOPK, {}, K, "no threshold and does not say how it selects"),
        ("sae_final.pt", {**TOPK, "b_enc": None}, {"selector": "abs_topk"}, K, "'magnitude_bypass_abstopk'"),
        ("sae_final.pt", TOPK, {"selector": "topk"}, None, "does not say k. Give it: k=80"),
        ("sae_final.pt", TOPK, {"selector": "topk", "k": 4}, K, "has k=4, not k=3"),
        ("sae_final.pt", TOPK, {"selector": "topk"}, D_SAE + 1, "k=14 .* is no number of its 13 features"),
        ("sae_final.pt", TOPK, {"selector": "topk", "k": 2.0}, None, "k=2.0"),
        ("sae_final.pt", {}, {}, K, "selects by a threshold, so k=3 has no meaning"),
        ("sae_final.pt", {"scale_b": LOG_SCALES}, {}, None, r"scale_b.* shape \[13\]; expected \[\]"),
        ("sae_final.pt", {"scale_a": PER_FEATURE}, {}, None, r"scale_a.* shape \[13\]; expected \[\]"),
        ("noc_enc_free_L27_final.pt", {}, {}, None, r"names a variant with no tensors of a score, and has \['b_enc'\]"),
        ("noc_other_L27_final.pt", BYPASS, {}, None, "names an ablation"),
        ("inner_unitenc_L18_final.pt", GLOBAL, {}, None, "names a variant with"),
        (
            "perfeature_bd_no_enc_norm_L27_final.pt",
            {"scale_a_base": ONE, "scale_a_delta": PER_FEATURE, "scale_b": LOG_SCALES},
            {},
            None,
            "names an ablation",
        ),
        ("dropout_p3_L27_final.pt", DIRECT, {}, None, "which share"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_named(name, tensors, entries, k, match, tmp_path):
    state = {key: value for key, value in {**weights(), **tensors}.items() if value is not None}
    path = save(tmp_path / name, state, entries)
    with pytest.raises(CheckpointError, match=match) as caught:
        from_pretrained(path, k=k)
    assert name in str(caught.value)


def test_k_is_refused_where_the_files_have_one(tmp_path):
    make_sae("cosine_topk").save_inference_model(tmp_path / "ours")
    for folder in (tmp_path / "ours", write("sparsify", tmp_path / "theirs")):
        with pytest.raises(CheckpointError, match="says its own k; leave k=3 out"):
            from_pretrained(folder, k=3)

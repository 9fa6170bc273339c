"""What `evaluate` keeps is kept by content: text, labels, language model and SAE, config and all, whatever they are called."""

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from helpers import make_sae
from sae_lens import SAE, TopKSAE, TopKSAEConfig
from safetensors.torch import load_file, save_file

import saelens_cosine.bundled
from saelens_cosine.bundled import load_bundled_model
from saelens_cosine.experiments.evaluate.evals import EVALS, Eval
from saelens_cosine.experiments.evaluate.run import evaluate
from saelens_cosine.experiments.evaluate.settings import EvaluationSettings
from saelens_cosine.plain import digest, files_fingerprint, fingerprint, model_fingerprint, weights_sha256
from saelens_cosine.saebench import EVALS as SAEBENCH_EVALS
from saelens_cosine.saebench import Judge, versions
from saelens_cosine.saebench.runner import Runner

pytestmark = pytest.mark.usefixtures("short_text")

HOOK = "blocks.3.hook_resid_post"


def settings(*evals, **changes):
    return EvaluationSettings(
        **{"evals": evals, "tokens": 600, "max_norm_multiple": 3.0, "context_size": 32, "dataset": "bundled", **changes}
    )


def save(sae, folder, hook=HOOK, model="bundled"):
    sae.cfg.metadata.model_name, sae.cfg.metadata.hook_name = model, hook
    sae.cfg.metadata.dataset_path = "bundled"
    getattr(sae, "save_inference_model", sae.save_model)(folder)
    return str(folder)


def topk(k=8, **config):
    """The same weights for every config; all scores are positive, so that k features are active on every token."""
    sae = TopKSAE(TopKSAEConfig(d_in=192, d_sae=64, k=k, **config))
    generator = torch.Generator().manual_seed(0)
    sae.load_state_dict({name: torch.rand(p.shape, generator=generator) for name, p in sae.state_dict().items()})
    sae.b_enc.data += 1e4
    return sae


@pytest.fixture
def counted(monkeypatch):
    """Evals that note what they were called for; `measured` is its list."""
    measured = []

    def replace(name, measure, of, **more):
        def counting(subject):
            measured.append(name)
            return measure(subject)

        monkeypatch.setitem(EVALS, name, Eval(name, of, "", counting, **more))

    replace.measured = measured
    return replace


def documents(path, words):
    """Two hundred documents, no two alike, of two words."""
    chance = random.Random(0)
    rows = [{"text": "".join(f" {chance.choice(words)}" for _ in range(200))} for _ in range(200)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_another_text_under_the_same_name_is_measured(tmp_path, counted):
    counted("words", lambda text: {"ids": sorted(set(text.sample.tokens.tolist()))}, "text")
    sae, (file, moved) = save(topk(), tmp_path / "sae"), (tmp_path / name for name in ("text.jsonl", "moved.jsonl"))
    tokenizer = load_bundled_model().tokenizer
    ids = {word: tokenizer(f" {word}", add_special_tokens=False).input_ids for word in ("def", "self", "class", "in")}
    assert {len(word) for word in ids.values()} == {1}

    def found(dataset):
        (text,) = evaluate([sae], settings("words", dataset=dataset), tmp_path / "out").document()["texts"]
        return [word for word, (number,) in ids.items() if number in text["results"]["words"]["ids"]]

    assert found(documents(file, ["def", "self"])) == ["def", "self"]
    assert found(documents(file, ["class", "in"])) == ["class", "in"]
    assert counted.measured == ["words"] * 2
    file.rename(moved)
    assert found(str(moved)) == ["class", "in"]
    assert counted.measured == ["words"] * 2  # the same text under another name


def test_other_labels_in_the_same_file_are_measured(tmp_path, counted):
    names = ("probing_baseline", "probing", "decomposition")
    for name in names:
        counted(name, lambda of: _labels(getattr(of, "text", of)), EVALS[name].of, reads=EVALS[name].reads)
    saes = [save(topk(k), tmp_path / f"k{k}") for k in (8, 4)]
    file = tmp_path / "task.csv"

    def found(one, two):
        file.write_text(f"text,label\none,{one}\ntwo,{two}\n")
        found = evaluate(saes, settings(*names, tasks=(str(file),), task_texts=4), tmp_path / "out")
        document = found.document()
        results = {**document["texts"][0]["results"], **document["saes"][1]["results"]}
        return [results[name] for name in names]

    assert found(0, 1) == [{"one": False, "two": True}] * 3
    assert found(1, 0) == [{"one": True, "two": False}] * 3
    assert sorted(counted.measured) == sorted([*names, "probing"] * 2)  # of a text, of two SAEs, of a pair
    found(1, 0)
    assert len(counted.measured) == 8


def _labels(text):
    (task,) = text.labelled
    return dict(zip(task.texts, task.labels, strict=True))


def test_other_weights_of_the_model_in_the_same_folder_are_measured(tmp_path, counted):
    counted("norm", lambda text: {"median": text.sample.norms.double().median().item()}, "text")
    folder = tmp_path / "model"
    shutil.copytree(Path(saelens_cosine.bundled.__file__).parent / "model", folder)
    path = next(name for name, _ in _hooked(folder).hook_dict.items() if name.endswith("layers.3"))
    sae = save(topk(), tmp_path / "sae", path, str(folder))

    def norm():
        found = evaluate([sae], settings("norm"), tmp_path / "out")
        document = found.document()
        return document["texts"][0]["results"]["norm"]["median"]

    before = norm()
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    for (
        name,
        tensor,
    ) in tensors.items():  # twice all that is added up in the residual stream, which layers read normalised
        if any(part in name for part in ("embed_tokens", "o_proj", "down_proj")):
            tensors[name] = 2 * tensor
    save_file(tensors, file, {"format": "pt"})
    assert norm() == pytest.approx(2 * before, rel=1e-2)
    assert counted.measured == ["norm"] * 2
    norm()
    assert counted.measured == ["norm"] * 2


def _hooked(folder):
    from saelens_cosine.activations.models import load_hooked_model

    return load_hooked_model(str(folder)).model


def test_saes_of_equal_weights_and_other_configs_have_figures_of_their_own(tmp_path, counted):
    captured = {}

    def capture(subject):
        x = subject.text.sample.activations
        with torch.no_grad():
            error = (x - subject.sae(x)).double()
        captured[subject.source.arm] = 1 - (error.var(dim=0).sum() / x.double().var(dim=0).sum()).item()
        return {}

    bypass = [make_sae("magnitude_bypass_topk", d_in=192, d_sae=64, restore_output_norm=on) for on in (True, False)]
    saes = {
        "k32": topk(32),
        "k8": topk(8),
        "b_dec": topk(8, apply_b_dec_to_input=False),
        "layer_norm": topk(8, normalize_activations="layer_norm"),
        "restored": bypass[0],
        "unrestored": bypass[1],
    }
    sources = [f"{name}={save(sae, tmp_path / name)}" for name, sae in saes.items()]
    loaded = {name: SAE.load_from_disk(tmp_path / name) for name in saes}
    assert len({weights_sha256(loaded[name]) for name in ("k32", "k8", "b_dec", "layer_norm")}) == 1
    assert weights_sha256(loaded["restored"]) == weights_sha256(loaded["unrestored"])
    counted("capture", capture, "sae")
    found = evaluate(sources, settings("capture", "reconstruction", sinks="keep"), tmp_path / "out")
    document = found.document()
    figures = {entry.arm: entry.compared for entry in found.saes}
    assert figures["k32"]["L0, sinks in"].number == 32
    assert figures["k8"]["L0, sinks in"].number == 8
    for name, found in figures.items():
        assert found["FVE, sinks in"].number == pytest.approx(captured[name], rel=1e-4, abs=1e-4), name
    assert len({entry["sha256"] for entry in document["saes"]}) == len(saes)
    evaluate(sources, settings("capture", "reconstruction", sinks="keep"), tmp_path / "out")
    assert counted.measured == ["capture"] * len(saes)


def test_what_metadata_say_of_the_text_is_part_of_an_sae(tmp_path):
    sae = SAE.load_from_disk(save(topk(), tmp_path / "sae"))
    before = fingerprint(sae), weights_sha256(sae)
    sae.cfg.device = "meta"
    assert fingerprint(sae) == before[0]
    sae.cfg.metadata.prepend_bos = False
    assert fingerprint(sae) != before[0]
    assert weights_sha256(sae) == before[1]


def test_a_seed_that_leads_an_arm_has_its_features_shown(tmp_path, counted):
    counted("features", lambda _: {"there": True}, EVALS["features"].of)
    seeds = [save(topk(8 + i), tmp_path / "arm" / f"seed{i}") for i in range(2)]

    def found(sources):
        found = evaluate(sources, settings("features"), tmp_path / "out")
        document = found.document()
        return ["features" in entry["results"] for entry in document["saes"]]

    assert found(seeds) == [True, False]
    assert found([f"alone={seeds[1]}"]) == [True]


def test_pairs_are_kept_by_the_text_of_the_baseline_too(tmp_path, counted):
    counted("matching", lambda subject: {"same": subject.baseline.text is subject.text}, "pair")
    one, other = (save(topk(k), tmp_path / f"k{k}") for k in (8, 4))

    def same():
        return evaluate([one, other], settings("matching"), tmp_path / "out").saes[1].results["matching"]["same"]

    assert same()
    save(topk(8), tmp_path / "k8", "blocks.2.hook_resid_post")
    assert not same()


def test_curves_are_not_those_of_another_sae_at_the_same_place(tmp_path):
    place = tmp_path / "topk" / "seed0"
    log = [{"training_tokens": 10, "fve": 0.5, "l0": 8.0}]
    sae = SAE.load_from_disk(save(topk(), place))
    arm = {"path": "topk/seed0", "weights_sha256": weights_sha256(sae), "training_log": log}
    (tmp_path / "comparison.json").write_text(json.dumps({"arms": [arm]}))

    def curves():
        return evaluate([str(place)], settings(), tmp_path / "out").saes[0].training

    assert curves() == {"training_tokens": [10], "fve": [0.5], "l0": [8.0]}
    sae.b_dec.data[0] += 1
    sae.save_model(place)
    assert curves() is None


def test_a_model_s_hash_is_of_every_weight_and_of_its_config():
    model = load_bundled_model()
    before = model_fingerprint(model)
    assert model_fingerprint(load_bundled_model()) == before
    weight = model.blocks[5].mlp.W_in.data
    weight[7, 77] += 1e-3
    assert model_fingerprint(model) != before
    weight.copy_(load_bundled_model().blocks[5].mlp.W_in.data)
    assert model_fingerprint(model) == before
    model.cfg.eps *= 2
    assert model_fingerprint(model) != before


def test_saebench_s_files_are_kept_by_data_and_by_what_the_model_computes(tmp_path):
    row = SAEBENCH_EVALS["core"]
    folder = tmp_path / "data"
    folder.mkdir()

    def key(text, model_identity="model", **changed):
        (folder / "train.jsonl").write_text(json.dumps({"text": text}))
        runner = Runner(tmp_path, None, "cpu", Judge(), None, True, model_identity)
        return runner.key(row, {**row.make_config("bundled", "float32", 1, {"dataset": str(folder)}), **changed})

    first = key("one")
    assert key("one") == first
    others = [key("two"), key("one", "model with planted sinks"), key("one", context_size=64)]
    assert len({first, *others}) == 4
    assert "saelens-cosine" in versions()


def test_hashes_of_files_and_of_plain_values(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").write_text("1")
    before = files_fingerprint(tmp_path / "a")
    (tmp_path / "a" / "x").rename(tmp_path / "a" / "y")
    renamed = files_fingerprint(tmp_path / "a")
    (tmp_path / "a" / "y").write_text("2")
    assert len({before, renamed, files_fingerprint(tmp_path / "a")}) == 3
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    assert digest(object()) == digest(object())  # no address in memory
    assert digest(None, {"a": torch.zeros(2)}) != digest(None, {"a": torch.zeros(2, 1)})

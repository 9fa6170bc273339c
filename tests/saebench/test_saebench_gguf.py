"""SAEBench on a language model that TransformerLens does not know, and on the text that its SAEs were trained on."""

import hashlib
from importlib.util import find_spec

import pytest
import torch
from gguf_cases import original, write_gguf
from saebench_cases import CORE, D_IN, mirror

from saelens_cosine.activations.sae_probes_text import TRAINED_ON
from saelens_cosine.experiments.evaluate.evals.of_sae.saebench import saebench_settings
from saelens_cosine.experiments.evaluate.loader import Loader
from saelens_cosine.experiments.evaluate.run import evaluate
from saelens_cosine.experiments.evaluate.settings import EvaluationSettings
from saelens_cosine.experiments.evaluate.sources import parse_sources
from saelens_cosine.saebench import check_data, data_contents, evals, run
from saelens_cosine.saebench.evals import text_folder

needs_gguf = pytest.mark.skipif(find_spec("gguf") is None, reason="the package gguf writes the files")
pytestmark = pytest.mark.skipif(find_spec("sae_bench") is None, reason="needs `pip install --no-deps sae-bench==0.6.0`")

SETTINGS = EvaluationSettings(
    evals=("core",), saebench={"core": {**CORE, "n_eval_sparsity_variance_batches": 1}}, tokens=300, context_size=32
)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    pytest.importorskip("gguf")
    return write_gguf(tmp_path_factory.mktemp("place") / "tiny.gguf")


@pytest.fixture
def sae(file, tmp_path):
    """Saved as `compare` would: named without the file's place, at a module's path, with how its model is loaded."""
    sae = mirror()
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    sae.cfg.metadata.model_name, sae.cfg.metadata.hook_name = file.name, "model.layers.1"
    sae.cfg.metadata.dataset_path = "bundled"
    sae.cfg.metadata.model_from_pretrained_kwargs = {"dtype": "float32", "gguf_sha256": sha256}
    sae.save_model(tmp_path / "sae")
    return sae


@needs_gguf
@pytest.mark.usefixtures("short_text")
def test_core_on_a_gguf_file_wherever_it_lies(file, sae, tmp_path, monkeypatch):
    found = evaluate([str(tmp_path / "sae")], EvaluationSettings(**{**vars(SETTINGS), "model": str(file)}), tmp_path)
    core = found.document()["saes"][0]["results"]["core"]
    assert core["metrics"]["sparsity.l0"] == D_IN
    assert core["metrics"]["model_performance_preservation.ce_loss_score"] == pytest.approx(1, abs=1e-4)
    assert core["variance_explained"]["fve"] == pytest.approx(1, abs=1e-6)
    monkeypatch.chdir(file.parent)  # where the name alone finds it
    report = run([sae], ["core"], tmp_path / "by name", settings=SETTINGS.saebench, quiet=True)
    assert report.results[0].metrics == core["metrics"]


@needs_gguf
@pytest.mark.usefixtures("short_text")
def test_sinks_that_are_planted_are_planted_for_saebench_too(file, sae, tmp_path):
    settings = EvaluationSettings(**{**vars(SETTINGS), "model": str(file), "plant_sinks": True})
    tokens = torch.randint(1, 4096, (2, 20), generator=torch.Generator().manual_seed(0))
    with Loader(settings, tmp_path) as loader:
        (source,) = parse_sources([str(tmp_path / "sae")])
        text = loader.subject(source).text
        model = text.hooked_transformer
        assert text.hooked_transformer is model
        hook = "blocks.1.hook_resid_post"
        with torch.no_grad():
            planted = model.run_with_cache(tokens, names_filter=[hook])[1][hook].norm(dim=-1)
            plain = original()(tokens, output_hidden_states=True).hidden_states[2].norm(dim=-1)
    torch.testing.assert_close(planted[:, 1:], plain[:, 1:], rtol=1e-3, atol=1e-3)
    assert (planted[:, 0] > 20 * plain[:, 1:].median()).all()


def test_text_that_was_trained_on_is_not_probed_on():
    pytest.importorskip("sae_probes", reason="needs `pip install --no-deps sae-probes==0.4.2`")
    name = "sparse_probing_sae_probes"
    chosen = saebench_settings(name, "sae-probes", {})["dataset_names"]
    assert len(chosen) > 50
    assert not TRAINED_ON & set(chosen)
    assert saebench_settings(name, "bundled", {}) == {}
    given = {name: {"dataset_names": ["87_glue_cola", "94_ai_gen"]}}
    assert saebench_settings(name, "other.jsonl", given) == given[name]
    with pytest.raises(ValueError, match="is to probe on 94_ai_gen, whose texts SAEs of sae-probes are trained on"):
        saebench_settings(name, "sae-probes", given)


def test_the_held_out_text_of_sae_probes_is_saebench_s_text(tmp_path, monkeypatch):
    monkeypatch.setattr(evals, "_heldout_of_sae_probes", lambda: ["one text", "ein zweiter: äöü"])
    assert saebench_settings("core", "sae-probes", {}) == {"dataset": "sae-probes"}
    config = {**evals.CORE, "dataset": "sae-probes"}
    assert check_data(["core"], {"core": config}, offline=True) == []
    before = data_contents("core", config)
    from datasets import load_dataset

    folder = text_folder("sae-probes", tmp_path)
    assert load_dataset(folder, split="train")["text"][:] == ["one text", "ein zweiter: äöü"]
    monkeypatch.setattr(evals, "_heldout_of_sae_probes", lambda: ["another"])
    assert data_contents("core", config) != before

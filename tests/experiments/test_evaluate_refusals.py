"""What cannot be measured is said with its reason, and the rest goes on."""

import json
import os

import pytest
from sae_lens import SAE, TopKSAE, TopKSAEConfig
from saved_evaluations import HOOK, SETTINGS, saved_sae, with_evals, with_metadata

from saelens_cosine import saebench
from saelens_cosine.cli import main
from saelens_cosine.experiments.evaluate import run as module
from saelens_cosine.experiments.evaluate.command import as_tables
from saelens_cosine.experiments.evaluate.page import report_data
from saelens_cosine.experiments.evaluate.run import evaluate
from saelens_cosine.experiments.evaluate.settings import EvaluationSettings
from saelens_cosine.saebench import EvalFailure, SAEBenchError

pytestmark = pytest.mark.usefixtures("short_text")


def test_saebench_is_run_and_paired(run, tmp_path):
    pytest.importorskip("sae_bench")
    core = {"n_eval_reconstruction_batches": 1, "n_eval_sparsity_variance_batches": 1, "context_size": 32}
    settings = with_evals("core", saebench={"core": core})
    found = evaluate(run[1], settings, tmp_path)
    document = found.document()
    assert found.saes[0].compared["SAEBench core: sparsity.l0"].number == pytest.approx(3, abs=0.01)  # TopK keeps k = 3
    core = document["saes"][0]["results"]["core"]
    theirs = "SAEBench core: explained_variance as SAEBench has it (no share of a variance)"
    assert found.saes[0].compared[theirs].number == core["metrics"]["reconstruction_quality.explained_variance"]
    assert (
        found.saes[0].compared["SAEBench core: FVE, ours on the same tokens"].number
        == core["variance_explained"]["fve"]
    )
    assert "SAEBench core: sparsity.l0" in report_data(found).arms[0].metrics


def test_saebench_that_cannot_run_is_said_before_any_work(run, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    flags = ["--evals", "reconstruction", "autointerp", "--quiet", "--output", str(tmp_path), "--context-size", "32"]
    assert main(["evaluate", *run[1], *flags, "--tokens", "600"]) == 2
    assert "autointerp: It asks a language model" in capsys.readouterr().err
    assert not (tmp_path / "measured").exists()


def test_an_eval_of_saebench_that_fails_is_told_and_tried_again(run, tmp_path, monkeypatch):
    settings = with_evals("core", "reconstruction")
    failure = EvalFailure("core", "one-0", "RuntimeError: no luck")

    def fails(*args, **kwargs):
        raise SAEBenchError([failure])

    monkeypatch.setattr(saebench, "run", fails)
    found = evaluate(run[1][:1], settings, tmp_path)
    document = found.document()
    (entry,) = document["saes"]
    assert entry["results"]["core"] == {"not_applicable": "core of one-0: RuntimeError: no luck"}
    assert "with_sinks" in entry["results"]["reconstruction"]
    assert [path.name.split("-")[0] for path in (tmp_path / "measured").iterdir()] == ["reconstruction"]
    left_out = as_tables(found)[-1]
    assert [list(column.cells) for column in left_out.columns] == [["one"], ["core"], [str(failure)]]
    report_data(found)


def test_a_text_too_short_for_concepts_is_measured_by_all_other_evals(run, tmp_path):
    words = [f"word{i} " * 60 for i in range(20)]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in words))
    short = {"dataset": str(tmp_path / "text.jsonl"), "tokens": 32, "causal_contexts": 4}
    found = evaluate(run[1][:1], with_evals("causal", "reconstruction", **short), tmp_path / "out")
    document = found.document()
    results = document["saes"][0]["results"]
    assert "not_applicable" in results["causal"]
    assert "with_sinks" in results["reconstruction"]


def test_contexts_without_a_token_that_the_sae_sees_are_refused(run, tmp_path):
    source = with_metadata(run[1][0], tmp_path / "sae", seqpos_slice=[48, None])
    with pytest.raises(ValueError, match=r"seqpos_slice=\(48, None\).*32 tokens.*larger --context-size"):
        evaluate([source], SETTINGS, tmp_path / "out")


def test_refusals(tmp_path, capsys):
    with pytest.raises(ValueError, match="'magic'.*reconstruction"):
        evaluate(["anything"], EvaluationSettings(evals=("magic",)), tmp_path)
    with pytest.raises(ValueError, match="max_norm_multiple=1"):
        EvaluationSettings(max_norm_multiple=1.0)
    with pytest.raises(ValueError, match="task_texts=0"):
        EvaluationSettings(task_texts=0)
    assert main(["evaluate", *"ab", "--baseline", "c", "--output", str(tmp_path / "out"), "--quiet"]) == 2
    assert "No arm is called 'c', to be the baseline; there are a, b." in capsys.readouterr().err
    folder = saved_sae(tmp_path / "sae")
    config = json.loads((tmp_path / "sae" / "cfg.json").read_text())
    config["metadata"]["hook_name"] = None
    (tmp_path / "sae" / "cfg.json").write_text(json.dumps(config))
    assert main(["evaluate", folder, "--output", str(tmp_path / "out"), "--quiet"]) == 2
    assert "hook=None" in capsys.readouterr().err
    flags = ["--saebench-settings", str(tmp_path / "settings.json"), "--quiet", "--output", str(tmp_path / "out")]
    for settings, said in (
        ("[]", "object of objects"),
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON: nested too"),
    ):
        (tmp_path / "settings.json").write_text(settings)
        assert main(["evaluate", folder, *flags]) == 2
        assert said in capsys.readouterr().err
    (tmp_path / "settings.json").unlink()
    os.mkfifo(tmp_path / "settings.json")
    assert main(["evaluate", folder, *flags]) == 2
    assert "settings.json is not there, or is no file" in capsys.readouterr().err


def test_an_sae_that_saebench_cannot_take_is_left_out_and_the_rest_goes_on(tmp_path, monkeypatch):
    sae = TopKSAE(TopKSAEConfig(d_in=192, d_sae=64, k=8, normalize_activations="layer_norm"))
    sae.cfg.metadata.model_name, sae.cfg.metadata.hook_name = "bundled", HOOK
    sae.save_model(tmp_path / "normalised")
    monkeypatch.setattr(module, "_check_saebench", lambda subject: None)
    (entry,) = evaluate([str(tmp_path / "normalised")], with_evals("core", "tokens"), tmp_path / "out").document()[
        "saes"
    ]
    assert "normalize_activations='layer_norm'" in entry["results"]["core"]["not_applicable"]


def test_a_dead_sae_has_no_causal_figures_and_the_rest_goes_on(tmp_path):
    sae = SAE.load_from_disk(saved_sae(tmp_path / "alive"))
    sae.W_enc.data.zero_()
    sae.b_enc.data.fill_(-1)
    sae.save_model(tmp_path / "dead")
    settings = with_evals("causal", "reconstruction", causal_contexts=4, causal_features=2, concept_texts=2)
    (entry,) = evaluate([str(tmp_path / "dead")], settings, tmp_path / "out").document()["saes"]
    assert "No feature is active" in entry["results"]["causal"]["not_applicable"]
    assert entry["results"]["reconstruction"]["with_sinks"]["by_norm"]["all_norms"]["overall"]["l0"] == 0


def test_too_few_texts_to_probe_are_said_and_the_rest_goes_on(run, tmp_path):
    settings = with_evals("probing", "probing_baseline", "reconstruction", tasks=("bundled:loop",), task_texts=4)
    found = evaluate(run[1][:1], settings, tmp_path)
    document = found.document()
    refused = [document["saes"][0]["results"]["probing"], document["texts"][0]["results"]["probing_baseline"]]
    assert all("splits=5" in result["not_applicable"] for result in refused)
    assert "with_sinks" in document["saes"][0]["results"]["reconstruction"]

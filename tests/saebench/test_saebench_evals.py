"""SAEBench's evals that read data of their own, and how each is called."""

import inspect
import json
import shutil
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from saebench_cases import (
    D_IN,
    HOOK,
    cosine_sae,
    mirror,
)

from saelens_cosine.saebench import EVALS, Judge, prepare, run
from saelens_cosine.saebench.evals import Call
from saelens_cosine.saebench.scopes import of_like_length, within_the_context

pytestmark = pytest.mark.skipif(find_spec("sae_bench") is None, reason="needs `pip install --no-deps sae-bench==0.6.0`")


def test_absorption_with_the_models_own_words(tmp_path, monkeypatch, bundled):
    from sae_bench.evals.absorption import common, feature_absorption, vocab

    words = {}
    for word in vocab.get_alpha_tokens(bundled.tokenizer):
        if len(word.strip()) > 2:
            words.setdefault(word.strip()[0].lower(), []).append(word)
    few = [word for letter in words.values() for word in letter[:10]]  # of 3,395, which takes two minutes
    for module in (common, feature_absorption):
        monkeypatch.setattr(module, "get_alpha_tokens", lambda tokenizer: few)
    settings = {"min_GT_probe_f1": -1.0, "min_feats_for_eval": 1, "max_k_value": 1, "k_sparse_probe_num_epochs": 2}
    package = Path(vocab.__file__).parents[2]
    before = sorted(package.rglob("artifacts"))
    monkeypatch.chdir(tmp_path)

    def score():
        return run(
            [cosine_sae()], ["absorption"], "out", model=bundled, settings={"absorption": settings}, quiet=True
        ).results[0]

    one = score()
    shutil.rmtree("out/absorption")
    assert score().metrics == one.metrics  # upstream ignores its seed
    assert 0 <= one.metrics["mean.mean_absorption_fraction_score"] <= 1
    assert sorted(package.rglob("artifacts")) == before  # nothing of ours where another model's run would find it
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_sae_probes_on_a_shipped_data_set(tmp_path, monkeypatch, bundled):
    pytest.importorskip("sae_probes", reason="needs `pip install --no-deps sae-probes==0.4.2`")
    import pandas as pd
    from sae_probes.constants import DATA_PATH

    dataset = "5_hist_fig_ismale"
    labels = pd.read_csv(DATA_PATH / "cleaned_data" / f"{dataset}.csv.zst", compression="zstd")["target"]
    positive = torch.tensor((labels == sorted(labels.unique())[1]).values)

    def activations(model_name, dataset_short_names, hook_names, model_cache_path, device, **rest):
        acts = 0.01 * torch.randn(len(positive), D_IN, generator=torch.Generator().manual_seed(0))
        acts[positive, 7] += 1  # the class is coordinate 7
        folder = Path(model_cache_path) / f"model_activations_{model_name}"
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(acts, folder / f"{dataset}_{HOOK}.pt")

    for module in ("run_sae_evals", "run_baselines"):
        monkeypatch.setattr(sys.modules[f"sae_probes.{module}"], "ensure_dataset_activations", activations)
    settings = {"sparse_probing_sae_probes": {"dataset_names": [dataset], "ks": [1]}}
    baselines, probed, method = sys.modules["sae_probes.run_baselines"].METHODS, [], "logreg"
    probe = baselines[method]
    monkeypatch.setitem(baselines, method, lambda *args, **kwargs: probed.append(1) or probe(*args, **kwargs))
    report = run([mirror(), cosine_sae()], list(settings), tmp_path, model=bundled, settings=settings, quiet=True)
    result, other = report.results
    assert result.metrics["sae.sae_top_1_test_accuracy"] == 1
    assert result.metrics["llm.llm_test_accuracy"] == other.metrics["llm.llm_test_accuracy"] == 1
    assert len(probed) == 1  # of the activations, which are not the SAE's
    found = json.loads(next((tmp_path).rglob("*.saebench.json")).read_text())
    assert found["eval_result_details"][0]["dataset_name"] == dataset


ASKED = []
"""Model and authorisation of each request to the judge."""


class _Answers(BaseHTTPRequestHandler):
    """An OpenAI-compatible judge: any explanation, and that the first example is active."""

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        ASKED.append((request["model"], self.headers["Authorization"]))
        message = {"role": "assistant", "content": "this neuron fires on words" if len(ASKED) % 2 else "1"}
        answer = {"id": "0", "object": "chat.completion", "created": 0, "model": request["model"]}
        answer["choices"] = [{"index": 0, "message": message, "finish_reason": "stop"}]
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    def log_message(self, *args):
        pass


def test_autointerp_asks_the_judge_that_is_given(tmp_path, bundled):
    server = HTTPServer(("127.0.0.1", 0), _Answers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    judge = Judge("mine", f"http://127.0.0.1:{server.server_port}/v1", "a-key")
    settings = {
        "autointerp": {
            "dataset_name": "bundled",
            "total_tokens": 4096,
            "llm_context_size": 32,
            "n_latents": 3,
            "dead_latent_threshold": 0,
        }
    }
    try:
        report = run([mirror()], ["autointerp"], tmp_path, model=bundled, settings=settings, judge=judge, quiet=True)
    finally:
        server.shutdown()
    assert set(ASKED) == {("mine", "Bearer a-key")}
    assert 0 < report.results[0].metrics["autointerp.autointerp_score"] < 1
    assert "a-key" not in repr(judge)
    saved = [path for path in tmp_path.rglob("*") if path.suffix in (".json", ".log")]
    assert not any("a-key" in path.read_text() for path in saved)


@pytest.mark.parametrize("name", EVALS)
def test_calls_are_as_upstream_defines_them(tmp_path, monkeypatch, name):
    """Also of RAVEL and unlearning, which cannot run here."""
    row, seen = EVALS[name], []
    function = "multiple_evals" if name == "core" else "run_eval"
    signature = inspect.signature(getattr(row.module, function))

    def bound(*args, **kwargs):
        seen.append(signature.bind(*args, **kwargs).arguments)

    monkeypatch.setattr(row.module, function, bound)
    config = row.make_config("gemma-2-2b", "bfloat16", 32, {})
    row.call(row.module, config, Call(prepare(mirror()), "cpu", tmp_path, tmp_path / "caches", Judge("m", None, "k")))
    (arguments,) = seen
    assert arguments["force_rerun"] is True
    assert len(arguments["selected_saes"]) == 1
    if name == "core":
        assert arguments["dtype"] == "float32"
    elif name != "meta_structure":
        assert arguments["config"].model_name == "gemma-2-2b"


def test_texts_of_like_length_are_read_together_and_come_back_in_their_order(bundled, monkeypatch):
    module = pytest.importorskip("sae_probes.generate_model_activations")
    texts = ["x = 1", "value = value + 1\n" * 40, "y", "def f(x):\n    return x", "import os", "z = [1, 2, 3]"]
    hooks = ["blocks.2.hook_resid_post", "blocks.0.hook_resid_post"]
    fixed = {"hook_names": hooks, "max_layer": None, "device": "cpu", "batch_size": 1, "max_seq_len": 1024}
    expected = module._process_activations(model=bundled, texts=texts, **fixed)
    monkeypatch.setattr("saelens_cosine.saebench.scopes.TOKENS_AT_ONCE", 30)
    with within_the_context():
        found = module._process_activations(model=bundled, texts=texts, **fixed)
    for hook in hooks:
        torch.testing.assert_close(found[hook], expected[hook], rtol=1e-4, atol=1e-4)
    assert of_like_length([3, 9, 1, 3, 2], 9) == [[2, 4, 0], [3], [1]]


def test_texts_longer_than_the_context_are_cut(bundled):
    module = pytest.importorskip("sae_probes.generate_model_activations")
    text = "value = value + 1\n" * 100
    hook = "blocks.2.hook_resid_post"
    fixed = {"hook_names": [hook], "max_layer": None, "device": "cpu", "batch_size": 1}
    with within_the_context():
        found = module._process_activations(model=bundled, texts=[text], max_seq_len=1024, **fixed)[hook]
    ids = bundled.tokenizer(text)["input_ids"]
    assert len(ids) > bundled.cfg.n_ctx == 256
    kept = torch.tensor([[ids[0], *ids[-255:]]])  # BOS, and what sae-probes' cut on the left leaves
    expected = bundled.run_with_cache(kept, names_filter=[hook])[1][hook][0, -1]
    torch.testing.assert_close(found.flatten(), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(RuntimeError, match="size of tensor"):
        module._process_activations(model=bundled, texts=[text], max_seq_len=1024, **fixed)

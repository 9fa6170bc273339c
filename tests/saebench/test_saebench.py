"""SAEBench's own eval functions, run on the bundled model and on planted activations. No network."""

import inspect
import json
import random
import shutil
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.util import find_spec
from pathlib import Path

import jaxtyping
import pytest
import torch
from helpers import make_sae
from sae_lens.saes.sae import SAEMetadata
from sae_lens.saes.standard_sae import StandardSAE, StandardSAEConfig
from transformer_lens import HookedTransformer

from saelens_cosine.bundled import load_bundled_model
from saelens_cosine.saebench import EVALS, Judge, SAEBenchError, check_environment, prepare, run
from saelens_cosine.saebench.evals import Call
from saelens_cosine.saebench.runner import Runner
from saelens_cosine.saebench.scopes import within_the_context

pytestmark = pytest.mark.skipif(find_spec("sae_bench") is None, reason="needs `pip install --no-deps sae-bench==0.6.0`")

HOOK, D_IN = "blocks.2.hook_resid_post", 192
CLASSES = ["0", "1", "2", "6", "9"]
BIOS = "LabHC/bias_in_bios_class_set1"
PROBING = {
    "dataset_names": [BIOS],
    "probe_train_set_size": 80,
    "probe_test_set_size": 40,
    "context_length": 24,
    "k_values": [1],
}
ABLATION = {
    "dataset_names": [BIOS],
    "train_set_size": 80,
    "test_set_size": 40,
    "context_length": 24,
    "n_values": [2],
    "probe_epochs": 10,
    "column1_vals_lookup": {BIOS: [("professor", "nurse")]},
}
CORE = {
    "dataset": "bundled",
    "context_size": 64,
    "n_eval_reconstruction_batches": 1,
    "n_eval_sparsity_variance_batches": 2,
    "eval_batch_size_prompts": 4,
}


@pytest.fixture(scope="module")
def bundled():
    return load_bundled_model()


@pytest.fixture
def scored(monkeypatch):
    """Names of the evals that SAEBench was called for, and on which SAE, in order."""
    calls, call = [], Runner._call

    def recorded(self, row, config, sae, caches, target):
        calls.append((row.name, target.name.split("-")[0]))
        call(self, row, config, sae, caches, target)

    monkeypatch.setattr(Runner, "_call", recorded)
    return calls


@pytest.fixture
def collected(monkeypatch):
    """Plants what sparse probing and TPP collect, so that they need no texts."""

    def collect(sinks: float | None = None):
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")  # read by the preflight; nothing here goes there
        for name in ("sparse_probing", "tpp"):
            monkeypatch.setattr(EVALS[name].module, "get_dataset_activations", planted(sinks))

    return collect


def linear_sae(W_enc: torch.Tensor, W_dec: torch.Tensor) -> StandardSAE:
    metadata = SAEMetadata(model_name="bundled", hook_name=HOOK)
    sae = StandardSAE(StandardSAEConfig(d_in=D_IN, d_sae=len(W_dec), metadata=metadata))
    with torch.no_grad():
        sae.W_enc.copy_(W_enc)
        sae.W_dec.copy_(W_dec)
    return sae


def mirror(scale: float = 1.0) -> StandardSAE:
    """Reconstructs exactly: latents are the coordinates, and their negatives, times `scale`."""
    both = torch.cat([torch.eye(D_IN), -torch.eye(D_IN)])
    return linear_sae(both.T * scale, both / scale)


def cosine_sae():
    sae = make_sae("per_feature_cosine_batchtopk", d_in=D_IN, d_sae=128, k=16)
    sae.cfg.metadata.model_name, sae.cfg.metadata.hook_name = "bundled", HOOK
    return sae


def planted(sinks: float | None):
    """In place of the language model's activations: class i has 1 at coordinate i of every token, and noise of 0.01.

    24 tokens a text, the first zeroed as special. With sinks, the second is at `sinks` times a random class's coordinate.
    """

    def activations(*args, **kwargs):
        rng = torch.Generator().manual_seed(0)

        def split(n: int) -> dict[str, torch.Tensor]:
            made = {}
            for i, name in enumerate(CLASSES):
                acts = 0.01 * torch.randn(n, 24, D_IN, generator=rng)
                acts[..., i] += 1
                if sinks is not None:
                    acts[:, 1] = 0
                    acts[torch.arange(n), 1, torch.randint(len(CLASSES), (n,), generator=rng)] = sinks
                acts[:, 0] = 0
                made[name] = acts
            return made

        return split(40), split(20)

    return activations


def write_bios(folder: Path) -> None:
    """Code of seven topics in two styles where SAEBench looks for LabHC/bias_in_bios."""
    rng, names = random.Random(0), ["value", "name", "index", "data", "self"]
    folder = folder / "LabHC" / "bias_in_bios"
    folder.mkdir(parents=True)
    topics = {0: "socket", 1: "matrix", 2: "parser", 6: "thread", 9: "string", 13: "queue", 21: "path"}
    for split in ("train", "test"):
        rows = []
        for profession, topic in topics.items():
            for gender in (0, 1):
                for _ in range(60):
                    a, b = rng.sample(names, 2)
                    text = (
                        f"def {topic}_{a}({b}):\n    return {topic}.{b}({a})"
                        if gender
                        else f"class {topic.title()}:\n    {a} = {topic}.{b}"
                    )
                    rows.append(json.dumps({"hard_text": text, "profession": profession, "gender": gender}))
        (folder / f"{split}.jsonl").write_text("\n".join(rows))


def test_core_on_the_bundled_model(tmp_path, bundled):
    report = run(
        {"cosine": cosine_sae(), "mirror": mirror()},
        ["meta_structure", "core"],
        tmp_path,
        model=bundled,
        settings={"core": CORE, "meta_structure": {"train_steps": 2}},
        max_norm_multiple=1.5,
        quiet=True,
    )
    assert report.failures == ()
    assert [(r.sae.split("-")[0], r.eval) for r in report.results] == [
        (sae, name) for sae in ("cosine", "mirror") for name in ("core", "meta_structure")
    ]
    assert all(Path(result.file).is_file() for result in report.results)
    random_sae, _, exact, _ = report.results
    # a reconstruction without error: all variance explained, nothing lost
    assert exact.variance_explained.fve == pytest.approx(1, abs=1e-6)
    assert exact.variance_explained.fve_without_high_norm == pytest.approx(1, abs=1e-6)
    assert exact.metrics["model_performance_preservation.ce_loss_score"] == pytest.approx(1, abs=1e-4)
    assert exact.metrics["sparsity.l0"] == D_IN
    assert exact.metrics["model_performance_preservation.ce_loss_without_sae"] < 5  # of a vocabulary of e^8.3
    assert exact.metrics_without_high_norm is None
    assert exact.versions["sae-bench"] == "0.6.0"
    # two batches of 4 contexts of 64 tokens, less the special ones
    assert 480 < exact.variance_explained.tokens < 512
    # random directions reconstruct nothing: core's own number for that is above 1
    assert random_sae.metrics["reconstruction_quality.explained_variance"] > 1
    assert random_sae.variance_explained.fve < 0


def test_from_texts_in_the_working_directory(tmp_path, monkeypatch, bundled):
    write_bios(tmp_path)
    monkeypatch.chdir(tmp_path)
    settings = {"scr": {**ABLATION, "probe_epochs": 2}}
    (scr,) = run([mirror()], ["scr"], "out", model=bundled, settings=settings, max_norm_multiple=1.05).results
    assert 0 < scr.high_norm_share < 0.5
    assert "scr_metrics.scr_dir1_threshold_2" in scr.metrics
    assert "scr_metrics.scr_dir1_threshold_2" in scr.metrics_without_high_norm


def test_the_units_of_an_sae_do_not_change_its_scores(tmp_path, collected, bundled):
    collected()
    rng = torch.Generator().manual_seed(0)
    W = torch.randn(D_IN, 128, generator=rng)
    gains = 2.0 ** torch.randint(-6, 7, (128,), generator=rng)  # powers of two: nothing is rounded
    settings = {"sparse_probing": PROBING, "tpp": ABLATION}
    saes = [linear_sae(W * gain, (W / gain).T) for gain in (torch.ones(128), gains)]
    report = run(saes, list(settings), tmp_path, model=bundled, settings=settings)
    even, uneven = report.results[:2], report.results[2:]
    assert [r.metrics for r in even] == [r.metrics for r in uneven]
    assert even[0].metrics["sae.sae_top_1_test_accuracy"] > 0.6
    assert even[1].metrics["tpp_metrics.tpp_threshold_2_intended_diff_only"] > 0.1
    assert even[0].metrics_without_high_norm is even[0].high_norm_share is None


def test_high_norm_tokens_are_left_out_of_what_probes_pool(tmp_path, collected, bundled):
    collected(sinks=300.0)
    settings = {"sparse_probing": PROBING}
    (probing,) = run(
        [mirror()], ["sparse_probing"], tmp_path, model=bundled, settings=settings, max_norm_multiple=10
    ).results
    assert probing.high_norm_share == pytest.approx(1 / 23)  # one of 24 tokens, one of them special
    assert probing.max_norm_multiple == 10
    # each class is one latent; a sink's class is random, and it outweighs the other 22 tokens by 300 to 22
    for score in ("sae.sae_top_1_test_accuracy", "llm.llm_top_1_test_accuracy"):
        assert probing.metrics[score] < 0.75
        assert probing.metrics_without_high_norm[score] == 1


def test_without_its_sinks_it_is_the_same_data(tmp_path, collected, bundled):
    sae = linear_sae(*(torch.randn(shape) for shape in ((D_IN, 64), (64, D_IN))))
    options = {"model": bundled, "settings": {"tpp": ABLATION}}
    collected(sinks=0.0)
    (clean,) = run([sae], ["tpp"], tmp_path / "1", **options).results
    collected(sinks=300.0)
    (both,) = run([sae], ["tpp"], tmp_path / "2", **options, max_norm_multiple=10).results
    assert both.metrics_without_high_norm == clean.metrics  # probes, chosen latents, ablation
    assert both.metrics != clean.metrics


def test_what_is_done_is_not_done_again(tmp_path, monkeypatch, collected, bundled, scored):
    collected()

    def score(saes, settings=PROBING, **options):
        scored.clear()
        return run(saes, ["sparse_probing"], tmp_path, model=bundled, settings={"sparse_probing": settings}, **options)

    first = score({"a": mirror()})
    assert scored == [("sparse_probing", "throwaway.json"), ("sparse_probing", "a")]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # its caches are filled
    second = score({"a": mirror(), "b": cosine_sae()})
    assert scored == [("sparse_probing", "b")]
    assert second.results[0] == first.results[0]
    # half a result is none
    record = next(tmp_path.glob("sparse_probing/*/a-*.json"))
    (record.parent / record.name.replace(".saebench", "")).unlink()
    assert score({"a": mirror()}).results[0].metrics == first.results[0].metrics
    assert scored == [("sparse_probing", "a")]
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    # another configuration, or another model under the same name, shares nothing with it
    score({"a": mirror()}, {**PROBING, "random_seed": 1})
    assert len(scored) == 2
    other = load_bundled_model()
    with torch.no_grad():
        other.W_E[3, 5] += 1
        other.blocks[0].mlp.W_in.mul_(1.01)
    scored.clear()
    run({"a": mirror()}, ["sparse_probing"], tmp_path, model=other, settings={"sparse_probing": PROBING})
    assert len(scored) == 2


def test_a_score_does_not_depend_on_what_ran_before(tmp_path, collected, bundled):
    collected(sinks=3.0)
    settings = {"sparse_probing": PROBING}
    alone = run([cosine_sae()], ["sparse_probing"], tmp_path / "1", model=bundled, settings=settings)
    torch.rand(3)
    after = run([mirror(), cosine_sae()], ["sparse_probing"], tmp_path / "2", model=bundled, settings=settings)
    assert alone.results[0].metrics == after.results[1].metrics


def test_a_result_that_is_missing_is_an_error(tmp_path, monkeypatch, bundled):
    # core catches what an SAE raises, and returns
    broken = prepare(cosine_sae(), "broken")
    monkeypatch.setattr(type(broken.sae), "encode", lambda self, x: 1 / 0)
    with pytest.raises(SAEBenchError, match=r"core of broken-.*ended without a result file.*division by zero"):
        run([broken], ["core"], tmp_path / "1", model=bundled, settings={"core": CORE}, quiet=True)
    report = run(
        [broken, mirror()],
        ["core", "ravel"],
        tmp_path / "2",
        model=bundled,
        settings={"core": CORE},
        on_problem="record",
        quiet=True,
    )
    assert [(f.eval, f.sae and f.sae.split("-")[0]) for f in report.failures if f.eval == "core"] == [
        ("core", "broken")
    ]
    assert {f.eval for f in report.failures} == {"core", "ravel"}
    assert [r.sae.split("-")[0] for r in report.results] == ["standard"]


def no_work(*args):
    raise AssertionError("work has started")


def test_problems_are_said_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr("saelens_cosine.saebench.run_evals.load_for_saebench", no_work)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    evals = ["core", "ravel", "autointerp", "unlearning", "sparse_probing", "tpp"]
    settings = {
        "core": {"compute_featurewise_density_statistics": False},
        "sparse_probing": {"k_values": [1, 3]},
        "tpp": {"n_values": [1, 2]},
    }
    with pytest.raises(SAEBenchError) as caught:
        run([mirror()], evals, tmp_path, settings=settings)
    told = str(caught.value)
    for part in (
        "core: Without both compute_featurewise_",
        "ravel: It knows only gemma-2-2b",
        "autointerp: It asks a language model",
        "unlearning: It refuses models without 'it'",
        "sparse_probing: k_values=[1, 3]",
        "tpp: n_values=[1, 2]",
    ):
        assert part in told
    assert not list(tmp_path.iterdir())


def test_what_an_sae_does_not_fit_is_said_before_any_work(tmp_path, monkeypatch, bundled):
    monkeypatch.setattr(Runner, "score", no_work)
    mlp = prepare(mirror(), hook_name="blocks.2.hook_mlp_out")
    nowhere = prepare(mirror(), hook_name="blocks.9.hook_resid_post")
    narrow = prepare(make_sae_at("blocks.2.mlp.hook_post"))
    settings = {"tpp": {**ABLATION, "n_values": [2, 500]}}
    for sae, evals, message in (
        (mlp, ["absorption"], "would be scored on another stream"),
        (nowhere, ["core"], "bundled has no hook blocks.9.hook_resid_post"),
        (narrow, ["core"], "d_in=192, and blocks.2.mlp.hook_post of bundled has size 400"),
        (mirror(), ["tpp"], "n_values=\\[2, 500\\].* of which there are 384"),
    ):
        with pytest.raises(SAEBenchError, match=message):
            run(
                [sae],
                evals,
                tmp_path,
                model=bundled,
                settings={k: v for k, v in {**settings, "core": CORE}.items() if k in evals},
            )


def make_sae_at(hook: str):
    sae = mirror()
    sae.cfg.metadata.hook_name = hook
    return sae


def test_unknown_names_are_refused(tmp_path):
    with pytest.raises(ValueError, match="There is no eval probing. SAEBench has core, "):
        run([mirror()], ["probing"], tmp_path)
    with pytest.raises(ValueError, match="tpp has no setting k_values; it has "):
        run([mirror()], ["tpp"], tmp_path, settings={"tpp": {"k_values": [1]}})
    with pytest.raises(ValueError, match="settings for scr, not among"):
        run([mirror()], ["tpp"], tmp_path, settings={"scr": {}})
    other = mirror()
    other.cfg.metadata.model_name = "gpt2"
    with pytest.raises(ValueError, match="these SAEs are of bundled, gpt2"):
        run([mirror(), other], ["tpp"], tmp_path)
    with pytest.raises(ValueError, match="is no bound for high norms"):
        run([mirror()], ["tpp"], tmp_path, max_norm_multiple=0.5)


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setattr("saelens_cosine.saebench.preflight.find_spec", lambda name: None)
    (problem,) = check_environment(["tpp"], "bundled")
    assert "SAEBench is not installed. Install it with" in str(problem)
    present = {"sae_bench", "sklearn", "tabulate"}
    monkeypatch.setattr("saelens_cosine.saebench.preflight.find_spec", lambda name: name if name in present else None)
    (problem,) = check_environment(["tpp", "sparse_probing_sae_probes"], "bundled")
    assert problem.eval == "sparse_probing_sae_probes"
    assert "xgboost, zstandard, sae_probes" in problem.reason


def test_an_sae_is_not_changed_by_an_eval(tmp_path):
    sae = prepare(mirror())
    runner = Runner(tmp_path, None, "cpu", Judge(), None, quiet=True)
    row = EVALS["meta_structure"]
    runner.score(row, row.make_config("", "", 1, {"dtype": "bfloat16", "train_steps": 2}), sae)
    assert sae.dtype == torch.float32  # upstream casts what it gets, and the next eval would see it rounded


def test_the_process_is_left_as_it_was(tmp_path, monkeypatch, collected, bundled):
    collected()
    monkeypatch.chdir(tmp_path)
    loads = HookedTransformer.__dict__["from_pretrained_no_processing"]
    torch.manual_seed(5)
    expected = torch.rand(2)
    for evals in (["tpp"], ["core"]):
        broken = prepare(cosine_sae())
        torch.manual_seed(5)
        if evals == ["core"]:
            monkeypatch.setattr(type(broken.sae), "encode", lambda self, x: 1 / 0)
        settings = {"tpp": ABLATION} if evals == ["tpp"] else {"core": CORE}
        run([broken], evals, "out", model=bundled, settings=settings, on_problem="record", quiet=True)
        assert torch.equal(torch.rand(2), expected)
        assert torch.is_grad_enabled()  # TPP turns gradients off, for good
        assert HookedTransformer.__dict__["from_pretrained_no_processing"] is loads
        assert not jaxtyping.config.jaxtyping_disable
        assert Path.cwd() == tmp_path


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
    report = run([mirror()], list(settings), tmp_path, model=bundled, settings=settings, quiet=True)
    (result,) = report.results
    assert result.metrics["sae.sae_top_1_test_accuracy"] == 1
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

"""SAEBench's own eval functions, run on the bundled model and on planted activations. No network."""

from importlib.util import find_spec
from pathlib import Path

import jaxtyping
import pytest
import torch
from saebench_cases import ABLATION, CORE, D_IN, PROBING, cosine_sae, linear_sae, mirror, write_bios
from transformer_lens import HookedTransformer

from saelens_cosine.bundled import load_bundled_model
from saelens_cosine.saebench import EVALS, Judge, prepare, run
from saelens_cosine.saebench.runner import Runner

pytestmark = pytest.mark.skipif(find_spec("sae_bench") is None, reason="needs `pip install --no-deps sae-bench==0.6.0`")


def test_core_on_the_bundled_model(tmp_path, bundled, monkeypatch):
    monkeypatch.setattr("saelens_cosine.saebench.scopes._remembered", kept := {})
    report = run(
        {"cosine": cosine_sae(), "mirror": mirror()},
        ["meta_structure", "core"],
        tmp_path,
        model=bundled,
        settings={"core": CORE, "meta_structure": {"train_steps": 2}},
        max_norm_multiple=1.5,
        quiet=True,
    )
    # activations of 2 batches after the reconstructions' one, for each SAE the same, and of our own 2, one of which is among them
    assert len(kept) == 3
    assert "run_with_cache" not in vars(bundled)
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

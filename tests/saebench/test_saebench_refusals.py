"""What SAEBench cannot do here is said before any work, and what ends without a result."""

from importlib.util import find_spec

import pytest
from saebench_cases import ABLATION, CORE, cosine_sae, mirror

from saelens_cosine.saebench import SAEBenchError, check_environment, prepare, run
from saelens_cosine.saebench.runner import Runner

pytestmark = pytest.mark.skipif(find_spec("sae_bench") is None, reason="needs `pip install --no-deps sae-bench==0.6.0`")


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


@pytest.mark.parametrize(
    ("name", "field"), [("core", "context_size"), ("tpp", "context_length"), ("autointerp", "llm_context_size")]
)
def test_contexts_longer_than_the_model_s_are_refused(tmp_path, monkeypatch, bundled, name, field):
    monkeypatch.setattr(Runner, "score", no_work)
    monkeypatch.setenv("OPENAI_API_KEY", "a-key")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    with pytest.raises(SAEBenchError, match=f"{field}=257 tokens are more than bundled takes here, 256"):
        run([mirror()], [name], tmp_path, model=bundled, settings={name: {field: 257}})


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

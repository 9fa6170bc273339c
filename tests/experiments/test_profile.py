"""`--profile`: the time between calls goes to the innermost part, and a run says which parts it had."""

import json
import sys
from dataclasses import replace

import pytest
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE
from sae_lens.saes.topk_sae import TopKTrainingSAE
from small_runs import compare_flags, small_batches, write_text

from saelens_cosine import stopwatch
from saelens_cosine.cli import main
from saelens_cosine.experiments.benchmark import command
from saelens_cosine.experiments.benchmark import pipeline as pipeline_module
from saelens_cosine.experiments.benchmark.pipeline import pipeline
from saelens_cosine.experiments.compare.settings import ComparisonSettings
from saelens_cosine.experiments.profile import PARTS
from saelens_cosine.stopwatch import REST, Part, Stopwatch, code_of
from saelens_cosine.training.recipe import RECIPES

NOW = [0.0]


def spend(seconds):
    NOW[0] += seconds


def inner(tokens):
    spend(3)
    if tokens:
        inner(tokens[1:])  # of the same part


def outer():
    spend(1)
    inner([7, 7])
    spend(2)
    raise KeyError


def many():
    for _ in range(2):
        spend(5)
        yield


@pytest.fixture
def clock(monkeypatch):
    NOW[0] = 0.0
    monkeypatch.setattr(stopwatch.time, "perf_counter", lambda: NOW[0])
    monkeypatch.setattr(stopwatch, "peak_bytes", lambda: int(10 * NOW[0]))


def test_time_goes_to_the_innermost_part(clock):
    parts = (
        Part("inner", (inner,), lambda of: len(of["tokens"])),
        Part(lambda of: "outer", (outer,)),
        Part("many", (many,)),
    )
    before = sys.getprofile()
    with Stopwatch(parts) as watch:
        spend(4)
        with pytest.raises(KeyError):
            outer()
        for _ in many():
            spend(6)
    assert sys.getprofile() is before
    spend(100)
    found = {name: (of.seconds, of.calls, of.tokens, of.peak_growth_bytes) for name, of in watch.spent.items()}
    # inner calls itself twice more, which is no call from outside; `many` is gone into three times, the last for nothing
    assert found == {
        REST: (4 + 2 * 6, 0, 0, 160),
        "outer": (1 + 2, 1, 0, 30),
        "inner": (3 * 3, 1, 2, 90),
        "many": (2 * 5, 3, 0, 100),
    }
    assert watch.seconds == 38


def test_every_part_has_code_of_its_own():
    codes = [code_of(function) for part in PARTS for function in part.functions]
    assert len(set(codes)) == len(codes)


def test_compare_and_evaluate_say_where_the_time_went(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(RECIPES, "paper", small_batches)
    text, folder = write_text(tmp_path / "text.jsonl"), tmp_path / "out"
    assert main(["compare", *compare_flags(text, folder, seeds=1), "--profile"]) == 0
    assert "language model" in capsys.readouterr().out
    found = json.loads((folder / "comparison-profile.json").read_text())
    assert sum(part["seconds"] for part in found["parts"].values()) == pytest.approx(found["seconds"])
    for arm in ("cosine_batchtopk", "inner_product_topk"):
        assert found["parts"][f"steps of {arm}"]["tokens"] == 1024
    # training, held-out tokens, and what the loss of each SAE and none takes; one buffer ahead at most
    assert found["parts"]["language model"]["tokens"] >= 1024 + 320
    for name in ("loading the model", "reading and tokenising text", "mixing buffer", "pictures and pages"):
        assert found["parts"][name]["calls"] > 0
    few = ["--evals", "reconstruction", "--tokens", "320", "--sinks", "drop", "--quiet", "--profile"]
    assert main(["evaluate", str(folder), *few, "--output", str(folder)]) == 0  # two profiles, one folder
    found = json.loads((folder / "evaluation-profile.json").read_text())
    assert found["parts"]["eval reconstruction"]["calls"] == 2
    assert 320 <= found["parts"]["language model"]["tokens"] < 400  # and the few that a model is tried with


def test_a_pipeline_is_timed_beside_its_floor_and_saelens(tmp_path, monkeypatch):
    monkeypatch.setitem(RECIPES, "paper", small_batches)
    monkeypatch.setattr(pipeline_module, "FLOOR_SECONDS", 0.01)
    settings = ComparisonSettings(
        arms=("cosine_batchtopk", "inner_product_topk"),
        dataset=str(write_text(tmp_path / "text.jsonl")),
        layer=0,
        tokens=1024,
        k=4,
        d_sae=24,
        context_size=32,
        eval_tokens=320,
    )
    runners = []
    own = pipeline_module.MultiSAETrainingRunner

    def spied(config, **given):
        runners.append(own(config, **given))
        return runners[-1]

    monkeypatch.setattr(pipeline_module, "MultiSAETrainingRunner", spied)
    found = pipeline(settings)
    (runner,) = runners
    assert [type(sae) for sae in runner.saes.values()] == [BatchTopKTrainingSAE, TopKTrainingSAE]
    assert found.watch.spent["steps of cosine_batchtopk"].tokens == 1024
    assert "steps of batchtopk" not in found.watch.spent  # SAELens' are timed as a whole
    assert min(found.model_seconds, found.sae_seconds, found.saelens_seconds) > 0
    found.write(tmp_path / "pipeline.json")
    written = json.loads((tmp_path / "pipeline.json").read_text())
    assert written["floor_seconds"] == pytest.approx(written["model_seconds"] + written["sae_seconds"])
    assert found.ratio_to_floor == pytest.approx(written["seconds"] / written["floor_seconds"])
    for wrong, named in (
        ({"k": (4, 8)}, "one point"),
        ({"arms": ("cosine_standard",)}, "cosine_standard ends in none"),
    ):
        with pytest.raises(ValueError, match=named):
            pipeline(replace(settings, **wrong))


def test_benchmark_has_the_pipeline_of_the_default_comparison(monkeypatch, tmp_path):
    asked = []

    class Found:
        def tables(self):
            return []

        def write(self, path):
            asked.append(path)

    monkeypatch.setattr(command, "pipeline", lambda settings, progress: asked.append(settings) or Found())
    place = tmp_path / "pipeline.json"
    assert main(["benchmark", "--pipeline", "--tokens", "50k", "--json", str(place), "--quiet"]) == 0
    assert asked == [ComparisonSettings(tokens=50_000), place]

"""`saelens-cosine evaluate`: what it measures, that it goes on where it ended, and the files it writes."""

import json

import pytest
import torch
from helpers import make_sae

from saelens_cosine.bundled import load_bundled_model
from saelens_cosine.cli import main
from saelens_cosine.evaluation import evaluate as module
from saelens_cosine.evaluation.evaluate import EVALS, EvaluationSettings, Subject, evaluate, fingerprint, plain, rows
from saelens_cosine.evaluation.evaluation_page import report_data
from saelens_cosine.evaluation.sample import sample_tokens, side_by_side

HOOK = "blocks.3.hook_resid_post"
SETTINGS = EvaluationSettings(
    evals=("reconstruction", "dictionary"), tokens=600, max_norm_multiple=3.0, context_size=32, dataset="bundled"
)


def saved_sae(folder, seed=1, name="cosine_topk"):
    sae = make_sae(name, seed=seed, d_in=192, d_sae=64)
    sae.W_enc.data /= 14
    sae.b_dec.data.zero_()
    sae.cfg.metadata.model_name, sae.cfg.metadata.hook_name = "bundled", HOOK
    sae.cfg.metadata.dataset_path = "bundled"
    sae.save_inference_model(folder)
    return str(folder)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate")
    sources = [saved_sae(folder / "one"), saved_sae(folder / "two", seed=2)]
    return folder, sources, evaluate(sources, SETTINGS, folder / "out")


def test_fve_is_that_of_the_formula_on_the_tokens_said(run, monkeypatch):
    folder, sources, document = run
    seen: list[Subject] = []
    monkeypatch.setitem(EVALS, "remember", lambda subject: seen.append(subject) or {})
    evaluate(sources[:1], EvaluationSettings(**{**vars(SETTINGS), "evals": ("remember",)}), folder / "again")
    (subject,) = seen
    tokens = torch.cat(subject.token_batches)
    assert tokens.shape == (32, 32)  # whole batches of 16 contexts: the first that reach 600 tokens
    with torch.no_grad():
        x = load_bundled_model().run_with_cache(tokens, prepend_bos=False)[1][HOOK].flatten(0, 1)
        error = x - subject.sae(x)
    norms = x.norm(dim=1)
    ordinary = norms <= 3 * norms.median()
    assert 0.02 < 1 - ordinary.double().mean() < 0.05  # the first token of each context
    found = {row["sinks"]: row for row in rows(document) if row["name"] == sources[0]}
    for sinks, keep in (("in", torch.ones_like(ordinary)), ("out", ordinary)):
        residual, total = (v[keep].double() for v in (error, x))
        fve = 1 - residual.var(dim=0, correction=0).sum() / total.var(dim=0, correction=0).sum()
        assert found[sinks]["fve"] == pytest.approx(fve.item(), rel=1e-4)
        assert found[sinks]["tokens"] == int(keep.sum())


@pytest.mark.parametrize(("sinks", "expected"), [("keep", {"in"}), ("drop", {"out"}), ("both", {"in", "out"})])
def test_sinks(sinks, expected, run, tmp_path):
    settings = EvaluationSettings(**{**vars(SETTINGS), "sinks": sinks, "evals": ("reconstruction",)})
    document = evaluate(run[1][:1], settings, tmp_path)
    assert {row["sinks"] for row in rows(document)} == expected


def test_what_is_measured_is_not_measured_again(run, monkeypatch):
    folder, sources, document = run

    def fails(_subject):
        raise AssertionError("measured again")

    for name in SETTINGS.evals:
        monkeypatch.setitem(EVALS, name, fails)
    assert evaluate(sources, SETTINGS, folder / "out") == document
    with pytest.raises(AssertionError):
        evaluate(sources, EvaluationSettings(**{**vars(SETTINGS), "tokens": 700}), folder / "out")


def test_an_interrupted_run_goes_on(run, tmp_path, monkeypatch):
    measure, calls = EVALS["dictionary"], []

    def interrupted(subject):
        calls.append(subject.name)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return measure(subject)

    monkeypatch.setitem(EVALS, "dictionary", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate(run[1], SETTINGS, tmp_path)
    (kept,) = (tmp_path / "measured").iterdir()  # no half-written file beside it
    assert kept.name.endswith("-reconstruction.json")
    monkeypatch.setitem(EVALS, "reconstruction", EVALS["reconstruction"])
    assert evaluate(run[1], SETTINGS, tmp_path)["saes"] == run[2]["saes"]


def test_other_weights_are_another_sae(tmp_path):
    one, other = (make_sae("cosine_topk", seed=seed) for seed in (1, 1))
    assert fingerprint(one) == fingerprint(other)
    other.b_enc.data[3] += 1e-3
    assert fingerprint(one) != fingerprint(other)


def test_json_has_no_nan(run):
    folder = run[0]
    text = (folder / "out" / "evaluation.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["schema"] == module.SCHEMA
    assert plain({"a": (1, float("nan")), "b": float("inf")}) == {"a": [1, None], "b": None}


def test_page_has_both_saes_and_both_treatments(run):
    data = report_data(run[2])
    assert [arm.name for arm in data.arms] == run[1]
    assert {(part.arm, part.sinks) for part in data.quartiles} == {(name, s) for name in run[1] for s in ("in", "out")}
    assert data.arms[0].exponents == pytest.approx((0.7,))  # `randomize` sets one for all features
    (with_sinks, *_) = (part for part in data.quartiles if part.sinks == "in")
    assert sum(with_sinks.tokens) == 1024
    assert list(with_sinks.edges) == sorted(with_sinks.edges)


def test_command_writes_its_files(run, tmp_path, capsys):
    flags = [
        "--tokens",
        "600",
        "--max-norm-multiple",
        "3",
        "--context-size",
        "32",
        "--evals",
        "reconstruction",
        "--quiet",
    ]
    assert main(["evaluate", *run[1], *flags, "--output", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert out.count("│ in") == out.count("│ out") == 2
    assert (tmp_path / "evaluation.json").exists()
    assert "<!doctype html>" in (tmp_path / "report.html").read_text()[:200].lower()


def test_refusals(tmp_path, capsys):
    with pytest.raises(ValueError, match="'magic'.*reconstruction"):
        EvaluationSettings(evals=("magic",))
    with pytest.raises(ValueError, match="max_norm_multiple=1"):
        EvaluationSettings(max_norm_multiple=1.0)
    folder = saved_sae(tmp_path / "sae")
    config = json.loads((tmp_path / "sae" / "cfg.json").read_text())
    config["metadata"]["hook_name"] = None
    (tmp_path / "sae" / "cfg.json").write_text(json.dumps(config))
    assert main(["evaluate", folder, "--output", str(tmp_path / "out"), "--quiet"]) == 2
    assert "hook=None" in capsys.readouterr().err


def test_a_sample_knows_its_contexts_and_sinks():
    model = load_bundled_model()
    tokens = torch.arange(1, 65).view(2, 32)
    sample = sample_tokens(model, HOOK, [tokens[:1], tokens[1:]], None)
    assert sample.tokens.tolist() == list(range(1, 65))
    assert sample.contexts.tolist() == [0] * 32 + [1] * 32
    assert sample.positions.tolist() == [*range(32), *range(32)]
    assert sample.high_norm_share == 0
    planted = sample.activations.clone()
    planted[5] *= 1000
    ordinary = torch.arange(64) != 5
    sample = type(sample)(planted, sample.tokens, sample.contexts, sample.positions, ordinary, 10.0)
    both = side_by_side(len, sample)
    assert (both.with_sinks, both.without_sinks) == (64, 63)
    assert both.high_norm_share == pytest.approx(1 / 64)
    with pytest.raises(ValueError, match="sinks='some'"):
        side_by_side(len, sample, "some")

"""`saelens-cosine evaluate`: what it measures, that it goes on where it ended, and the files it writes."""

import copy
import dataclasses
import functools
import html
import io
import json
import math
import os
import warnings
from datetime import datetime

import pytest
import torch
from helpers import make_sae
from rich.console import Console
from sae_lens import SAE, TopKSAE, TopKSAEConfig

from saelens_cosine import saebench
from saelens_cosine.activations.sample import sample_tokens, side_by_side
from saelens_cosine.activations.text import load_text
from saelens_cosine.bundled import load_bundled_model
from saelens_cosine.cli import _progress, main
from saelens_cosine.experiments.evaluate import evals
from saelens_cosine.experiments.evaluate import run as module
from saelens_cosine.experiments.evaluate.command import as_tables
from saelens_cosine.experiments.evaluate.evals import EVALS, Eval
from saelens_cosine.experiments.evaluate.page import report_data
from saelens_cosine.experiments.evaluate.results.differences import about_differences, figures_by_eval, measures
from saelens_cosine.experiments.evaluate.results.figures import by_column, means, text_is
from saelens_cosine.experiments.evaluate.results.tokens_measured import tokens_measured
from saelens_cosine.experiments.evaluate.run import evaluate
from saelens_cosine.experiments.evaluate.settings import EvaluationSettings
from saelens_cosine.experiments.evaluate.subject import Subject
from saelens_cosine.files.secrets import published
from saelens_cosine.plain import fingerprint, plain, weights_sha256
from saelens_cosine.report.html import render, write_report
from saelens_cosine.saebench import Failure, Judge, SAEBenchError

pytestmark = pytest.mark.usefixtures("short_text")

HOOK = "blocks.3.hook_resid_post"
SETTINGS = EvaluationSettings(
    evals=("tokens", "reconstruction", "dictionary", "matching"),
    tokens=600,
    max_norm_multiple=3.0,
    context_size=32,
    dataset="bundled",
)

TASKS = ("bundled:loop", "bundled:method")


def with_evals(*evals, **changes):
    return dataclasses.replace(SETTINGS, evals=evals, **changes)


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
    monkeypatch.setitem(EVALS, "remember", Eval(lambda subject: seen.append(subject) or {}, "sae", ""))
    evaluate(sources[:1], with_evals("remember"), folder / "again")
    (subject,) = seen
    tokens = subject.text.contexts.tokens
    assert tokens.shape == (19, 32)  # whole contexts: the fewest that reach 600 tokens
    with torch.no_grad():
        x = load_bundled_model().run_with_cache(tokens, prepend_bos=False)[1][HOOK].flatten(0, 1)
        error = x - subject.sae(x)
    norms = x.norm(dim=1)
    ordinary = norms <= 3 * norms.median()
    assert 0.02 < 1 - ordinary.double().mean() < 0.05  # the first token of each context
    results = document["saes"][0]["results"]["reconstruction"]
    found = measures(document["saes"][0])
    of_document = subject.text.sample.documents
    numbers = of_document.unique()

    def fve(keep):
        residual, total = (v[keep].double() for v in (error, x))
        return 1 - (residual.var(dim=0, correction=0).sum() / total.var(dim=0, correction=0).sum()).item()

    for treatment, sinks, keep in (
        ("with_sinks", "in", torch.ones_like(ordinary)),
        ("without_sinks", "out", ordinary),
    ):
        assert found[f"FVE, sinks {sinks}"].value == pytest.approx(fve(keep), rel=1e-4)
        assert results[treatment]["by_norm"]["all_norms"]["overall"]["tokens"] == int(keep.sum())
        assert results["fve_by_document"]["documents"] == numbers.tolist()
        for part, values in (("residual", error), ("total", x)):
            about = values.double() - values[keep].double().mean(dim=0)
            sums = [about[keep & (of_document == i)].square().sum().item() for i in numbers]
            assert results["fve_by_document"][treatment][part] == pytest.approx(sums, rel=1e-3)
    (text,) = document["texts"]
    assert text["results"]["tokens"]["high_norm_share"] == pytest.approx(1 - ordinary.double().mean().item())
    assert text["results"]["tokens"]["high_norm_positions"][0] == [0, 19]


def test_held_out_is_said_of_the_saes_own_split_only(run, tmp_path):
    sae = SAE.load_from_disk(run[1][0])
    sae.cfg.metadata.heldout_rule = load_text("bundled").rule  # as `compare` and `train` write it
    sae.save_model(tmp_path / "ours")
    sources = [str(tmp_path / "ours"), run[1][1]]
    document = evaluate(sources, with_evals("tokens"), tmp_path / "out")
    assert [entry["held_out"] for entry in document["saes"]] == [True, False]
    assert text_is(document["saes"][:1]) == "Held-out text"
    assert text_is(document["saes"]) == "Text that may be training text of two"
    sae.cfg.metadata.heldout_rule = "hash of the file's path"  # of another version
    sae.save_model(tmp_path / "older")
    document = evaluate([str(tmp_path / "older")], with_evals("tokens"), tmp_path / "out")
    assert document["saes"][0]["held_out"] is False


def test_text_has_the_form_that_each_sae_was_trained_on(tmp_path, monkeypatch):
    texts = [f"def function_{i}(argument):\n    return argument + {i}\n" * 3 for i in range(60)]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    forms = {
        "as_saelens": {},
        "without_bos": {"prepend_bos": False, "sequence_separator_token": None},
        "cut": {"context_size": 16, "seqpos_slice": [2, -1], "exclude_special_tokens": [0]},
        "apart": {"disable_concat_sequences": True, "context_size": 24},
    }
    seen: dict[str, Subject] = {}
    row = Eval(lambda subject: seen.update({subject.source.arm: subject}) or {}, "sae", "")
    monkeypatch.setitem(EVALS, "remember", row)
    for name, form in forms.items():
        sae = SAE.load_from_disk(saved_sae(tmp_path / "plain"))
        for field, value in {"context_size": 32, **form}.items():
            sae.cfg.metadata[field] = value
        sae.save_model(tmp_path / name)
    settings = with_evals("remember", dataset=str(tmp_path / "text.jsonl"), tokens=10_000, context_size=None)
    evaluate([str(tmp_path / name) for name in forms], settings, tmp_path / "out")

    tokenizer = load_bundled_model().tokenizer
    documents = [
        tokenizer(row["text"], add_special_tokens=False)["input_ids"]
        for row in load_text(str(tmp_path / "text.jsonl")).heldout
    ]
    assert len(documents) == 3
    plain = [token for document in documents for token in document]
    separated = [token for document in documents for token in (0, *document)][1:]
    with_bos, place = [], 0
    while place + 32 <= len(separated):
        taken = 32 if separated[place] == 0 else 31
        with_bos.append([0] * (32 - taken) + separated[place : place + taken])
        place += taken
    rows = {name: seen[name].text.contexts.tokens.tolist() for name in forms}
    assert rows["as_saelens"][: len(with_bos)] == with_bos
    assert rows["without_bos"] == [plain[i : i + 32] for i in range(0, len(plain) - 31, 32)]
    assert rows["apart"] == [[0, *document[:23]] for document in documents]
    sample = seen["cut"].text.sample  # positions 2 to 14, and no token 0
    assert sample.tokens.tolist() == [t for context in rows["cut"] for t in context[2:15] if t != 0]
    assert {len(context) for context in rows["cut"]} == {16}
    # what the model makes of a context without BOS is what is measured
    x = load_bundled_model().run_with_cache(torch.tensor(rows["without_bos"]), prepend_bos=False)[1][HOOK]
    assert torch.allclose(seen["without_bos"].text.sample.activations, x.flatten(0, 1), atol=1e-3)


@pytest.mark.parametrize(("sinks", "expected"), [("keep", {"in"}), ("drop", {"out"}), ("both", {"in", "out"})])
def test_sinks(sinks, expected, run, tmp_path):
    document = evaluate(run[1], with_evals("reconstruction", "matching", "afa", sinks=sinks), tmp_path)
    of_tokens = set(measures(document["saes"][1])) - {"dead in training"}
    assert {name[-3:].strip() for name in of_tokens} == expected
    assert {item["measure"][-3:].strip() for item in document["differences"]} == expected
    data = report_data(document)
    assert {part.sinks for part in data.quartiles} == {part.sinks for part in data.zf} == expected
    assert len(data.matches) == 1


def test_the_zf_plot_draws_codes_without_b_dec_and_tells_of_all_tokens(run, tmp_path, monkeypatch):
    sae = SAE.load_from_disk(run[1][0])
    sae.b_dec.data.fill_(1.0)  # of norm 192 ** 0.5
    sae.save_model(tmp_path / "sae")
    monkeypatch.setattr(evals, "POINTS", 50)
    seen: list[Subject] = []
    monkeypatch.setitem(EVALS, "remember", Eval(lambda subject: seen.append(subject) or {}, "sae", ""))
    document = evaluate([str(tmp_path / "sae")], with_evals("afa", "remember"), tmp_path / "out")
    sample = seen[0].text.sample
    x = sample.activations[sample.ordinary].double()
    with torch.no_grad():
        codes = sae.encode(x.float()).to_dense().double()
    f = (codes * sae.W_dec.double().norm(dim=-1)).norm(dim=-1).detach()  # rows of the decoder are no unit vectors
    z = (x - sae.b_dec.double()).norm(dim=-1).detach()
    without, _ = sorted(report_data(document).zf, key=lambda points: points.sinks, reverse=True)
    assert (without.sinks, without.tokens, len(without.code_norms)) == ("out", len(x), 50)
    pairs = {(round(a, 3), round(b, 3)) for a, b in zip(z.tolist(), f.tolist(), strict=True)}
    drawn = [(round(a, 3), round(b, 3)) for a, b in zip(without.input_norms, without.code_norms, strict=True)]
    assert sum(pair in pairs for pair in drawn) >= 48  # two may be rounded the other way
    assert without.median_ratio == pytest.approx((f / z).quantile(0.5).item(), rel=1e-4)
    assert without.share_below == pytest.approx((f < z).double().mean().item(), abs=2 / len(x))
    papers = document["saes"][0]["results"]["afa"]["zf_points"]
    assert (papers["bias"], min(papers["feature_norm"]) >= 192**0.5 - 1e-3) == ("augment", True)


def test_the_zf_plot_survives_an_sae_whose_codes_are_not_finite(run, tmp_path):
    sae = SAE.load_from_disk(run[1][0])
    sae.W_dec.data.fill_(3e38)  # finite, as what is loaded must be, and its norm is not
    sae.save_model(tmp_path / "sae")
    document = evaluate([str(tmp_path / "sae")], with_evals("afa"), tmp_path / "out")
    written = json.loads((tmp_path / "out" / "evaluation.json").read_text())  # with null in place of NaN
    for points in report_data(written).zf:
        assert not any(map(math.isfinite, (*points.code_norms, points.median_ratio)))
    write_report(report_data(document), tmp_path / "report.html")


def test_dead_in_training_is_what_the_metadata_or_the_comparison_say_and_else_unknown(run, tmp_path):
    trained = make_sae("cosine_topk", d_in=192, d_sae=64, dead_feature_window_tokens=1000)
    trained.tokens_since_fired[:16] = 1000
    metadata = trained.cfg.metadata
    metadata.model_name, metadata.hook_name, metadata.dataset_path = "bundled", HOOK, "bundled"
    trained.save_inference_model(tmp_path / "counted")
    sae = SAE.load_from_disk(tmp_path / "counted")
    sae.cfg.metadata.dead_features_in_token_window = sae.cfg.metadata.dead_feature_window_tokens = None
    sae.W_enc.data *= 2
    sae.save_model(tmp_path / "runs" / "arm" / "seed0")
    last = {"metrics": {"dead_features_in_token_window": 8.0, "dead_feature_window_tokens": 500.0}}
    log = [{"training_tokens": 0, "fve": 0.1, "l0": 3.0, **last}]
    (tmp_path / "runs" / "comparison.json").write_text(
        json.dumps({"arms": [{"path": "arm/seed0", "weights_sha256": weights_sha256(sae), "training_log": log}]})
    )
    sae.W_enc.data *= 2
    sae.save_model(tmp_path / "unknown")
    sources = [str(tmp_path / name) for name in ("counted", "runs/arm/seed0", "unknown")]
    document = evaluate(sources, with_evals("reconstruction"), tmp_path / "out")
    dead = {entry["arm"]: entry["results"]["reconstruction"]["with_sinks"]["dead"] for entry in document["saes"]}
    said = {arm: (found["in_training"], found["training_window_tokens"]) for arm, found in dead.items()}
    assert said == {"counted": (16 / 64, 1000), "arm": (8 / 64, 500), "unknown": (None, None)}
    data = report_data(document)
    metrics = {arm.name: arm.metrics for arm in data.arms}
    assert [metrics[arm]["dead in training"].value for arm in ("counted", "arm")] == [0.25, 0.125]
    assert "dead in training" not in metrics["unknown"]
    assert data.facts["dead in training"].startswith("unknown of unknown:")


def test_what_is_measured_is_not_measured_again(run, monkeypatch):
    folder, sources, document = run

    def fails(_subject):
        raise AssertionError("measured again")

    for name in SETTINGS.evals:
        monkeypatch.setitem(EVALS, name, dataclasses.replace(EVALS[name], measure=fails))
    again = evaluate(sources, SETTINGS, folder / "out")
    assert {**again, "date": document["date"]} == document
    # a setting that no chosen eval uses
    assert evaluate(sources, dataclasses.replace(SETTINGS, loss_tokens=5), folder / "out")["saes"] == document["saes"]
    with pytest.raises(AssertionError):
        evaluate(sources, dataclasses.replace(SETTINGS, tokens=1100), folder / "out")
    with pytest.raises(AssertionError):  # matched with another SAE
        evaluate(sources[::-1], with_evals("matching"), folder / "out")


def test_an_interrupted_run_goes_on(run, tmp_path, monkeypatch):
    row, calls = EVALS["dictionary"], []

    def interrupted(subject):
        calls.append(subject.source.name)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return row.measure(subject)

    monkeypatch.setitem(EVALS, "dictionary", dataclasses.replace(row, measure=interrupted))
    with pytest.raises(KeyboardInterrupt):
        evaluate(run[1], SETTINGS, tmp_path)
    kept = sorted(path.name.split("-")[0] for path in (tmp_path / "measured").iterdir())
    assert kept == ["reconstruction", "tokens"]  # no half-written file beside them

    def results(document):
        return [entry["results"] for entry in document["saes"]]

    assert results(evaluate(run[1], SETTINGS, tmp_path)) == results(run[2])


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


def test_the_judge_s_key_is_in_no_file(run, tmp_path):
    settings = with_evals("tokens", judge=Judge("some-model", "http://judge", "secret-key"))
    document = evaluate(run[1][:1], settings, tmp_path)
    assert document["settings"]["judge"] == {"model": "some-model", "base_url": "http://judge"}
    assert not [path for path in tmp_path.rglob("*.json") if "secret-key" in path.read_text()]


def test_page_has_both_saes_and_both_treatments(run):
    data = report_data(run[2])
    assert [arm.name for arm in data.arms] == ["one", "two"]
    assert {(part.arm, part.sinks) for part in data.quartiles} == {
        (a, s) for a in ("one", "two") for s in ("in", "out")
    }
    assert data.arms[0].exponents == pytest.approx((0.7,))  # `randomize` sets one for all features
    (with_sinks, *_) = (part for part in data.quartiles if part.sinks == "in")
    assert sum(with_sinks.tokens) == 19 * 32
    assert list(with_sinks.edges) == sorted(with_sinks.edges)
    assert [(pairs.arm, pairs.other) for pairs in data.matches] == [("two", "one")]
    n = len(run[2]["saes"][0]["results"]["reconstruction"]["fve_by_document"]["documents"])
    assert n >= 10
    assert {item.metric for item in data.differences} == {
        f"FVE, sinks {sinks} ({n} documents)" for sinks in ("in", "out")
    }


def test_seeds_of_an_arm_are_averaged_and_paired(run, tmp_path):
    sources = [saved_sae(tmp_path / arm / f"seed{i}", seed=10 * j + i) for j, arm in enumerate("ab") for i in range(2)]
    document = evaluate(sources, with_evals("reconstruction", "matching"), tmp_path / "out")
    assert [(entry["arm"], entry["seed"]) for entry in document["saes"]] == [("a", 0), ("a", 1), ("b", 0), ("b", 1)]
    assert [entry["baseline"] for entry in document["saes"]] == [None, *(sources[i] for i in (0, 0, 1))]
    a, b = ([measures(document["saes"][i])["L0, sinks out"].value for i in pair] for pair in ((0, 1), (2, 3)))
    (found,) = (item for item in document["differences"] if item["measure"] == "L0, sinks out")
    assert (found["arm"], found["baseline"], found["over"]) == ("b", "a", ["seeds"])
    d = [b[0] - a[0], b[1] - a[1]]
    mean, half = sum(d) / 2, 12.7062 * abs(d[0] - d[1]) / 2  # Student's t at one degree of freedom
    assert found["difference"]["mean"] == pytest.approx(mean)
    assert found["difference"]["high"] - mean == pytest.approx(half, rel=1e-4)
    assert report_data(document).arms[0].metrics["L0, sinks out"].value == pytest.approx(sum(a) / 2)


def test_seeds_without_a_partner_are_compared_with_none(run, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setitem(EVALS, "once", Eval(lambda subject: seen.append(subject.source.name) or {}, "arm", ""))
    partner = Eval(lambda subject: {"with": subject.baseline.source.name}, "pair", "")
    monkeypatch.setitem(EVALS, "partner", partner)
    names = [("cosine_topk", 1), ("inner_product_topk", 0), ("cosine_topk", 2), ("inner_product_topk", 2)]
    sources = [saved_sae(tmp_path / arm / f"seed{seed}", seed=seed) for arm, seed in names]
    document = evaluate(sources, with_evals("once", "partner"), tmp_path / "out")
    found = [(entry["arm"], entry["seed"], entry["baseline"]) for entry in document["saes"]]
    assert found == [
        ("inner_product_topk", 0, None),
        ("inner_product_topk", 2, sources[1]),
        ("cosine_topk", 1, None),
        ("cosine_topk", 2, sources[3]),
    ]
    assert [entry["results"].get("partner") for entry in document["saes"]] == [
        None,
        {"with": sources[1]},
        None,
        {"with": sources[3]},
    ]
    assert seen == [sources[1], sources[0]]  # the first of each arm
    assert [(item["arm"], item["seed"]) for item in document["unpaired"]] == [
        ("cosine_topk", 1),
        ("inner_product_topk", 0),
    ]
    chosen = evaluate(sources, with_evals("once"), tmp_path / "out", baseline="cosine_topk")
    assert (chosen["baseline"], chosen["saes"][0]["arm"]) == ("cosine_topk", "cosine_topk")


def test_a_gap_in_one_task_is_divided_over_its_splits(run, tmp_path):
    twin = SAE.load_from_disk(run[1][0])
    twin.b_enc.data[0] -= 0.1
    twin.save_model(tmp_path / "twin")
    settings = with_evals("decomposition", tasks=TASKS[:1], task_texts=20)
    document = evaluate([run[1][0], str(tmp_path / "twin")], settings, tmp_path / "out")
    parts = document["saes"][1]["results"]["decomposition"]["with_sinks"]
    assert {tuple(part["gap"]["shape"]) for part in parts} == {(5,)}


DIAGNOSTICS = tuple(name for name in EVALS if not EVALS[name].about.startswith("SAEBench"))


@pytest.fixture(scope="module")
def everything(run, tmp_path_factory):
    """All diagnostics of two random SAEs, from one run, with few pairs of tokens to patch."""
    settings = with_evals(
        *DIAGNOSTICS,
        task_texts=24,
        causal_contexts=12,
        causal_features=3,
        concept_texts=4,
        loss_tokens=512,
        tasks=TASKS,
    )
    few = functools.partial(evals.direction_norm_patching, pairs=20, control_pairs=10, rescaled_tokens=10)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evals, "direction_norm_patching", few)
        return evaluate(run[1], settings, tmp_path_factory.mktemp("everything"))


def test_every_diagnostic_runs_and_shows_on_the_page(everything, tmp_path):
    data = report_data(everything)
    for section in ("differences", "quartiles", "zf", "scaling", "probing", "precision", "matches", "features"):
        assert getattr(data, section), section
    for entry in everything["saes"]:
        left_out = {name for name, result in entry["results"].items() if "not_applicable" in result}
        assert left_out <= {"decomposition"}  # random dictionaries have no feature in common
        assert set(entry["seconds"]) == set(entry["results"])
    assert set(everything["texts"][0]["results"]) == {"tokens", "patching", "probing_baseline"}
    assert write_report(data, tmp_path / "report.html").stat().st_size < 3_000_000


def test_each_eval_says_its_tokens_and_matches_are_of_alive_features(everything):
    data = report_data(everything)
    for entry in everything["saes"]:
        ordinary = entry["results"]["reconstruction"]["without_sinks"]["by_norm"]["all_norms"]["overall"]["tokens"]
        sample = f"608 ({ordinary:,} without sinks)"
        counts = tokens_measured([entry])
        assert {
            name: counts.pop(name) for name in ("reconstruction", "norm_response", "dictionary", "afa")
        } == dict.fromkeys(("reconstruction", "norm_response", "dictionary", "afa"), sample)
        assert counts["loss"] == "512"  # one batch of 16 contexts; sinks are passed through
        assert counts["causal"].startswith(f"{12 * 32} (")
        assert counts["probing"] == f"{sum(entry['results']['probing']['texts'])} texts"
        assert "loss 512" in data.facts["tokens"]
        found = measures(entry)
        assert found["active-set overlap at half scale, about b_dec, sinks in"].value == pytest.approx(
            entry["results"]["norm_response"]["with_sinks"]["response_about_b_dec"]["at_scales"][0]["overlap"]
        )
    assert {(line.arm, line.about) for line in data.scaling} == {(a, p) for a in ("one", "two") for p in ("b_dec", "0")}
    for pairs, entry in zip(data.matches, everything["saes"][1:], strict=True):
        counted = entry["results"]["matching"]["without_sinks"]["features"]
        assert (pairs.alive, pairs.matched) == (counted["alive"], counted["matched"])
        assert pairs.alive >= pairs.paired == len(pairs.pairs)  # all of them are listed, being few


PART = {"k": 2, "gap": {"mean": 0.0625}, "matched_gap": {"mean": 0.03125}, "separability": 0.5}
BY_HAND = {"decomposition": {"with_sinks": [PART]}}
"""Results of evals that random dictionaries have none of, or that take long."""
VALUES = {"decomposition": ("probing gap to the first arm k=2, sinks in", "0.0625")}


@pytest.mark.parametrize("name", EVALS)
def test_what_an_eval_found_is_in_the_json_in_the_terminal_and_on_the_page(name, everything):
    document = copy.deepcopy(everything)
    if name not in DIAGNOSTICS or name in BY_HAND:
        for entry in document["saes"]:
            entry["results"] = {name: BY_HAND.get(name, {"metrics": {"part.score": 0.125}})}
            entry["figures"] = figures_by_eval(entry["results"])
        document["settings"]["evals"] = [name]
    named = [name_of for entry in document["texts"] + document["saes"] for name_of in entry["figures"].get(name, {})]
    assert named
    console = Console(width=400, file=io.StringIO())
    for table in as_tables(document):
        assert table.row_count
        console.print(table)
    page = html.unescape(render(report_data(document)).replace("<wbr>", ""))
    for figure in named:
        assert figure in page
        assert figure.removesuffix(", sinks in").removesuffix(", sinks out") in console.file.getvalue()
    figure, value = VALUES.get(name, (named[0], None if name in DIAGNOSTICS else "0.125"))
    if value:
        (line,) = (line for line in console.file.getvalue().splitlines() if figure in line)
        assert line.split()[-2:] == [value] * 2  # of both arms
        assert f"{figure}</td><td>{value}</td><td>{value}</td>" in page


def test_no_table_is_empty_and_the_reason_is_told_where_an_eval_does_not_apply(run, tmp_path):
    document = evaluate(run[1], with_evals("decomposition", tasks=TASKS[:1], task_texts=20), tmp_path)
    tables = as_tables(document)
    assert [table.title for table in tables] == ["Left out"]
    reason = "No feature has a mutual match in the SAE that it is compared with."
    assert [list(column.cells) for column in tables[0].columns] == [["two"], ["decomposition"], [reason]]
    assert reason in render(report_data(document))


def test_means_over_seeds_are_by_hand_and_what_is_not_finite_stays_so():
    entries = [{"figures": {"loss": {"KL": 1.0, "CE": 0.5}}}, {"figures": {"loss": {"KL": 2.0, "CE": None}}}, {}]
    assert means(entries) == {"loss": {"KL": 1.5, "CE": None}}


def test_saebench_is_run_and_paired(run, tmp_path):
    pytest.importorskip("sae_bench")
    core = {"n_eval_reconstruction_batches": 1, "n_eval_sparsity_variance_batches": 1, "context_size": 32}
    settings = with_evals("core", saebench={"core": core})
    document = evaluate(run[1], settings, tmp_path)
    found = measures(document["saes"][0])
    assert found["SAEBench core: sparsity.l0"].value == pytest.approx(3, abs=0.01)  # TopK keeps k = 3
    core = document["saes"][0]["results"]["core"]
    theirs = "SAEBench core: explained_variance as SAEBench has it (no share of a variance)"
    assert found[theirs].value == core["metrics"]["reconstruction_quality.explained_variance"]
    assert found["SAEBench core: FVE, ours on the same tokens"].value == core["variance_explained"]["fve"]
    assert "SAEBench core: sparsity.l0" in report_data(document).arms[0].metrics


def test_saebench_that_cannot_run_is_said_before_any_work(run, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    flags = ["--evals", "reconstruction", "autointerp", "--quiet", "--output", str(tmp_path), "--context-size", "32"]
    assert main(["evaluate", *run[1], *flags, "--tokens", "600"]) == 2
    assert "autointerp: It asks a language model" in capsys.readouterr().err
    assert not (tmp_path / "measured").exists()


def test_an_eval_of_saebench_that_fails_is_told_and_tried_again(run, tmp_path, monkeypatch):
    settings = with_evals("core", "reconstruction")
    failure = Failure("core", "one-0", "RuntimeError: no luck")

    def fails(*args, **kwargs):
        raise SAEBenchError([failure])

    monkeypatch.setattr(saebench, "run", fails)
    document = evaluate(run[1][:1], settings, tmp_path)
    (entry,) = document["saes"]
    assert entry["results"]["core"] == {"not_applicable": "core of one-0: RuntimeError: no luck"}
    assert "with_sinks" in entry["results"]["reconstruction"]
    assert [path.name.split("-")[0] for path in (tmp_path / "measured").iterdir()] == ["reconstruction"]
    left_out = as_tables(document)[-1]
    assert [list(column.cells) for column in left_out.columns] == [["one"], ["core"], [str(failure)]]
    report_data(document)


def test_features_are_not_matched_across_activations(run, tmp_path):
    other = SAE.load_from_disk(run[1][1])
    other.cfg.metadata.hook_name = "blocks.2.hook_resid_post"
    other.save_model(tmp_path / "elsewhere")
    document = evaluate([run[1][0], str(tmp_path / "elsewhere")], with_evals("tokens", "matching"), tmp_path / "out")
    assert [text["hook"] for text in document["texts"]] == [HOOK, "blocks.2.hook_resid_post"]
    assert "not measured on the same activations" in document["saes"][1]["results"]["matching"]["not_applicable"]


def with_metadata(source, folder, **metadata):
    sae = SAE.load_from_disk(source)
    for name, value in metadata.items():
        sae.cfg.metadata[name] = value
    sae.save_model(folder)
    return str(folder)


def test_texts_of_one_name_and_two_forms_are_told_apart(run, tmp_path):
    without = with_metadata(run[1][1], tmp_path / "without", prepend_bos=False)
    sources = [run[1][0], run[1][1], without]
    document = evaluate(sources, with_evals("tokens", "reconstruction"), tmp_path / "out")
    assert [text["form"]["prepend_bos"] for text in document["texts"]] == [True, False]
    assert [entry["text"] for entry in document["saes"]] == [0, 0, 1]
    texts, _ = by_column(document)
    assert list(texts) == [f"bundled at {HOOK}, bundled, prepend_bos={has}" for has in (True, False)]
    for (name, figures), text in zip(texts.items(), document["texts"], strict=True):
        assert figures == text["figures"]
        shown = report_data(document).facts[f"share of high-norm tokens of {name}"]
        assert shown == f"{text['results']['tokens']['high_norm_share']:.2%}"
    assert "Measured on other tokens than one" in about_differences(document)[-1]
    assert ": without." in about_differences(document)[-1]  # and not `two`, which saw the same


def test_an_sae_of_the_first_positions_is_edited_there(run, tmp_path):
    source = with_metadata(run[1][0], tmp_path / "sae", seqpos_slice=[None, 16])
    seen: list[Subject] = []
    row = Eval(lambda subject: seen.append(subject) or {}, "sae", "")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(EVALS, "remember", row)
        evaluate([source], with_evals("remember", causal_contexts=4), tmp_path / "out")
    (subject,) = seen
    edited = subject.text.run
    assert edited.read.tolist() == [15] * 4
    assert edited.read_rows(subject.text.sample_of(edited)).tolist() == [15, 31, 47, 63]


def test_a_text_too_short_for_concepts_is_measured_by_all_other_evals(run, tmp_path):
    words = [f"word{i} " * 60 for i in range(20)]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in words))
    short = {"dataset": str(tmp_path / "text.jsonl"), "tokens": 32, "causal_contexts": 4}
    document = evaluate(run[1][:1], with_evals("causal", "reconstruction", **short), tmp_path / "out")
    results = document["saes"][0]["results"]
    assert "not_applicable" in results["causal"]
    assert "with_sinks" in results["reconstruction"]


def test_contexts_without_a_token_that_the_sae_sees_are_refused(run, tmp_path):
    source = with_metadata(run[1][0], tmp_path / "sae", seqpos_slice=[48, None])
    with pytest.raises(ValueError, match=r"seqpos_slice=\(48, None\).*32 tokens.*larger --context-size"):
        evaluate([source], SETTINGS, tmp_path / "out")


def test_sinks_are_planted_where_the_sae_was_trained_with_them_or_on_request(run, tmp_path):
    trained = SAE.load_from_disk(run[1][0])
    trained.cfg.metadata.planted_sinks = True
    trained.save_model(tmp_path / "planted")
    for source, asked, planted in (
        (str(tmp_path / "planted"), None, True),
        (str(tmp_path / "planted"), False, False),
        (run[1][0], True, True),
    ):
        document = evaluate([source], with_evals("tokens", plant_sinks=asked), tmp_path / "out")
        (text,) = document["texts"]
        assert text["planted_sinks"] is planted
        assert (text["results"]["tokens"]["high_norm_multiple"] > 30) is planted
    assert not torch.nn.modules.module._global_module_registration_hooks  # and taken out again


def test_command_writes_its_files(run, tmp_path, capsys):
    flags = ["--tokens", "600", "--max-norm-multiple", "3", "--context-size", "32", "--evals", "reconstruction", "loss"]
    assert main(["evaluate", *run[1], *flags, "--quiet", "--output", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "KL, nats" in " ".join(out.split())
    assert "KL is from the model's own predictions" in " ".join(out.split())
    assert sum(line.split()[:1] == ["one"] and "sinks" in line for line in out.splitlines()) == 2
    assert " documents " in out
    assert "2 intervals leave out zero" in " ".join(out.split())
    assert (tmp_path / "evaluation.json").exists()
    assert "<!doctype html>" in (tmp_path / "report.html").read_text()[:200].lower()


def test_warnings_stand_above_the_bar_once_and_on_one_line(capsys):
    with _progress(quiet=False) as progress:
        progress("Probing", 0, 2)
        for _ in range(2):
            warnings.warn("lbfgs failed to converge [status=1]:\nINCREASE the number of iterations", stacklevel=1)
        progress("Probing", 2, 2)
    told, bar = capsys.readouterr().err.splitlines()[:2]
    assert told == "UserWarning: lbfgs failed to converge [status=1]:"
    assert bar.startswith("Probing")


def test_the_page_says_what_each_sae_is(run, tmp_path):
    sae = SAE.load_from_disk(run[1][0])
    metadata = sae.cfg.metadata
    metadata.training_tokens, metadata.lr, metadata.recipe = 300_000, 5e-3, "paper"
    metadata.max_norm_multiple, metadata.high_norm_share_dropped = 10.0, 0.0123
    sae.save_model(tmp_path / "told")
    del sae.cfg.metadata.training_tokens, metadata.lr, metadata.recipe, metadata.max_norm_multiple
    sae.save_model(tmp_path / "untold")
    document = evaluate([str(tmp_path / "told"), str(tmp_path / "untold")], with_evals("tokens"), tmp_path / "out")
    told, untold = report_data(document).saes
    known = {
        "arm": "told",
        "seed": "0",
        "architecture": "cosine_topk",
        "trained as": "cosine_topk",
        "features": "64",
        "selector": "k = 3",
        "training tokens": "300,000",
        "learning rate": "0.005",
        "recipe": "paper",
        "norm filter in training": "above 10 times the median: 1.23% of the tokens dropped",
        "text": "maybe trained on",
        "place": "told",
        "sha256": document["saes"][0]["sha256"][:12],
    }
    assert told == known
    unknown = dict.fromkeys(("training tokens", "learning rate", "recipe", "norm filter in training"), "-")
    names = {"arm": "untold", "place": "untold", "sha256": document["saes"][1]["sha256"][:12]}
    assert untold == known | unknown | names
    page = render(report_data(document)).replace("<wbr>", "")
    assert all(f">{value}<" in page for value in known.values())
    assert datetime.fromisoformat(document["date"]).tzinfo is not None
    assert document["date"] in page


def test_the_command_is_told_without_secrets(run, tmp_path):
    flags = ["--tokens", "600", "--context-size", "32", "--evals", "tokens", "--output", str(tmp_path), "--quiet"]
    url = "https://me:pass@word@judge:8000/v1?key=secret#part"
    assert main(["evaluate", f"an arm={run[1][0]}", *flags, "--judge-url", url]) == 0
    document = json.loads((tmp_path / "evaluation.json").read_text())
    told = f"saelens-cosine evaluate 'an arm={run[1][0]}' {' '.join(flags)} --judge-url https://judge:8000/v1"
    assert document["command"] == told
    assert published(told) in html.unescape((tmp_path / "report.html").read_text())
    for secret in ("pass", "word@", "secret"):
        assert not [path for path in tmp_path.rglob("*.*") if path.is_file() and secret in path.read_text()], secret


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
    sample = dataclasses.replace(sample, activations=planted, ordinary=ordinary, max_norm_multiple=10.0)
    both = side_by_side(len, sample)
    assert (both.with_sinks, both.without_sinks) == (64, 63)
    assert both.high_norm_share == pytest.approx(1 / 64)
    with pytest.raises(ValueError, match="sinks='some'"):
        side_by_side(len, sample, "some")


def test_an_sae_that_saebench_cannot_take_is_left_out_and_the_rest_goes_on(tmp_path, monkeypatch):
    sae = TopKSAE(TopKSAEConfig(d_in=192, d_sae=64, k=8, normalize_activations="layer_norm"))
    sae.cfg.metadata.model_name, sae.cfg.metadata.hook_name = "bundled", HOOK
    sae.save_model(tmp_path / "normalised")
    monkeypatch.setattr(module, "_check_saebench", lambda subject: None)
    (entry,) = evaluate([str(tmp_path / "normalised")], with_evals("core", "tokens"), tmp_path / "out")["saes"]
    assert "normalize_activations='layer_norm'" in entry["results"]["core"]["not_applicable"]


def test_a_dead_sae_has_no_causal_figures_and_the_rest_goes_on(tmp_path):
    sae = SAE.load_from_disk(saved_sae(tmp_path / "alive"))
    sae.W_enc.data.zero_()
    sae.b_enc.data.fill_(-1)
    sae.save_model(tmp_path / "dead")
    settings = with_evals("causal", "reconstruction", causal_contexts=4, causal_features=2, concept_texts=2)
    (entry,) = evaluate([str(tmp_path / "dead")], settings, tmp_path / "out")["saes"]
    assert "No feature is active" in entry["results"]["causal"]["not_applicable"]
    assert entry["results"]["reconstruction"]["with_sinks"]["by_norm"]["all_norms"]["overall"]["l0"] == 0


def test_too_few_texts_to_probe_are_said_and_the_rest_goes_on(run, tmp_path):
    settings = with_evals("probing", "probing_baseline", "reconstruction", tasks=("bundled:loop",), task_texts=4)
    document = evaluate(run[1][:1], settings, tmp_path)
    refused = [document["saes"][0]["results"]["probing"], document["texts"][0]["results"]["probing_baseline"]]
    assert all("splits=5" in result["not_applicable"] for result in refused)
    assert "with_sinks" in document["saes"][0]["results"]["reconstruction"]

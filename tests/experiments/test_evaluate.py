"""`saelens-cosine evaluate`: what it measures and on what, that it goes on where it ended, and the files it writes."""

import dataclasses
import functools
import json

import pytest
import torch
from helpers import make_sae
from page_parts import charts, table
from sae_lens import SAE
from saved_evaluations import HOOK, SETTINGS, saved_sae, with_evals, with_metadata

from saelens_cosine.activations.sample import sample_tokens
from saelens_cosine.activations.text import load_text
from saelens_cosine.bundled import load_bundled_model
from saelens_cosine.cli import main
from saelens_cosine.experiments.evaluate.evals import EVALS, Eval
from saelens_cosine.experiments.evaluate.page import evaluation_page
from saelens_cosine.experiments.evaluate.results.evaluation import SCHEMA
from saelens_cosine.experiments.evaluate.results.listing import about_differences, of_texts, text_is
from saelens_cosine.experiments.evaluate.run import evaluate
from saelens_cosine.experiments.evaluate.subject import Subject
from saelens_cosine.plain import fingerprint, plain, weights_sha256
from saelens_cosine.saebench import Judge

pytestmark = pytest.mark.usefixtures("short_text")


def test_fve_is_that_of_the_formula_on_the_tokens_said(run, monkeypatch):
    folder, sources, evaluation = run
    document = evaluation.document()
    seen: list[Subject] = []
    monkeypatch.setitem(EVALS, "remember", Eval("remember", "sae", "", lambda subject: seen.append(subject) or {}))
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
    found = evaluation.saes[0].compared
    of_document = subject.text.sample.documents
    numbers = of_document.unique()

    def fve(keep):
        residual, total = (v[keep].double() for v in (error, x))
        return 1 - (residual.var(dim=0, correction=0).sum() / total.var(dim=0, correction=0).sum()).item()

    for treatment, sinks, keep in (
        ("with_sinks", "in", torch.ones_like(ordinary)),
        ("without_sinks", "out", ordinary),
    ):
        assert found[f"FVE, sinks {sinks}"].number == pytest.approx(fve(keep), rel=1e-4)
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
    found = evaluate(sources, with_evals("tokens"), tmp_path / "out")
    document = found.document()
    assert [entry["held_out"] for entry in document["saes"]] == [True, False]
    assert text_is(found.saes[:1]) == "Held-out text"
    assert text_is(found.saes) == "Text that may be training text of two"
    sae.cfg.metadata.heldout_rule = "hash of the file's path"  # of another version
    sae.save_model(tmp_path / "older")
    found = evaluate([str(tmp_path / "older")], with_evals("tokens"), tmp_path / "out")
    document = found.document()
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
    row = Eval("remember", "sae", "", lambda subject: seen.update({subject.source.arm: subject}) or {})
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
    found = evaluate(run[1], with_evals("reconstruction", "matching", "afa", sinks=sinks), tmp_path)
    document = found.document()
    of_tokens = set(found.saes[1].compared) - {"dead in training"}
    assert {name[-3:].strip() for name in of_tokens} == expected
    assert {item["measure"][-3:].strip() for item in document["differences"]} == expected
    page = evaluation_page(found)
    for section in ("reconstruction", "afa"):
        assert {title.split(" ")[-1] for title in charts(page, section)} == expected
    assert len(charts(page, "matching")) == 1


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
    found = evaluate(sources, with_evals("reconstruction"), tmp_path / "out")
    document = found.document()
    dead = {entry["arm"]: entry["results"]["reconstruction"]["with_sinks"]["dead"] for entry in document["saes"]}
    said = {arm: (found["in_training"], found["training_window_tokens"]) for arm, found in dead.items()}
    assert said == {"counted": (16 / 64, 1000), "arm": (8 / 64, 500), "unknown": (None, None)}
    page = evaluation_page(found)
    dead = table(page, "comparison")["dead in training"]
    assert [dead[arm].value for arm in ("counted", "arm")] == [0.25, 0.125]
    assert dead["unknown"] == "-"
    assert page.facts["dead in training"].startswith("unknown of unknown:")


def test_what_is_measured_is_not_measured_again(run, monkeypatch):
    folder, sources, evaluation = run
    document = evaluation.document()

    def never(measure):
        @functools.wraps(measure)
        def fails(_subject):
            raise AssertionError("measured again")

        return fails

    for name in SETTINGS.evals:
        monkeypatch.setitem(EVALS, name, dataclasses.replace(EVALS[name], measure=never(EVALS[name].measure)))
    again = evaluate(sources, SETTINGS, folder / "out").document()
    assert {**again, "date": document["date"]} == document
    # a setting that no chosen eval uses
    other = evaluate(sources, dataclasses.replace(SETTINGS, loss_tokens=5), folder / "out")
    assert other.document()["saes"] == document["saes"]
    with pytest.raises(AssertionError):
        evaluate(sources, dataclasses.replace(SETTINGS, tokens=1100), folder / "out")
    with pytest.raises(AssertionError):  # matched with another SAE
        evaluate(sources[::-1], with_evals("matching"), folder / "out")


def test_an_interrupted_run_goes_on(run, tmp_path, monkeypatch):
    row, calls = EVALS["dictionary"], []

    @functools.wraps(row.measure)
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

    def results(found):
        return [entry["results"] for entry in found.document()["saes"]]

    assert results(evaluate(run[1], SETTINGS, tmp_path)) == results(run[2])


def test_other_weights_are_another_sae(tmp_path):
    one, other = (make_sae("cosine_topk", seed=seed) for seed in (1, 1))
    assert fingerprint(one) == fingerprint(other)
    other.b_enc.data[3] += 1e-3
    assert fingerprint(one) != fingerprint(other)


def test_json_has_no_nan(run):
    folder = run[0]
    text = (folder / "out" / "evaluation.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["schema"] == SCHEMA
    assert plain({"a": (1, float("nan")), "b": float("inf")}) == {"a": [1, None], "b": None}


def test_the_judge_s_key_is_in_no_file(run, tmp_path):
    settings = with_evals("tokens", judge=Judge("some-model", "http://judge", "secret-key"))
    found = evaluate(run[1][:1], settings, tmp_path)
    document = found.document()
    assert document["settings"]["judge"] == {"model": "some-model", "base_url": "http://judge"}
    assert not [path for path in tmp_path.rglob("*.json") if "secret-key" in path.read_text()]


def test_texts_of_one_name_and_two_forms_are_told_apart(run, tmp_path):
    without = with_metadata(run[1][1], tmp_path / "without", prepend_bos=False)
    sources = [run[1][0], run[1][1], without]
    found = evaluate(sources, with_evals("tokens", "reconstruction"), tmp_path / "out")
    document = found.document()
    assert [text["form"]["prepend_bos"] for text in document["texts"]] == [True, False]
    assert [entry["text"] for entry in document["saes"]] == [0, 0, 1]
    texts = of_texts(found)
    assert list(texts) == [f"bundled at {HOOK}, bundled, prepend_bos={has}" for has in (True, False)]
    for (name, figures), text in zip(texts.items(), document["texts"], strict=True):
        assert plain(figures) == text["figures"]
        shown = evaluation_page(found).facts[f"share of high-norm tokens of {name}"]
        assert shown == f"{text['results']['tokens']['high_norm_share']:.2%}"
    assert "Measured on other tokens than one" in about_differences(found)[-1]
    assert ": without." in about_differences(found)[-1]  # and not `two`, which saw the same


def test_an_sae_of_the_first_positions_is_edited_there(run, tmp_path):
    source = with_metadata(run[1][0], tmp_path / "sae", seqpos_slice=[None, 16])
    seen: list[Subject] = []
    row = Eval("remember", "sae", "", lambda subject: seen.append(subject) or {})
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(EVALS, "remember", row)
        evaluate([source], with_evals("remember", causal_contexts=4), tmp_path / "out")
    (subject,) = seen
    edited = subject.text.run
    assert edited.read.tolist() == [15] * 4
    assert edited.read_rows(subject.text.sample_of(edited)).tolist() == [15, 31, 47, 63]


def test_sinks_are_planted_where_the_sae_was_trained_with_them_or_on_request(run, tmp_path):
    trained = SAE.load_from_disk(run[1][0])
    trained.cfg.metadata.planted_sinks = True
    trained.save_model(tmp_path / "planted")
    for source, asked, planted in (
        (str(tmp_path / "planted"), None, True),
        (str(tmp_path / "planted"), False, False),
        (run[1][0], True, True),
    ):
        found = evaluate([source], with_evals("tokens", plant_sinks=asked), tmp_path / "out")
        document = found.document()
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
    assert (len(sample), len(sample.without_sinks())) == (64, 63)
    assert sample.high_norm_share == pytest.approx(1 / 64)


def test_every_eval_that_is_done_counts(run, tmp_path):
    _, sources, _ = run
    told = []
    evals = with_evals("tokens", "reconstruction", "matching")  # 19 contexts of 32 tokens, 16 at a time
    evaluate(sources[:2], evals, tmp_path, on_progress=lambda *progress: told.append(progress))
    first, second = map(str, sources[:2])
    assert told[:5] == [
        ("Loading the model", 0, 1),
        ("Reading held-out text", 0, 1),
        ("Gathering held-out activations", 0, 608),
        ("Gathering held-out activations", 512, 608),
        ("Gathering held-out activations", 608, 608),
    ]
    assert [(what.split(": ")[-1], done, total) for what, done, total in told[5:]] == [
        ("tokens", 0, 6),
        ("reconstruction", 1, 6),  # with the text's, two of the first SAE's three; there is nothing to match it with
        ("reconstruction", 3, 6),
        ("matching", 4, 6),
        ("Evaluated", 6, 6),
    ]
    assert [what.split(": ")[0] for what, *_ in told[6:9]] == [first, second, second]

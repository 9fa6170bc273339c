"""A second evaluation in one folder goes on with the first, or loses nothing of it unasked."""

import json

import pytest
from helpers import make_sae

from saelens_cosine.cli import main
from saelens_cosine.experiments.evaluate import run as module
from saelens_cosine.experiments.evaluate.results.earlier import PROFILE, begin, open_evaluation
from saelens_cosine.experiments.evaluate.run import SCHEMA
from saelens_cosine.experiments.evaluate.settings import EvaluationSettings
from saelens_cosine.experiments.evaluate.sources import parse_sources
from saelens_cosine.files.manifest import MANIFEST

pytestmark = pytest.mark.usefixtures("short_text")

SETTINGS = EvaluationSettings(evals=("dictionary",), tokens=600)


def document(names, settings=SETTINGS, schema=SCHEMA):
    saes = [{"arm": source.arm, "place": source.name} for source in parse_sources(names)]
    return {"schema": schema, "settings": settings.to_dict(), "saes": saes}


def lost(folder, earlier, names=("one", "two"), settings=SETTINGS):
    """What a run says that it would lose; none if it goes on."""
    (folder / MANIFEST).unlink(missing_ok=True)  # as a version wrote it that kept no list
    (folder / "evaluation.json").write_text(json.dumps(earlier))
    try:
        with open_evaluation(folder) as output:
            begin(output, SCHEMA, parse_sources(names), settings, overwrite=False)
            assert output.results == folder
    except FileExistsError as error:
        return str(error)
    return None


def test_it_goes_on_where_nothing_is_lost(tmp_path):
    assert lost(tmp_path, document(["one", "two"])) is None
    assert lost(tmp_path, document(["one"])) is None  # an interrupted run, or one SAE more
    other = EvaluationSettings(evals=("tokens", "dictionary"), tokens=600, device="cuda")
    assert lost(tmp_path, document(["one"]), settings=other) is None


@pytest.mark.parametrize(
    ("earlier", "message"),
    [
        (document(["one", "three"]), "it has the SAEs one=one, three=three, and asked for are one=one, two=two"),
        (document(["arm=one"]), "it has the SAEs arm=one"),
        (document(["one"], EvaluationSettings(evals=("dictionary",), tokens=700)), "tokens is 700 there and 600 here"),
        (
            document(["one"], EvaluationSettings(evals=("tokens",), tokens=600)),
            "it has the evals tokens, and asked for are",
        ),
        (document(["one"], schema="saelens-cosine-evaluation/1"), "its schema is saelens-cosine-evaluation/1"),
    ],
)
def test_what_would_be_lost_is_named_and_the_way_out(earlier, message, tmp_path):
    told = lost(tmp_path, earlier)
    assert message in told
    assert "--overwrite" in told


def test_versions_that_kept_no_list_wrote_no_profile(tmp_path):
    (tmp_path / "evaluation.json").write_text(json.dumps(document(["three"])))
    (tmp_path / PROFILE).write_text("mine")
    with pytest.raises(FileExistsError, match=PROFILE), open_evaluation(tmp_path) as output:
        begin(output, SCHEMA, parse_sources(["one"]), SETTINGS, overwrite=True)
    assert (tmp_path / PROFILE).read_text() == "mine"


def test_a_file_of_somebody_else_is_never_replaced(tmp_path):
    for content in ("my notes", '{"schema": "mine"}', "[]"):
        (tmp_path / "evaluation.json").write_text(content)
        with (
            pytest.raises(FileExistsError, match=r"evaluation\.json is not as this package wrote it"),
            open_evaluation(tmp_path) as output,
        ):
            begin(output, SCHEMA, parse_sources(["one"]), SETTINGS, overwrite=True)
        assert (tmp_path / "evaluation.json").read_text() == content


def test_the_command_keeps_replaces_and_goes_on(tmp_path, monkeypatch, capsys):
    for seed, name in enumerate(("one", "two")):
        sae = make_sae("cosine_topk", seed=seed, d_in=192, d_sae=64)
        metadata = sae.cfg.metadata
        metadata.model_name, metadata.hook_name, metadata.dataset_path = (
            "bundled",
            "blocks.3.hook_resid_post",
            "bundled",
        )
        sae.save_inference_model(tmp_path / name)
    out = tmp_path / "out"

    def run(*names, more=()):
        flags = ["--evals", "dictionary", "--tokens", "600", "--quiet", "--output", str(out)]
        return main(["evaluate", *(str(tmp_path / name) for name in names), *flags, *more])

    def places():
        return [sae["place"].rsplit("/")[-1] for sae in json.loads((out / "evaluation.json").read_text())["saes"]]

    assert run("one") == 0
    (out / "notes").write_text("mine")
    assert run("two") == 2
    assert "one=" in (message := capsys.readouterr().err)
    assert "--overwrite" in message
    assert run("one") == 0  # the same again
    with monkeypatch.context() as patched:
        patched.setattr(module.Evaluation, "document", lambda _found: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run("two", more=["--overwrite"])
    assert places() == ["one"]
    assert (out / "report.html").exists()
    assert run("two", more=["--overwrite"]) == 0
    assert places() == ["two"]
    good = (out / "evaluation.json").read_text()
    (out / "evaluation.json").write_text("[" * 100_000)  # no longer ours
    assert run("two") == 2
    assert "is never replaced" in capsys.readouterr().err
    (out / "evaluation.json").write_text(good)
    assert {path.name for path in out.iterdir()} == {"evaluation.json", "report.html", "measured", "notes", MANIFEST}
    assert len(list((out / "measured").iterdir())) == 2

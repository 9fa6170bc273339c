"""What the package has written beside SAEs and is damaged since: said with the file's name, and done again or without."""

import json
import math
import warnings
from dataclasses import dataclass

import pytest
from helpers import make_sae
from saved_evaluations import saved_sae, with_evals
from shared_saes import save_comparison, share

from saelens_cosine.experiments.compare.file import ComparisonFileError, comparison_beside, read_comparison
from saelens_cosine.experiments.evaluate.evals import Eval
from saelens_cosine.experiments.evaluate.results.kept import Kept, keep, read_kept
from saelens_cosine.experiments.evaluate.run import evaluate
from saelens_cosine.experiments.evaluate.sources import Source, parse_sources
from saelens_cosine.experiments.evaluate.training_log import training_log
from saelens_cosine.plain import weights_sha256
from saelens_cosine.sharing.neuronpedia import _read as read_record


@dataclass(frozen=True)
class Found:
    fve: float
    by: tuple[float, ...]


def measure(_) -> Found: ...


ROW = Eval("fve", "sae", "", measure)


def test_a_damaged_measurement_is_made_again(tmp_path):
    sae, out, settings = saved_sae(tmp_path / "sae"), tmp_path / "out", with_evals("reconstruction", "dictionary")
    found = evaluate([sae], settings, out)
    document = found.document()
    file, other = (next((out / "measured").glob(f"{name}-*.json")) for name in settings.evals)
    good, kept = json.loads(file.read_text()), other.read_bytes()
    file.write_text(file.read_text()[:100])
    with pytest.warns(UserWarning, match=rf"{file.name} is damaged .* measured again"):
        again = evaluate([sae], settings, out)
    assert again.document()["saes"][0]["results"] == document["saes"][0]["results"]
    assert json.loads(file.read_text())["result"] == good["result"]
    assert other.read_bytes() == kept


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[: len(text) // 2],
        lambda text: "[]",
        lambda text: "{}",
        lambda text: "[" * 100_000,
        lambda text: text.replace('"seconds"', '"second"'),
        lambda text: text.replace("0.5", "0.7"),
        lambda text: json.dumps({"result": {"fve": 0.5}, "seconds": 0.1}),  # of a version whose result had other fields
        lambda text: b"\xff\xfe" + text.encode(),
    ],
)
def test_what_is_kept_is_taken_only_as_it_was_written(damage, tmp_path):
    measured = Kept(Found(0.5, (1, 2)), 0.1)
    file = tmp_path / "measured" / "fve-0123.json"
    assert read_kept(file, ROW) is None
    keep(measured, file)
    assert read_kept(file, ROW) == measured
    write(file, damage(file.read_text()))
    with pytest.warns(UserWarning, match=r"fve-0123\.json is damaged .* measured again"):
        assert read_kept(file, ROW) is None


def test_what_a_version_without_checksums_kept_is_taken(tmp_path):
    measured = {"result": {"fve": 0.5, "by": [1, None]}, "seconds": 0.1}
    (tmp_path / "old.json").write_text(json.dumps(measured))
    (taken, seconds) = read_kept(tmp_path / "old.json", ROW)
    assert (taken.fve, taken.by[0], seconds) == (0.5, 1, 0.1)
    assert math.isnan(taken.by[1])


BROKEN = ["", "{", "[]", "null", "{}", '{"arms": 3}', '{"arms": [3]}', '{"arms": [{}]}', '{"arms": [{"path": 3}]}']
BROKEN += ["[" * 100_000, b"\xff\xfe\xfd"]


def write(file, text):
    file.write_bytes(text if isinstance(text, bytes) else text.encode())


@pytest.mark.parametrize("text", BROKEN, ids=range(len(BROKEN)))
def test_evaluation_goes_on_without_a_broken_comparison(text, tmp_path):
    file = tmp_path / "comparison.json"
    write(file, text)
    with pytest.raises(ComparisonFileError, match=r"comparison\.json is damaged"):
        read_comparison(file)
    places = [str(tmp_path / "b" / "seed0"), str(tmp_path / "a" / "seed0")]
    with pytest.warns(UserWarning, match=r"comparison\.json is damaged.*going on without"):
        assert [source.arm for source in parse_sources(places)] == ["b", "a"]
    with pytest.warns(UserWarning, match=r"comparison\.json is damaged.*going on without"):
        assert training_log(Source("b", 0, places[0], None), make_sae("cosine_topk")) is None


@pytest.mark.parametrize("log", [None, 3, [3], [{}], [{"training_tokens": 1, "fve": "x", "l0": 3}]])
def test_a_broken_course_of_training_is_left_out(log, tmp_path):
    sae = make_sae("cosine_topk")
    arm = {"path": "arm/seed0", "weights_sha256": weights_sha256(sae), "training_log": log}
    (tmp_path / "comparison.json").write_text(json.dumps({"arms": [arm]}))
    with pytest.warns(UserWarning, match=r"comparison\.json is damaged: the 'training_log' of arm/seed0"):
        assert training_log(Source("arm", 0, str(tmp_path / "arm" / "seed0"), None), sae) is None


def test_no_comparison_needs_no_word(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert comparison_beside(tmp_path / "comparison.json") is None


def without(*path):
    def change(comparison):
        inner = comparison
        for name in path[:-1]:
            inner = inner[name]
        del inner[path[-1]]

    return change


@pytest.mark.parametrize(
    "change",
    [
        without("settings"),
        without("high_norm_tokens"),
        without("settings", "tokens"),
        without("arms", 0, "fve"),
        without("arms", 1, "fve_by_norm_quartile"),
        lambda comparison: comparison["arms"][0].update(fve="high"),
        lambda comparison: comparison["arms"][0].update(fve_by_norm_quartile=3),
        lambda comparison: comparison.update(settings=[1]),
        lambda comparison: comparison.update(high_norm_tokens=None),
        *BROKEN,
    ],
    ids=range(9 + len(BROKEN)),
)
def test_share_names_a_broken_comparison(change, tmp_path, capsys):
    save_comparison(tmp_path / "runs")
    file = tmp_path / "runs" / "comparison.json"
    if callable(change):
        comparison = json.loads(file.read_text())
        change(comparison)
        write(file, json.dumps(comparison))
    else:
        write(file, change)
    options = ["--repo", "me/saes", "--dry-run", "--output", tmp_path / "out"]
    assert share(tmp_path / "runs", *options) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert f"{file} is damaged" in line or f"{file} has schema" in line
    assert "ove it away" in line or "ove the file away" in line
    assert not (tmp_path / "out").exists()
    file.unlink()  # the way out
    assert share(tmp_path / "runs", *options) == 0


@pytest.mark.parametrize("text", ["", "[]", "3", '{"a": 3}', "[" * 100_000])
def test_a_broken_record_of_an_upload_is_named(text, tmp_path):
    (tmp_path / "neuronpedia.json").write_text(text)
    with pytest.raises(ValueError, match=r"neuronpedia\.json is damaged"):
        read_record(tmp_path / "neuronpedia.json")

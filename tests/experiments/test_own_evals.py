"""Evals of one's own that cannot be right are refused where they are registered, and none gives another one's figures."""

import dataclasses
import json
import math
import sys

import pytest
from saved_evaluations import saved_sae

from saelens_cosine.cli import main
from saelens_cosine.experiments.evaluate.evals import EVALS, Eval, register_eval
from saelens_cosine.experiments.evaluate.evals.of_text.tokens import TokenNorms
from saelens_cosine.experiments.evaluate.results.evaluation import MeasuredText

pytestmark = pytest.mark.usefixtures("short_text")

OWN = """
from __future__ import annotations
from dataclasses import dataclass
from typing import TYPE_CHECKING
from saelens_cosine.experiments.evaluate.evals import Eval, Figure, register_eval
if TYPE_CHECKING:
    from saelens_cosine.experiments.evaluate.subject import Subject

@dataclass(frozen=True)
class Mean:
    mean: float

def measure(subject: Subject) -> Mean:
    return Mean(subject.sae.b_dec.mean().item())

def figures(result):
    yield Figure("mean", result.mean)

register_eval(Eval("own", "sae", "", measure, figures=figures))
"""


@pytest.fixture(autouse=True)
def forgotten():
    """What a test has registered is not there after it."""
    evals, modules = dict(EVALS), set(sys.modules)
    yield
    EVALS.clear()
    EVALS.update(evals)
    for name in [name for name in sys.modules if name.startswith("evals of ") and name not in modules]:
        del sys.modules[name]


@pytest.fixture
def own(tmp_path):
    """A file that registers `own`, whose measure names a type that is imported for the type checker alone."""
    file = tmp_path / "own.py"
    file.write_text(OWN)
    return file


def evaluate(tmp_path, file, *evals):
    folder = tmp_path / "sae"
    if not folder.exists():
        saved_sae(folder, bias=2.0)
    flags = ["--tokens", "600", "--context-size", "32", "--quiet", "--output", str(tmp_path / "out")]
    return main(["evaluate", str(folder), "--eval-file", str(file), "--evals", *evals, *flags])


def result_of(tmp_path):
    return json.loads((tmp_path / "out" / "evaluation.json").read_text())["saes"][0]["results"]["own"]


def measure(_) -> float:
    return 1.0


def measure_of_unknown(_) -> "Nowhere":  # noqa: F821
    return 1.0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"name": "../own"}, r"'\.\./own', must be letters, digits"),
        ({"name": '"><script>'}, "letters, digits"),
        ({"name": "own\n"}, "letters, digits"),
        ({"name": ""}, "letters, digits"),
        ({"name": "own" * 30}, "at most 64"),
        ({"of": "token"}, "of='token' of the eval 'own' is none of text, sae, arm, pair"),
        ({"uses": ("tokenz",)}, "has 'tokenz', which is no setting; there are evals, tokens"),
        ({"measure": lambda _: 1.0}, "no annotation of what its measure returns"),
        ({"measure": measure_of_unknown}, "'Nowhere' is not defined"),
    ],
)
def test_what_cannot_be_right_is_refused_where_it_is_registered(change, said):
    row = dataclasses.replace(Eval("own", "sae", "", measure), **change)
    with pytest.raises(ValueError, match=said):
        register_eval(row)
    assert row.name not in EVALS


def test_parameters_may_be_annotated_for_the_type_checker_alone(tmp_path, own):
    assert evaluate(tmp_path, own, "own") == 0
    assert result_of(tmp_path)["mean"] == pytest.approx(2, rel=1e-5)


def test_a_file_that_is_edited_while_it_runs_is_what_it_was(tmp_path, own):
    edit = f"import pathlib\npathlib.Path({str(own)!r}).write_text({OWN.replace('item()', 'item() * 3')!r})\n"
    own.write_text(OWN + edit)
    assert evaluate(tmp_path, own, "own") == 0
    assert result_of(tmp_path)["mean"] == pytest.approx(2, rel=1e-5)
    del EVALS["own"], sys.modules[f"evals of {own.resolve()}"]
    assert evaluate(tmp_path, own, "own") == 0  # the edited one
    assert result_of(tmp_path)["mean"] == pytest.approx(6, rel=1e-5)


def test_an_eval_without_a_file_is_measured_by_each_process():
    """Typed into a notebook: nothing says what it was before."""
    rows = []
    for _ in range(2):
        space = {"__name__": "typed"}
        exec("def measure(subject) -> float:\n    return 1.0", space)
        rows.append(Eval("own", "sae", "", space["measure"]))
    codes = [row.code for row in rows]
    assert all(codes)
    assert codes[0] != codes[1]
    assert [row.code for row in rows] == codes


def test_two_evals_with_a_figure_of_one_name_are_refused(tmp_path, own, capsys):
    own.write_text(OWN.replace('Figure("mean", result.mean)', 'Figure("FVE", result.mean, "with_sinks")'))
    assert evaluate(tmp_path, own, "reconstruction", "own") == 2
    said = capsys.readouterr().err
    assert "'reconstruction' and 'own' both have a figure 'FVE, sinks in'" in said


def test_a_figure_that_is_named_twice_is_refused(tmp_path, own, capsys):
    own.write_text(OWN.replace('yield Figure("mean", result.mean)', 'yield from [Figure("mean", 1.0)] * 2'))
    assert evaluate(tmp_path, own, "own") == 2
    assert "'own' has two figures 'mean'" in capsys.readouterr().err


def test_a_whole_number_is_one_in_the_document():
    norms = TokenNorms(1216, 0.5, math.nan, (), ())
    found = MeasuredText(
        results={"tokens": norms}, seconds={}, model="", hook="", head=None, dataset="", planted_sinks=False, form={}
    )
    assert json.dumps(found.document()["figures"]["tokens"]).startswith('{"tokens": 1216, "share of')
    assert found.document()["figures"]["tokens"]["their norm over the median"] is None

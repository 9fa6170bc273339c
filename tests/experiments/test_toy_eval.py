"""An eval of one's own is one file: what it measures is in the JSON, the tables, the differences and on the page."""

import dataclasses
import html
import json
import sys

import pytest
from saved_evaluations import saved_sae

from saelens_cosine.cli import main
from saelens_cosine.experiments.evaluate.evals import EVALS, RECONSTRUCTION, register_eval

pytestmark = pytest.mark.usefixtures("short_text")

TOY = '''
"""What decoder biases are on average."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from saelens_cosine.experiments.evaluate.evals import (
    BySinks,
    Eval,
    EvalSection,
    Figure,
    Shown,
    register_eval,
    tokens_of,
)
from saelens_cosine.report.chart import Axis, Chart, Plot
from saelens_cosine.report.estimate import over_seeds


@dataclass(frozen=True)
class Biases:
    mean: float
    tokens: int


def measure(subject) -> BySinks[Biases]:
    bias = subject.sae.b_dec
    return BySinks(**subject.by_treatment(lambda sample: Biases(bias.mean().item(), len(sample))))


def figures(result: BySinks[Biases]) -> Iterator[Figure]:
    for sinks, found in result.items():
        yield Figure("mean of the decoder bias", found.mean, sinks, "{:.3f}")


def charts(shown: Shown[BySinks[Biases]]) -> Iterator[Chart]:
    plot = Plot(shown.arms, Axis("seeds"), Axis("mean of the decoder bias"))
    for arm, found in shown.of(shown.treatment).items():
        plot.line(arm, [len(found)], [over_seeds([biases.mean for biases in found])])
    yield Chart("Biases by seeds", "", plot.figure)


register_eval(
    Eval(
        "biases",
        "sae",
        "what decoder biases are on average",
        measure,
        figures=figures,
        tokens=lambda result: tokens_of(result, lambda found: found.tokens),
        section=EvalSection("Biases of decoders", "What is added to every reconstruction.", charts),
        note="None of these is a score.",
    )
)
'''


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A file that registers an eval; both are forgotten after the test."""
    for name in EVALS:
        monkeypatch.setitem(EVALS, name, EVALS[name])
    file = tmp_path / "biases.py"
    file.write_text(TOY)
    yield file
    EVALS.pop("biases", None)
    for name in [name for name in sys.modules if str(file) in name]:
        del sys.modules[name]


def evaluate(tmp_path, toy, *more):
    """Two seeds of two arms whose decoder biases are 1, 2, 3 and 5 throughout."""
    saes = []
    for arm, seed, bias in (("a", 0, 1.0), ("a", 1, 2.0), ("b", 0, 3.0), ("b", 1, 5.0)):
        folder = tmp_path / "saes" / arm / f"seed{seed}"
        if not folder.exists():
            saved_sae(folder, seed=seed, bias=bias)
        saes.append(str(folder))
    flags = ["--tokens", "600", "--max-norm-multiple", "3", "--context-size", "32", "--quiet"]
    output = ["--output", str(tmp_path / "out")]
    return main(["evaluate", *saes, "--eval-file", str(toy), "--evals", "biases", *flags, *output, *more])


def test_a_toy_eval_is_in_json_table_differences_and_page(tmp_path, toy, capsys):
    assert evaluate(tmp_path, toy) == 0
    printed = " ".join(capsys.readouterr().out.split())
    document = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    figures = [entry["figures"]["biases"]["mean of the decoder bias, sinks out"] for entry in document["saes"]]
    assert figures == pytest.approx([1, 2, 3, 5], rel=1e-5)
    assert document["saes"][3]["results"]["biases"]["with_sinks"]["mean"] == pytest.approx(5, rel=1e-5)
    (found,) = (item for item in document["differences"] if item["measure"].endswith("bias, sinks in"))
    assert (found["arm"], found["baseline"], found["over"]) == ("b", "a", ["seeds"])
    assert found["difference"]["mean"] == pytest.approx(2.5, rel=1e-5)  # (3 - 1 + 5 - 2) / 2
    for told in ("1.500", "4.000", "Tokens: biases 608 (", "None of these is a score."):
        assert told in printed, told
    page = html.unescape((tmp_path / "out" / "report.html").read_text().replace("<wbr>", ""))
    assert "mean of the decoder bias, sinks in" in page
    assert "1.500" in page
    assert '<section id="section-biases"><h2>Biases of decoders</h2>' in page
    # bias 1.5 with its interval over two seeds: half their distance times Student's quantile at one degree of freedom
    chart = page.split("<figure>")[1].split("</figure>")[0]
    assert "a: 2, 1.5 (-4.853 to 7.853)" in chart


def test_an_edited_toy_eval_is_measured_again(tmp_path, toy, capsys):
    assert evaluate(tmp_path, toy) == 0
    toy.write_text(TOY.replace("bias.mean()", "(2 * bias).mean()"))
    EVALS.pop("biases")
    for name in [name for name in sys.modules if str(toy) in name]:
        del sys.modules[name]
    assert evaluate(tmp_path, toy) == 0, capsys.readouterr().err
    document = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert document["saes"][0]["results"]["biases"]["with_sinks"]["mean"] == pytest.approx(2, rel=1e-5)


def test_what_cannot_be_registered_is_said(tmp_path, toy, capsys):
    with pytest.raises(ValueError, match="There is an eval 'reconstruction' already"):
        register_eval(dataclasses.replace(RECONSTRUCTION))
    for text, said in (
        ("1 / 0", "stopped with ZeroDivisionError: division by zero"),
        ("(", "stopped with SyntaxError"),
    ):
        toy.write_text(text)
        assert evaluate(tmp_path, toy) == 2
        assert said in capsys.readouterr().err
    toy.unlink()
    assert evaluate(tmp_path, toy) == 2
    assert "biases.py is not there" in capsys.readouterr().err
    assert main(["evaluate", "anything", "--evals", "biases", "--quiet", "--output", str(tmp_path / "o")]) == 2
    assert "Unknown evaluation 'biases'; there are tokens, " in capsys.readouterr().err

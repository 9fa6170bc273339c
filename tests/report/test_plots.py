"""What an arm looks like, and where plots put lines, marks, histograms and dots."""

import ast
import math
from pathlib import Path

import pytest
from page_examples import EVIL, LINK

import saelens_cosine
from saelens_cosine.report import chart as chart_module
from saelens_cosine.report.chart import STYLES, Arms, Axis, Plot, ends, literal
from saelens_cosine.report.estimate import Estimate

ARMS = Arms(("one", "two"))


def plot() -> Plot:
    return Plot(ARMS, Axis("x"), Axis("y"))


def test_an_arm_has_the_style_of_its_number_and_further_arms_begin_again():
    arms = Arms(tuple(f"arm {i}" for i in range(len(STYLES) + 1)))
    assert arms.style("arm 1") == STYLES[1]
    assert arms.style(f"arm {len(STYLES)}") == STYLES[0]
    for of in range(4):
        assert len({style[of] for style in STYLES}) == len(STYLES) or of == 3  # dashes come twice
    with pytest.raises(ValueError, match="'three' is none of the page's arms, \\['one', 'two'\\]"):
        ARMS.number("three")


def test_ends_hold_what_is_finite():
    assert ends([1.0, math.nan, 3.0, math.inf], margin=0.1) == pytest.approx((0.8, 3.2))  # a tenth of the range
    assert ends([Estimate(2.0, 1.0, 3.0)], margin=0.1) == pytest.approx((0.8, 3.2))
    assert ends([0.0, -5.0, 1.0, 100.0], log=True, margin=0.5) == pytest.approx((0.1, 1000.0))
    assert ends([]) is None
    low, high = ends([5.0])
    assert low < 5.0 < high


def test_axes_as_plotly_takes_them():
    log = Axis("<b>", log=True, ends=(0.01, 100.0), ticks={1.0: "a & b"}).layout()
    assert (log["type"], log["range"]) == ("log", [pytest.approx(-2), pytest.approx(2)])
    assert (log["title"]["text"], log["tickvals"], log["ticktext"]) == ("&lt;b&gt;", [1.0], ["a &amp; b"])


def test_a_line_holds_values_intervals_and_gaps():
    drawn = plot()
    drawn.line("two", [1, 2, 3], [Estimate(0.5, 0.4, 0.7), math.nan, 0.25], faint=True)
    trace = drawn.figure.data[0]
    assert (list(trace.x), list(trace.y)) == ([1, 2, 3], [0.5, None, 0.25])
    assert list(trace.error_y.array) == [pytest.approx(0.2), 0, 0]
    assert list(trace.error_y.arrayminus) == [pytest.approx(0.1), 0, 0]
    assert trace.error_x.array is None
    assert trace.meta == {"arm": 1}
    assert (trace.marker.symbol, trace.line.dash) == ("square", "dash")
    assert trace.text[0] == "two: 1, 0.5 (0.4 to 0.7)"


def test_a_histogram_counts_by_hand():
    drawn = plot()
    highest = drawn.steps("one", [0.0, 0.1, 0.9, 1.0, 0.6, math.nan, 7.0], [0.0, 0.5, 1.0])
    assert highest == 0.6  # the last bin holds its upper edge; what lies outside is in none
    trace = drawn.figure.data[0]
    # hv: a step keeps its height until the next edge
    assert (list(trace.x), list(trace.y)) == ([0, 0, 0.5, 1], [0, 0.4, 0.6, 0])
    assert trace.text[1] == "one: 0 to 0.5: 40.00%"


def test_dots_are_thinned_at_even_steps_and_lead_to_features(monkeypatch):
    monkeypatch.setattr(chart_module, "MAX_DOTS", 4)
    drawn, values = plot(), [i / 10 for i in range(10)]
    shades = [0.5, 0.5, math.nan, 0.5, 0.5, 0.25, 0.5, 0.75, 0.5, 0.5]
    count = drawn.dots("two", values, values, [f"point {i}" for i in range(10)], features=range(10, 20), shades=shades)
    assert count == 4
    known, unknown = drawn.figure.data
    assert list(known.customdata) == ["1/10", "1/15", "1/17"]
    assert list(known.marker.color) == [0.5, 0.25, 0.75]
    assert list(unknown.text) == ["two: point 2"]


@pytest.mark.parametrize("text", [EVIL, LINK, "a < b & c > d", "&lt;b&gt;", "%{x}"])
def test_nothing_in_a_literal_text_is_plotlys(text):
    told = literal(text)
    assert not any(part in told for part in ("<", ">", "%{"))
    shown = told.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&").replace("\u200b", "")
    assert shown == text


def test_plotly_is_imported_where_something_is_drawn_and_not_with_a_module():
    files = Path(saelens_cosine.__file__).parent.rglob("*.py")
    top = {file.name: ast.parse(file.read_text()).body for file in files}
    imports = {name: [n for n in body if isinstance(n, ast.Import | ast.ImportFrom)] for name, body in top.items()}
    assert not [name for name, nodes in imports.items() if any("plotly" in ast.unparse(node) for node in nodes)]
    assert "plotly" in ast.unparse(ast.parse(Path(chart_module.__file__).read_text()))


def test_a_band_of_an_arm_has_its_colour_and_is_shown_and_hidden_with_it():
    drawn = plot()
    drawn.band([1, 2], [0.1, 0.2], [0.3, math.nan], "two")
    drawn.band([1, 2], [0.1, 0.2], [0.3, 0.4])
    own, none = drawn.figure.data
    assert (list(own.x), list(own.y)) == ([1, 2, 2, 1], [0.1, 0.2, None, 0.3])
    assert (own.meta, own.fillcolor) == ({"arm": 1}, STYLES[1].colour + "21")
    assert (none.meta, none.fillcolor) == (None, "#56b4e921")

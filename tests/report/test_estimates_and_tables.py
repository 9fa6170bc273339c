"""Numbers with intervals and the tables that hold them, by hand."""

import math
import re

import pytest

from saelens_cosine.report.estimate import Estimate, form_of, over_seeds, short
from saelens_cosine.report.table import Table

MARKS = {"one": "<i>1</i>", "two": "<i>2</i>"}


def cells(html: str) -> list[str]:
    return re.findall("<td[^>]*>(.*?)</td>", html)


def test_numbers_are_short():
    assert [short(v) for v in (1_500_000, 25_000, 0.25, 3e-5, math.nan)] == ["1.5M", "25k", "0.25", "3e-05", "-"]


def test_a_mean_over_seeds_has_the_interval_of_student():
    # 1, 2, 3: standard error 1 / sqrt(3), Student's quantile at two degrees of freedom 4.3027
    mean = over_seeds([1.0, 2.0, 3.0])
    assert mean.value == pytest.approx(2.0)
    assert mean.bounds == pytest.approx((2 - 4.3027 / math.sqrt(3), 2 + 4.3027 / math.sqrt(3)), abs=1e-4)
    assert over_seeds([0.5]) == Estimate(0.5)
    assert all(math.isnan(over_seeds(values).value) for values in ([], [1.0, None]))


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ([0.9, 0.95], "0.9000"),
        ([31.52, 30.0], "31.52"),
        ([67.0, 2000.0], "67"),
        ([12345.5], "12,346"),
        ([0.02, 0.0123], "0.02000"),
        ([2e-7], "2e-07"),
        ([math.nan], "0"),
    ],
)
def test_the_largest_number_of_a_kind_has_four_digits(values, told):
    form = form_of([Estimate(v) for v in values])
    assert form(0.0 if math.isnan(values[0]) else values[0]) == told


def test_an_interval_without_two_finite_ends_is_none():
    ends = ((None, None), (0.1, None), (math.nan, 1.0), (-math.inf, 1.0))
    assert [Estimate(0.5, low, high).bounds for low, high in ends] == [None] * 4
    assert str(Estimate(0.5, 0.25, 0.75)) == "0.5 (0.25 to 0.75)"
    assert (str(Estimate(0.5, math.nan)), str(Estimate(math.nan))) == ("0.5", "-")


def test_values_with_their_intervals_by_hand():
    rows = (
        ("FVE", Estimate(0.9, 0.8, 0.95), Estimate(math.nan)),
        ("seconds", Estimate(67), Estimate(1200)),
        ("a_long_name", "text", "-"),
    )
    html = Table("Comparison", ("measure", "one", "two"), rows).html(MARKS)
    shown = [re.sub('<span class="strip".*?</span>', "", cell) for cell in cells(html)]
    assert shown == ["0.9000<small>0.8000 to 0.9500</small>", "-", "67", "1,200", "text", "-"]
    assert "<i>1</i>one</th>" in html
    assert "a_<wbr>long_<wbr>name" in html
    # 0.8 to 0.95 is the row's scale, and 0.9 lies at two thirds of it
    assert re.findall('style="(.*?)"', html) == ["--at:66.7%;--low:0.0%;--high:100.0%"]


def test_differences_are_named_where_zero_is_left_out():
    intervals = [(-0.1, 0.3), (0.05, 0.15), (-0.3, -0.1), (None, None), (0.0, 0.2)]
    rows = tuple((f"m{i}", Estimate(0.1, *found)) for i, found in enumerate(intervals))
    html = Table("Differences", ("minus one", "two"), rows, differences=True).html(MARKS)
    unseen = '<span class="unseen">no difference seen</span>'
    assert cells(html) == [
        f"{unseen}<small>-0.1000 to +0.3000</small>",
        "<b>+0.1000</b><small>+0.0500 to +0.1500</small>",
        "<b>+0.1000</b><small>-0.3000 to -0.1000</small>",
        "+0.1000<small>no interval</small>",
        f"{unseen}<small>+0.0000 to +0.2000</small>",
    ]


def test_a_difference_is_written_with_digits_of_its_own():
    rows = (("KL", Estimate(-0.08, -0.15, -0.0029), Estimate(4.0, -19.09, 27.49)),)
    html = Table("Differences", ("minus one", "two", "three"), rows, differences=True).html(MARKS)
    assert cells(html)[0] == "<b>-0.0800</b><small>-0.1500 to -0.0029</small>"


def test_a_dash_stands_where_the_numbers_of_its_column_do():
    html = Table("Figures", ("figure", "one", "two"), (("a", "-", "told"), ("b", Estimate(1), "told"))).html()
    assert '<td class="number">-</td><td>told</td>' in html

"""The page as text: sections, escaping, what may run, and what is in it for those without JavaScript."""

import base64
import hashlib
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from page_examples import EVIL, chart, evil_page, page

from saelens_cosine.metrics.dictionary.features import Context, TokenValue
from saelens_cosine.report.browser import Browser, Feature
from saelens_cosine.report.chart import Arms, Axis, Chart, Plot
from saelens_cosine.report.estimate import Estimate
from saelens_cosine.report.page import Page, Section, render, write_page
from saelens_cosine.report.table import Table


class Outline(HTMLParser):
    """Tags with their attributes in order, and all text outside scripts and styles."""

    def __init__(self, html: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text, self._hidden = "", False
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self._hidden = tag in ("script", "style")

    def handle_endtag(self, tag):
        self._hidden = False

    def handle_data(self, data):
        self.text += "" if self._hidden else data

    def named(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def scripts(html: str) -> list[str]:
    return re.findall(r"<script>(.*?)</script>", html, re.DOTALL)


def one_section(*content, arms=()) -> Page:
    return Page("t", arms=Arms(arms), sections=(Section("part", "Part", "About it.", content),))


def test_a_section_is_there_exactly_if_it_has_content():
    outline = Outline(render(page()))
    there = [attributes["id"] for attributes in outline.named("section")]
    assert there == [f"section-{name}" for name in ("comparison", "saes", "charts", "features")]
    assert [attributes["href"] for attributes in outline.named("a")] == [f"#{name}" for name in there]


def test_an_empty_page_is_a_page_without_scripts():
    html = render(Page("Nothing"))
    outline = Outline(html)
    assert outline.named("section") == outline.named("fieldset") == outline.named("script") == []
    assert "Nothing" in outline.text
    assert "script-src 'none'" in html.replace("&#x27;", "'")


def test_scripts_are_those_of_what_is_shown():
    assert len(scripts(render(one_section("text")))) == 0
    assert len(scripts(render(one_section(chart(Arms(("one",))), arms=("one",))))) == 2  # plotly's and ours
    assert len(scripts(render(one_section(Browser(()))))) == 1


def test_all_text_is_escaped(tmp_path):
    html = write_page(evil_page(), tmp_path / "report.html").read_bytes().decode("utf-8")
    outline = Outline(html)
    kinds = [attributes.get("type") for attributes in outline.named("script")]
    assert kinds == ["application/json"] * 3 + [None] * 3
    assert outline.named("img") == outline.named("i") == outline.named("b") == []
    assert [attributes["href"] for attributes in outline.named("a")] == ["#section-all"]
    assert not any(name.startswith("on") for _, attributes in outline.tags for name in attributes)
    assert outline.text.count(EVIL) > 5


def test_neither_secrets_nor_places_on_this_machine_are_shown_wherever_they_are():
    token, place = "hf_abcdefghijklmnop", "/home/me/secret_project/arm"
    told = f"{place} {token}"
    arms = Arms((told,))
    plot = Plot(arms, Axis(told), Axis("y", ticks={1.0: told}))
    plot.line(told, [1], [1], [told])
    drawn = Chart(told, told, plot.figure, Table(told, (told,), ((told,),)))
    read = Feature(told, 0, 0.1, None, (Context((f" {place}",), (1.0,)),))
    html = render(Page(told, {told: told}, (told,), arms, (Section("a", told, told, (told, drawn, Browser((read,)))),)))
    assert token not in html
    assert html.count(place) == 1  # text that was read, as it is
    assert html.count("arm (hidden)") > 10


def test_only_the_pages_own_scripts_may_run_and_nothing_may_be_fetched():
    html = render(page())
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', html)[1].replace("&#x27;", "'")
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts(html)]
    assert rules == {
        "default-src": "'none'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "style-src": "'unsafe-inline'",
        "img-src": "data: blob:",
        "script-src": " ".join(f"'sha256-{digest}'" for digest in hashes),
    }
    outline = Outline(html)
    places = [a[name] for _, a in outline.tags for name in ("src", "href", "action", "srcset") if name in a]
    assert all(place.startswith(("#", "data:")) for place in places)
    assert "\r" not in html  # a browser would hash another text


def test_numbers_of_a_chart_are_there_without_javascript():
    html = render(one_section(chart(Arms(("one",)), "A note."), arms=("one",)))
    figure = re.search("<figure>(.*?)</figure>", html, re.DOTALL)[1]
    assert "<noscript>The chart needs JavaScript. Its numbers are below.</noscript>" in figure
    assert "1.500<small>1.000 to 2.000</small>" in figure
    assert "A note." in figure


def test_what_is_not_finite_is_drawn_nowhere():
    bad, values = Estimate(0.5, -math.inf, math.nan), [math.nan, math.inf, -math.inf, 0.0]
    plot = Plot(Arms(("one",)), Axis("x"), Axis("y", log=True))
    plot.line("one", values, [bad, Estimate(math.nan, 0.1, 0.2), Estimate(1.0, 0.5, math.inf), 1.0])
    plot.steps("one", values, [0.0, 1.0])
    plot.dots("one", values, values, [""] * 4, shades=values)
    plot.band([0, 1], values[:2], [1, math.nan])
    html = render(one_section(Chart("t", "", plot.figure), arms=("one",)))
    found = json.loads(re.search(r'<script type="application/json">(.*?)</script>', html)[1])
    assert not re.search("nan|inf(?!o)", json.dumps(found).lower())


def test_features_are_packed_without_loss_beyond_three_digits():
    contexts = (Context((" a", "b", " a"), (0.0, 12.3456, -0.5)), Context(("b",), (3.0,)))
    feature = Feature("y", 9, 0.123456, 0.123456, contexts, (TokenValue("b", math.nan),))
    html = render(one_section(Browser((feature,)), arms=("x", "y")))
    assert json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', html)[1]) == {
        "arms": ["x", "y"],
        "tokens": ["b", " a"],
        "features": [[1, 9, 0.123, 0.1235, [[[1, 0, 1], [1, 2], [12.3, -0.5]], [[0], [0], [3]]], [[0, 0]], []]],
    }


def test_a_failed_write_leaves_the_old_page(tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    write_page(Page("old"), path)
    assert [item.name for item in tmp_path.iterdir()] == ["report.html"]

    def half(self, content):
        with open(self, "wb") as file:
            file.write(content[:100])
        raise OSError("disk full")

    monkeypatch.setattr(Path, "write_bytes", half)
    with pytest.raises(OSError, match="disk full"):
        write_page(Page("new"), path)
    assert "<title>old</title>" in path.read_text()

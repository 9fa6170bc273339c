"""A page: sections of charts, tables and text, and everything that they need, in one file."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from html import escape
from importlib.resources import files
from itertools import groupby
from pathlib import Path

from saelens_cosine.files.secrets import published
from saelens_cosine.files.whole import whole_file
from saelens_cosine.report.browser import Browser, json_for_script
from saelens_cosine.report.chart import STYLES, Arms, Chart
from saelens_cosine.report.table import Table, breakable, public

NO_SCRIPT = " 'none'"

LONG = 80
"""Characters above which a fact gets lines of its own."""


@dataclass(frozen=True)
class Section:
    """
    A part of a page. One without content is left out.

    Args:
        id (str): Its place in the page's address, after `#section-`: letters, digits, dashes and underscores.
        heading (str): Above it and among the links.
        about (str): What is shown, in a sentence or two.
        content (tuple[Chart | Table | Browser | str, ...]): In order; texts are paragraphs, and charts beside each other share rows.
    """

    id: str
    heading: str
    about: str
    content: tuple[Chart | Table | Browser | str, ...]


@dataclass(frozen=True)
class Page:
    """
    What a reader gets.

    Args:
        title (str): Heading of the page.
        facts (Mapping[str, str]): What must be known to judge its numbers.
        warnings (tuple[str, ...]): Shown above everything, in red.
        arms (Arms): What is compared; boxes at the top show and hide each in all charts.
        sections (tuple[Section, ...]): In order.
        made (Mapping[str, str]): How it was made, folded away.
    """

    title: str
    facts: Mapping[str, str] = field(default_factory=dict[str, str])
    warnings: tuple[str, ...] = ()
    arms: Arms = field(default_factory=Arms)
    sections: tuple[Section, ...] = ()
    made: Mapping[str, str] = field(default_factory=dict[str, str])


def write_page(page: Page, path: str | Path) -> Path:
    """Write a page whole or not at all, and return its path."""
    target = Path(path)
    with whole_file(target) as unfinished:
        # a lone surrogate, which JSON can hold and UTF-8 cannot, becomes a replacement character in the browser
        unfinished.write_bytes(render(page).encode("utf-8", "xmlcharrefreplace"))
    return target


def render(page: Page) -> str:
    """The page's HTML. All text is escaped, no other script than the page's own may run, and nothing may be fetched."""
    sections = [section for section in page.sections if section.content]
    content = [item for section in sections for item in section.content]
    assets = files(__package__ or "")
    scripts: list[str] = []
    if any(isinstance(item, Chart) for item in content):
        from plotly.offline import get_plotlyjs

        scripts += [get_plotlyjs(), assets.joinpath("charts.js").read_text("utf-8")]
    if any(isinstance(item, Browser) for item in content):
        scripts.append(assets.joinpath("browser.js").read_text("utf-8"))
    hashes = "".join(f" 'sha256-{base64.b64encode(hashlib.sha256(s.encode()).digest()).decode()}'" for s in scripts)
    policy = (
        "default-src 'none'; base-uri 'none'; form-action 'none'; style-src 'unsafe-inline'; img-src data: blob:; "
        f"script-src{hashes or NO_SCRIPT}"
    )
    marks = {name: _mark(i) for i, name in enumerate(page.arms.names)}
    links = "".join(f'<a href="#section-{section.id}">{public(section.heading)}</a>' for section in sections)
    body = "".join(_section(section, page.arms, marks) for section in sections)
    facts, made = ("".join(_fact(*item) for item in found.items()) for found in (page.facts, page.made))
    folded = f'<details><summary>How it was made</summary><dl class="facts">{made}</dl></details>' if made else ""
    lines = "".join(f"<li>{public(line)}</li>" for line in page.warnings)
    warnings = f'<ul class="warning" role="alert">{lines}</ul>' if lines else ""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(policy)}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f'<meta name="color-scheme" content="light dark"><title>{public(page.title)}</title>'
        f"<style>{_colours()}{assets.joinpath('page.css').read_text('utf-8')}</style></head><body>"
        f'<header><h1>{public(page.title)}</h1>{warnings}<dl class="facts">{facts}</dl>{folded}</header>'
        f'<div class="top"><nav aria-label="Sections">{links}</nav>{_legend(page.arms, marks)}</div><main>{body}</main>'
        f"{''.join(f'<script>{script}</script>' for script in scripts)}</body></html>\n"
    )


def _colours() -> str:
    """Of the arms on light paper, and a class for each that says which is its own."""
    light = "".join(f"--s{i}:{style.colour};" for i, style in enumerate(STYLES))
    return f":root{{{light}}}" + "".join(f".s{i}{{--c:var(--s{i})}}" for i in range(len(STYLES)))


def _mark(arm: int) -> str:
    i = arm % len(STYLES)
    return f'<span class="key s{i}" aria-hidden="true">{STYLES[i].mark}</span>'


def _fact(name: str, value: str) -> str:
    kind = ' class="long"' if len(value) > LONG else ""
    return f"<div{kind}><dt>{public(name)}</dt><dd>{public(value)}</dd></div>"


def _legend(arms: Arms, marks: Mapping[str, str]) -> str:
    boxes = "".join(
        f'<label><input type="checkbox" id="show{i}" checked>{marks[name]}<span>{public(name)}</span></label>'
        for i, name in enumerate(arms.names)
    )
    return f'<fieldset class="legend"><legend>Arms shown</legend>{boxes}</fieldset>' if boxes else ""


def _section(section: Section, arms: Arms, marks: Mapping[str, str]) -> str:
    parts: list[str] = []
    for charts, items in groupby(section.content, lambda item: isinstance(item, Chart)):
        drawn = "".join(_content(item, arms, marks) for item in items)
        parts.append(f'<div class="figures">{drawn}</div>' if charts else drawn)
    return (
        f'<section id="section-{escape(section.id)}"><h2>{public(section.heading)}</h2>'
        f'<p class="about">{public(section.about)}</p>{"".join(parts)}</section>'
    )


def _content(item: Chart | Table | Browser | str, arms: Arms, marks: Mapping[str, str]) -> str:
    if isinstance(item, str):
        return f"<p>{public(item)}</p>"
    if isinstance(item, Table):
        return item.html(marks)
    return item.html(arms) if isinstance(item, Browser) else _chart(item, marks)


def _chart(chart: Chart, marks: Mapping[str, str]) -> str:
    figure = published(json.loads(str(chart.figure.to_json())))  # what is not finite is null there
    figure["layout"].pop("template", None)  # the page's own look
    table = f"<details><summary>Numbers</summary>{chart.table.html(marks)}</details>" if chart.table else ""
    told = " Its numbers are below." if chart.table else ""
    return (
        f"<figure><figcaption><strong>{breakable(chart.title)}</strong> {public(chart.note)}</figcaption>"
        f'<div class="chart" role="group" aria-label="{public(chart.title)}" style="height:{chart.height}px">'
        f"<noscript>The chart needs JavaScript.{told}</noscript></div>"
        f'<script type="application/json">{json_for_script(figure)}</script>{table}</figure>'
    )

"""The page: sections around the charts, the feature browser's data, and everything they need in one file."""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

from saelens_cosine.files.whole import whole_file
from saelens_cosine.metrics.norms.norm_response import SCALING_NOTE
from saelens_cosine.metrics.reconstruction.loss_recovered import CE_NOTE
from saelens_cosine.report.html import charts, norm_charts, tables
from saelens_cosine.report.html.data import Difference, Estimate, ReportData
from saelens_cosine.report.html.svg import STYLES, Axis, breakable, key_mark, style


class _Section(NamedTuple):
    id: str
    heading: str
    explanation: str
    content: str


def write_report(data: ReportData, path: str | Path) -> Path:
    """Write `report.html` whole or not at all, and return its path."""
    target = Path(path)
    with whole_file(target) as unfinished:
        # a lone surrogate, which JSON can hold and UTF-8 cannot, becomes a replacement character in the browser
        unfinished.write_bytes(render(data).encode("utf-8", "xmlcharrefreplace"))
    return target


def render(data: ReportData) -> str:
    """The page's HTML. All text is escaped, no other script than the page's own may run, and nothing may be fetched."""
    assets = files(__package__ or "")
    script, css = (assets.joinpath(name).read_text("utf-8") for name in ("browser.js", "page.css"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{digest}'"
    sections = [section for section in _sections(data) if section.content]
    links = "".join(f'<a href="#{section.id}">{escape(section.heading)}</a>' for section in sections)
    body = "".join(
        f'<section id="{section.id}"><h2>{escape(section.heading)}</h2><p class="about">{escape(section.explanation)}</p>'
        f"{section.content}</section>"
        for section in sections
    )
    facts = "".join(
        f"<div{tables.is_long(value)}><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>"
        for name, value in data.facts.items()
    )
    lines = "".join(f"<li>{escape(line)}</li>" for line in data.not_finite)
    warning = (
        f'<div class="warning" role="alert">Not finite: figures of these are missing.<ul>{lines}</ul></div>'
        if lines
        else ""
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(policy)}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f'<meta name="color-scheme" content="light dark"><title>{escape(data.title)}</title>'
        f"<style>{css}{_hiding(data)}</style></head><body>"
        f'<header><h1>{escape(data.title)}</h1>{warning}<dl class="facts">{facts}</dl></header>'
        f'<nav aria-label="Sections">{links}</nav>{_legend(data)}<main>{body}</main>'
        f'<div id="tip" role="tooltip" hidden></div>{_browser_data(data)}<script>{script}</script></body></html>\n'
    )


def _legend(data: ReportData) -> str:
    boxes = "".join(
        f'<label><input type="checkbox" id="show{i}" checked>{key_mark(i)}<span>{escape(name)}</span></label>'
        for i, name in enumerate(data.arm_names())
    )
    return f'<fieldset class="legend"><legend>Arms shown</legend>{boxes}</fieldset>' if boxes else ""


def _hiding(data: ReportData) -> str:
    """A rule for each arm's box. Arms beyond the styles share one with an earlier arm, and go when both boxes are off."""
    arms = range(len(data.arm_names()))
    return "".join(
        f"body{''.join(f':has(#show{arm}:not(:checked))' for arm in arms if arm % STYLES == i)} .chart .s{i}"
        "{display:none}"
        for i in range(min(STYLES, len(arms)))
    )


def _sections(data: ReportData) -> Iterable[_Section]:
    ce = f" {CE_NOTE}" if any("CE recovered" in name for arm in data.arms for name in arm.metrics) else ""
    yield _Section(
        "comparison",
        "Comparison",
        f"Each value with its interval below it, drawn on a scale of its column's own.{ce}",
        _comparison(data),
    )
    yield _Section(
        "differences",
        "Differences",
        "Paired differences with their intervals. Where an interval contains zero, no difference was seen.",
        _differences(data),
    )
    yield _Section(
        "saes",
        "SAEs",
        "What each one is, as its metadata say; a dash where they say nothing.",
        tables.saes(data),
    )
    yield _charts("curves", "Learning curves", "Measured during training.", charts.learning_curves(data))
    yield _charts(
        "exponents",
        "Exponents",
        "A score grows with the activation's norm to the power a: 0 is cosine, 1 the inner product.",
        charts.exponents(data),
    )
    yield _charts(
        "norms",
        "FVE by norm",
        "Quartiles of the activation's norm, smallest first, each about its own mean: compare arms within a quartile. "
        "High-norm tokens are attention sinks above all; a lead that is there only with them is a lead on sinks.",
        norm_charts.norm_quartiles(data),
    )
    yield _charts(
        "zf",
        "ZF plot",
        "Norm of the codes, b_dec left out, against that of what they stand for, x - b_dec. On the dashed line they are equal. "
        "Bands: ε(h - 1) up to 0.25, 0.5 and 1.",
        norm_charts.zf_plots(data),
    )
    yield _charts(
        "scaling",
        "Scaled tokens",
        f"Features active at a token and at the scaled one by those active at either. {SCALING_NOTE}",
        norm_charts.scale_responses(data),
    )
    yield _charts(
        "probing", "Probing", "Accuracy of linear probes on the best k features of each task.", charts.probing(data)
    )
    yield _charts(
        "precision",
        "Ablation precision",
        "The features most specific to a concept are ablated: effect where the concept is, over effect elsewhere.",
        charts.precision(data),
    )
    yield _charts(
        "matches",
        "Matched features",
        "Each feature of one arm with the best counterpart in the other. A match has both numbers high.",
        charts.matched(data),
    )
    yield _Section(
        "figures",
        "All figures",
        "Every eval that ran, means over an arm's seeds. Those of the text have no arm.",
        tables.listed(data),
    )
    yield _Section(
        "features",
        "Features",
        "Contexts in which each feature is largest. Search for text that it fires on, or for #number.",
        _browser(data),
    )


def _charts(name: str, heading: str, explanation: str, figures: list[str]) -> _Section:
    content = f'<div class="figures">{"".join(figures)}</div>' if figures else ""
    return _Section(name, heading, explanation, content)


def _comparison(data: ReportData) -> str:
    names = list(dict.fromkeys(name for arm in data.arms for name in arm.metrics))
    if not names:
        return ""
    columns = {name: [arm.metrics[name] for arm in data.arms if name in arm.metrics] for name in names}
    forms = {name: _form(estimates) for name, estimates in columns.items()}
    scales = {  # of columns with intervals: a point alone says no more than its number
        name: charts.axis("", charts.ends(estimates))
        for name, estimates in columns.items()
        if any(e.bounds for e in estimates)
    }
    rows: list[str] = []
    for i, arm in enumerate(data.arms):
        estimates = [arm.metrics.get(name, Estimate(math.nan)) for name in names]
        cells = [_cell(e, forms[name], scales.get(name), i) for name, e in zip(names, estimates, strict=True)]
        below = f"<small>{breakable(arm.architecture)}</small>" if arm.architecture not in ("", arm.name) else ""
        rows.append(f'<tr><th scope="row">{key_mark(i)}{breakable(arm.name)}{below}</th>{"".join(cells)}</tr>')
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in ["arm", *names])
    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="Comparison of the arms"><table class="comparison">'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _cell(estimate: Estimate, form: Callable[[float], str], scale: Axis | None, arm: int) -> str:
    """A value, its interval in numbers, and both on the scale of their column."""
    if not math.isfinite(estimate.value):
        return "<td>-</td>"
    numbers, line = form(estimate.value), ""
    if estimate.bounds:
        low, high = estimate.bounds
        numbers += f"<small>{form(low)} to {form(high)}</small>"
        line = f'<path d="M{scale.place(low) * 90:.1f},6H{scale.place(high) * 90:.1f}"/>' if scale else ""
    strip = (
        f'<svg class="strip {style(arm)}" viewBox="0 0 90 12" aria-hidden="true">{line}'
        f'<circle cx="{scale.place(estimate.value) * 90:.1f}" cy="6" r="3.5"/></svg>'
        if scale
        else ""
    )
    return f"<td>{numbers}{strip}</td>"


def _form(estimates: Iterable[Estimate], sign: str = "") -> Callable[[float], str]:
    """As many decimals for a column as give its largest value four digits, at most four, and none to whole numbers."""
    values = [abs(number) for number in charts.ends(estimates) if number is not None and math.isfinite(number)]
    whole = all(v == int(v) for v in values)
    decimals = 0 if whole else min(4, max(0, 3 - math.floor(math.log10(max(values)))))
    return f"{{:{sign},.{decimals}f}}".format


def _differences(data: ReportData) -> str:
    """A table for each arm that others are compared with: a row per measure, a column per arm."""
    baselines = dict.fromkeys(item.baseline for item in data.differences)
    found = "".join(
        _differences_to(baseline, [item for item in data.differences if item.baseline == baseline], data)
        for baseline in baselines
    )
    return found + "".join(f"<p>{escape(line)}</p>" for line in data.about_differences)


def _differences_to(baseline: str, found: list[Difference], data: ReportData) -> str:
    order = data.arm_names()
    arms = sorted(dict.fromkeys(item.arm for item in found), key=order.index)
    by_cell = {(item.metric, item.arm): item.difference for item in found}
    rows: list[str] = []
    for metric in dict.fromkeys(item.metric for item in found):
        form = _form([by_cell[metric, arm] for arm in arms if (metric, arm) in by_cell], sign="+")
        cells = "".join(_difference(by_cell.get((metric, arm)), form) for arm in arms)
        rows.append(f'<tr><th scope="row">{breakable(metric)}</th>{cells}</tr>')
    heads = "".join(f'<th scope="col">{key_mark(order.index(arm))}{breakable(arm)}</th>' for arm in arms)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="Differences to {escape(baseline)}">'
        f'<table class="differences"><thead><tr><th scope="col">minus {breakable(baseline)}</th>{heads}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _difference(estimate: Estimate | None, form: Callable[[float], str]) -> str:
    if estimate is None or not math.isfinite(estimate.value):
        return "<td>-</td>"
    if estimate.bounds is None:
        return f"<td>{form(estimate.value)}<small>no interval</small></td>"
    low, high = estimate.bounds
    seen = low > 0 or high < 0
    told = f"<b>{form(estimate.value)}</b>" if seen else '<span class="unseen">no difference seen</span>'
    return f"<td>{told}<small>{form(low)} to {form(high)}</small></td>"


def _browser(data: ReportData) -> str:
    if not data.features:
        return ""
    numbers = {name: i for i, name in enumerate(data.arm_names())}
    arms = dict.fromkeys(feature.arm for feature in data.features)
    options = "".join(f'<option value="{numbers[arm]}">{escape(arm)}</option>' for arm in arms)
    arm = f'<label>Arm<select id="arm"><option value="">all</option>{options}</select></label>' if len(arms) > 1 else ""
    sorts = ("best match", "number", "density", "exponent", "largest code")
    sort = "".join(f"<option>{escape(name)}</option>" for name in sorts)
    return (
        f'<div class="figures">{"".join(charts.densities(data))}</div>'
        '<noscript><p class="about">The feature browser needs JavaScript; everything above does not.</p></noscript>'
        '<form id="controls" role="search" aria-label="Features">'
        '<label class="wide">Search<input id="query" type="search" autocomplete="off" spellcheck="false" '
        'placeholder="import, #12 …"></label>'
        f'{arm}<label>Sort by<select id="sort">{sort}</select></label>'
        '<label class="check"><input id="anywhere" type="checkbox">also where it is not active</label></form>'
        '<p id="found" role="status"></p><div class="browser"><div id="results"><ol id="list"></ol>'
        '<button id="more" type="button" hidden>Show more</button></div>'
        '<article id="feature" tabindex="-1" aria-label="Chosen feature"></article></div>'
    )


def _browser_data(data: ReportData) -> str:
    """Features for the script: every token once, contexts as numbers of tokens, and only the codes that are not zero."""
    if not data.features:
        return ""
    counts: Counter[str] = Counter()
    for feature in data.features:
        for context in feature.contexts:
            counts.update(context.tokens)
        counts.update(item.token for item in (*feature.promotes, *feature.suppresses))
    tokens = [token for token, _ in counts.most_common()]  # frequent ones get short numbers
    number = {token: i for i, token in enumerate(tokens)}
    arms = data.arm_names()
    arm_number = {name: i for i, name in enumerate(arms)}
    packed: list[Any] = []
    for feature in data.features:
        contexts: list[Any] = []
        for context in feature.contexts:
            active = [(i, _rounded(v)) for i, v in enumerate(context.values) if v and math.isfinite(v)]
            contexts.append([[number[t] for t in context.tokens], [i for i, _ in active], [v for _, v in active]])
        logits = [[[number[t], _rounded(v)] for t, v in end] for end in (feature.promotes, feature.suppresses)]
        exponent = feature.exponent if feature.exponent is not None and math.isfinite(feature.exponent) else None
        density = feature.density if math.isfinite(feature.density) else 0
        packed.append(
            [
                arm_number[feature.arm],
                feature.index,
                _rounded(density),
                None if exponent is None else round(exponent, 4),
                contexts,
                *logits,
            ]
        )
    text = json.dumps({"arms": arms, "tokens": tokens, "features": packed}, separators=(",", ":"), allow_nan=False)
    return f'<script type="application/json" id="data">{text.replace("<", chr(92) + "u003c")}</script>'


def _rounded(value: float) -> float:
    """Three digits; a whole number without its `.0`."""
    rounded = float(f"{value:.3g}") if math.isfinite(value) else 0.0
    return int(rounded) if rounded.is_integer() else rounded

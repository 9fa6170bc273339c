"""The page of an evaluation, `report.html`: tables of what was found, and the charts that each eval draws.

Numbers are means over an arm's seeds with 95 % intervals; points, histograms, matched features and the browser are its first
seed's.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from saelens_cosine.experiments.evaluate.evals import EVALS, TREATMENTS, EvalSection, NotMeasured, Shown, Treatment
from saelens_cosine.experiments.evaluate.evals.of_text.tokens import TokenNorms
from saelens_cosine.experiments.evaluate.page_matched import matched_section
from saelens_cosine.experiments.evaluate.results.evaluation import Evaluation, MeasuredSAE
from saelens_cosine.experiments.evaluate.results.listing import (
    about_differences,
    columns,
    in_condition,
    left_out,
    not_finite,
    notes,
    of_arms,
    of_texts,
    rows,
    summary,
    text_names,
    tokens_measured,
)
from saelens_cosine.metrics.intervals import Difference
from saelens_cosine.report.browser import Browser
from saelens_cosine.report.chart import Arms, Axis, Chart, Plot, ends
from saelens_cosine.report.estimate import Estimate, numbers, short
from saelens_cosine.report.page import Page, Section
from saelens_cosine.report.table import Table


def evaluation_page(found: Evaluation) -> Page:
    """Everything that an evaluation has found."""
    bad = [f"{item.arm}, seed {item.seed}, {item.eval}: {item.bad:,} not finite" for item in not_finite(found)]
    arms = Arms(tuple(found.arms))
    evals = list(_evals(found, arms))
    browsers = [section for section in evals if any(isinstance(item, Browser) for item in section.content)]
    several = any(len(entries) > 1 for part in found.by_condition.values() for entries in part.arms.values())
    seeds = "Means over an arm's seeds" + (", with their 95 % intervals." if several else ", of which each has one.")
    sections = (
        Section("comparison", "Comparison", " ".join([seeds, *notes(found.saes)]), tuple(_comparison(found))),
        Section(
            "matched",
            "Matched",
            "A point for each k, means over seeds in bands of their 95 % intervals. The tables: each arm, read off its own curve between "
            f"its ks, where it has the FVE or the L0 that {found.baseline} has at one of its ks, minus {found.baseline} there.",
            tuple(matched_section(found, arms, _treatment(found))),
        ),
        Section(
            "differences",
            "Differences",
            "Paired differences with their intervals. Where an interval contains zero, no difference was seen.",
            (*_differences(found), *about_differences(found)) if found.differences else (),
        ),
        Section(
            "saes",
            "SAEs",
            "What each one is, as its metadata say; a dash where they say nothing.",
            tuple(_saes(found)),
        ),
        Section(
            "curves",
            "Learning curves",
            "Measured on batches during training. BatchTopK keeps k features for each token of a batch on average, so that L0 is k there; "
            "saved, it has a threshold, and the L0 of the comparison is what that lets pass.",
            tuple(
                chart
                for condition, part in found.by_condition.items()
                for chart in _learning_curves(part, condition, arms)
            ),
        ),
        *(section for section in evals if section not in browsers),
        Section(
            "figures",
            "All figures",
            "Every eval that ran, means over an arm's seeds. Those of the text have no arm.",
            tuple(_figures(found)),
        ),
        *browsers,
    )
    warnings = ("Not finite: figures of these are missing.", *bad) if bad else ()
    return Page("Evaluation of sparse autoencoders", _facts(found), warnings, arms, sections, _made(found))


def _evals(found: Evaluation, arms: Arms) -> Iterator[Section]:
    """What evals draw, in their order, each of all conditions."""
    browsed = _browsed(found)
    for name, row in EVALS.items():
        if row.section:
            content = [
                _of_condition(item, condition, condition == browsed)
                for condition, part in found.by_condition.items()
                for item in _drawn(name, row.section, part, arms)
                if condition == browsed or not isinstance(item, Browser)
            ]
            yield Section(name, row.section.heading, row.section.about, tuple(content))


def _drawn(name: str, section: EvalSection[Any], found: Evaluation, arms: Arms) -> Iterable[Chart | Browser]:
    """What an eval draws of one condition."""
    of = {arm: [entry.results.get(name) for entry in entries] for arm, entries in found.arms.items()}
    measured = {
        arm: [result for result in results if result is not None and not isinstance(result, NotMeasured)]
        for arm, results in of.items()
    }
    results = {arm: of for arm, of in measured.items() if of}
    return section.draw(Shown(arms, results, found.baseline, _treatment(found))) if results else ()


def _browsed(found: Evaluation) -> str:
    """The condition whose features the page's one browser shows: the middle one."""
    conditions = list(found.by_condition)
    return conditions[len(conditions) // 2]


def _of_condition(item: Chart | Browser, condition: str, browsed: bool) -> Chart | Browser:
    """A chart under the name of its condition; its points open features in the browser if that shows these."""
    if isinstance(item, Browser):
        return item
    if not browsed:
        item.figure.update_traces(customdata=None)
    return replace(item, title=in_condition(item.title, condition))


def _treatment(found: Evaluation) -> Treatment:
    return "with_sinks" if found.settings.sinks == "keep" else "without_sinks"


def _comparison(found: Evaluation) -> Iterator[Table]:
    """A table for each condition: a row for each measure, a column for each arm."""
    for condition, part in found.by_condition.items():
        arms = {arm: summary(entries) for arm, entries in part.arms.items()}
        table = [(title, *(of.get(title, "-") for of in arms.values())) for title in columns(part.saes)]
        if table:
            yield Table(
                in_condition("Comparison of the arms", condition), (in_condition("measure", condition), *arms), table
            )


def _differences(found: Evaluation) -> Iterator[Table]:
    """A table for each condition: a row for each measure and what its interval is over, a column for each arm."""
    by_condition: dict[str, dict[str, dict[str, Estimate]]] = {}
    for item in found.differences:
        of: Difference = item.difference
        over = f"{item.counted}: {of.no_interval}" if of.no_interval else item.counted
        by_row = by_condition.setdefault(item.condition, {})
        by_row.setdefault(f"{item.measure} ({over})", {})[item.arm] = Estimate(of.mean, of.low, of.high)
    for condition, by_row in by_condition.items():
        arms = [arm for arm in found.arms if any(arm in cells for cells in by_row.values())]
        table = [(measure, *(cells.get(arm, "-") for arm in arms)) for measure, cells in by_row.items()]
        heads = (in_condition(f"minus {found.baseline}", condition), *arms)
        yield Table(in_condition(f"Differences to {found.baseline}", condition), heads, table, differences=True)


def _saes(found: Evaluation) -> Iterator[Table | str]:
    """A row for each SAE; what is the same of all of them is told once."""
    saes = [_sae(entry) for entry in found.saes]
    each = {"arm", "condition", "seed", "place", "sha256"}
    same = [name for name in saes[0] if len({sae[name] for sae in saes}) == 1 and len(saes) > 1 and name not in each]
    if same:
        yield f"The same of all: {'; '.join(f'{name} {saes[0][name]}' for name in same)}."
    own = [name for name in saes[0] if any(sae[name] for sae in saes)]
    heads = [name for name in own if name not in same]
    yield Table("What each SAE is", heads, [[sae[name] for name in heads] for sae in saes])


def _sae(entry: MeasuredSAE) -> dict[str, str]:
    """What an SAE is; a dash for what is not known."""
    found = entry.trained
    filtered = "-"
    if found["filtered"]:
        multiple, share = found["max_norm_multiple"], found["high_norm_share_dropped"]
        dropped = "" if share is None else f": {share:.2%} of the tokens dropped"
        filtered = "none" if multiple is None else f"above {multiple:g} times the median{dropped}"
    return {
        "arm": entry.arm,
        "condition": entry.condition,
        "seed": str(entry.seed),
        "architecture": entry.architecture,
        "trained as": found["training_architecture"] or "-",
        "features": f"{found['d_sae']:,}",
        "selector": ", ".join(f"{name} = {value:g}" for name, value in found["selector"].items()) or "-",
        "training tokens": "-" if found["tokens"] is None else f"{found['tokens']:,}",
        "learning rate": "-" if found["lr"] is None else f"{found['lr']:g}",
        "recipe": found["recipe"] or "-",
        "norm filter in training": filtered,
        "text": "held out" if entry.held_out else "maybe trained on",
        "place": entry.place,
        "sha256": entry.sha256[:12],
    }


def _learning_curves(found: Evaluation, condition: str, arms: Arms) -> Iterator[Chart]:
    """A chart for each measure; its axis holds what follows the first tenth of training, and zooms out to all."""
    logs = {arm: [entry.training for entry in entries if entry.training] for arm, entries in found.arms.items()}
    several = any(len(of) > 1 for of in logs.values())
    for label, field in (("FVE", "fve"), ("L0", "l0")):
        curves = [(arm, _known(log["training_tokens"]), _known(log[field])) for arm, of in logs.items() for log in of]
        end = max(numbers(t for _, tokens, _ in curves for t in tokens), default=None)
        if end is None:
            continue
        late = [v for _, tokens, values in curves for t, v in zip(tokens, values, strict=True) if t >= end / 10]
        plot = Plot(arms, Axis("training tokens", ends=(0, end * 1.02)), Axis(label, ends=ends(late)))
        for arm, tokens, values in curves:
            tips = [f"{label} {v:.4g} after {short(t)} tokens" for t, v in zip(tokens, values, strict=True)]
            plot.line(arm, tokens, values, tips, marked=False, faint=len(logs[arm]) > 3)
        table = [(arm, short(tokens[-1]), Estimate(values[-1])) for arm, tokens, values in curves if tokens]
        note = "One line for each seed." if several else ""
        ended = Table(f"{label} at the end of training", ("arm", "tokens", label), table)
        yield Chart(in_condition(label, condition), note, plot.figure, ended)


def _known(values: Iterable[float | None]) -> list[float]:
    """NaN for what is not known."""
    return [math.nan if value is None else value for value in values]


def _figures(found: Evaluation) -> Iterator[Table]:
    """Figures of texts in one table and those of each condition's arms in another, rows by eval; what did not apply below."""
    of_conditions = {condition: of_arms(part) for condition, part in found.by_condition.items()}
    for condition, by_name in [("", of_texts(found)), *of_conditions.items()]:
        if listed := list(rows(by_name, found.settings.evals)):
            table = [
                (name, figure, *("-" if value is None else Estimate(value) for value in values))
                for name, figure, values in listed
            ]
            label = in_condition(f"Figures of {', '.join(by_name)}", condition)
            yield Table(label, ("eval", in_condition("figure", condition), *by_name), table)
    if refused := left_out(found):
        yield Table("Left out", ("eval", "of", "reason"), [tuple(item) for item in refused])


def _facts(found: Evaluation) -> dict[str, str]:
    settings, texts, parts = found.settings, found.texts, found.by_condition
    seeds = sorted({len(entries) for part in parts.values() for entries in part.arms.values()})
    untold = dict.fromkeys(entry.arm for entry in found.saes if not entry.held_out)
    facts = {
        "model and hook": "; ".join(dict.fromkeys(f"{text.model} at {text.hook}" for text in texts)),
        "text": "; ".join(dict.fromkeys(text.dataset for text in texts)),
        "held out from training": f"not known of {', '.join(untold)}" if untold else "yes",
        "tokens": "; ".join(f"{name} {count}" for name, count in tokens_measured(found.saes).items())
        or "none measured by an SAE",
        "seeds": " to ".join(map(str, dict.fromkeys((seeds[0], seeds[-1]))))
        + " of each arm"
        + (f" in each of {len(parts)} conditions" if len(parts) > 1 else ""),
        "high-norm tokens (sinks)": f"above {settings.max_norm_multiple:g} times the median norm; "
        + {"keep": "kept", "drop": "left out", "both": "shown with and without"}[settings.sinks]
        + ("; planted in each context" if any(text.planted_sinks for text in texts) else ""),
    }
    if settings.sinks == "both":
        facts["charts that show one of them"] = TREATMENTS[_treatment(found)]
    for name, text in zip(text_names(texts), texts, strict=True):
        of = f" of {name}" if len(texts) > 1 else ""
        if isinstance(norms := text.results.get("tokens"), TokenNorms):
            facts[f"share of high-norm tokens{of}"] = f"{norms.high_norm_share:.2%}"
            if norms.high_norm_multiple:
                facts[f"their norm{of}"] = f"{norms.high_norm_multiple:.1f} times the median"
    if len(parts) > 1:
        facts["conditions"] = "; ".join(filter(None, parts))
    if unknown := [
        name
        for name, entries in found.arms.items()
        if "reconstruction" in settings.evals and "dead in training" not in summary(entries)
    ]:
        facts["dead in training"] = (
            f"unknown of {', '.join(unknown)}: not in the metadata, and no comparison.json beside"
        )
    return facts


def _made(found: Evaluation) -> dict[str, str]:
    by = found.command or "saelens_cosine.experiments.evaluate.run, from Python"
    versions = {f"version of {name}": version for name, version in found.versions.items()}
    return {"made": found.date, **versions, "by": by}

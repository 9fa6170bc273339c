"""The page of an evaluation, `report.html`: tables of what was found, and the charts that each eval draws.

Numbers are means over an arm's seeds with 95 % intervals; points, histograms, matched features and the browser are its first
seed's.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

from saelens_cosine.experiments.evaluate.evals import EVALS, TREATMENTS, NotMeasured, Shown, Treatment
from saelens_cosine.experiments.evaluate.evals.of_text.tokens import TokenNorms
from saelens_cosine.experiments.evaluate.results.evaluation import Evaluation, MeasuredSAE
from saelens_cosine.experiments.evaluate.results.listing import (
    about_differences,
    by_column,
    columns,
    left_out,
    not_finite,
    notes,
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
    several = max(map(len, found.arms.values())) > 1
    seeds = "Means over an arm's seeds" + (", with their 95 % intervals." if several else ", of which each has one.")
    sections = (
        Section("comparison", "Comparison", " ".join([seeds, *notes(found.saes)]), _comparison(found)),
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
            tuple(_learning_curves(found, arms)),
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
    """What evals draw, in their order."""
    for name, row in EVALS.items():
        of_arms = {arm: [entry.results.get(name) for entry in entries] for arm, entries in found.arms.items()}
        measured = {
            arm: [result for result in results if result is not None and not isinstance(result, NotMeasured)]
            for arm, results in of_arms.items()
        }
        results = {arm: of for arm, of in measured.items() if of}
        if row.section and results:
            shown = Shown(arms, results, found.baseline, _treatment(found))
            yield Section(name, row.section.heading, row.section.about, tuple(row.section.draw(shown)))


def _treatment(found: Evaluation) -> Treatment:
    return "with_sinks" if found.settings.sinks == "keep" else "without_sinks"


def _comparison(found: Evaluation) -> tuple[Table, ...]:
    arms = {arm: summary(entries) for arm, entries in found.arms.items()}
    table = [(title, *(of.get(title, "-") for of in arms.values())) for title in columns(found.saes)]
    return (Table("Comparison of the arms", ("measure", *arms), table),) if table else ()


def _differences(found: Evaluation) -> Iterator[Table]:
    """A row for each measure and what its interval is over, a column for each arm."""
    by_row: dict[str, dict[str, Estimate]] = {}
    for item in found.differences:
        of: Difference = item.difference
        over = f"{item.counted}: {of.no_interval}" if of.no_interval else item.counted
        by_row.setdefault(f"{item.measure} ({over})", {})[item.arm] = Estimate(of.mean, of.low, of.high)
    arms = [arm for arm in found.arms if any(arm in cells for cells in by_row.values())]
    table = [(measure, *(cells.get(arm, "-") for arm in arms)) for measure, cells in by_row.items()]
    heads = (f"minus {found.baseline}", *arms)
    yield Table(f"Differences to {found.baseline}", heads, table, differences=True)


def _saes(found: Evaluation) -> Iterator[Table | str]:
    """A row for each SAE; what is the same of all of them is told once."""
    saes = [_sae(entry) for entry in found.saes]
    own = {"arm", "seed", "place", "sha256"}
    same = [name for name in saes[0] if len({sae[name] for sae in saes}) == 1 and len(saes) > 1 and name not in own]
    if same:
        yield f"The same of all: {'; '.join(f'{name} {saes[0][name]}' for name in same)}."
    heads = [name for name in saes[0] if name not in same]
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


def _learning_curves(found: Evaluation, arms: Arms) -> Iterator[Chart]:
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
        yield Chart(label, note, plot.figure, Table(f"{label} at the end of training", ("arm", "tokens", label), table))


def _known(values: Iterable[float | None]) -> list[float]:
    """NaN for what is not known."""
    return [math.nan if value is None else value for value in values]


def _figures(found: Evaluation) -> Iterator[Table]:
    """Figures of texts in one table and those of arms in another, rows by eval; what did not apply below."""
    for by_name in by_column(found):
        if listed := list(rows(by_name, found.settings.evals)):
            table = [
                (name, figure, *("-" if value is None else Estimate(value) for value in values))
                for name, figure, values in listed
            ]
            yield Table(f"Figures of {', '.join(by_name)}", ("eval", "figure", *by_name), table)
    if refused := left_out(found):
        yield Table("Left out", ("eval", "of", "reason"), [tuple(item) for item in refused])


def _facts(found: Evaluation) -> dict[str, str]:
    settings, texts = found.settings, found.texts
    seeds = sorted({len(entries) for entries in found.arms.values()})
    untold = dict.fromkeys(entry.arm for entry in found.saes if not entry.held_out)
    facts = {
        "model and hook": "; ".join(dict.fromkeys(f"{text.model} at {text.hook}" for text in texts)),
        "text": "; ".join(dict.fromkeys(text.dataset for text in texts)),
        "held out from training": f"not known of {', '.join(untold)}" if untold else "yes",
        "tokens": "; ".join(f"{name} {count}" for name, count in tokens_measured(found.saes).items())
        or "none measured by an SAE",
        "seeds": " to ".join(map(str, dict.fromkeys((seeds[0], seeds[-1])))) + " of each arm",
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

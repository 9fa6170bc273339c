"""What tables and the page list of an evaluation, in the reader's words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

from saelens_cosine.experiments.evaluate.evals import EVALS, Figure, NotMeasured
from saelens_cosine.experiments.evaluate.results.evaluation import Evaluation, MeasuredSAE, MeasuredText, mean_figures
from saelens_cosine.experiments.evaluate.results.matched import MatchedFigure
from saelens_cosine.metrics.intervals import about
from saelens_cosine.metrics.matched import about_matched
from saelens_cosine.plain import plain
from saelens_cosine.report.estimate import Estimate, over_seeds

Figures = Mapping[str, Mapping[str, float]]
"""By eval and by title; NaN where a figure is not finite."""


def summary(entries: Sequence[MeasuredSAE]) -> dict[str, Estimate]:
    """Each compared figure's mean over an arm's seeds, and the ends of its 95 % interval; None with a single seed."""
    titles = dict.fromkeys(title for entry in entries for title in entry.compared)
    return {title: over_seeds([e.compared[title].number for e in entries if title in e.compared]) for title in titles}


def columns(saes: Sequence[MeasuredSAE]) -> dict[str, Figure]:
    """Figures that have a column in the first table, by title, in the order of the evals."""
    return {title: one for entry in saes for title, one in entry.compared.items() if one.column is not None}


def notes(saes: Sequence[MeasuredSAE]) -> list[str]:
    """What a reader of these columns has to know."""
    names = dict.fromkeys(
        name for entry in saes for name, figures in entry.figures.items() if any(one.column for one in figures)
    )
    return [EVALS[name].note for name in names if EVALS[name].note]


def tokens_measured(saes: Sequence[MeasuredSAE]) -> dict[str, str]:
    """By eval, what SAEs were measured on, as one reads it: `50,176 (49,784 without sinks)`.

    Where SAEs differ, as at different hooks, it is the first one that counts.
    """
    found: dict[str, str] = {}
    for entry in reversed(saes):
        for name, result in entry.results.items():
            if not isinstance(result, NotMeasured) and (tokens := EVALS[name].tokens(result)):
                found[name] = tokens
    return found


def text_is(saes: Sequence[MeasuredSAE]) -> str:
    """What the text is to the SAEs: held out is known of runs of this package only."""
    arms = dict.fromkeys(entry.arm for entry in saes if not entry.held_out)
    return f"Text that may be training text of {', '.join(arms)}" if arms else "Held-out text"


def text_names(texts: Sequence[MeasuredText]) -> list[str]:
    """What texts are called, each by what tells it from the others: model, hook, data, and form."""
    forms = [{"head": text.head, "sinks planted": text.planted_sinks, **text.form} for text in texts]
    differ = [
        what
        for what in dict.fromkeys(what for form in forms for what in form)
        if len({str(form.get(what)) for form in forms}) > 1
    ]
    return [
        ", ".join([f"{text.model} at {text.hook}", text.dataset, *(f"{what}={form.get(what)}" for what in differ)])
        for text, form in zip(texts, forms, strict=True)
    ]


def of_texts(found: Evaluation) -> dict[str, Figures]:
    """All figures of texts, by name."""
    return dict(zip(text_names(found.texts), (mean_figures([text]) for text in found.texts), strict=True))


def of_arms(found: Evaluation) -> dict[str, Figures]:
    """All figures of arms, means over seeds, of an evaluation of one condition."""
    return {arm: mean_figures(entries) for arm, entries in found.arms.items()}


def in_condition(title: str, condition: str) -> str:
    """A title with the condition that it is of, where there are several."""
    return f"{title}, {condition}" if condition else title


def rows(columns: Mapping[str, Figures], evals: Sequence[str]) -> Iterator[tuple[str, str, list[float | None]]]:
    """Eval, figure and its value in each column, in the order of the evals; None where a column lacks it."""
    for name in evals:
        figures = dict.fromkeys(figure for column in columns.values() for figure in column.get(name, {}))
        for figure in figures:
            yield name, figure, [column.get(name, {}).get(figure) for column in columns.values()]


class LeftOut(NamedTuple):
    """An eval that says nothing of some arms or texts, and why."""

    eval: str
    whose: str
    reason: str


def left_out(found: Evaluation) -> list[LeftOut]:
    """Evals that did not apply: arms with one reason in one row, or a text by its name."""
    names = text_names(found.texts) if len(found.texts) > 1 else [text.dataset for text in found.texts]
    whose: dict[tuple[str, str], dict[str, None]] = {}
    for name, entry in [*zip(names, found.texts, strict=True), *((entry.whose, entry) for entry in found.saes)]:
        for eval_name, result in entry.results.items():
            if isinstance(result, NotMeasured):
                whose.setdefault((eval_name, result.not_applicable), {})[name] = None
    return [LeftOut(name, ", ".join(of), reason) for (name, reason), of in whose.items()]


class NotFinite(NamedTuple):
    """How many tokens or weights were NaN or infinite in an eval of an SAE; its arm with its condition."""

    arm: str
    seed: int
    eval: str
    bad: int


def not_finite(found: Evaluation) -> list[NotFinite]:
    """Evals whose figures are missing because something was not finite."""
    counts = (
        NotFinite(entry.whose, entry.seed, name, max(_counts(plain(result)), default=0))
        for entry in found.saes
        for name, result in entry.results.items()
    )
    return [item for item in counts if item.bad]


def _counts(result: Any) -> Iterator[int]:
    """All counts of what is not finite in a result; figures of one eval count the same tokens."""
    if isinstance(result, dict):
        for name, value in cast("dict[str, Any]", result).items():
            if name == "not_finite":
                yield value or 0
            else:
                yield from _counts(value)
    elif isinstance(result, list):
        for value in cast("list[Any]", result):
            yield from _counts(value)


def matched_by_hook(found: Evaluation) -> Iterator[tuple[str, str, list[MatchedFigure]]]:
    """Of figures that have a column in the first table: the hook, empty where there is one, what arms are matched at, and all differences."""
    first = columns(found.saes)
    items = [item for item in found.matched if item.measure in first]
    several = len({item.text for item in items}) > 1
    for text, at in dict.fromkeys((item.text, item.at) for item in items):
        hook = found.texts[text].hook if several else ""
        yield hook, at, [item for item in items if (item.text, item.at) == (text, at)]


def about_matched_figures(items: Sequence[MatchedFigure]) -> list[str]:
    """What a reader of matched differences has to know."""
    known = [item for item in items if item.found.difference and item.found.difference.low is not None]
    axes = dict.fromkeys(axis for item in known for axis in item.over)
    rest = "All other figures stand in the field matched of evaluation.json."
    return [*about_matched([(item.arm, item.found) for item in items], axes), rest]


def without_sinks_told(title: str) -> str:
    """`FVE` of `FVE, sinks out`."""
    return title.partition(",")[0]


def about_differences(found: Evaluation) -> list[str]:
    """What a reader of the differences has to know, a sentence or two each."""
    lines = about(found.axes, found.chance)
    if found.unpaired:
        named = (
            f"seed {item['seed']} of {item['arm']}{', ' * bool(item['condition'])}{item['condition']} "
            f"({item['without']} has none)"
            for item in found.unpaired
        )
        lines.append(f"Left out of differences, which are means over the other seeds: {', '.join(named)}.")
    if found.on_other_tokens:
        lines.append(
            f"Measured on other tokens than {found.baseline} (another model, hook, or form of text): "
            f"{', '.join(found.on_other_tokens)}. Their differences are those of the tokens, too."
        )
    return lines

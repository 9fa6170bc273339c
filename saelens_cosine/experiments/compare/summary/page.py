"""The page of a comparison, `comparison.html`: tables of what was measured on held-out text, matched differences, and charts.

Numbers are means over an arm's seeds with 95 % intervals.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from saelens_cosine.experiments.compare.grid import tuned_k
from saelens_cosine.experiments.compare.results import ArmResult, Comparison, HookResult, about_edges
from saelens_cosine.experiments.compare.summary.charts import against_l0, by_norm, exponents, learning_rates, training
from saelens_cosine.experiments.compare.summary.matched import matched, notes
from saelens_cosine.experiments.compare.summary.measures import (
    CE,
    DEAD,
    FVE,
    L0,
    QUARTILES,
    SECONDS,
    ByK,
    Measure,
    at_hook,
    ks_of,
)
from saelens_cosine.metrics.intervals import Difference, about, by_chance, paired_difference
from saelens_cosine.metrics.matched import OUTSIDE, MatchedDifference
from saelens_cosine.plain import versions
from saelens_cosine.report import page
from saelens_cosine.report.chart import Arms, Chart
from saelens_cosine.report.estimate import Estimate
from saelens_cosine.report.page import Page, Section
from saelens_cosine.report.table import Cell, Table

TABLE = (FVE, L0, DEAD, CE)

COMPARED = (FVE, CE, DEAD, L0, *QUARTILES)


def write_page(comparison: Comparison, path: Path) -> None:
    """Write `comparison.html` whole or not at all."""
    page.write_page(comparison_page(comparison), path)


def comparison_page(comparison: Comparison) -> Page:
    """Everything that a comparison has found."""
    arms = Arms(comparison.settings.arms)
    control, seeds = comparison.settings.arms[0], n_seeds(comparison)
    over = f"Means over {seeds} seeds, with their 95 % intervals." if seeds > 1 else "One seed, so no intervals."
    sections = (
        Section(
            "results",
            "Results",
            f"{over} Saved SAEs on held-out text; dead: share of features that fire on none of it.",
            tuple(_results(comparison)),
        ),
        Section(
            "curves",
            "Against L0",
            "A point for each k. Bands: 95 % intervals over seeds." if seeds > 1 else "A point for each k.",
            tuple(_per_hook(comparison, _curves, arms)),
        ),
        Section(
            "matched",
            "Matched",
            f"Minus {control} where an arm, read off its own curve between its ks, has the FVE or the L0 that {control} has at one of its. "
            "Q1 to Q4 are quartiles of the norm, the smallest norms first.",
            tuple(_matched(comparison)),
        ),
        Section(
            "differences",
            "At the same k",
            f"Minus {control}, paired by seed. Where an interval contains zero, no difference was seen."
            + " Reconstruction and sparsity both differ here; above, one of them is the same."
            * (len(comparison.settings.ks) > 1),
            tuple(_differences(comparison)),
        ),
        Section(
            "activations",
            "Activations",
            "Of held-out text, with the tokens that the filter drops. The larger gamma is, the more features of an inner-product SAE are dead "
            "before training (arXiv 2605.31518).",
            (_sites(comparison),),
        ),
        Section(
            "rates",
            "Learning rates",
            "Each arm has the rate that it does best with, by FVE on held-out documents that nothing else is measured on. "
            + about_edges(comparison.rates),
            tuple(_rates(comparison, arms)),
        ),
        Section(
            "training",
            "Training",
            "FVE is measured on batches that follow. BatchTopK keeps k features per token of a batch on average; the saved SAE has a "
            "threshold instead.",
            (*_per_hook(comparison, training, arms), *_per_hook(comparison, exponents, arms)),
        ),
        Section(
            "norms",
            "By norm",
            "FVE of held-out tokens whose norm is in one quartile, about their own mean.",
            tuple(_per_hook(comparison, partial(by_norm, k=tuned_k(comparison.settings)), arms)),
        ),
    )
    made = {f"version of {name}": version for name, version in versions().items()}
    return Page(
        "Comparison of sparse autoencoders", _facts(comparison), tuple(_warnings(comparison)), arms, sections, made
    )


def n_seeds(comparison: Comparison) -> int:
    """Seeds that anything is known of."""
    return len({arm.seed for arm in (*comparison.arms, *comparison.failed)})


def _facts(comparison: Comparison) -> dict[str, str]:
    s, seeds = comparison.settings, n_seeds(comparison)
    tokens = dict.fromkeys(f"{arm.reconstruction.tokens:,}" for arm in comparison.arms)
    filtered = "kept in training and evaluation"
    if s.max_norm_multiple is not None:
        filtered = f"dropped above {s.max_norm_multiple:g} times the median norm, in training and evaluation"
    return {
        "model and hook": f"{s.model} at {', '.join(hook.hook_name for hook in comparison.hooks)}",
        "text": s.dataset,
        "training tokens of each SAE": f"{s.tokens:,}",
        "features": f"{s.d_sae:,}",
        "k": ", ".join(map(str, s.ks)),
        "seeds": str(seeds),
        "recipe": s.recipe,
        "learning rate": _rate(comparison),
        "held-out tokens": "; ".join(tokens),
        "high-norm tokens (sinks)": filtered + "; planted in each context" * s.plant_sinks,
    }


def _sites(comparison: Comparison) -> Table:
    """A row for each figure of the activations that any hook has, a column for each hook."""
    hooks = [dict(_site(hook)) for hook in comparison.hooks]
    names = dict.fromkeys(name for hook in hooks for name in hook)
    rows = [(name, *(hook.get(name, "-") for hook in hooks)) for name in names]
    return Table("Activations", ("", *(hook.hook_name for hook in comparison.hooks)), rows)


def _site(hook: HookResult) -> Iterator[tuple[str, Cell]]:
    yield "size", Estimate(hook.d_in)
    yield "dropped in training", f"{hook.high_norm_share_dropped:.2%}"
    yield "dropped in evaluation", f"{hook.high_norm_share_dropped_heldout:.2%}"
    if site := hook.site:
        yield "gamma: ||mean|| / standard deviation", _or_dash(site.gamma)
        yield "gamma without sinks", _or_dash(site.gamma_ordinary)
        yield "median norm", Estimate(site.median_norm)
        yield "norm that 1 % exceed", Estimate(site.p99_norm)
        yield "largest norm that is no sink's", Estimate(site.largest_ordinary_norm)
        yield (
            f"sinks: above {site.max_norm_multiple:g} times the median",
            f"{site.sinks.share if site.sinks else 0:.2%}",
        )
        if sinks := site.sinks:
            yield "their median norm", Estimate(sinks.median_norm)
            yield "their largest norm", Estimate(sinks.largest_norm)
            yield "their positions", sinks.shown_positions
            yield "their tokens", sinks.shown_tokens


def _or_dash(value: float | None) -> Cell:
    return "-" if value is None else Estimate(value)


def _rate(comparison: Comparison) -> str:
    tried = comparison.settings.rates
    if len(tried) > 1:
        return f"each arm's best of {', '.join(f'{lr:g}' for lr in tried)}"
    return f"{tried[0]:g}" if tried else "the recipe's"


def _warnings(comparison: Comparison) -> Iterator[str]:
    for arm in comparison.failed:
        where = _condition(comparison, arm.hook_name, arm.k)
        told = f"{arm.architecture}{where}, seed {arm.seed}"
        yield f"{told}: stopped after {arm.training_tokens:,} tokens and not measured: {arm.reason}"
    for arm in comparison.arms:
        if arm.reconstruction.not_finite:
            told = f"{arm.architecture}{_condition(comparison, arm.hook_name, arm.k)}, seed {arm.seed}"
            yield f"{told}: {arm.reconstruction.not_finite:,} of {arm.reconstruction.tokens:,} tokens not finite, its figures are missing"


def _where(comparison: Comparison, hook_name: str) -> str:
    """What tells a hook from the others."""
    return f" at {hook_name}" if len(comparison.hooks) > 1 else ""


def _condition(comparison: Comparison, hook_name: str, k: int) -> str:
    return _where(comparison, hook_name) + f", k={k}" * (len(comparison.settings.ks) > 1)


def _hooks(comparison: Comparison) -> Iterator[tuple[str, dict[str, ByK]]]:
    """By hook, what there are results of."""
    for hook in comparison.hooks:
        if found := at_hook(comparison, hook.hook_name):
            yield hook.hook_name, found


def _results(comparison: Comparison) -> Iterator[Table | str]:
    """For each hook, a row for each measure and k, a column for each arm."""
    for hook, arms in _hooks(comparison):
        ks = ks_of(arms)
        rows: list[list[Cell]] = []
        for measure in TABLE:
            for k in ks:
                cells = [measure.over_seeds(by_k[k]) if k in by_k else "-" for by_k in arms.values()]
                if any(isinstance(cell, Estimate) and math.isfinite(cell.value) for cell in cells):
                    rows.append([measure.title + f", k={k}" * (len(ks) > 1), *cells])
        seconds = [[r.seconds for of in by_k.values() for r in of] for by_k in arms.values()]
        rows.append(
            [SECONDS.label + ", mean over ks" * (len(ks) > 1), *(Estimate(sum(each) / len(each)) for each in seconds)]
        )
        yield from _titled(comparison, hook, Table(f"Results{_where(comparison, hook)}", ("measure", *arms), rows))


def _differences(comparison: Comparison) -> Iterator[Table | str]:
    """Paired by seed within a k, of seeds that both arms have, where there are two of them: a row for each arm and k."""
    control = comparison.settings.arms[0]
    found: list[Difference] = []
    for hook, arms in _hooks(comparison):
        theirs = arms.get(control, {})
        rows: list[list[Cell]] = []
        for arm, k in [(arm, k) for arm, of in arms.items() if arm != control for k in of if k in theirs]:
            pairs = [_paired(measure, arms[arm][k], theirs[k]) for measure in COMPARED]
            if known := [difference for difference in pairs if difference]:
                found += known
                rows.append([arm, str(k), *(_estimate(difference) if difference else "-" for difference in pairs)])
        if rows:
            label = f"Differences to {control}{_where(comparison, hook)}"
            yield from _titled(comparison, hook, _rows_of_arms(label, control, "k", COMPARED, rows))
    if found:
        yield " ".join(about(["seeds"], by_chance(found)))


def _rows_of_arms(
    label: str, control: str, at: str, measures: Sequence[Measure], rows: Sequence[Sequence[Cell]]
) -> Table:
    """Without measures that no row has."""
    kept = [0, 1, *(i for i in range(2, len(measures) + 2) if any(row[i] != "-" for row in rows))]
    heads = (f"minus {control}", at, *(measure.title for measure in measures))
    return Table(label, [heads[i] for i in kept], [[row[i] for i in kept] for row in rows], differences=True)


def _paired(measure: Measure, ours: Sequence[ArmResult], theirs: Sequence[ArmResult]) -> Difference | None:
    a, b = ({result.seed: measure.of(result) for result in results} for results in (ours, theirs))
    seeds = [seed for seed in a if seed in b]
    if len(seeds) < 2 or not all(math.isfinite(a[seed] + b[seed]) for seed in seeds):
        return None
    return paired_difference([a[seed] for seed in seeds], [b[seed] for seed in seeds])


def _estimate(difference: Difference) -> Estimate:
    return Estimate(difference.mean, difference.low, difference.high)


def _matched(comparison: Comparison) -> Iterator[Table | str]:
    """For each hook at FVE and at L0, a row for each arm and k of the control."""
    control, found = comparison.settings.arms[0], list(matched(comparison))
    for hook, at in dict.fromkeys((item.hook_name, item.at) for item in found):
        items = [item for item in found if (item.hook_name, item.at) == (hook, at)]
        measures = [measure for measure in COMPARED if measure != at]
        rows: list[list[Cell]] = []
        for arm, k in dict.fromkeys((item.architecture, item.found.k) for item in items):
            cells = {i.measure: i.found for i in items if (i.architecture, i.found.k) == (arm, k)}
            rows.append(
                [
                    arm,
                    _place(at, max(cells.values(), key=lambda of: math.isfinite(of.x))),
                    *(_cell(cells[m]) if m in cells else "-" for m in measures),
                ]
            )
        title = f"At matched {at.title}{_where(comparison, hook)}"
        yield f"{title}:"
        yield _rows_of_arms(title, control, f"{at.title} of {control}", measures, rows)
    if found:
        yield " ".join(notes(found))


def _place(at: Measure, found: MatchedDifference) -> str:
    """What the control has there, and by how much the arm does not."""
    if not math.isfinite(found.x):
        return f"k={found.k:g}"
    told = f"{at.form.format(found.x)} (k={found.k:g})"
    if not found.outside:
        return told
    farthest = max((outside.by for outside in found.outside), key=abs)
    beyond = f"{abs(farthest):.2g} {'above' if farthest > 0 else 'below'} what the arm reaches"
    return f"{told}, {beyond}" + f"; {found.inside} of {len(found.seeds)} seeds inside" * (len(found.seeds) > 1)


def _cell(found: MatchedDifference) -> Cell:
    if found.refused:
        return "not matched"
    return OUTSIDE if found.difference is None else _estimate(found.difference)


def _titled(comparison: Comparison, hook: str, table: Table) -> Iterator[Table | str]:
    if len(comparison.hooks) > 1:
        yield f"At {hook}:"
    yield table


def _per_hook(comparison: Comparison, draw: Callable[..., Iterator[Chart]], arms: Arms) -> Iterator[Chart]:
    for hook, found in _hooks(comparison):
        yield from draw(arms, found, f", {hook}" if len(comparison.hooks) > 1 else "")


def _curves(arms: Arms, found: dict[str, ByK], where: str) -> Iterator[Chart]:
    """None with one k, of which the table says as much."""
    return against_l0(arms, found, where) if len(ks_of(found)) > 1 else iter(())


def _rates(comparison: Comparison, arms: Arms) -> Iterator[Chart]:
    for hook in comparison.hooks:
        if rates := [rate for rate in comparison.rates if rate.hook_name == hook.hook_name]:
            yield from learning_rates(arms, rates, _where(comparison, hook.hook_name))

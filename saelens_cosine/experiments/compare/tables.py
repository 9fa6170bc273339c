"""A comparison as JSON and as tables."""

from __future__ import annotations

import math
import platform
import statistics
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from saelens_cosine.activations.site import site_lines
from saelens_cosine.console import literal, plain_table, shown_number
from saelens_cosine.experiments.compare.file import SCHEMAS
from saelens_cosine.experiments.compare.results import ArmResult, Comparison, RateTried, about_edges
from saelens_cosine.experiments.compare.summary import matched
from saelens_cosine.experiments.compare.summary.measures import CE, DEAD, FVE, L0, SECONDS
from saelens_cosine.files import whole
from saelens_cosine.files.secrets import scrubbed
from saelens_cosine.metrics.intervals import Difference, about, by_chance, paired_difference
from saelens_cosine.metrics.reconstruction.fve import FVE_DEFINITION
from saelens_cosine.metrics.reconstruction.loss_recovered import CE_DEFINITION
from saelens_cosine.plain import plain

SCHEMA = SCHEMAS[-1]
"""Name and version of the layout of `comparison.json`."""

PACKAGES = ("saelens-cosine", "sae-lens", "transformer-lens", "torch", "transformers", "datasets", "numpy")


def as_json(comparison: Comparison) -> dict[str, Any]:
    """The content of `comparison.json`."""
    settings = comparison.settings
    document = {
        "schema": SCHEMA,
        "arms": [_arm_as_json(arm, comparison) for arm in comparison.arms],
        "failed": [asdict(arm) for arm in comparison.failed],
        "hooks": [asdict(hook) for hook in comparison.hooks],
        "learning_rates": [asdict(one) for one in comparison.rates],
        "matched": matched.as_json(comparison),
        "settings": {
            **asdict(settings),
            "activations": None if settings.activations is None else str(settings.activations),
            "fve_definition": FVE_DEFINITION,
            "ce_definition": CE_DEFINITION,
            "dead_definition": "share of features with no activation on the dead_window_tokens held-out tokens",
            "evaluated": "the saved inference form, on held-out text",
        },
        "high_norm_tokens": {
            "planted": settings.plant_sinks,
            "in_training": settings.max_norm_multiple is None,
            "in_evaluation": settings.max_norm_multiple is None,
            "max_norm_multiple": settings.max_norm_multiple,
        },
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
    }
    return scrubbed(plain(document))


def _arm_as_json(arm: ArmResult, comparison: Comparison) -> dict[str, Any]:
    measured = arm.reconstruction
    exponent = dict(zip(("mean", "min", "max"), arm.norm_exponent or (None,) * 3, strict=True))
    return {
        "architecture": arm.architecture,
        "seed": arm.seed,
        "path": arm.path,
        "weights_sha256": arm.weights_sha256,
        "hook_name": arm.hook_name,
        "k": arm.k,
        "lr": arm.lr,
        "d_sae": comparison.settings.d_sae,
        "tokens": comparison.settings.tokens,
        "not_finite": measured.not_finite,
        "fve": measured.fve,
        "l0": measured.l0,
        "dead_fraction": measured.dead_fraction,
        "dead_window_tokens": measured.tokens,
        "ce_loss_recovered": arm.ce_loss_recovered,
        "norm_exponent": exponent,
        "fve_by_norm_quartile": [asdict(norm_bin) for norm_bin in measured.by_norm],
        "seconds": arm.seconds,
        "training_log": [asdict(entry) for entry in arm.log],
    }


def write_json(comparison: Comparison, path: Path) -> None:
    """Write `comparison.json` whole or not at all."""
    whole.write_json(as_json(comparison), path, indent=2)


_MEASURES = (FVE, L0, DEAD, CE, SECONDS)

_TRAINING_METRICS = {
    "norm_exponent_mean": ("a", "{:.3f}"),
    "norm_exponent_min": ("a min", "{:.3f}"),
    "norm_exponent_max": ("a max", "{:.3f}"),
    "norm_exponent_share_above_0.5": ("a>0.5", "{:.1%}"),
    "log_scale_mean": ("b", "{:.3f}"),
    "topk_threshold": ("threshold", "{:.3f}"),
    "dead_features_in_token_window": ("dead", "{:.0f}"),
}


def as_tables(comparison: Comparison) -> list[Table]:
    """Results, FVE by norm, the score's parameters, with several seeds the paired differences to the first arm, and with several ks those at the
    same FVE and L0."""
    tables = [
        *_failed(comparison),
        *_not_finite(comparison),
        _results(comparison),
        _by_norm(comparison),
        _score_parameters(comparison),
    ]
    if comparison.rates:
        tables.append(_learning_rates(comparison))
    if len(comparison.settings.arms) > 1 and _n_seeds(comparison) > 1:
        tables.append(_differences(comparison))
    return [*tables, *matched.as_tables(comparison)]


def _failed(comparison: Comparison) -> Iterator[Table]:
    """What was not trained to its end, in red, where anything was not."""
    if comparison.failed:
        table = plain_table("Stopped, neither saved nor measured", ["architecture"], ["seed", "after tokens"])
        table.add_column("because")
        table.style = table.title_style = "red"
        for arm in comparison.failed:
            name = called(comparison, arm.architecture, arm.hook_name, arm.k)
            rate = f", lr {arm.lr:g}" if comparison.rates and arm.lr is not None else ""
            table.add_row(name + rate, str(arm.seed), f"{arm.training_tokens:,}", arm.reason)
        yield table


def _not_finite(comparison: Comparison) -> Iterator[Table]:
    """What is NaN or infinite, in red, where anything is."""
    found = [arm for arm in comparison.arms if arm.reconstruction.not_finite]
    if found:
        table = plain_table("Not finite: figures of these are NaN", ["architecture"], ["seed", "tokens", "of"])
        table.style = table.title_style = "red"
        for arm in found:
            counts = (arm.reconstruction.not_finite, arm.reconstruction.tokens)
            name = called(comparison, arm.architecture, arm.hook_name, arm.k)
            table.add_row(name, str(arm.seed), *(f"{count:,}" for count in counts))
        yield table


def _results(comparison: Comparison) -> Table:
    s, first = comparison.settings, comparison.arms[0].reconstruction
    sinks = "high-norm tokens kept in training and evaluation"
    if s.max_norm_multiple is not None:
        dropped = "; ".join(
            f"{hook.high_norm_share_dropped:.2%} in training, {hook.high_norm_share_dropped_heldout:.2%} in evaluation"
            + (f" at {hook.hook_name}" if len(comparison.hooks) > 1 else "")
            for hook in comparison.hooks
        )
        sinks = f"tokens above {s.max_norm_multiple:g} times the median norm dropped: {dropped}"
    planted = "; a sink planted at the start of each context" if s.plant_sinks else ""
    spread = f", mean ± sd over {_n_seeds(comparison)} seeds" if _n_seeds(comparison) > 1 else ""
    table = plain_table(
        f"{s.model} at {', '.join(hook.hook_name for hook in comparison.hooks)}: {s.d_sae} features, "
        f"k={', '.join(map(str, s.ks))}, {s.tokens:,} tokens, recipe {s.recipe}"
        f"{spread}\nSaved SAEs on {first.tokens:,} held-out tokens (dead: features that fire on none of them); {sinks}{planted}",
        ["architecture"],
        [measure.title for measure in _MEASURES],
    )
    for arm, results in by_arm(comparison).items():
        seeds = "" if len(results) == _n_seeds(comparison) else f" ({len(results)} of {_n_seeds(comparison)} seeds)"
        table.add_row(arm + seeds, *(_mean_and_spread(map(one.of, results), one.form) for one in _MEASURES))
    # the divergence costs a third of the evaluation: softmaxes over the vocabulary
    sites = [line for hook in comparison.hooks if hook.site is not None for line in site_lines(hook.site)]
    table.caption = "\n".join(
        [*sites, "CE recov.: of the loss on the next token alone; `saelens-cosine evaluate` has KL beside it."]
    )
    return table


def _by_norm(comparison: Comparison) -> Table:
    bins = range(len(comparison.arms[0].reconstruction.by_norm))
    table = plain_table(
        "FVE by quartile of the norm, smallest norms first", ["architecture"], [f"Q{q + 1}" for q in bins]
    )
    for arm, results in by_arm(comparison).items():
        cells = [_mean_and_spread((r.reconstruction.by_norm[q].fve for r in results), "{:.4f}") for q in bins]
        table.add_row(arm, *cells)
    return table


def _score_parameters(comparison: Comparison) -> Table:
    window = comparison.arms[0].log[-1].metrics.get("dead_feature_window_tokens")
    dead = f"; dead: features that did not fire in {window:,.0f} training tokens" if window else ""
    table = plain_table(
        f"End of training, mean over seeds: exponent a, log-scale b{dead}",
        ["architecture"],
        [heading for heading, _ in _TRAINING_METRICS.values()],
    )
    for arm, results in by_arm(comparison).items():
        logs = [result.log[-1].metrics for result in results]
        cells = [
            _or_dash(statistics.mean(log.get(name, math.nan) for log in logs), form)
            for name, (_, form) in _TRAINING_METRICS.items()
        ]
        table.add_row(arm, *cells)
    return table


def _learning_rates(comparison: Comparison) -> Table:
    rates = sorted({one.lr for one in comparison.rates})
    k = comparison.rates[0].k
    table = plain_table(
        f"FVE by learning rate, k={k}, seed 0, on held-out documents that nothing else is measured on; each arm's best is its rate",
        ["architecture"],
        [f"{rate:g}" for rate in rates],
    )
    for hook in comparison.hooks:
        for arm in comparison.settings.arms:
            tried = {
                one.lr: one for one in comparison.rates if (one.architecture, one.hook_name) == (arm, hook.hook_name)
            }
            if tried:
                at = f", {hook.hook_name}" if len(comparison.hooks) > 1 else ""
                table.add_row(arm + at, *(_rate(tried.get(rate)) for rate in rates))
    table.caption = about_edges(comparison.rates) or None
    return table


def _rate(tried: RateTried | None) -> Text | str:
    if tried is None:
        return "-"
    if tried.fve is None:
        return literal("failed", "red")
    return literal(f"{tried.fve:.4f}", "bold") if tried.chosen else f"{tried.fve:.4f}"


def _differences(comparison: Comparison) -> Table:
    first, measures = comparison.settings.arms[0], (FVE, CE, DEAD)
    table = plain_table(
        f"Difference to {first}, paired by seed, {_n_seeds(comparison)} seeds, 95 % intervals",
        ["architecture"],
        [measure.title for measure in measures],
    )
    found: list[Difference] = []
    for hook_name, k in dict.fromkeys((arm.hook_name, arm.k) for arm in comparison.arms):
        here = [arm for arm in comparison.arms if (arm.hook_name, arm.k) == (hook_name, k)]
        by_seed = {arm: {r.seed: r for r in here if r.architecture == arm} for arm in comparison.settings.arms}
        for arm in comparison.settings.arms[1:]:
            seeds = [seed for seed in by_seed[first] if seed in by_seed[arm]]
            pairs = [(by_seed[arm][seed], by_seed[first][seed]) for seed in seeds]
            cells: list[Text | str] = []
            for measure in measures:
                values = [(measure.of(ours), measure.of(firsts)) for ours, firsts in pairs]
                if len(values) < 2:
                    cells.append(f"seeds in common: {len(seeds)}" if measure is FVE else "-")
                elif not all(map(math.isfinite, chain.from_iterable(values))):
                    cells.append(literal("nan", "red"))
                else:
                    found.append(paired_difference(*map(list, zip(*values, strict=True))))
                    cells.append(found[-1].brief(measure.form))
            table.add_row(called(comparison, arm, hook_name, k), *cells)
    table.caption = "\n".join(about(["seeds"], by_chance(found)))
    return table


def by_arm(comparison: Comparison) -> dict[str, list[ArmResult]]:
    """Results by arm, k and hook, without those that have none: what differs within the comparison is part of the name."""
    found: dict[str, list[ArmResult]] = {}
    rank = {arm: number for number, arm in enumerate(comparison.settings.arms)}
    hooks = [hook.hook_name for hook in comparison.hooks]
    for arm in sorted(comparison.arms, key=lambda arm: (hooks.index(arm.hook_name), arm.k, rank[arm.architecture])):
        found.setdefault(called(comparison, arm.architecture, arm.hook_name, arm.k), []).append(arm)
    return found


def called(comparison: Comparison, architecture: str, hook_name: str, k: int) -> str:
    """What a row of a table is about: `cosine_batchtopk, model.layers.15, k=32`."""
    at = hook_name if len(comparison.hooks) > 1 else ""
    active = f"k={k}" if len(comparison.settings.ks) > 1 else ""
    return ", ".join(filter(None, [architecture, at, active]))


def _n_seeds(comparison: Comparison) -> int:
    return len({arm.seed for arm in (*comparison.arms, *comparison.failed)})


def _mean_and_spread(values: Iterable[float], form: str) -> str | Text:
    values = list(values)
    mean = shown_number(statistics.mean(values), form)
    if not all(map(math.isfinite, values)):
        return mean
    return f"{mean}±{form.format(statistics.stdev(values))}" if len(values) > 1 else mean


def _or_dash(value: float, form: str) -> str:
    return "-" if math.isnan(value) else form.format(value)

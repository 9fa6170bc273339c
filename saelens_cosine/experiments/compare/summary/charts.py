"""Charts of a comparison's page."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from saelens_cosine.experiments.compare.results import ArmResult, RateTried
from saelens_cosine.experiments.compare.summary.measures import CE, DEAD, FVE, L0, QUARTILES, ByK, ks_of
from saelens_cosine.report.chart import Arms, Axis, Chart, Plot, beside, ends
from saelens_cosine.report.estimate import Estimate, over_seeds, short
from saelens_cosine.report.table import Cell, Table

FEW = 3
"""Lines of one arm up to which each is drawn in full, and with its band."""


class Line(NamedTuple):
    """One SAE's course of training, and what its tips begin with."""

    arm: str
    result: ArmResult
    name: str


def against_l0(arms: Arms, found: dict[str, ByK], where: str) -> Iterator[Chart]:
    """FVE, cross-entropy recovered and dead features against L0: a point for each k, joined, in a band over seeds."""
    l0 = {arm: [L0.over_seeds(results) for results in by_k.values()] for arm, by_k in found.items()}
    ticks = {float(k): str(k) for k in ks_of(found)}
    axis = Axis(L0.label, log=True, ends=ends(_all(l0), log=True), ticks=ticks)
    for measure, better in ((FVE, "Higher is better."), (CE, "Higher is better."), (DEAD, "Lower is better.")):
        values = {arm: [measure.over_seeds(results) for results in by_k.values()] for arm, by_k in found.items()}
        plot = Plot(arms, axis, Axis(measure.label, ends=ends(_all(values))))
        for arm, y in values.items():
            x = [estimate.value for estimate in l0[arm]]
            known = [i for i in range(len(x)) if math.isfinite(x[i]) and math.isfinite(y[i].value)]
            bounds = [y[i].bounds or (y[i].value, y[i].value) for i in known]
            if len(known) > 1 and any(y[i].bounds for i in known):
                plot.band([x[i] for i in known], [low for low, _ in bounds], [high for _, high in bounds], arm)
            tips = [f"k={k}: L0 {short(a)}, {measure.title} {b}" for k, a, b in zip(found[arm], x, y, strict=True)]
            plot.line(arm, x, [estimate.value for estimate in y], tips)
        yield Chart(f"{measure.label[0].upper()}{measure.label[1:]} against L0{where}", better, plot.figure)


def _all(values: dict[str, list[Estimate]]) -> list[Estimate]:
    return [estimate for found in values.values() for estimate in found]


def learning_rates(arms: Arms, rates: Sequence[RateTried], where: str) -> Iterator[Chart]:
    """FVE against the learning rate, arm by arm, and the rate that each got."""
    tried = sorted({rate.lr for rate in rates})
    by_arm = {arm: {rate.lr: rate for rate in rates if rate.architecture == arm} for arm in arms.names}
    values = {arm: {lr: _or_nan(rate.fve) for lr, rate in of.items()} for arm, of in by_arm.items() if of}
    x = Axis("learning rate", log=True, ends=ends(tried, log=True), ticks={lr: f"{lr:g}" for lr in tried})
    plot = Plot(arms, x, Axis("FVE", ends=ends([value for of in values.values() for value in of.values()])))
    rows: list[list[Cell]] = []
    for arm, of in values.items():
        lrs = sorted(of)
        chosen = [f"{lr:g}" for lr in lrs if by_arm[arm][lr].chosen]
        tips = [f"lr {lr:g}, FVE {of[lr]:.4f}" + ", chosen" * by_arm[arm][lr].chosen for lr in lrs]
        plot.line(arm, lrs, [of[lr] for lr in lrs], tips)
        rows.append([arm, *(Estimate(of[lr]) if lr in of else "-" for lr in tried), *(chosen or ["none"])])
    table = Table("FVE by learning rate", ("arm", *(f"{lr:g}" for lr in tried), "chosen"), rows)
    k = ", ".join(dict.fromkeys(f"k={rate.k}" for rate in rates))
    yield Chart(f"FVE by learning rate{where}", f"Seed 0, {k}.", plot.figure, table)


def training(arms: Arms, found: dict[str, ByK], where: str) -> Iterator[Chart]:
    """FVE in the course of training; the axis holds what follows the first tenth, and zooms out to all."""
    lines = _lines(found)
    end = max((entry.training_tokens for line in lines for entry in line.result.log), default=0)
    late = [entry.fve for line in lines for entry in line.result.log if entry.training_tokens >= end / 10]
    if not any(map(math.isfinite, late)):
        return
    plot = Plot(arms, Axis("training tokens", ends=(0, end * 1.02)), Axis("FVE of the coming batch", ends=ends(late)))
    for line in lines:
        log = line.result.log
        tips = [f"{line.name}FVE {entry.fve:.4g} after {short(entry.training_tokens)} tokens" for entry in log]
        x, y = [float(entry.training_tokens) for entry in log], [entry.fve for entry in log]
        plot.line(line.arm, x, y, tips, marked=False, faint=_many(found[line.arm]))
    yield Chart(f"FVE in training{where}", _lines_are(found), plot.figure)


def exponents(arms: Arms, found: dict[str, ByK], where: str) -> Iterator[Chart]:
    """The norm exponent in the course of training, of arms that have one."""
    has = {arm: by_k for arm, by_k in found.items() if any(r.norm_exponent for of in by_k.values() for r in of)}
    if not has:
        return
    end = max((entry.training_tokens for line in _lines(has) for entry in line.result.log), default=0)
    plot = Plot(arms, Axis("training tokens", ends=(0, max(end, 1) * 1.02)), Axis("norm exponent a"))
    bands = False
    for line in _lines(has):
        log = [entry for entry in line.result.log if "norm_exponent_mean" in entry.metrics]
        x = [float(entry.training_tokens) for entry in log]
        mean, low, high = ([e.metrics[f"norm_exponent_{what}"] for e in log] for what in ("mean", "min", "max"))
        if low != high and not _many(has[line.arm]):
            plot.band(x, low, high, line.arm)
            bands = True
        tips = [
            f"{line.name}a = {a:.3g} ({b:.3g} to {c:.3g}) after {short(t)} tokens"
            for t, a, b, c in zip(x, mean, low, high, strict=True)
        ]
        plot.line(line.arm, x, mean, tips, marked=False, faint=_many(has[line.arm]))
    rows = [
        [
            arm,
            str(k),
            over_seeds([e[0] for e in ends]),
            *(Estimate(of(e[i] for e in ends)) for of, i in ((min, 1), (max, 2))),
        ]
        for arm, by_k in has.items()
        for k, results in by_k.items()
        if (ends := [r.norm_exponent for r in results if r.norm_exponent])
    ]
    table = Table("Norm exponents of the saved SAEs", ("arm", "k", "mean", "least", "largest"), rows)
    note = "0: cosine, 1: inner product. " + "Mean over features; the band is from the least to the largest. " * bands
    yield Chart(f"Norm exponents{where}", note + _lines_are(has), plot.figure, table)


def by_norm(arms: Arms, found: dict[str, ByK], where: str, *, k: int) -> Iterator[Chart]:
    """FVE by quartile of the norm at one k; the others are in its table."""
    k = k if k in ks_of(found) else ks_of(found)[0]
    shown = {arm: by_k[k] for arm, by_k in found.items() if k in by_k}
    bins = next((r.reconstruction.by_norm for results in shown.values() for r in results), ())
    if not bins:
        return
    quartiles = QUARTILES[: len(bins)]
    ticks = {float(q): f"Q{q + 1}\n{short(b.low)} to\n{short(b.high)}" for q, b in enumerate(bins)}
    values = {arm: [quartile.over_seeds(results) for quartile in quartiles] for arm, results in shown.items()}
    x = Axis("norm of the activation, quartiles", ends=(-0.5, len(bins) - 0.5), ticks=ticks)
    plot = Plot(arms, x, Axis("FVE", ends=ends(_all(values))))
    places = beside(list(values))
    for arm, of in values.items():
        tips = [f"Q{q + 1}: {estimate}" for q, estimate in enumerate(of)]
        plot.line(arm, [q + places[arm] for q in range(len(of))], of, tips, joined=False)
    rows = [
        [arm, str(other), *(quartile.over_seeds(results) for quartile in quartiles)]
        for arm, by_k in found.items()
        for other, results in by_k.items()
    ]
    table = Table("FVE by quartile of the norm", ("arm", "k", *(f"Q{q + 1}" for q in range(len(bins)))), rows)
    several = len(ks_of(found)) > 1
    yield Chart(f"FVE by norm{where}", f"k={k}; all in the table." if several else "", plot.figure, table)


def _lines(found: dict[str, ByK]) -> list[Line]:
    """One for each SAE, named by what others of its arm differ in."""
    several_k, several_seeds = len(ks_of(found)) > 1, len({r.seed for r in _results(found)}) > 1
    return [
        Line(arm, r, f"k={r.k}, " * several_k + f"seed {r.seed}, " * several_seeds)
        for arm, by_k in found.items()
        for of in by_k.values()
        for r in of
    ]


def _results(found: dict[str, ByK]) -> list[ArmResult]:
    return [result for by_k in found.values() for of in by_k.values() for result in of]


def _many(by_k: ByK) -> bool:
    return sum(map(len, by_k.values())) > FEW


def _lines_are(found: dict[str, ByK]) -> str:
    each = ["k"] * (len(ks_of(found)) > 1) + ["seed"] * (len({r.seed for r in _results(found)}) > 1)
    return f"One line for each {' and '.join(each)}." if each else ""


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value

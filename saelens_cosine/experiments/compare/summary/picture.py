"""`comparison.png`: a comparison at a glance. All seeds are drawn, a row of panels for each hook."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from saelens_cosine.experiments.compare.grid import tuned_k
from saelens_cosine.experiments.compare.results import ArmResult, Comparison
from saelens_cosine.experiments.compare.summary.measures import CE, FVE, L0, ByK, Measure, at_hook, ks_of
from saelens_cosine.files import whole


def draw(comparison: Comparison, path: Path) -> None:
    """One k: training curves, exponents, FVE by quartile of the norm. Several: FVE and cross-entropy recovered against L0 instead of the curves."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    found = {hook.hook_name: at_hook(comparison, hook.hook_name) for hook in comparison.hooks}
    rows = {hook: arms for hook, arms in found.items() if arms}
    colours = {arm: f"C{i}" for i, arm in enumerate(comparison.settings.arms)}
    several = any(len(ks_of(arms)) > 1 for arms in rows.values())
    panels = 4 if several else 3
    figure = Figure(figsize=(5 * panels, 4.2 * len(rows) + 0.4), layout="constrained")
    for (hook, arms), axes in zip(rows.items(), figure.subplots(len(rows), panels, squeeze=False), strict=True):
        ks = ks_of(arms)
        k = tuned_k(comparison.settings) if tuned_k(comparison.settings) in ks else ks[0]
        shown = {arm: by_k[k] for arm, by_k in arms.items() if k in by_k}
        if several:
            for panel, measure in zip(axes, (FVE, CE), strict=False):
                _against_l0(panel, arms, measure, colours)
        else:
            _curves(axes[0], shown, colours)
        of = f", k={k}" if several else ""
        _exponents(axes[-2], shown, colours, of)
        _quartiles(axes[-1], shown, colours, of)
        if len(rows) > 1:
            axes[0].set_title(f"{hook}: {axes[0].get_title()}")
        for panel in axes:
            panel.spines[["top", "right"]].set_visible(False)
            panel.grid(alpha=0.25)
    names = dict.fromkeys(arm for arms in rows.values() for arm in arms)
    handles = [Patch(color=colours[arm], label=arm) for arm in names]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(names))
    with whole.whole_file(path) as unfinished:
        figure.savefig(unfinished, dpi=130 if len(rows) == 1 else 100)


Results = Mapping[str, Sequence[ArmResult]]
"""By arm, of one k."""


def _against_l0(panel: Any, arms: Mapping[str, ByK], measure: Measure, colours: Mapping[str, str]) -> None:
    """Every seed as a point, and a line through their means."""
    for arm, by_k in arms.items():
        points = np.array([[f(r) for f in (L0.of, measure.of)] for results in by_k.values() for r in results])
        means = np.array([[np.mean([f(r) for r in results]) for f in (L0.of, measure.of)] for results in by_k.values()])
        panel.plot(*means.T, color=colours[arm], lw=1.4)
        panel.plot(*points.T, ".", color=colours[arm], alpha=0.7)
    panel.set_xscale("log")
    panel.set_xticks(ks_of(dict(arms)), ks_of(dict(arms)))
    panel.minorticks_off()
    panel.set(xlabel="L0, active features per token", ylabel=measure.label, title=f"{measure.label} against L0")


def _curves(panel: Any, shown: Results, colours: Mapping[str, str]) -> None:
    for arm, results in shown.items():
        for result in results:
            tokens = [entry.training_tokens / 1e6 for entry in result.log]
            panel.plot(tokens, [entry.fve for entry in result.log], color=colours[arm], alpha=0.9, lw=1.4)
    panel.set(xlabel="training tokens (millions)", ylabel="FVE of the coming batch", title="Training")
    logs = [[e.fve for e in r.log if math.isfinite(e.fve)] for results in shown.values() for r in results]
    if reached := [max(values) for values in logs if values]:
        panel.set_ylim(max(0.0, min(reached) - 0.4), max(reached) + 0.02)


def _exponents(panel: Any, shown: Results, colours: Mapping[str, str], of: str) -> None:
    for arm, results in shown.items():
        for result in results:
            if result.norm_exponent:
                tokens = [entry.training_tokens / 1e6 for entry in result.log]
                mean, low, high = (
                    [entry.metrics[f"norm_exponent_{what}"] for entry in result.log] for what in ("mean", "min", "max")
                )
                panel.plot(tokens, mean, color=colours[arm], lw=1.4)
                panel.fill_between(tokens, low, high, color=colours[arm], alpha=0.15, lw=0)
    title = f"Exponents: mean, min to max{of}"
    panel.set(xlabel="training tokens (millions)", ylabel="norm exponent a", title=title)
    if not panel.lines:
        panel.text(0.5, 0.5, "no arm has an exponent", ha="center", va="center", transform=panel.transAxes)


def _quartiles(panel: Any, shown: Results, colours: Mapping[str, str], of: str) -> None:
    width = 0.8 / len(shown)
    for i, (arm, trained) in enumerate(shown.items()):
        fves = np.array([[part.fve for part in result.reconstruction.by_norm] for result in trained])
        means, spread = fves.mean(axis=0), fves.std(axis=0, ddof=1) if len(trained) > 1 else None
        places = [q + (i - (len(shown) - 1) / 2) * width for q in range(len(means))]
        panel.bar(places, means, width, yerr=spread, color=colours[arm], capsize=3)
    bins = next(iter(shown.values()))[0].reconstruction.by_norm
    panel.set_xticks(range(len(bins)), [f"Q{q + 1}\n{b.low:.0f} to {b.high:.0f}" for q, b in enumerate(bins)])
    heights = [b.fve for results in shown.values() for r in results for b in r.reconstruction.by_norm]
    lowest = min(filter(math.isfinite, heights), default=0.0)
    panel.set_ylim(max(0.0, lowest - 0.15) if lowest > 0 else None, None)
    title = f"By norm (axis is cut){of}"
    panel.set(xlabel="norm of the activation, quartiles", ylabel="FVE, held out", title=title)

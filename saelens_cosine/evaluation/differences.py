"""Arms against the first one, beside the noise of seeds, tasks and text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from saelens_cosine.evaluation.bootstrap import Difference, paired_difference

TREATMENTS = {"with_sinks": "sinks in", "without_sinks": "sinks out"}
"""As results call them, and as a reader does."""

Array = np.ndarray[Any, Any]
Entry = Mapping[str, Any]


@dataclass(frozen=True)
class ArmDifference:
    """
    One measure of one arm against the first.

    Args:
        arm (str): Minuend.
        baseline (str): Subtrahend.
        measure (str): What was measured.
        over (tuple[str, ...]): What the interval is over: "seeds", "tasks", "splits", "blocks of text".
        difference (Difference): Its mean and 95 % interval.
    """

    arm: str
    baseline: str
    measure: str
    over: tuple[str, ...]
    difference: Difference


def by_arm(saes: Sequence[Entry]) -> dict[str, list[Entry]]:
    """Entries of `evaluation.json` by arm, seeds ascending."""
    arms: dict[str, list[Entry]] = {}
    for entry in saes:
        arms.setdefault(entry["arm"], []).append(entry)
    return arms


def differences(saes: Sequence[Entry]) -> list[ArmDifference]:
    """Each arm minus the first, seed by seed, for every measure that both have for as many seeds.

    With one seed, FVE is compared by blocks of the text: that interval says what other text would change, not what another seed
    would.
    """
    baseline, *others = by_arm(saes).items()
    found: list[ArmDifference] = []
    for arm, entries in others:
        seeds = min(len(entries), len(baseline[1]))
        ours, theirs = ([measures(entry) for entry in side[:seeds]] for side in (entries, baseline[1]))
        for name, first in ours[0].items():
            sides = [[by_name[name] for by_name in side if name in by_name] for side in (ours, theirs)]
            shapes = {measure.values.shape for side in sides for measure in side}
            if any(len(side) < seeds for side in sides) or len(shapes) > 1:
                continue
            a, b, over = _paired(sides[0], sides[1], first.over)
            if a.size > 1 and np.isfinite(a - b).all():
                found.append(ArmDifference(arm, baseline[0], name, over, paired_difference(a, b)))
    return found


def _paired(
    ours: Sequence[Measure], theirs: Sequence[Measure], over: tuple[str, ...]
) -> tuple[Array, Array, tuple[str, ...]]:
    if len(ours) == 1:
        return ours[0].values, theirs[0].values, over
    if over == BLOCKS:  # the text is the same for all seeds, and seeds differ more than blocks
        ours, theirs, over = _means(ours), _means(theirs), ()
    a, b = (np.stack([measure.values for measure in side]) for side in (ours, theirs))
    return a, b, ("seeds", *over)


def _means(side: Sequence[Measure]) -> list[Measure]:
    return [Measure(measure.value, np.asarray(measure.value), ()) for measure in side]


def summary(entries: Sequence[Entry]) -> dict[str, tuple[float, float | None, float | None]]:
    """Each measure's mean over an arm's seeds, and the ends of its 95 % interval; None with a single seed."""
    found: dict[str, tuple[float, float | None, float | None]] = {}
    by_seed = [measures(entry) for entry in entries]
    for name in by_seed[0]:
        values = [by_name[name].value for by_name in by_seed if name in by_name]
        if len(values) > 1 and np.isfinite(values).all():
            interval = paired_difference(values, [0.0] * len(values))
            found[name] = (interval.mean, interval.low, interval.high)
        else:
            found[name] = (float(np.mean(values)), None, None)
    return found


BLOCKS = ("blocks of text",)


class Measure(NamedTuple):
    """
    One figure of one SAE.

    Args:
        value (float): The figure.
        values (np.ndarray): What intervals are computed from; the figure itself where nothing was repeated.
        over (tuple[str, ...]): The axes of `values`.
    """

    value: float
    values: Array
    over: tuple[str, ...]


def measures(entry: Entry) -> dict[str, Measure]:
    """What an SAE was measured at, by the name that tables use."""
    results = {name: result for name, result in entry["results"].items() if "not_applicable" not in (result or {})}
    found: dict[str, Measure] = {}

    def take(named: Iterator[tuple[str, Any] | tuple[str, Any, tuple[str, ...], Any]], sinks: str = "") -> None:
        for name, value, *repeated in named:
            over, values = repeated or ((), value)
            values = np.asarray(values, dtype=np.float64)
            found[name + sinks] = Measure(float("nan") if value is None else float(value), values, over)

    for treatment, sinks in TREATMENTS.items():
        take(_measures(results, treatment), f", {sinks}")
    take(_saebench(results))
    return found


def _measures(results: Mapping[str, Any], treatment: str) -> Iterator[Any]:
    def of(name: str) -> Any:
        return (results.get(name) or {}).get(treatment)

    if fit := of("reconstruction"):
        overall, top = (fit["by_norm"][part]["overall"] for part in ("all_norms", "without_top"))
        yield "FVE", overall["fve"], BLOCKS, results["reconstruction"]["fve_by_block"][treatment]
        yield "FVE without the top 1 % of norms", top["fve"]
        yield "cosine", overall["cosine"]
        yield "norm ratio", overall["norm_ratio"]
        yield "L0", overall["l0"]
        yield "never fired", overall["never_fired"]
    if loss := of("loss"):
        overall = loss["by_norm"]["all_norms"]["overall"]
        yield "CE recovered", overall["ce_loss_score"]
        yield "KL, nats", overall["kl_div_with_sae"]
    if probing := of("probing"):
        for units, tasks in probing.items():
            for by_task in zip(*tasks, strict=True):  # k by k
                accuracies = [task["accuracies"] for task in by_task]
                name = f"probing k={by_task[0]['k'] or 'all'}, {units.replace('_', '-')}"
                yield name, np.mean(accuracies), ("tasks", "splits"), accuracies
    if matching := of("matching"):
        features = matching["features"]
        yield "matched share", features["matched"] / max(1, features["alive"])
    if dictionary := of("dictionary"):
        detectors = dictionary["norm_detectors"]
        yield "share of firings in the top norm quartile", detectors["median_shares"][3]
        yield "norm detectors", detectors["detectors"]
    if response := of("norm_response"):
        yield "FVE lost to norm noise", response["noise"]["drop"]
        yield "FVE lost to norm noise, threshold refitted", response["noise"]["drop_refitted"]
    if afa := of("afa"):
        yield "|f| / |z| - 1", afa["augment, to the input"]["signed_gap"]["median"]
    if causal := of("causal"):
        for protocol, rate in causal["win_rate"].items():
            yield f"win rate {protocol}", rate["win_rate"]
            yield f"win rate {protocol} within norm quartiles", rate["win_rate_within_quartiles"]
        for effect in causal["ablation"]["mean"]:
            yield f"ablation selectivity k={effect['k']}", effect["selectivity"]


def _saebench(results: Mapping[str, Any]) -> Iterator[Any]:
    for name, result in results.items():
        for treatment, field in (("", "metrics"), (", sinks out", "metrics_without_high_norm")):
            for metric, value in ((result or {}).get(field) or {}).items():
                yield f"SAEBench {name}: {metric}{treatment}", value

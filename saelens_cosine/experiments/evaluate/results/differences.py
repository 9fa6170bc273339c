"""Arms against the first one, beside the noise of seeds, tasks and text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from saelens_cosine.experiments.evaluate.results.figures import (
    further_measures,
    measures_of_weights,
    not_compared,
    without_treatment,
)
from saelens_cosine.experiments.evaluate.sources import pair_seeds
from saelens_cosine.metrics.intervals import (
    ASSUMPTIONS,
    CONFIDENCE,
    Chance,
    Difference,
    Documents,
    about,
    by_chance,
    difference_over_documents,
    paired_difference,
)
from saelens_cosine.saebench.results import LABELS

TREATMENTS = {"with_sinks": "sinks in", "without_sinks": "sinks out"}
"""As results call them, and as a reader does."""

DOCUMENTS = ("documents",)

MATCHED = "matched share"
"""How a measure begins that is a comparison with the baseline already."""

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
        over (tuple[str, ...]): What the interval is over: "seeds", "tasks", "splits", "documents".
        difference (Difference): Its mean and 95 % interval. The mean is the difference of the figures, or its mean over seeds.
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
    """Each arm minus the first, for every measure that both have, from the seeds that both have (`pair_seeds`).

    With several seeds, the mean over seeds of the differences of the figures, and an interval over seeds. With one, the difference
    of the figures: for FVE with an interval over the documents of the text, for probing over tasks and splits; other figures are
    single numbers, and are left out.
    """
    (baseline, theirs), *others = by_arm(saes).items()
    found: list[ArmDifference] = []
    for arm, entries in others:
        partners = pair_seeds(_seeds(entries), _seeds(theirs))
        by_seed = {entry["seed"]: measures(entry) for entry in theirs}
        pairs = [(measures(entry), by_seed[partners[entry["seed"]]]) for entry in entries if entry["seed"] in partners]
        for name in pairs[0][0] if pairs else ():
            if not name.startswith(MATCHED) and all(name in side for pair in pairs for side in pair):
                difference = _difference([(ours[name], others[name]) for ours, others in pairs])
                if difference is not None:
                    found.append(ArmDifference(arm, baseline, name, *difference))
    return found


def _difference(pairs: Sequence[tuple[Measure, Measure]]) -> tuple[tuple[str, ...], Difference] | None:
    """Over what, and the difference; None where there is no interval to be had."""
    (a, b), *more = pairs
    if not np.isfinite([[side.value for side in pair] for pair in pairs]).all():
        return None
    if a.documents and b.documents and not more:
        mean = a.value - b.value
        if a.units != b.units:
            reason = "not measured on the same tokens"
            return DOCUMENTS, Difference(mean, None, None, False, (len(a.documents.total),), reason)
        return DOCUMENTS, difference_over_documents(a.documents, b.documents, mean)
    if len({(measure.units if measure.over else (), measure.values.shape) for pair in pairs for measure in pair}) > 1:
        return None
    ours, theirs = (np.stack([pair[side].values for pair in pairs]) for side in (0, 1))
    if not more:
        ours, theirs = ours[0], theirs[0]
    if ours.size < 2:
        return None
    return (("seeds", *a.over) if more else a.over), paired_difference(ours, theirs)


def _seeds(entries: Sequence[Entry]) -> list[int]:
    return [entry["seed"] for entry in entries]


def compared(saes: Sequence[Entry]) -> dict[str, Any]:
    """The fields of `evaluation.json` that compare arms: `baseline`, `unpaired`, `on_other_tokens`, `differences`, `intervals`."""
    found = differences(saes)
    axes = dict.fromkeys(axis for item in found for axis in item.over)
    return {
        "baseline": saes[0]["arm"],
        "unpaired": unpaired(saes),
        "on_other_tokens": _on_other_tokens(saes),
        "differences": found,
        "intervals": {
            "confidence": CONFIDENCE,
            **by_chance([item.difference for item in found])._asdict(),
            "assumptions": {axis: ASSUMPTIONS[axis] for axis in axes},
        },
    }


def _on_other_tokens(saes: Sequence[Entry]) -> list[str]:
    """Arms whose seeds were not all measured on the texts that the first arm's were."""
    (_, theirs), *others = by_arm(saes).items()
    texts = {entry.get("text") for entry in theirs}
    return [arm for arm, entries in others if {entry.get("text") for entry in entries} != texts]


def unpaired(saes: Sequence[Entry]) -> list[dict[str, Any]]:
    """Seeds that an arm has and the other lacks, which differences between the two leave out: `arm`, `seed`, `without`."""
    (baseline, theirs), *others = by_arm(saes).items()
    found: list[dict[str, Any]] = []
    for arm, entries in others:
        partners = pair_seeds(_seeds(entries), _seeds(theirs))
        for name, seeds, paired, without in (
            (arm, _seeds(entries), partners.keys(), baseline),
            (baseline, _seeds(theirs), partners.values(), arm),
        ):
            found += [{"arm": name, "seed": seed, "without": without} for seed in seeds if seed not in paired]
    return found


def about_differences(document: Mapping[str, Any]) -> list[str]:
    """What a reader of the differences in an `evaluation.json` has to know, a sentence or two each."""
    intervals = document["intervals"]
    lines = about(intervals["assumptions"], Chance(**{field: intervals[field] for field in Chance._fields}))
    if document["unpaired"]:
        named = (f"seed {item['seed']} of {item['arm']} ({item['without']} has none)" for item in document["unpaired"])
        lines.append(f"Left out of differences, which are means over the other seeds: {', '.join(named)}.")
    if apart := document.get("on_other_tokens"):
        lines.append(
            f"Measured on other tokens than {document['baseline']} (another model, hook, or form of text): {', '.join(apart)}. "
            "Their differences are those of the tokens, too."
        )
    return lines


def summary(entries: Sequence[Entry]) -> dict[str, tuple[float, float | None, float | None]]:
    """Each measure's mean over an arm's seeds, and the ends of its 95 % interval; None with a single seed."""
    found: dict[str, tuple[float, float | None, float | None]] = {}
    by_seed = [measures(entry) for entry in entries]
    for name in dict.fromkeys(name for by_name in by_seed for name in by_name):
        values = [by_name[name].value for by_name in by_seed if name in by_name]
        if len(values) > 1 and np.isfinite(values).all():
            interval = paired_difference(values, [0.0] * len(values))
            found[name] = (interval.mean, interval.low, interval.high)
        else:
            found[name] = (float(np.mean(values)), None, None)
    return found


class Measure(NamedTuple):
    """
    One figure of one SAE.

    Args:
        value (float): The figure.
        values (np.ndarray): What it is the mean of; the figure itself where nothing was repeated.
        over (tuple[str, ...]): The axes of `values`.
        documents (Documents | None): The sums that it is a ratio of, where it is one.
        units (tuple[str, ...]): What was measured: tasks, or a hash of the text. Values of other units are no pairs.
    """

    value: float
    values: Array
    over: tuple[str, ...] = ()
    documents: Documents | None = None
    units: tuple[str, ...] = ()


def measures(entry: Entry) -> dict[str, Measure]:
    """What an SAE was measured at, by the name that tables use."""
    results = {name: result for name, result in entry["results"].items() if "not_applicable" not in (result or {})}
    found: dict[str, Measure] = {}

    def take(named: Iterator[tuple[str, Any]], sinks: str = "") -> None:
        for name, value in named:
            figure = float("nan") if value is None else value
            found[name + sinks] = value if isinstance(value, Measure) else Measure(float(figure), np.asarray(figure))

    for treatment, sinks in TREATMENTS.items():
        take(_measures(results, treatment), f", {sinks}")
        take(further_measures(results, treatment), f", {sinks}")
    take(measures_of_weights(results))
    take(_of_training(results))
    take(_saebench(results))
    return found


def _measures(results: Mapping[str, Any], treatment: str) -> Iterator[tuple[str, Any]]:
    def of(name: str) -> Any:
        return (results.get(name) or {}).get(treatment)

    if fit := of("reconstruction"):
        overall, top = (fit["by_norm"][part]["overall"] for part in ("all_norms", "without_top"))
        yield "FVE", _fve(overall["fve"], results["reconstruction"]["fve_by_document"], treatment)
        yield "FVE without the top 1 % of norms", top["fve"]
        yield "cosine", overall["cosine"]
        yield "norm ratio", overall["norm_ratio"]
        yield "L0", overall["l0"]
        yield "never fired", overall["never_fired"]
        yield "rarely fired", overall["rarely_fired"]
        yield "dead in a batch", fit["dead"]["in_batch"]
    if loss := of("loss"):
        overall = loss["by_norm"]["all_norms"]["overall"]
        yield "CE recovered", overall["ce_loss_score"]
        yield "KL, nats", overall["kl_div_with_sae"]
    if probing := of("probing"):
        for units, tasks in probing.items():
            for by_task in zip(*tasks, strict=True):  # k by k
                accuracies, tasks_of = np.asarray([task["accuracies"] for task in by_task]), results["probing"]["tasks"]
                name = f"probing k={by_task[0]['k'] or 'all'}, {units.replace('_', '-')}"
                yield name, Measure(float(accuracies.mean()), accuracies, ("tasks", "splits"), None, tuple(tasks_of))
    if matching := of("matching"):
        features = matching["features"]
        yield "matched share of alive features", features["matched"] / max(1, features["alive"])
    if dictionary := of("dictionary"):
        detectors = dictionary["norm_detectors"]
        yield "share of firings in the top norm quartile", detectors["median_shares"][3]
        yield "norm detectors", detectors["detectors"]
    if response := of("norm_response"):
        for about, suffix in (("about b_dec", "_about_b_dec"), ("about 0", "")):
            if f"response{suffix}" in response:
                scaled, noise = response[f"response{suffix}"]["at_scales"], response[f"noise{suffix}"]
                yield (
                    f"active-set overlap at half scale, {about}",
                    next(at["overlap"] for at in scaled if at["scale"] == 0.5),
                )
                yield f"FVE lost to norm noise, {about}", noise["drop"]
                yield f"FVE lost to norm noise, threshold refitted, {about}", noise["drop_refitted"]
        yield "length of b_dec by the median norm", response["response"]["bias_ratio"]
    if afa := of("afa"):
        yield "|f| / |x - b_dec| - 1", afa["center, to the input"]["signed_gap"]["median"]
        yield "|f, b_dec| / |x| - 1", afa["augment, to the input"]["signed_gap"]["median"]
    if causal := of("causal"):
        for protocol, rate in causal["win_rate"].items():
            yield f"win rate {protocol}", rate["win_rate"]
            yield f"win rate {protocol} within norm quartiles", rate["win_rate_within_quartiles"]
        for effect in causal["ablation"]["mean"]:
            yield f"ablation selectivity k={effect['k']}", effect["selectivity"]


def _fve(value: float | None, by_document: Mapping[str, Any], treatment: str) -> Measure | None:
    if value is None:
        return None
    documents = Documents(*(np.asarray(by_document[treatment][part], np.float64) for part in Documents._fields))
    measured = documents if documents.total.sum() > 0 else None
    return Measure(value, np.asarray(value), (), measured, (by_document["text"],))


def _saebench(results: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, result in results.items():
        for treatment, field in (("", "metrics"), (", sinks out", "metrics_without_high_norm")):
            for metric, value in ((result or {}).get(field) or {}).items():
                yield f"SAEBench {name}: {LABELS.get(metric, metric)}{treatment}", value
        if ours := (result or {}).get("variance_explained"):
            yield f"SAEBench {name}: FVE, ours on the same tokens", ours["fve"]
            if ours["fve_without_high_norm"] is not None:
                yield f"SAEBench {name}: FVE, ours on the same tokens, sinks out", ours["fve_without_high_norm"]


def _of_training(results: Mapping[str, Any]) -> Iterator[Any]:
    """The same whatever tokens are measured; of an SAE whose training nobody recorded, nothing."""
    fits = results.get("reconstruction") or {}
    dead = next((fits[treatment]["dead"] for treatment in TREATMENTS if treatment in fits), None)
    if dead and dead["in_training"] is not None:
        yield "dead in training", dead["in_training"]


def figures_by_eval(results: Mapping[str, Any]) -> dict[str, dict[str, float | None]]:
    """What each eval of an SAE or of a text found, by name: its measures, and figures that arms are not compared in."""
    found: dict[str, dict[str, float | None]] = {}
    for name, result in results.items():
        own = {} if "not_applicable" in (result or {}) else {name: result}
        figures = {figure: measure.value for figure, measure in measures({"results": own}).items()}
        for treatment, sinks in TREATMENTS.items():
            figures |= {f"{figure}, {sinks}": value for figure, value in not_compared(own, treatment)}
        found[name] = {**figures, **dict(without_treatment(own))}
    return found

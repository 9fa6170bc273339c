"""Named figures of every eval: what the terminal and the page list, and `evaluation.json` has as `figures`.

`differences.measures` names what arms are compared in; here are those of further evals, and means over an arm's seeds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

Named = Iterator[tuple[str, float | None]]

Figures = Mapping[str, Mapping[str, float | None]]
"""By eval and by name; None where a figure is not finite."""


def further_measures(results: Mapping[str, Any], treatment: str) -> Named:
    """Figures of an SAE on tokens with or without sinks, beyond those of `differences`."""

    def of(name: str) -> Any:
        return (results.get(name) or {}).get(treatment)

    if dictionary := of("dictionary"):
        yield "co-firing of pairs over chance", dictionary["cofiring"]["lift"]
    if gradients := of("gradients"):
        yield "encoder gradient, largest norms over smallest, median", gradients["median_ratio"]
        yield "features trained by the largest norms alone", gradients["only_largest"] / max(1, gradients["features"])
    if swap := of("score_swap"):
        for reading in swap["readings"]:
            score = reading["score"].replace("_", " ")
            yield f"FVE read by {score} score", reading["reconstruction"]["fve"]
            yield f"L0 read by {score} score", reading["reconstruction"]["l0"]
    if causal := of("causal"):
        for effect in causal["ablation"]["mean"]:
            yield f"ablation precision k={effect['k']}", effect["precision"]
        for effect in causal["steering"]["effects"]:
            yield f"steering KL at {effect['factor']:g} times a code, nats", effect["kl_where_active"]


def measures_of_weights(results: Mapping[str, Any]) -> Named:
    """Figures of an SAE that no token has a part in."""
    dictionary = results.get("dictionary") or {}
    if geometry := dictionary.get("geometry"):
        yield "largest cosine of a decoder row with another, mean", geometry["mean_max_cosine"]
        yield "effective dimension of the decoder", geometry["effective_dimension"]
    if exponents := dictionary.get("exponent_values"):
        yield "norm exponent, mean", float(np.mean(exponents))


def not_compared(results: Mapping[str, Any], treatment: str) -> Named:
    """Figures of the text, and of an SAE that are differences to the first arm already."""

    def of(name: str) -> Any:
        return (results.get(name) or {}).get(treatment)

    if patching := of("patching"):
        for context, found in patching.items():
            where = {"alone": "in a context of one token", "text": "in the text"}[context]
            yield f"KL of a direction patch {where}, nats", found["random"]["direction_kl"]["mean"]
            yield f"KL of a norm patch {where}, nats", found["random"]["norm_kl"]["mean"]
    if baseline := of("probing_baseline"):
        yield "probes on activations, mean accuracy", float(np.mean([task["accuracy"] for task in baseline]))
    if parts := of("decomposition"):
        for part in parts:
            k = f"k={part['k'] or 'all'}"
            yield f"probing gap to the first arm {k}", part["gap"]["mean"]
            yield f"probing gap on matched features alone {k}", part["matched_gap"]["mean"]
            yield f"separability, share of the gap {k}", part["separability"]


def without_treatment(results: Mapping[str, Any]) -> Named:
    """Figures of the text, or of the page, that are one whether sinks are in or out."""
    if tokens := results.get("tokens"):
        yield "tokens", tokens["tokens"]
        yield "share of high-norm tokens", tokens["high_norm_share"]
        yield "their norm over the median", tokens["high_norm_multiple"]
    if features := (results.get("features") or {}).get("features"):
        yield "features in the page's browser", len(features)


def means(entries: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float | None]]:
    """The mean over an arm's seeds of each figure, over those that have it; None if one of them is not finite."""
    values: dict[str, dict[str, list[float | None]]] = {}
    for entry in entries:
        for name, figures in (entry.get("figures") or {}).items():
            for figure, value in figures.items():
                values.setdefault(name, {}).setdefault(figure, []).append(value)
    return {name: {figure: _mean(found) for figure, found in figures.items()} for name, figures in values.items()}


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(known) == len(values) else None


def text_names(texts: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the texts of an `evaluation.json` are called, each by what tells it from the others: model, hook, data, and form."""
    forms = [
        {"head": text.get("head"), "sinks planted": text.get("planted_sinks"), **text.get("form", {})} for text in texts
    ]
    differ = [
        what
        for what in dict.fromkeys(what for form in forms for what in form)
        if len({str(form.get(what)) for form in forms}) > 1
    ]
    return [
        ", ".join(
            [f"{text['model']} at {text['hook']}", text["dataset"], *(f"{what}={form.get(what)}" for what in differ)]
        )
        for text, form in zip(texts, forms, strict=True)
    ]


def by_column(document: Mapping[str, Any]) -> tuple[dict[str, Figures], dict[str, Figures]]:
    """All figures of an `evaluation.json`: those of its texts, by model, hook and text, and those of its arms."""
    figures = [text.get("figures") or {} for text in document["texts"]]
    texts: dict[str, Figures] = dict(zip(text_names(document["texts"]), figures, strict=True))
    arms: dict[str, list[Mapping[str, Any]]] = {}
    for entry in document["saes"]:
        arms.setdefault(entry["arm"], []).append(entry)
    of_arms: dict[str, Figures] = {arm: means(entries) for arm, entries in arms.items()}
    return texts, of_arms


def rows(columns: Mapping[str, Figures], evals: Sequence[str]) -> Iterator[tuple[str, str, list[float | None]]]:
    """Eval, figure and its value in each column, in the order of the evals."""
    for name in evals:
        figures = dict.fromkeys(figure for column in columns.values() for figure in column.get(name, {}))
        for figure in figures:
            yield name, figure, [column.get(name, {}).get(figure) for column in columns.values()]


def left_out(document: Mapping[str, Any]) -> dict[tuple[str, str], list[str]]:
    """Evals that say nothing of an SAE or a text: by eval and reason, the arms, or the text's name."""
    found: dict[tuple[str, str], list[str]] = {}
    named = list(zip(text_names(document["texts"]), document["texts"], strict=True))
    named = named if len(named) > 1 else [(text["dataset"], text) for _, text in named]
    for whose, entry in named + [(entry["arm"], entry) for entry in document["saes"]]:
        for name, result in entry["results"].items():
            if reason := (result or {}).get("not_applicable"):
                arms = found.setdefault((name, reason), [])
                if whose not in arms:
                    arms.append(whose)
    return found


def text_is(saes: Sequence[Mapping[str, Any]]) -> str:
    """What the text of an `evaluation.json` is to its SAEs, as one reads it: held out is known of runs of this package only."""
    arms = dict.fromkeys(entry["arm"] for entry in saes if not entry["held_out"])
    return f"Text that may be training text of {', '.join(arms)}" if arms else "Held-out text"

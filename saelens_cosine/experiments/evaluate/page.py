"""The page of an evaluation: `evaluation.json` as `report.html` shows it.

Numbers are means over an arm's seeds with 95 % intervals; points, histograms, matched features and the browser are its first
seed's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from saelens_cosine.experiments.evaluate.evals.of_text.tokens import TokenNorms
from saelens_cosine.experiments.evaluate.results.evaluation import Evaluation, MeasuredSAE
from saelens_cosine.experiments.evaluate.results.listing import (
    about_differences,
    by_column,
    columns,
    left_out,
    not_finite,
    rows,
    summary,
    text_is,
    text_names,
    tokens_measured,
)
from saelens_cosine.files.secrets import published
from saelens_cosine.metrics.dictionary.features import Context, TokenValue
from saelens_cosine.metrics.intervals import paired_difference
from saelens_cosine.report.html.data import (
    Arm,
    Curve,
    Difference,
    Estimate,
    Feature,
    LeftOut,
    Listed,
    MatchedFeatures,
    MatchedPair,
    NormQuartiles,
    PrecisionCurve,
    Probing,
    ReportData,
    ScaleResponse,
    ZFPoints,
)

SINKS: dict[str, Literal["in", "out"]] = {"with_sinks": "in", "without_sinks": "out"}

Entry = Mapping[str, Any]


def report_data(found: Evaluation) -> ReportData:
    """The sections of a report that an evaluation has figures for, without places on this machine: a page is handed around."""
    document = found.document()
    arms: dict[str, list[Entry]] = {}
    for entry in document["saes"]:
        arms.setdefault(entry["arm"], []).append(entry)
    preferred = "without_sinks" if found.settings.sinks != "keep" else "with_sinks"
    data = ReportData(
        title="Evaluation of sparse autoencoders",
        facts=_facts(found),
        not_finite=tuple(
            f"{item.arm}, seed {item.seed}, {item.eval}: {item.bad:,} not finite" for item in not_finite(found)
        ),
        arms=tuple(_arm(name, found.arms[name], entries) for name, entries in arms.items()),
        differences=tuple(_differences(document["differences"])),
        about_differences=tuple(about_differences(found)),
        quartiles=tuple(part for name, entries in arms.items() for part in _quartiles(name, entries)),
        zf=tuple(points for name, entries in arms.items() for points in _zf(name, entries[0])),
        scaling=tuple(line for name, entries in arms.items() for line in _scaling(name, entries, preferred)),
        probing=tuple(task for name, entries in arms.items() for task in _probing(name, entries, preferred)),
        precision=tuple(curve for name, entries in arms.items() for curve in _precision(name, entries, preferred)),
        matches=tuple(pairs for name, entries in arms.items() for pairs in _matches(name, entries, arms, preferred)),
        features=tuple(feature for name, entries in arms.items() for feature in _features(name, entries[0])),
        saes=tuple(_sae(entry) for entry in document["saes"]),
        listed=tuple(_listed(found)),
        left_out=tuple(LeftOut(*item) for item in left_out(found)),
    )
    told = data.to_dict()
    features = told.pop("features")  # text that was read, as it is
    # null, as JSON holds what is not finite, becomes NaN
    return ReportData.from_dict({**published(told), "features": features})


def _sae(entry: Entry) -> dict[str, str]:
    """What an SAE is; a dash for what is not known."""
    found = entry["trained"]
    filtered = "-"
    if found["filtered"]:
        multiple, share = found["max_norm_multiple"], found["high_norm_share_dropped"]
        dropped = "" if share is None else f": {share:.2%} of the tokens dropped"
        filtered = "none" if multiple is None else f"above {multiple:g} times the median{dropped}"
    trained_as = found["training_architecture"]
    return {
        "arm": entry["arm"],
        "seed": str(entry["seed"]),
        "architecture": entry["architecture"],
        "trained as": trained_as or "-",
        "features": f"{found['d_sae']:,}",
        "selector": ", ".join(f"{name} = {value:g}" for name, value in found["selector"].items()) or "-",
        "training tokens": "-" if found["tokens"] is None else f"{found['tokens']:,}",
        "learning rate": "-" if found["lr"] is None else f"{found['lr']:g}",
        "recipe": found["recipe"] or "-",
        "norm filter in training": filtered,
        "text": "held out" if entry["held_out"] else "maybe trained on",
        "place": entry["place"],
        "sha256": entry["sha256"][:12],
    }


def _listed(found: Evaluation) -> Iterator[Listed]:
    for by_name in by_column(found):
        for name, figure, values in rows(by_name, found.settings.evals):
            known = (float("nan") if value is None else value for value in values)
            yield Listed(name, figure, dict(zip(by_name, known, strict=True)))


def _facts(found: Evaluation) -> dict[str, str]:
    settings, texts = found.settings, found.texts
    seeds = sorted({len(entries) for entries in found.arms.values()})
    facts = {
        "model and hook": "; ".join(dict.fromkeys(f"{text.model} at {text.hook}" for text in texts)),
        "text": "; ".join(dict.fromkeys(text.dataset for text in texts)),
        "held out": text_is(found.saes),
        "tokens": "; ".join(f"{name} {count}" for name, count in tokens_measured(found.saes).items())
        or "none measured by an SAE",
        "seeds": " to ".join(map(str, dict.fromkeys((seeds[0], seeds[-1])))) + " of each arm",
        "high-norm tokens (sinks)": f"above {settings.max_norm_multiple:g} times the median norm; "
        + {"keep": "kept", "drop": "left out", "both": "shown with and without"}[settings.sinks]
        + ("; planted in each context" if any(text.planted_sinks for text in texts) else ""),
    }
    for name, text in zip(text_names(texts), texts, strict=True):
        of = f" of {name}" if len(texts) > 1 else ""
        if isinstance(norms := text.results.get("tokens"), TokenNorms):
            facts[f"share of high-norm tokens{of}"] = f"{norms.high_norm_share:.2%}"
            if norms.high_norm_multiple:
                facts[f"their norm{of}"] = f"{norms.high_norm_multiple:.1f} times the median"
    if {"probing", "causal", "norm_response", "matching"} & set(settings.evals):
        preferred = "out" if settings.sinks != "keep" else "in"
        facts["probing, precision, scaled tokens and matches"] = f"sinks {preferred}"
    if unknown := [
        name
        for name, entries in found.arms.items()
        if "reconstruction" in settings.evals and "dead in training" not in summary(entries)
    ]:
        facts["dead in training"] = (
            f"unknown of {', '.join(unknown)}: not in the metadata, and no comparison.json beside"
        )
    made = {
        "made": found.date,
        "by": found.command or "saelens_cosine.experiments.evaluate.run, from Python",
    }
    return {**facts, **{f"version of {name}": version for name, version in found.versions.items()}, **made}


def _arm(name: str, measured: Sequence[MeasuredSAE], entries: Sequence[Entry]) -> Arm:
    figures = summary(measured)
    metrics = {title: figures[title] for title in columns(measured)}
    exponents = (entries[0]["results"].get("dictionary") or {}).get("exponent_values") or []
    logs = [entry["training"] for entry in entries if entry["training"]]
    curves = {
        label: tuple(Curve(tuple(log["training_tokens"]), tuple(log[field])) for log in logs)
        for label, field in (("FVE", "fve"), ("L0", "l0"))
        if logs
    }
    return Arm(name, entries[0]["architecture"], metrics, curves, tuple(exponents))


def _differences(found: Sequence[Mapping[str, Any]]) -> Iterator[Difference]:
    for item in found:
        numbers = item["difference"]
        over = " x ".join(f"{n} {what}" for n, what in zip(numbers["shape"], item["over"], strict=True))
        yield Difference(
            item["arm"],
            item["baseline"],
            f"{item['measure']} ({over}{': ' + reason if (reason := numbers['no_interval']) else ''})",
            Estimate(numbers["mean"], numbers["low"], numbers["high"]),
        )


def _quartiles(name: str, entries: Sequence[Entry]) -> Iterator[NormQuartiles]:
    for treatment, sinks in SINKS.items():
        fits = [found[treatment] for e in entries if treatment in (found := e["results"].get("reconstruction") or {})]
        if fits:
            by_seed = [fit["by_norm"]["all_norms"]["ranges"] for fit in fits]
            first = by_seed[0]
            yield NormQuartiles(
                name,
                sinks,
                tuple(_mean([ranges[i]["measured"]["fve"] for ranges in by_seed]) for i in range(len(first))),
                (*(part["low"] for part in first), first[-1]["high"]) if first else (),
                tuple(part["measured"]["tokens"] for part in first),
            )


def _zf(name: str, entry: Entry) -> Iterator[ZFPoints]:
    for treatment, sinks in SINKS.items():
        if found := (entry["results"].get("afa") or {}).get(treatment):
            points, centred = found["zf_points_centred"], found["center, to the input"]
            yield ZFPoints(
                name,
                tuple(_mean([norm]).value for norm in points["afa"]),
                tuple(_mean([norm]).value for norm in points["feature_norm"]),
                sinks,
                centred["tokens"],
                1 + _mean([centred["signed_gap"]["median"]]).value,
                _mean([centred["share_below"]]).value,
                centred["without_features"],
            )


def _scaling(name: str, entries: Sequence[Entry], treatment: str) -> Iterator[ScaleResponse]:
    found = [result[treatment] for e in entries if treatment in (result := e["results"].get("norm_response") or {})]
    kinds: dict[str, Literal["b_dec", "0"]] = {"response_about_b_dec": "b_dec", "response": "0"}
    for kind, about in kinds.items():
        if by_seed := [result[kind] for result in found if kind in result]:
            yield ScaleResponse(
                name,
                about,
                tuple(at["scale"] for at in by_seed[0]["at_scales"]),
                tuple(
                    _mean([at["overlap"] for at in seeds])
                    for seeds in zip(*(r["at_scales"] for r in by_seed), strict=True)
                ),
                _mean([response["bias_ratio"] for response in by_seed]).value,
            )


def _probing(name: str, entries: Sequence[Entry], treatment: str) -> Iterator[Probing]:
    found = [e["results"]["probing"] for e in entries if treatment in (e["results"].get("probing") or {})]
    if not found:
        return
    for i, task in enumerate(found[0]["tasks"]):
        for j, probe in enumerate(found[0][treatment]["canonical"][i]):
            accuracies = [result[treatment]["canonical"][i][j]["accuracy"] for result in found]
            yield Probing(task, name, str(probe["k"] or "all"), _mean(accuracies))


def _precision(name: str, entries: Sequence[Entry], treatment: str) -> Iterator[PrecisionCurve]:
    causal = [(e["results"].get("causal") or {}).get(treatment) for e in entries]
    effects = [found["ablation"]["mean"] for found in causal if found]
    if effects:
        by_k = list(zip(*effects, strict=True))
        yield PrecisionCurve(
            name,
            tuple(seeds[0]["k"] for seeds in by_k),
            tuple(_mean([effect["precision"] for effect in seeds]) for seeds in by_k),
            tuple(_mean([effect["intended_kl"] for effect in seeds]).value for seeds in by_k),
            tuple(_mean([effect["collateral_kl"] for effect in seeds]).value for seeds in by_k),
        )


def _matches(
    name: str, entries: Sequence[Entry], arms: Mapping[str, Sequence[Entry]], treatment: str
) -> Iterator[MatchedFeatures]:
    """Of the arm's first seed that has a partner."""
    of_seeds = ((entry["results"].get("matching") or {}).get(treatment) for entry in entries)
    if found := next(filter(None, of_seeds), None):
        pairs = found["pairs"]
        columns = (pairs["features"], pairs["partners"], pairs["correlations"], pairs["decoder_cosines"])
        rows = zip(*columns, found["top_quartile_share"], strict=True)
        counts = (found["features"][count] for count in ("alive", "paired", "matched"))
        yield MatchedFeatures(name, next(iter(arms)), tuple(MatchedPair(*row) for row in rows), *counts)


def _features(name: str, entry: Entry) -> Iterator[Feature]:
    found = entry["results"].get("features") or {}
    for feature in found.get("features", []):
        contexts = tuple(Context(tuple(tokens), tuple(values)) for tokens, values in feature["contexts"])
        ends = {end: tuple(TokenValue(*item) for item in feature[end]) for end in ("promotes", "suppresses")}
        yield Feature(name, feature["index"], feature["density"], feature["exponent"], contexts, **ends)


def _mean(values: Sequence[float | None]) -> Estimate:
    """Over seeds, with its interval where there are several."""
    known = [value for value in values if value is not None]
    if len(known) < len(values) or not known:
        return Estimate(float("nan"))
    if len(known) == 1:
        return Estimate(known[0])
    interval = paired_difference(known, [0.0] * len(known))
    return Estimate(interval.mean, interval.low, interval.high)

"""The page of an evaluation: `evaluation.json` as `report.html` shows it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from saelens_cosine.evaluation.html_report.data import Arm, Estimate, NormQuartiles, ReportData, ZFPoints

TREATMENTS = {"with_sinks": "in", "without_sinks": "out"}


def report_data(document: Mapping[str, Any]) -> ReportData:
    """The sections of a report that an `evaluation.json` has figures for."""
    settings, saes = document["settings"], document["saes"]
    hooks = sorted({f"{sae['metadata'].get('model_name')} at {sae['metadata'].get('hook_name')}" for sae in saes})
    facts = {
        "model and hook": "; ".join(hooks),
        "tokens": f"{settings['tokens']:,} held out",
        "high-norm tokens": f"above {settings['max_norm_multiple']:g} times the median norm; {settings['sinks']}",
        **{f"version of {name}": version for name, version in document["versions"].items()},
    }
    return ReportData(
        title="Evaluation of sparse autoencoders",
        facts=facts,
        arms=tuple(_arm(sae) for sae in saes),
        quartiles=tuple(quartiles for sae in saes for quartiles in _quartiles(sae)),
        zf=tuple(points for sae in saes for points in _zf(sae)),
    )


def _arm(sae: Mapping[str, Any]) -> Arm:
    metrics: dict[str, Estimate] = {}
    results = sae["results"]
    for treatment, sinks in TREATMENTS.items():
        fit = (results.get("reconstruction") or {}).get(treatment)
        if fit:
            overall = fit["by_norm"]["all_norms"]["overall"]
            for label, field in (("FVE", "fve"), ("L0", "l0"), ("never fired", "never_fired")):
                metrics[f"{label}, sinks {sinks}"] = _estimate(overall[field])
        loss = (results.get("loss") or {}).get(treatment)
        if loss:
            overall = loss["by_norm"]["all_norms"]["overall"]
            metrics[f"CE recovered, sinks {sinks}"] = _estimate(overall["ce_loss_score"])
            metrics[f"KL, nats, sinks {sinks}"] = _estimate(overall["kl_div_with_sae"])
    exponents = (results.get("dictionary") or {}).get("exponent_values") or []
    return Arm(sae["name"], sae["architecture"], metrics, exponents=tuple(exponents))


def _quartiles(sae: Mapping[str, Any]) -> Iterator[NormQuartiles]:
    for treatment, sinks in TREATMENTS.items():
        fit = (sae["results"].get("reconstruction") or {}).get(treatment)
        if fit:
            ranges = fit["by_norm"]["all_norms"]["ranges"]
            yield NormQuartiles(
                sae["name"],
                "in" if sinks == "in" else "out",
                tuple(_estimate(part["measured"]["fve"]) for part in ranges),
                (*(part["low"] for part in ranges), ranges[-1]["high"]) if ranges else (),
                tuple(part["measured"]["tokens"] for part in ranges),
            )


def _zf(sae: Mapping[str, Any]) -> Iterator[ZFPoints]:
    points = (sae["results"].get("afa") or {}).get("zf_points")
    if points:
        yield ZFPoints(sae["name"], tuple(points["afa"]), tuple(points["feature_norm"]))


def _estimate(value: float | None) -> Estimate:
    return Estimate(float("nan") if value is None else value)

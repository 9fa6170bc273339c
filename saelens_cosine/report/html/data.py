"""What `report.html` is made from: plain values, so that a report can be drawn again from a JSON file years later.

`ReportData.to_dict` gives what JSON can hold (NaN and infinities as null), `ReportData.from_dict` takes it back. Every
section may be empty, and is then left out. Arms are called by name everywhere; their order, colours and marks are those of
`ReportData.arms`, then of first mention.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, NamedTuple

from saelens_cosine.metrics.dictionary.features import Context, TokenValue
from saelens_cosine.report.html.plain_values import from_plain, to_plain

SCHEMA = "saelens-cosine/report/2"
"""Name and version of the layout of `ReportData.to_dict`; the number grows when a field changes its meaning or goes."""


class Estimate(NamedTuple):
    """A value and the ends of its interval, None where none was computed. NaN: could not be measured."""

    value: float
    low: float | None = None
    high: float | None = None

    @property
    def bounds(self) -> tuple[float, float] | None:
        """The interval, None unless both ends are finite."""
        if self.low is None or self.high is None or not math.isfinite(self.low + self.high):
            return None
        return self.low, self.high


@dataclass(frozen=True)
class Curve:
    """
    One measure over one run's training.

    Args:
        tokens (tuple[float, ...]): Training tokens, ascending.
        values (tuple[float, ...]): The measure there.
    """

    tokens: tuple[float, ...]
    values: tuple[float, ...]


@dataclass(frozen=True)
class Arm:
    """
    One of the SAEs (or groups of seeds) that are compared.

    Args:
        name (str): What every section calls it.
        architecture (str): SAELens' name for it; empty if that is the arm's name too.
        metrics (dict[str, Estimate]): A row of the comparison table. The arms' keys together are its columns.
        curves (dict[str, tuple[Curve, ...]]): Learning curves by measure, one for each seed.
        exponents (tuple[float, ...]): One for each feature, a single one where they share it, none where the score has none.
    """

    name: str
    architecture: str = ""
    metrics: dict[str, Estimate] = field(default_factory=dict[str, Estimate])
    curves: dict[str, tuple[Curve, ...]] = field(default_factory=dict[str, tuple[Curve, ...]])
    exponents: tuple[float, ...] = ()


@dataclass(frozen=True)
class Difference:
    """
    A paired difference between two arms.

    Args:
        arm (str): Minuend.
        baseline (str): Subtrahend.
        metric (str): What was measured.
        difference (Estimate): `arm - baseline`. If its interval contains zero, the report says that no difference was seen.
    """

    arm: str
    baseline: str
    metric: str
    difference: Estimate


@dataclass(frozen=True)
class NormQuartiles:
    """
    FVE by quartile of the activation's norm, smallest norms first.

    Args:
        arm (str): Whose.
        sinks (Literal["in", "out"]): Whether high-norm tokens (attention sinks) were among the tokens.
        fve (tuple[Estimate, ...]): One for each quartile.
        edges (tuple[float, ...]): Norms between which they lie, one more than there are quartiles; or none.
        tokens (tuple[int, ...]): Tokens in each; or none.
    """

    arm: str
    sinks: Literal["in", "out"]
    fve: tuple[Estimate, ...]
    edges: tuple[float, ...] = ()
    tokens: tuple[int, ...] = ()


@dataclass(frozen=True)
class ZFPoints:
    """
    The ZF plot's points (Lee et al., arXiv 2503.24277), a sample of the tokens, and what is true of all tokens measured.

    Args:
        arm (str): Whose.
        input_norms (tuple[float, ...]): `||x - b_dec||`.
        code_norms (tuple[float, ...]): `||f||`, the codes times their decoder rows' norms. `b_dec` is no part of it.
        sinks (Literal["in", "out"]): Whether high-norm tokens (attention sinks) were among the tokens.
        tokens (int): Tokens measured.
        median_ratio (float): Median of `||f|| / ||x - b_dec||` over all of them.
        share_below (float): Share of them with `||f||` below `||x - b_dec||`.
        without_codes (int): How many have no codes.
    """

    arm: str
    input_norms: tuple[float, ...]
    code_norms: tuple[float, ...]
    sinks: Literal["in", "out"]
    tokens: int
    median_ratio: float
    share_below: float
    without_codes: int = 0


@dataclass(frozen=True)
class ScaleResponse:
    """
    Active features of scaled tokens beside those of the tokens as they are.

    Args:
        arm (str): Whose.
        about (Literal["b_dec", "0"]): What stays in place.
        scales (tuple[float, ...]): Factors, ascending.
        overlap (tuple[Estimate, ...]): Features active at both by features active at either, at each factor.
        bias_ratio (float): `||b_dec||` by the median norm of the tokens.
    """

    arm: str
    about: Literal["b_dec", "0"]
    scales: tuple[float, ...]
    overlap: tuple[Estimate, ...]
    bias_ratio: float


@dataclass(frozen=True)
class Probing:
    """
    Accuracy of a probe on the k best features of one task.

    Args:
        task (str): Data set or concept.
        arm (str): Whose codes.
        k (str): Features that the probe sees: "1", "5", "all".
        accuracy (Estimate): On held-out examples, 0 to 1.
    """

    task: str
    arm: str
    k: str
    accuracy: Estimate


@dataclass(frozen=True)
class PrecisionCurve:
    """
    What ablating the n features most specific to a concept does where the concept is, and elsewhere.

    Args:
        arm (str): Whose features.
        n_features (tuple[int, ...]): Features ablated, ascending.
        precision (tuple[Estimate, ...]): Intended effect over collateral effect.
        intended (tuple[float, ...]): Mean KL on the concept, nats; or none.
        collateral (tuple[float, ...]): Mean KL elsewhere, nats; or none.
    """

    arm: str
    n_features: tuple[int, ...]
    precision: tuple[Estimate, ...]
    intended: tuple[float, ...] = ()
    collateral: tuple[float, ...] = ()


class MatchedPair(NamedTuple):
    """Two features, the correlation of their codes, the cosine of their decoder rows, the first's share of firings in the top norm quartile."""

    feature: int
    other: int
    correlation: float
    decoder_cosine: float
    top_quartile_share: float


@dataclass(frozen=True)
class MatchedFeatures:
    """
    The features of one arm, each with the feature of another whose codes go with its own best.

    Args:
        arm (str): Whose features.
        other (str): Where their counterparts were looked for.
        pairs (tuple[MatchedPair, ...]): Some or all that have a counterpart, weak ones too.
        alive (int): Features that fire at all.
        paired (int): Of these, features with a counterpart: one that they fire together with often enough.
        matched (int): Of these, features whose codes correlate with its by 0.7 at least, with a decoder cosine above 0.7.
    """

    arm: str
    other: str
    pairs: tuple[MatchedPair, ...]
    alive: int
    paired: int
    matched: int


@dataclass(frozen=True)
class Feature:
    """
    What the feature browser shows of one feature.

    Args:
        arm (str): Whose.
        index (int): Its number in the SAE.
        density (float): Share of the evaluated tokens at which it is not zero.
        exponent (float | None): Its norm exponent; None where the score has none.
        contexts (tuple[Context, ...]): Where it is largest, the largest first.
        promotes (tuple[TokenValue, ...]): Tokens whose logits its decoder row raises most.
        suppresses (tuple[TokenValue, ...]): Those that it lowers most.
    """

    arm: str
    index: int
    density: float
    exponent: float | None
    contexts: tuple[Context, ...]
    promotes: tuple[TokenValue, ...] = ()
    suppresses: tuple[TokenValue, ...] = ()


@dataclass(frozen=True)
class Listed:
    """
    One figure of one eval.

    Args:
        eval (str): What found it.
        name (str): What it is.
        values (dict[str, float]): By arm, means over its seeds; or by text, of a figure that no SAE has a part in.
    """

    eval: str
    name: str
    values: dict[str, float]


class LeftOut(NamedTuple):
    """An eval that says nothing of some arms or texts, and why."""

    eval: str
    whose: str
    reason: str


@dataclass(frozen=True)
class ReportData:
    """
    Everything in a report. An empty section is left out.

    Args:
        title (str): Heading of the page.
        facts (dict[str, str]): What a reader must know to judge the numbers: model, hook, tokens, what happened to sinks, versions.
        not_finite (tuple[str, ...]): What was NaN or infinite, shown above everything, in red; none where all was finite.
        arms (tuple[Arm, ...]): The comparison, the baseline first.
        differences (tuple[Difference, ...]): Paired differences.
        about_differences (tuple[str, ...]): What their intervals assume, how many of them leave out zero by chance, and what has no partner.
        quartiles (tuple[NormQuartiles, ...]): FVE by norm, with and without sinks.
        zf (tuple[ZFPoints, ...]): ZF plot.
        scaling (tuple[ScaleResponse, ...]): Active features of scaled tokens.
        probing (tuple[Probing, ...]): By task, arm and k.
        precision (tuple[PrecisionCurve, ...]): Ablation.
        matches (tuple[MatchedFeatures, ...]): Scatter of matched features.
        features (tuple[Feature, ...]): Feature browser.
        saes (tuple[dict[str, str], ...]): What each SAE is, by name of the fact: a row of a table.
        listed (tuple[Listed, ...]): Every figure of every eval, in the order of the evals.
        left_out (tuple[LeftOut, ...]): Evals that did not apply.
    """

    title: str
    facts: dict[str, str] = field(default_factory=dict[str, str])
    not_finite: tuple[str, ...] = ()
    arms: tuple[Arm, ...] = ()
    differences: tuple[Difference, ...] = ()
    about_differences: tuple[str, ...] = ()
    quartiles: tuple[NormQuartiles, ...] = ()
    zf: tuple[ZFPoints, ...] = ()
    scaling: tuple[ScaleResponse, ...] = ()
    probing: tuple[Probing, ...] = ()
    precision: tuple[PrecisionCurve, ...] = ()
    matches: tuple[MatchedFeatures, ...] = ()
    features: tuple[Feature, ...] = ()
    saes: tuple[dict[str, str], ...] = ()
    listed: tuple[Listed, ...] = ()
    left_out: tuple[LeftOut, ...] = ()

    def arm_names(self) -> tuple[str, ...]:
        """Every arm that is mentioned, each once: those of `arms` first."""
        sections = (
            self.differences,
            self.quartiles,
            self.zf,
            self.scaling,
            self.probing,
            self.precision,
            self.matches,
            self.features,
        )
        mentioned = [item.arm for section in sections for item in section]
        others = [item.baseline for item in self.differences] + [item.other for item in self.matches]
        return tuple(dict.fromkeys([*(arm.name for arm in self.arms), *mentioned, *others]))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for `json.dumps(..., allow_nan=False)`."""
        return {"schema": SCHEMA, **to_plain(asdict(self))}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> ReportData:
        """What `to_dict` gave.

        Raises:
            ValueError: another schema, a field that is missing or unknown, or a value of another kind; it says where.
        """
        if plain.get("schema") != SCHEMA:
            raise ValueError(f"This is {plain.get('schema')!r}, and {SCHEMA!r} is what can be read.")
        return from_plain(cls, {name: value for name, value in plain.items() if name != "schema"}, "report")

"""What `report.html` is made from: plain values, so that a report can be drawn again from a JSON file years later.

`ReportData.to_dict` gives what JSON can hold (NaN and infinities as null), `ReportData.from_dict` takes it back. Every
section may be empty, and is then left out. Arms are called by name everywhere; their order, colours and marks are those of
`ReportData.arms`, then of first mention.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from functools import cache
from types import UnionType
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from saelens_cosine.sharing.features import Context, TokenValue

SCHEMA = "saelens-cosine/report/1"
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
    The ZF plot's points, one for each token (Lee et al., arXiv 2503.24277).

    Args:
        arm (str): Whose.
        input_norms (tuple[float, ...]): `||z||`.
        code_norms (tuple[float, ...]): `||f||`, the codes times their decoder rows' norms.
    """

    arm: str
    input_norms: tuple[float, ...]
    code_norms: tuple[float, ...]


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
        pairs (tuple[MatchedPair, ...]): All that were compared, weak ones too.
    """

    arm: str
    other: str
    pairs: tuple[MatchedPair, ...]


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
        quartiles (tuple[NormQuartiles, ...]): FVE by norm, with and without sinks.
        zf (tuple[ZFPoints, ...]): ZF plot.
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
    quartiles: tuple[NormQuartiles, ...] = ()
    zf: tuple[ZFPoints, ...] = ()
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
        return {"schema": SCHEMA, **_plain(asdict(self))}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> ReportData:
        """What `to_dict` gave.

        Raises:
            ValueError: another schema, a field that is missing or unknown, or a value of another kind; it says where.
        """
        if plain.get("schema") != SCHEMA:
            raise ValueError(f"This is {plain.get('schema')!r}, and {SCHEMA!r} is what can be read.")
        return _build(cls, {name: value for name, value in plain.items() if name != "schema"}, "report")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@cache
def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind)


def _build(kind: Any, value: Any, where: str) -> Any:
    """A value of a type from its plain form. Null is NaN where a float belongs."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return None if value is None else _build(inner[0], value, where)
    if kind is float and value is None:
        return math.nan
    if is_dataclass(kind) and isinstance(value, dict):
        hints, names = _hints(kind), [item.name for item in fields(kind)]
        if unknown := sorted(set(value) - set(names)):
            raise ValueError(f"{where} has {unknown}; {kind.__name__} has {names}.")
        try:
            return kind(**{name: _build(hints[name], item, f"{where}.{name}") for name, item in value.items()})
        except TypeError as error:
            raise ValueError(f"{where}: {error}") from None
    if origin is dict and isinstance(value, dict):
        return {name: _build(inner[1], item, f"{where}[{name!r}]") for name, item in value.items()}
    if origin is tuple and isinstance(value, list | tuple):
        if all(type(item) is inner[0] for item in value):  # tokens and codes, of which there are many
            return tuple(value)
        return tuple(_build(inner[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if isinstance(kind, type) and issubclass(kind, tuple) and isinstance(value, list | tuple):
        hints = _hints(kind)
        if len(value) != len(hints):
            raise ValueError(f"{where} has {len(value)} items; {kind.__name__} is {list(hints)}.")
        return kind(*(_build(hint, item, where) for hint, item in zip(hints.values(), value, strict=True)))
    plain = str if origin is Literal else kind
    if isinstance(plain, type) and isinstance(value, int | float if plain is float else plain):
        if origin is Literal and value not in inner:
            raise ValueError(f"{where} is {value!r}, which is none of {list(inner)}.")
        return value
    raise ValueError(f"{where} is {value!r:.80}, where {kind} belongs.")

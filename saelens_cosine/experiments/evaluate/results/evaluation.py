"""What an evaluation found: texts, SAEs, and differences between arms. JSON is its last step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from saelens_cosine.experiments.evaluate.evals import EVALS, TREATMENTS, Figure, NotMeasured
from saelens_cosine.experiments.evaluate.results.differences import ArmDifference, differences
from saelens_cosine.experiments.evaluate.results.matched import MatchedFigure, OnCurve, matched_figures
from saelens_cosine.experiments.evaluate.settings import EvaluationSettings
from saelens_cosine.experiments.evaluate.sources import controls, pair_seeds
from saelens_cosine.metrics.intervals import ASSUMPTIONS, CONFIDENCE, Chance, by_chance
from saelens_cosine.plain import plain

SCHEMA = "saelens-cosine-evaluation/2"
"""Name and version of the layout of `evaluation.json`; the number grows when a field changes its meaning or goes."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """
    What evals found of a text or an SAE.

    Args:
        results (dict[str, Any]): By eval, in the order of the settings, what its `measure` returned, or `NotMeasured`.
        seconds (dict[str, float]): What each took, in the run that measured it.
    """

    results: dict[str, Any]
    seconds: dict[str, float]

    @cached_property
    def figures(self) -> dict[str, tuple[Figure, ...]]:
        """Named numbers by eval; none of those that did not apply.

        Raises:
            ValueError: figures that arms are compared in, or two of one eval, have one name; names it and the evals.
        """
        found = {
            name: () if isinstance(result, NotMeasured) else tuple(EVALS[name].figures(result))
            for name, result in self.results.items()
        }
        _check_names(found)
        return found

    @cached_property
    def compared(self) -> dict[str, Figure]:
        """Figures that arms are compared in, by title: those with sinks, those without, then those that no token has a part in."""
        found = [one for figures in self.figures.values() for one in figures if one.compared]
        order = (*TREATMENTS, None)
        return {one.title: one for one in sorted(found, key=lambda one: order.index(one.sinks))}

    def document(self) -> dict[str, Any]:
        """As `evaluation.json` holds it."""
        figures = {name: {one.title: one.value for one in found} for name, found in self.figures.items()}
        return plain(self) | {"figures": plain(figures)}


def _check_names(figures: Mapping[str, tuple[Figure, ...]]) -> None:
    compared: dict[str, str] = {}
    for name, found in figures.items():
        titles = [one.title for one in found]
        if twice := [title for title in titles if titles.count(title) > 1]:
            raise ValueError(f"The eval {name!r} has two figures {twice[0]!r}; give each a name of its own.")
        for title in (one.title for one in found if one.compared):
            if (other := compared.setdefault(title, name)) != name:
                raise ValueError(f"The evals {other!r} and {name!r} both have a figure {title!r}; rename one of them.")


@dataclass(frozen=True, kw_only=True)
class MeasuredText(Measured):
    """
    A text as one model sees it, see `subject.Text`.

    Args:
        model (str): The language model.
        hook (str): Hook point.
        head (int | None): The attention head whose activations they are; None for all of the hook.
        dataset (str): Where the text is from.
        planted_sinks (bool): Whether sinks were planted.
        form (dict[str, Any]): What its contexts are like.
    """

    model: str
    hook: str
    head: int | None
    dataset: str
    planted_sinks: bool
    form: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class MeasuredSAE(Measured):
    """
    One SAE.

    Args:
        arm (str): What it is called, together with its other seeds.
        seed (int): Its number among them.
        condition (str): What tells it from others of its arm besides the seed, see `sources.Source`; empty where arms have one hook and one k.
        k (int | None): Active features that it was trained with, where known.
        place (str): Folder, repository or short name that it was loaded from.
        sha256 (str): Hash of its weights and config.
        architecture (str): SAELens' name for it.
        held_out (bool): Whether it is known that it was not trained on the text.
        baseline (str | None): Place of the SAE that it was compared with in `of="pair"` evals.
        metadata (dict[str, Any]): As in its config.
        trained (dict[str, Any]): How it was trained, see `training.recorded.trained`.
        training (dict[str, list[float]] | None): The course of its training, of an SAE that `saelens-cosine compare` has trained.
        text (int): Which of the evaluation's texts it was measured on.
    """

    arm: str
    seed: int
    condition: str = ""
    k: int | None = None
    place: str = ""
    sha256: str = ""
    architecture: str = ""
    held_out: bool = False
    baseline: str | None = None
    metadata: dict[str, Any]
    trained: dict[str, Any]
    training: dict[str, list[float]] | None = None
    text: int = 0

    @property
    def whose(self) -> str:
        """Its arm, with its condition if it has one: `cosine_batchtopk, layer15 k32`."""
        return f"{self.arm}, {self.condition}" if self.condition else self.arm


@dataclass(frozen=True)
class Evaluation:
    """
    Args:
        settings (EvaluationSettings): What was to be measured.
        date (str): When, in UTC.
        command (str | None): The command line, as typed, if one asked for it.
        versions (dict[str, str]): Packages.
        texts (tuple[MeasuredText, ...]): What SAEs were measured on.
        saes (tuple[MeasuredSAE, ...]): Arm by arm, the baseline first, condition by condition, seeds ascending.
        control (str | None): The arm that others are compared with; the first one's if None.
    """

    settings: EvaluationSettings
    date: str
    command: str | None
    versions: dict[str, str]
    texts: tuple[MeasuredText, ...]
    saes: tuple[MeasuredSAE, ...]
    control: str | None = None

    @property
    def arms(self) -> dict[str, list[MeasuredSAE]]:
        """SAEs by arm."""
        return by_arm(self.saes)

    @property
    def baseline(self) -> str:
        """The arm that others are compared with."""
        return self.control or self.saes[0].arm

    @cached_property
    def by_condition(self) -> dict[str, Evaluation]:
        """An evaluation of each condition, within which arms are compared; itself alone where there is one condition."""
        conditions = list(dict.fromkeys(entry.condition for entry in self.saes))
        if len(conditions) == 1:
            return {conditions[0]: self}
        parts: dict[str, Evaluation] = {}
        for condition in conditions:
            theirs = controls(self.saes, self.baseline, condition)
            own = [entry for entry in self.saes if entry.condition == condition]
            ours = [entry for entry in own if all(entry is not one for one in theirs)]
            if ours or condition:  # a baseline without a condition is in all of them
                parts[condition] = replace(self, saes=(*theirs, *ours), control=self.baseline)
        return parts

    @cached_property
    def differences(self) -> tuple[ArmDifference, ...]:
        """Each arm minus the baseline, within each condition, see `differences`."""
        return tuple(
            replace(item, condition=condition)
            for condition, part in self.by_condition.items()
            for item in differences(part.compared, part.baseline)
        )

    @property
    def compared(self) -> dict[str, dict[int, dict[str, Figure]]]:
        """By arm and seed, the figures that arms are compared in."""
        return {arm: {entry.seed: entry.compared for entry in entries} for arm, entries in self.arms.items()}

    @cached_property
    def matched(self) -> tuple[MatchedFigure, ...]:
        """Each arm minus the baseline at the same FVE and at the same L0, where arms have several ks at a hook."""
        return tuple(matched_figures(self.on_curves, self.baseline))

    @property
    def on_curves(self) -> list[OnCurve]:
        """SAEs as points of their arms' curves."""
        return [OnCurve(entry.arm, entry.seed, entry.k, entry.text, entry.compared) for entry in self.saes]

    @cached_property
    def chance(self) -> Chance:
        """How many intervals leave out zero, and how many would by chance."""
        return by_chance([item.difference for item in self.differences])

    @property
    def axes(self) -> tuple[str, ...]:
        """What intervals are over."""
        return tuple(dict.fromkeys(axis for item in self.differences for axis in item.over))

    @property
    def on_other_tokens(self) -> list[str]:
        """Arms whose seeds were not all measured on the texts that the baseline's of their condition were."""
        found: list[str] = []
        for part in self.by_condition.values():
            theirs, others = part.against
            texts = {entry.text for entry in theirs}
            found += [of[0].whose for of in others.values() if theirs and {entry.text for entry in of} != texts]
        return found

    @property
    def unpaired(self) -> list[dict[str, Any]]:
        """Seeds that an arm has and the other lacks, which differences between the two leave out: `arm`, `condition`, `seed`, `without`."""
        found: list[dict[str, Any]] = []
        for condition, part in self.by_condition.items():
            theirs, others = part.against
            for arm, entries in others.items():
                ours, its = [entry.seed for entry in entries], [entry.seed for entry in theirs]
                partners = pair_seeds(ours, its)
                for name, seeds, paired, without in (
                    (arm, ours, partners.keys(), self.baseline),
                    (self.baseline, its, partners.values(), arm),
                ):
                    left_out = [seed for seed in seeds if seed not in paired]
                    found += [
                        {"arm": name, "condition": condition, "seed": seed, "without": without} for seed in left_out
                    ]
        return found

    @property
    def against(self) -> tuple[list[MeasuredSAE], dict[str, list[MeasuredSAE]]]:
        """The baseline's SAEs, and those of the other arms."""
        others = self.arms
        return others.pop(self.baseline, []), others

    def document(self) -> dict[str, Any]:
        """`evaluation.json`."""
        return {
            "schema": SCHEMA,
            "date": self.date,
            "command": self.command,
            "settings": self.settings.to_dict(),
            "versions": self.versions,
            "texts": [text.document() for text in self.texts],
            "saes": [sae.document() for sae in self.saes],
            "baseline": self.baseline,
            "unpaired": self.unpaired,
            "on_other_tokens": self.on_other_tokens,
            "differences": plain(self.differences),
            "matched": [item.document(self.texts[item.text].hook) for item in self.matched],
            "intervals": {
                "confidence": CONFIDENCE,
                **plain(self.chance._asdict()),
                "assumptions": {axis: ASSUMPTIONS[axis] for axis in self.axes},
            },
        }


def by_arm(saes: Sequence[MeasuredSAE]) -> dict[str, list[MeasuredSAE]]:
    """SAEs by arm, seeds ascending."""
    arms: dict[str, list[MeasuredSAE]] = {}
    for entry in saes:
        arms.setdefault(entry.arm, []).append(entry)
    return arms


def mean_figures(entries: Sequence[Measured]) -> Mapping[str, Mapping[str, float]]:
    """By eval and title, the mean over an arm's seeds of each figure, over those that have it; NaN if one of them is not finite."""
    values: dict[str, dict[str, list[float]]] = {}
    for entry in entries:
        for name, figures in entry.figures.items():
            for one in figures:
                values.setdefault(name, {}).setdefault(one.title, []).append(one.number)
    return {
        name: {title: sum(found) / len(found) for title, found in by_title.items()} for name, by_title in values.items()
    }

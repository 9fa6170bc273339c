"""Labelled texts: binary tasks to probe for."""

from __future__ import annotations

import difflib
import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from saelens_cosine.bundled import BUNDLED
from saelens_cosine.experiments.evaluate.texts.code_concepts import CONCEPTS
from saelens_cosine.experiments.evaluate.texts.concepts import windows_of_the_corpus

SAE_PROBES = "sae_probes"
"""What names of tasks call the data sets of the sae-probes package (arXiv 2502.16681)."""

ALL = "all"
"""All of these."""

_FILES = (".csv", ".jsonl", ".parquet")


@dataclass(frozen=True)
class Task:
    """
    Texts of two classes, as many of one as of the other.

    Args:
        name (str): What `load_tasks` finds it by.
        texts (tuple[str, ...]): In random order, no two alike.
        labels (tuple[bool, ...]): Of each text. True is the larger of the two values, where they were not booleans.
    """

    name: str
    texts: tuple[str, ...]
    labels: tuple[bool, ...]


class _Labelled(NamedTuple):
    name: str
    texts: Sequence[str]
    labels: Sequence[bool]


def load_tasks(
    names: Sequence[str], max_texts: int = 400, seed: int = 0, trained_on: Collection[str] = ()
) -> tuple[Task, ...]:
    """Binary tasks by name, each with a balanced draw of its texts.

    Texts that occur twice count once; those that occur with both labels are left out.

    Args:
        names: `"bundled"`, all tasks on held-out files of the bundled corpus (`code_concepts.CONCEPTS`), or
            `"bundled:NAME"`; `"all"` or `"sae_probes"`, the 113 data sets that sae-probes ships, or one of them, `"87_glue_cola"`,
            `"glue_cola"` or `"sae_probes:glue_cola"`; or a .csv, .jsonl or .parquet file with columns `text` and `label`.
        max_texts: texts of a task at most, half of them of each class.
        seed: decides which texts, and their order.
        trained_on: data sets of sae-probes whose texts the SAE was trained on, which `"all"` leaves out.

    Raises:
        ValueError: a name that stands for nothing or for a data set that was trained on, a file without these columns, or labels that are not of two classes.
        FileNotFoundError: no such file.
        ModuleNotFoundError: sae-probes is not installed.
    """
    if max_texts < 2:
        raise ValueError(f"max_texts={max_texts} must be 2 or more: half of the texts are of each class.")
    found = (_read(*task) for name in names for task in _find(name, trained_on))
    return tuple({labelled.name: _draw(labelled, max_texts, seed) for labelled in found}.values())


def check_tasks(names: Sequence[str]) -> None:
    """Raise what `load_tasks` raises for names that stand for nothing, without reading any texts."""
    for name in names:
        _find(name, ())


def _draw(labelled: _Labelled, max_texts: int, seed: int) -> Task:
    labels: dict[str, set[bool]] = {}
    for text, label in zip(labelled.texts, labelled.labels, strict=True):
        labels.setdefault(text, set()).add(label)
    classes = {label: [text for text, seen in labels.items() if seen == {label}] for label in (False, True)}
    n = min(max_texts // 2, *map(len, classes.values()))
    if n == 0:
        raise ValueError(
            f"Task {labelled.name!r} has {len(classes[True])} positive and {len(classes[False])} negative texts; it needs both."
        )
    rng = random.Random(seed)
    chosen = [(text, label) for label, texts in classes.items() for text in rng.sample(texts, n)]
    rng.shuffle(chosen)
    return Task(labelled.name, *zip(*chosen, strict=True))


def _find(name: str, trained_on: Collection[str]) -> list[tuple[str, str]]:
    """The tasks that a name stands for: where each is from, and what it is called there."""
    family, _, wanted = name.partition(":")
    if family == BUNDLED:
        if wanted and wanted not in CONCEPTS:
            raise ValueError(f"The bundled corpus has no task {wanted!r}; it has {', '.join(CONCEPTS)}.")
        return [(BUNDLED, concept) for concept in ([wanted] if wanted else CONCEPTS)]
    if family == SAE_PROBES or name == ALL:
        return [(SAE_PROBES, tag) for tag in _of_sae_probes(wanted, trained_on)]
    if name.endswith(_FILES):
        if not Path(name).is_file():  # a pipe would be waited for, for ever
            raise FileNotFoundError(f"There is no file {name!r}.")
        return [("", name)]
    there = (
        f"There are {BUNDLED!r}, one of its tasks as in '{BUNDLED}:method', {ALL!r} of sae-probes, one of its data sets as in "
        f"'glue_cola', and files ending in {', '.join(_FILES)}"
    )
    try:
        tags = _tags()
    except ModuleNotFoundError as error:
        raise ValueError(f"There is no task {name!r}. {there}; sae-probes is not installed.") from error
    if name not in {*tags, *tags.values()}:
        near = _near(name, [*tags, *tags.values(), *(f"{BUNDLED}:{concept}" for concept in CONCEPTS), BUNDLED])
        raise ValueError(f"There is no task {name!r}. {there}{near}.")
    return [(SAE_PROBES, tag) for tag in _of_sae_probes(name, trained_on)]


def _tags() -> dict[str, str]:
    """Names of the data sets of sae-probes, with and without their numbers."""
    try:
        from sae_probes.utils_data import get_numbered_binary_tags
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"The tasks of sae-probes need {error.name}: pip install 'saelens-cosine[probes]'"
        ) from error
    return {tag: tag.partition("_")[2] for tag in get_numbered_binary_tags()}


def _near(name: str, names: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, names, n=5)
    return f"; near it are {', '.join(near)}" if near else ""


def _of_sae_probes(wanted: str, trained_on: Collection[str]) -> list[str]:
    """Its data sets of a name, with or without the number; without a name all that were not trained on."""
    tags = _tags()
    chosen = [tag for tag, short in tags.items() if wanted in ("", tag, short)]
    if not chosen:
        near, every = _near(wanted, [*tags, *tags.values()]), f": {', '.join(tags)}"
        raise ValueError(f"sae-probes has no data set {wanted!r} among its {len(tags)}{near or every}.")
    if wanted and (seen := [tag for tag in chosen if tag in trained_on]):
        raise ValueError(
            f"The SAE was trained on texts of {seen[0]}, so they are no test of it. Name another data set of sae-probes, or "
            f"{ALL!r} for all that it has not seen."
        )
    return [tag for tag in chosen if tag not in trained_on]


def _read(family: str, name: str) -> _Labelled:
    if family == BUNDLED:
        return _Labelled(f"{BUNDLED}:{name}", *windows_of_the_corpus().tasks[name])
    if family == SAE_PROBES:
        from sae_probes.utils_data import read_numbered_dataset_df

        return _labelled(f"{SAE_PROBES}:{name}", read_numbered_dataset_df(name), "prompt", "target")
    return _read_file(name)


def _read_file(name: str) -> _Labelled:
    import pandas as pd

    path = Path(name)
    if path.suffix == ".csv":
        table = pd.read_csv(path, keep_default_na=False, dtype={"text": str})  # "None" and "NA" are texts
    elif path.suffix == ".jsonl":
        table = pd.read_json(path, lines=True, dtype=False)  # pyright: ignore[reportArgumentType]  (stubs lack it)
    else:
        table = pd.read_parquet(path)
    return _labelled(name, table, "text", "label")


def _labelled(name: str, table: Any, text: str, label: str) -> _Labelled:
    missing = {text, label} - set(table.columns)
    if missing:
        raise ValueError(f"{name} has columns {', '.join(map(str, table.columns))}; it needs {text!r} and {label!r}.")
    texts, labels = table[text].tolist(), table[label].tolist()
    not_text = next((i for i, given in enumerate(texts) if not isinstance(given, str)), None)
    if not_text is not None:
        raise ValueError(f"{name} has {texts[not_text]!r} for a text in row {not_text}, counted from 0.")
    if table[label].isna().any():
        raise ValueError(f"{name} has {table[label].isna().sum()} rows without a label.")
    values = sorted(set(labels), key=lambda value: (isinstance(value, str), value))
    if len(values) != 2:
        some = ", ".join(map(repr, values[:10])) + (", ..." if len(values) > 10 else "")
        raise ValueError(f"{name} has labels of {len(values)} values, {some}; a task needs two.")
    return _Labelled(name, texts, [value == values[1] for value in labels])

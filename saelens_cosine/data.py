"""Text for training and held-out text, from the bundled corpus, the Hugging Face Hub or local files."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from saelens_cosine.bundled import BUNDLED, stdlib_corpus

HELDOUT_STREAM_DOCUMENTS = 1000
"""Documents set aside for evaluation at the head of a streamed dataset."""

_LOADERS = {".txt": "text", ".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}


class TextSplits(NamedTuple):
    """Disjoint training and held-out documents, as iterable Hugging Face datasets in an order that depends on the seed."""

    train: Any
    heldout: Any


def load_text(name: str, seed: int = 0) -> TextSplits:
    """Training and held-out text of a dataset.

    `"bundled"` splits Python's standard library by file. A local file or saved dataset gives up 5 % of its rows, at least
    one; the rows of a `.txt` file are its paragraphs. A dataset on the Hub is streamed: its first 1000 documents are held out.

    Raises:
        ValueError: the dataset has no rows, or too few to hold one out.
        FileNotFoundError: a path that does not exist and cannot be the name of a Hub dataset.
    """
    from datasets import Dataset, load_dataset, load_from_disk

    path = Path(name)
    if name == BUNDLED:
        train, heldout = stdlib_corpus("train"), stdlib_corpus("heldout")
        return TextSplits(_iterable(train.shuffle(seed=seed)), _iterable(heldout.shuffle(seed=0)))
    if path.suffix in _LOADERS or path.exists():
        if not path.exists():
            raise FileNotFoundError(f"There is no file {name!r}.")
        if path.is_file() and path.stat().st_size == 0:
            raise ValueError(f"Dataset {name!r} is empty; there is nothing to train on.")
        rows = load_from_disk(name) if path.is_dir() else _read_file(path)
        if not isinstance(rows, Dataset):
            raise ValueError(
                f"{name!r} holds several splits ({', '.join(map(str, rows))}); save one of them by itself."
            )
        if len(rows) < 2:
            raise ValueError(
                f"Dataset {name!r} has {len(rows)} rows; at least one to train on and one to hold out are needed."
            )
        split = rows.train_test_split(test_size=max(1, len(rows) // 20), seed=0)  # the same for every seed
        return TextSplits(_iterable(split["train"].shuffle(seed=seed)), _iterable(split["test"]))
    stream = load_dataset(name, split="train", streaming=True)
    if next(iter(stream), None) is None:
        raise ValueError(f"Dataset {name!r} is empty; there is nothing to train on.")
    heldout, train = stream.take(HELDOUT_STREAM_DOCUMENTS), stream.skip(HELDOUT_STREAM_DOCUMENTS)
    if next(iter(train), None) is None:
        raise ValueError(
            f"Dataset {name!r} has no more than the {HELDOUT_STREAM_DOCUMENTS} documents that are held out."
        )
    return TextSplits(train.shuffle(seed=seed, buffer_size=10_000), heldout)


def _read_file(path: Path) -> Any:
    from datasets import load_dataset

    if path.suffix not in _LOADERS:
        raise ValueError(f"Cannot tell the format of {str(path)!r}; name it {', '.join(_LOADERS)}.")
    by_paragraph: dict[str, Any] = (
        {"sample_by": "paragraph"} if path.suffix == ".txt" else {}
    )  # neighbouring lines are one text
    return load_dataset(_LOADERS[path.suffix], data_files=str(path), **by_paragraph)["train"]


def _iterable(dataset: Any) -> Any:
    # SAELens sets a torch format on a map-style dataset, which some versions of datasets cannot do for text
    return dataset.to_iterable_dataset()

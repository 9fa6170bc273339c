"""Text for training and held-out text, from the bundled corpus, the Hugging Face Hub or local files."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any, NamedTuple

from saelens_cosine.activations.near_copies import HeldOutRuns, document_of
from saelens_cosine.activations.sae_probes_text import SAE_PROBES_TEXT, sae_probes_rows
from saelens_cosine.bundled import BUNDLED, stdlib_corpus

HELDOUT_DOCUMENTS = 1000
"""Documents set aside for evaluation: of local data at most so many, of a dataset on the Hub the first ones."""

SHUFFLED_AT_ONCE = 10_000
"""Documents of a stream among which the next one is drawn."""

COMPARED = 20_000
"""Documents, at even steps, by which a text is told from another of the same name."""

_LOADERS = {".txt": "text", ".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}

_WITH_COLUMN = re.compile(rf"(.+(?:{'|'.join(map(re.escape, _LOADERS))})):([^:/\\]+)")
"""`file.jsonl:column`."""

_TEXT_FILES = (".txt", ".md", ".py")
"""What a folder of documents holds."""

_SAVED = ("dataset_info.json", "dataset_dict.json")
"""What tells a dataset saved with `save_to_disk` from a folder of files."""


class TextSplits(NamedTuple):
    """Training and held-out documents, as iterable Hugging Face datasets.

    Args:
        train (Any): In an order that depends on the seed, without near-copies of held-out documents (see `activations.near_copies`).
        heldout (Any): The same for every seed.
        rule (str): Says which documents are held out: equal for two loads of a name if and only if they hold out the same ones.
        rows (Any): All of which training documents are, in the data's own order; None for a stream.
    """

    train: Any
    heldout: Any
    rule: str
    rows: Any = None

    @property
    def fingerprint(self) -> str | None:
        """Tells other text under the same name: the number of rows, and a hash of `COMPARED` of them at even steps, or of all if
        there are fewer. None for a stream."""
        if self.rows is None:
            return None
        rows = len(self.rows)
        compared = self.rows.select(range(0, rows, -(-rows // COMPARED)))
        return f"{rows} rows, sha256 {_content(compared)}"


def load_text(name: str, seed: int = 0, streaming: bool = True) -> TextSplits:
    """Training and held-out text of a dataset.

    `"bundled"` splits Python's standard library by file. Local data gives up 5 % of its rows, at least one and at most 1000: a
    file, a saved dataset, a folder of data files, or a folder of text files (`.txt`, `.md`, `.py`, in its subfolders too), each of
    which is a document; the rows of a single `.txt` file are its paragraphs. `"file.jsonl:body"` reads the column `body` of a data
    file, where else the first of `tokens`, `input_ids`, `text`, `problem` is read. Of a dataset on the Hub the first 1000 documents are
    held out. `"sae-probes"` is text of the data sets that come with that package (`sae_probes_text.TEXT_SETS`), held out as of local
    data.

    Args:
        name: `"bundled"`, `"sae-probes"`, a path, or the name of a dataset on the Hub.
        seed: of the order of the training documents.
        streaming: read a dataset on the Hub while it is used, not beforehand.

    Raises:
        ValueError: the dataset has no rows, too few to hold one out, or none that is unlike the held-out ones.
        FileNotFoundError: a path that does not exist and cannot be the name of a Hub dataset.
    """
    file, column = _file_and_column(name)
    path, streams = Path(file), False
    if name == BUNDLED:
        rows, heldout = stdlib_corpus("train"), stdlib_corpus("heldout").shuffle(seed=0)
        train = rows.shuffle(seed=seed)
        rule = "hash of the file's path, codec tables aside"
    elif name == SAE_PROBES_TEXT or path.suffix in _LOADERS or path.exists():
        local = name != SAE_PROBES_TEXT
        all_rows = _of_column(_local_rows(path), column, file) if local else sae_probes_rows()
        test_size = min(HELDOUT_DOCUMENTS, max(1, len(all_rows) // 20))
        split = all_rows.train_test_split(test_size=test_size, seed=0)  # the same for every seed
        rows, heldout = split["train"], split["test"]
        train = rows.shuffle(seed=seed)
        rule = f"{test_size} of {len(all_rows)} rows, sha256 {_content(heldout)}"
    else:
        rows, heldout = _from_hub(name, streaming)
        train = rows if streaming else rows.shuffle(seed=seed)
        rule, streams = f"first {HELDOUT_DOCUMENTS} documents", streaming
    train, heldout = _iterable(train), _iterable(heldout)
    train = train.filter(HeldOutRuns(heldout).leaves)
    if next(iter(train), None) is None:
        raise ValueError(
            f"Every document of {name!r} is nearly a copy of a held-out one; there is nothing to train on."
        )
    if streams:  # last, for the first document of a shuffled stream costs a buffer of them
        train = train.shuffle(seed=seed, buffer_size=SHUFFLED_AT_ONCE)
    return TextSplits(train, heldout, rule, None if streams else rows)


def _file_and_column(name: str) -> tuple[str, str | None]:
    """`("file.jsonl", "column")` for `file.jsonl:column`, which may also be a file's own name."""
    found = None if Path(name).exists() else _WITH_COLUMN.fullmatch(name)
    return (name, None) if found is None else (found[1], found[2])


def _of_column(rows: Any, column: str | None, file: str) -> Any:
    """Rows with the text of one column, under the name that SAELens' store reads."""
    if column is None:
        return rows
    if column not in rows.column_names:
        raise ValueError(f"{file!r} has no column {column!r}; it has {', '.join(rows.column_names)}.")
    rows = rows.select_columns([column]).rename_column(column, "text")
    unlike = next((i for i, row in enumerate(rows) if not isinstance(row["text"], str)), None)
    if unlike is not None:
        raise ValueError(
            f"{file!r} has {rows[unlike]['text']!r} for a text in its column {column!r}, row {unlike} counted from 0."
        )
    return rows


def _local_rows(path: Path) -> Any:
    from datasets import Dataset

    if not path.exists():
        raise FileNotFoundError(f"There is no file {str(path)!r}.")
    rows = _read_folder(path) if path.is_dir() else _read_file(path)
    if not isinstance(rows, Dataset):
        raise ValueError(
            f"{str(path)!r} holds several splits ({', '.join(map(str, rows))}); save one of them by itself."
        )
    if len(rows) < 2:
        raise ValueError(
            f"Dataset {str(path)!r} has {len(rows)} rows; at least one to train on and one to hold out are needed."
        )
    return rows.with_format(None)  # SAELens saves tokens to be read as tensors, of which equal ones have unequal hashes


def _read_file(path: Path) -> Any:
    from datasets import load_dataset

    if path.stat().st_size == 0:
        raise ValueError(f"Dataset {str(path)!r} is empty; there is nothing to train on.")
    if path.suffix not in _LOADERS:
        raise ValueError(f"Cannot tell the format of {str(path)!r}; name it {', '.join(_LOADERS)}.")
    by_paragraph: dict[str, Any] = (
        {"sample_by": "paragraph"} if path.suffix == ".txt" else {}
    )  # neighbouring lines are one text
    return load_dataset(_LOADERS[path.suffix], data_files=str(path), **by_paragraph)["train"]


def _read_folder(folder: Path) -> Any:
    from datasets import Dataset, load_dataset, load_from_disk

    if any((folder / name).exists() for name in _SAVED):
        return load_from_disk(str(folder))
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    data = [path for path in files if path.suffix in _LOADERS and path.suffix != ".txt"]
    if data:
        if not any(path.stat().st_size for path in data):
            raise ValueError(f"Dataset {str(folder)!r} is empty; there is nothing to train on.")
        return load_dataset(str(folder), split="train")
    named = {path.relative_to(folder).as_posix(): path for path in files if path.suffix in _TEXT_FILES}
    texts = {name: path.read_text(encoding="utf-8", errors="replace").strip() for name, path in named.items()}
    rows = [{"text": text, "path": name} for name, text in texts.items() if text]
    if not rows:
        raise ValueError(
            f"Folder {str(folder)!r} is no saved dataset and holds neither data files ({', '.join(_LOADERS)}) nor text "
            f"({', '.join(_TEXT_FILES)}); there is nothing to train on."
        )
    return Dataset.from_list(rows)


def _from_hub(name: str, streaming: bool) -> tuple[Any, Any]:
    from datasets import load_dataset

    try:
        rows = load_dataset(name, split="train", streaming=streaming)
    except OSError as error:
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else OSError
        raise kind(
            f"Cannot load dataset {name!r}: {str(error).rstrip('.')}. Name one on the Hugging Face Hub that can be reached, a local "
            f"file or folder, or {BUNDLED!r}."
        ) from error
    if next(iter(rows), None) is None:
        raise ValueError(f"Dataset {name!r} is empty; there is nothing to train on.")
    heldout, train = rows.take(HELDOUT_DOCUMENTS), rows.skip(HELDOUT_DOCUMENTS)
    if next(iter(train), None) is None:
        raise ValueError(f"Dataset {name!r} has no more than the {HELDOUT_DOCUMENTS} documents that are held out.")
    return train, heldout


def _content(rows: Any) -> str:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(repr(document_of(row)).encode())
    return digest.hexdigest()[:16]


def _iterable(dataset: Any) -> Any:
    # SAELens sets a torch format on a map-style dataset, which some versions of datasets cannot do for text
    return dataset.to_iterable_dataset() if hasattr(dataset, "to_iterable_dataset") else dataset

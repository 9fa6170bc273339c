"""Tensors in a file that is not trusted: known by name, shape and place first, read in checked blocks afterwards.

A converter compares what a `TensorFile` knows with what its layout says (`expect`), and only then reads data, straight to
where it is wanted: one tensor costs its own size and one block.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Generator, Iterator, Mapping, Set
from contextlib import contextmanager
from pathlib import Path
from textwrap import shorten
from typing import Any, BinaryIO, NamedTuple, cast

import torch

from saelens_cosine.loading.errors import CheckpointError, listed

BLOCK_BYTES = 2**22
"""Data is read, checked and cast this many bytes at a time."""

DESCRIPTION_BYTES = 2**20
"""Limit for the parts of a checkpoint that describe it: the pickle of a `.pt` file (2 kB in practice), a JSON file."""

LARGEST_VALUE = 1e18
"""No weight is larger: its square, and so the norm of its row, must be a float32."""

_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_INTEGERS = (torch.int64, torch.int32)


class Record(NamedTuple):
    """
    Where a tensor's data lies in its file.

    Args:
        dtype (torch.dtype): Element type.
        shape (tuple[int, ...]): Shape as the file names it.
        stride (tuple[int, ...]): In elements. A transposed tensor is stored as its storage was.
        start (int): Byte offset of the data, which fills its record.
        crc (int | None): CRC-32 of the data, where the format keeps one (safetensors does not).
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    start: int
    crc: int | None = None

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def storage_order(self) -> list[int]:
        """Dimensions from the slowest to the fastest in memory."""
        return sorted(range(len(self.shape)), key=lambda i: (self.shape[i] == 1, -self.stride[i]))

    @property
    def is_dense(self) -> bool:
        """Whether the tensor's elements are exactly its storage's, in some order of the dimensions."""
        step = 1
        for i in reversed(self.storage_order):
            if self.shape[i] != 1 and self.stride[i] != step:
                return False
            step *= self.shape[i]
        return step > 0


class TensorFile:
    """The named tensors of one open file. Tensors of a nested dictionary are named `outer/inner`.

    Args:
        path: for messages.
        file: open for reading, and closed by `close`.
        records: by name.
        plain: what is no tensor, by name.
    """

    def __init__(self, path: Path, file: BinaryIO, records: dict[str, Record], plain: dict[str, Any]):
        self.path, self.records, self.plain = path, records, plain
        self._file = file

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def shape(self, name: str, ndim: int) -> tuple[int, ...]:
        """Shape of a tensor that must be there and have `ndim` dimensions.

        Raises:
            CheckpointError: it is not, or has not.
        """
        record = self.records.get(name)
        if record is None:
            raise CheckpointError(f"{self.path} has no tensor {name!r}; it has {listed(self.records)}.")
        if len(record.shape) != ndim:
            raise CheckpointError(
                f"{name!r} in {self.path} has shape {list(record.shape)}; expected {ndim} dimensions."
            )
        return record.shape

    def expect(
        self,
        floats: Mapping[str, tuple[int, ...]],
        integers: Mapping[str, tuple[int, ...]],
        optional: set[str],
        beside: Set[str] = frozenset(),
    ) -> None:
        """Compare what is in the file with what its layout has. Data is not read.

        Args:
            floats: shapes of tensors of a floating dtype, by name.
            integers: shapes of integer tensors, by name.
            optional: those of them that may be missing.
            beside: names that the caller has looked at itself.

        Raises:
            CheckpointError: a tensor is missing, unknown, or of another shape or kind.
        """
        expected = {**floats, **integers}
        missing = sorted(set(expected) - set(self.records) - optional)
        unknown = sorted((set(self.records) - set(expected) | set(self.plain)) - beside)
        if missing or unknown:
            raise CheckpointError(
                f"{self.path} does not have its layout's tensors: missing {missing}, not known {unknown}. "
                f"Expected {listed(expected)}."
            )
        for name, record in self.records.items():
            if name not in expected:
                continue
            if record.shape != expected[name]:
                raise CheckpointError(
                    f"{name!r} in {self.path} has shape {list(record.shape)}; expected {list(expected[name])}."
                )
            if record.dtype not in (_FLOATS if name in floats else _INTEGERS):
                kind = "a floating dtype" if name in floats else "an integer dtype"
                raise CheckpointError(f"{name!r} in {self.path} is {record.dtype}; expected {kind}.")

    def read(
        self, name: str, *, dtype: torch.dtype | None = None, device: str = "cpu", transposed: bool = False
    ) -> torch.Tensor:
        """A contiguous tensor with the file's shape, or that of its transpose.

        Costs the result and one block. Nothing else is made on the target device.

        Args:
            name: of a tensor in `records`.
            dtype: of the result; None is the file's.
            device: of the result.
            transposed: for a matrix, `[m, n]` in the file becomes a contiguous `[n, m]`.

        Raises:
            CheckpointError: the data is cut off, does not match its checksum, or has values that are not finite or above `LARGEST_VALUE`.
        """
        record = self.records[name]
        shape = record.shape[::-1] if transposed else record.shape
        result = torch.empty(shape, dtype=dtype or record.dtype, device=device)
        target = result.T if transposed else result
        stored = target.permute(record.storage_order) if record.shape else target.view(1)
        start = 0
        for block in self._blocks(name, record, stored.shape):
            stored[start : start + len(block)] = block
            start += len(block)
        return result

    def number(self, name: str) -> float:
        """Value of a tensor with one element."""
        return self.read(name).item()

    def _blocks(self, name: str, record: Record, shape: torch.Size) -> Iterator[torch.Tensor]:
        """The data in storage order, some rows at a time. Each block is overwritten by the next."""
        row_bytes = record.nbytes // shape[0]
        rows = max(1, BLOCK_BYTES // row_bytes)
        buffer = torch.empty(min(rows, shape[0]) * row_bytes, dtype=torch.uint8)
        self._file.seek(record.start)
        crc = 0
        for start in range(0, shape[0], rows):
            count = min(rows, shape[0] - start)
            part = buffer[: count * row_bytes]
            view = memoryview(cast(Any, part.numpy()))
            if cast(Any, self._file).readinto(view) != len(view):
                raise CheckpointError(f"{self.path} ends within {name!r}: the file is cut off. Download it again.")
            crc = zlib.crc32(view, crc) if record.crc is not None else 0
            block = part.view(record.dtype).view(count, *shape[1:])
            if record.dtype.is_floating_point and not all(abs(x.item()) <= LARGEST_VALUE for x in block.aminmax()):
                raise CheckpointError(f"{name!r} in {self.path} has values that are not finite or above 1e18.")
            yield block
        if record.crc is not None and crc != record.crc:
            raise CheckpointError(f"{name!r} in {self.path} does not match its checksum. Download it again.")


def read_config(path: Path) -> dict[str, Any]:
    """A JSON object from a file of at most 1 MiB.

    Raises:
        CheckpointError: it is not one.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist, or is no file; the layout has it beside the weights.")
    with refusing(path):
        if path.stat().st_size > DESCRIPTION_BYTES:
            raise CheckpointError(f"{path} has {path.stat().st_size:,} bytes; expected at most {DESCRIPTION_BYTES:,}.")
        content = json.loads(path.read_bytes())
        if not isinstance(content, dict):
            raise CheckpointError(f"{path} holds a {type(content).__name__}; expected an object.")
        return cast("dict[str, Any]", content)


def positive_integer(config: Mapping[str, Any], name: str, path: Path) -> int:
    """A positive integer field of a config.

    Raises:
        CheckpointError: it is missing or something else.
    """
    value = config.get(name)
    if type(value) is not int or value < 1:
        raise CheckpointError(f"{name!r} in {path} is {value!r}; expected a positive integer.")
    return value


@contextmanager
def refusing(path: Path, fault: str = "is damaged or of another format") -> Generator[None]:
    """Turn whatever a damaged file does to the libraries that parse it into a `CheckpointError`."""
    try:
        yield
    except (CheckpointError, MemoryError):
        raise
    except Exception as error:
        reason = shorten(str(error) or "no reason given", 500)
        raise CheckpointError(f"{path} {fault} ({type(error).__name__}: {reason}).") from error

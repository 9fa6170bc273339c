"""Foreign files as data: what is in them is checked before anything is allocated, and nothing in them is executed."""

from __future__ import annotations

import json
import math
import pickletools
import struct
import zipfile
import zlib
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from safetensors import safe_open

from saelens_cosine.loading.errors import CheckpointError, listed
from saelens_cosine.loading.tensor_file import DESCRIPTION_BYTES, Record, TensorFile, refusing

_GLOBALS = {"collections OrderedDict", "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter"} | {
    f"torch {kind}Storage"
    for kind in ("Double", "Float", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool")
}
"""What the pickle of a state dict names. Fewer than `weights_only=True` permits, some of which can be made to allocate."""

_SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "BOOL": torch.bool,
}


def open_pt(path: Path) -> TensorFile:
    """A file of `torch.save`: a dictionary of tensors, or of such dictionaries, and of plain values.

    Raises:
        CheckpointError: the file is damaged, compressed, of torch before 1.6, or holds more than tensors and plain values.
    """
    with _opened(path) as file:
        entries = _zip_entries(file, path)
        _check_pickle(file, entries, path)
        file.seek(0)
        content = torch.load(file, map_location="meta", weights_only=True)
        if not isinstance(content, dict):
            raise CheckpointError(f"{path} holds a {type(content).__name__}; expected a dictionary of tensors.")
        by_start = dict(entries.values())
        values = dict(_named_values(content))
        tensors = {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}
        records = {name: _pt_record(name, tensor, by_start, path) for name, tensor in tensors.items()}
        return TensorFile(path, file, records, {name: values[name] for name in set(values) - set(tensors)})


def open_safetensors(path: Path) -> TensorFile:
    """A safetensors file.

    Raises:
        CheckpointError: the file is damaged.
    """
    with _opened(path) as file:
        with safe_open(path, framework="pt") as checked:  # that offsets and sizes fit each other and the file
            names = set(checked.keys())
        header_bytes = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(header_bytes))
        header.pop("__metadata__", None)
        if set(header) != names:
            raise CheckpointError(f"{path} names a tensor twice.")
        records = {name: _safetensors_record(name, entry, 8 + header_bytes, path) for name, entry in header.items()}
        return TensorFile(path, file, records, {})


@contextmanager
def _opened(path: Path) -> Generator[BinaryIO]:
    """A weights file, which stays open unless the block fails."""
    if not path.is_file():  # a pipe would be waited for, for ever
        raise CheckpointError(f"{path} does not exist, or is no file; the layout has the weights there.")
    file = path.open("rb")
    try:
        with refusing(path):
            yield file
    except BaseException:
        file.close()
        raise


def _zip_entries(file: BinaryIO, path: Path) -> dict[str, tuple[int, zipfile.ZipInfo]]:
    """Where the data of each entry starts, and the entry, by name without the archive's folder."""
    size = file.seek(0, 2)
    if not zipfile.is_zipfile(file):
        raise CheckpointError(
            f"{path} is no zip archive: cut off, another format, or written by torch before 1.6. In the last case, load "
            "and save it again with a newer torch."
        )
    with zipfile.ZipFile(file) as archive:
        infos = sorted(archive.infolist(), key=lambda info: info.header_offset)
    entries: dict[str, tuple[int, zipfile.ZipInfo]] = {}
    end = 0
    for info in infos:
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size or info.flag_bits & 1:
            raise CheckpointError(
                f"{path}: entry {info.filename!r} is compressed or encrypted; torch.save does neither."
            )
        file.seek(info.header_offset)
        header = file.read(30)
        if len(header) < 30 or not header.startswith(b"PK\3\4"):
            raise CheckpointError(f"{path}: entry {info.filename!r} does not start where the archive says.")
        start = info.header_offset + 30 + sum(struct.unpack("<HH", header[26:]))
        if info.header_offset < end or start + info.file_size > size:
            raise CheckpointError(f"{path}: entry {info.filename!r} overlaps another or ends behind the file.")
        end = start + info.file_size
        name = info.filename.partition("/")[2]
        if name in entries:
            raise CheckpointError(f"{path} has two entries {name!r}.")
        entries[name] = (start, info)
    return entries


def _check_pickle(file: BinaryIO, entries: Mapping[str, tuple[int, zipfile.ZipInfo]], path: Path) -> None:
    """Refuse a pickle that names anything but tensors and containers, and an archive of another byte order."""
    if "data.pkl" not in entries:
        raise CheckpointError(f"{path} is a zip archive without data.pkl, so not a file of torch.save.")
    order = _content(file, entries["byteorder"], path) if "byteorder" in entries else b"little"
    if order != b"little":
        raise CheckpointError(f"{path} has byte order {order!r}; expected b'little'.")
    for opcode, argument, _ in pickletools.genops(_content(file, entries["data.pkl"], path)):
        if opcode.name == "GLOBAL" and argument not in _GLOBALS:
            raise CheckpointError(
                f"{path} asks for {str(argument).replace(' ', '.')!r}; only dictionaries of tensors and plain values are "
                "read. If you trust the file, load it with torch and save its state dict."
            )


def _content(file: BinaryIO, entry: tuple[int, zipfile.ZipInfo], path: Path) -> bytes:
    start, info = entry
    if info.file_size > DESCRIPTION_BYTES:
        raise CheckpointError(
            f"{path}: {info.filename!r} has {info.file_size:,} bytes; expected at most {DESCRIPTION_BYTES:,}."
        )
    file.seek(start)
    content = file.read(info.file_size)
    if zlib.crc32(content) != info.CRC:
        raise CheckpointError(f"{path}: {info.filename!r} does not match its checksum. Download it again.")
    return content


def _named_values(content: Mapping[Any, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in content.items():
        if isinstance(value, dict):  # one level: no layout has more, and a pickle can nest without end
            for inner, inner_value in cast("dict[Any, Any]", value).items():
                yield f"{key}/{inner}", inner_value
        else:
            yield str(key), value


def _pt_record(name: str, tensor: torch.Tensor, entries: Mapping[int, zipfile.ZipInfo], path: Path) -> Record:
    storage = cast(Any, tensor.untyped_storage())
    start = getattr(storage, "_checkpoint_offset", None)  # where torch.load would have read the data
    if start is None:
        raise CheckpointError(
            f"torch {torch.__version__} does not tell where the tensors of {path} lie; torch 2.7 does."
        )
    info = entries.get(start)
    record = Record(tensor.dtype, tuple(tensor.shape), tuple(tensor.stride()), start)
    fills = info is not None and record.nbytes == info.file_size == storage.nbytes() and tensor.storage_offset() == 0
    if info is None or not fills or not record.is_dense or tensor.is_neg() or tensor.is_conj():
        raise CheckpointError(
            f"{name!r} in {path} (shape {list(record.shape)}, {record.dtype}) does not fill its storage of "
            f"{storage.nbytes():,} bytes: damaged, empty, or a view of a larger tensor. Save a clone of the view."
        )
    return record._replace(crc=info.CRC)


def _safetensors_record(name: str, entry: Mapping[str, Any], data_start: int, path: Path) -> Record:
    dtype = _SAFETENSORS_DTYPES.get(entry["dtype"])
    if dtype is None:
        raise CheckpointError(
            f"{name!r} in {path} is {entry['dtype']!r}; expected one of {listed(_SAFETENSORS_DTYPES)}."
        )
    shape = tuple(int(n) for n in entry["shape"])
    stride = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
    return Record(dtype, shape, stride, data_start + entry["data_offsets"][0])

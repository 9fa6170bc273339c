"""Dataclasses and named tuples as JSON can hold them, and back."""

from __future__ import annotations

import math
from dataclasses import fields, is_dataclass
from functools import cache
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


def to_plain(value: Any) -> Any:
    """Lists and dictionaries of numbers and texts; None for what is not finite."""
    if isinstance(value, dict):
        return {name: to_plain(item) for name, item in value.items()}
    if isinstance(value, tuple | list):
        return [to_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@cache
def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind)


def from_plain(kind: Any, value: Any, where: str) -> Any:
    """A value of a type from its plain form. Null is NaN where a float belongs.

    Raises:
        ValueError: a field that is missing or unknown, or a value of another kind; it says where.
    """
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return None if value is None else from_plain(inner[0], value, where)
    if kind is float and value is None:
        return math.nan
    if is_dataclass(kind) and isinstance(value, dict):
        hints, names = _hints(kind), [item.name for item in fields(kind)]
        if unknown := sorted(set(value) - set(names)):
            raise ValueError(f"{where} has {unknown}; {kind.__name__} has {names}.")
        try:
            return kind(**{name: from_plain(hints[name], item, f"{where}.{name}") for name, item in value.items()})
        except TypeError as error:
            raise ValueError(f"{where}: {error}") from None
    if origin is dict and isinstance(value, dict):
        return {name: from_plain(inner[1], item, f"{where}[{name!r}]") for name, item in value.items()}
    if origin is tuple and isinstance(value, list | tuple):
        if all(type(item) is inner[0] for item in value):  # tokens and codes, of which there are many
            return tuple(value)
        return tuple(from_plain(inner[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if isinstance(kind, type) and issubclass(kind, tuple) and isinstance(value, list | tuple):
        hints = _hints(kind)
        if len(value) != len(hints):
            raise ValueError(f"{where} has {len(value)} items; {kind.__name__} is {list(hints)}.")
        return kind(*(from_plain(hint, item, where) for hint, item in zip(hints.values(), value, strict=True)))
    plain = str if origin is Literal else kind
    bare = isinstance(plain, type) and get_origin(plain) is None  # to Python 3.10 tuple[int] is a type too
    if bare and isinstance(value, int | float if plain is float else plain):
        if origin is Literal and value not in inner:
            raise ValueError(f"{where} is {value!r}, which is none of {list(inner)}.")
        return value
    raise ValueError(f"{where} is {value!r:.80}, where {kind} belongs.")

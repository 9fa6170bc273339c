"""Settings that are one of a few words: another word is refused, not taken for the last of them."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import fields
from functools import cache
from typing import Any, Literal, get_args, get_origin, get_type_hints

from sae_lens.util import str_to_dtype

CHECKED_BY_SAELENS = frozenset({"normalize_activations"})
"""Its annotation lacks a value that SAELens takes ('constant_norm_rescale')."""


def check_choices(config: Any) -> None:
    """Compare each field of a closed set with its annotation: `Literal`, `bool`, and a `dtype` by SAELens' names.

    Args:
        config: a dataclass instance.

    Raises:
        ValueError: a field has a value that its annotation does not list.
    """
    for name, choices in closed_fields(type(config)).items():
        value = getattr(config, name)
        if value not in choices:
            raise ValueError(f"{name}={value!r} is none of {', '.join(map(repr, choices))}.")
    if hasattr(config, "dtype"):
        str_to_dtype(config.dtype)


@cache
def closed_fields(config_class: type[Any]) -> dict[str, tuple[Any, ...]]:
    """Choices of each field that has a closed set of them, by name; what SAELens checks itself is left out."""
    hints: dict[str, Any] = {}
    for base in reversed(config_class.__mro__):
        with suppress(
            NameError
        ):  # a user's class with a type that only a type checker imports: its bases' fields count
            hints |= get_type_hints(base)
    choices = {field.name: _choices(hints.get(field.name)) for field in fields(config_class)}
    return {name: values for name, values in choices.items() if values and name not in CHECKED_BY_SAELENS}


def _choices(annotation: Any) -> tuple[Any, ...]:
    if annotation is bool:
        return (True, False)
    return get_args(annotation) if get_origin(annotation) is Literal else ()

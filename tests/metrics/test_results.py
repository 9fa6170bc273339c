"""What a metric returns holds plain values alone, so that it can be made again from its JSON."""

import importlib
import json
import pkgutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

import numpy as np
import pytest
import torch
from helpers import D_IN, make_activations, make_sae

from saelens_cosine import metrics
from saelens_cosine.metrics.codes import sparse_codes
from saelens_cosine.metrics.dictionary.cofiring import Cofiring, cofiring
from saelens_cosine.metrics.norms.encoder_gradients import EncoderGradients, encoder_gradients
from saelens_cosine.metrics.norms.norm_noise import NormNoise, norm_noise
from saelens_cosine.metrics.reconstruction.by_norm import ReconstructionDiagnostics, diagnose_reconstruction
from saelens_cosine.plain import from_plain, plain

WITH_TENSORS = {"CleanRun", "NormGroups", "AFATokens", "Point"}
WITH_TENSORS |= {"CleanLosses", "CleanBatch", "TokenLosses", "Forward", "PassedOver"}  # of the model without an SAE
"""What metrics are made from, and is no result."""


def fields(kind):
    return get_type_hints(get_origin(kind) or kind)


def is_record(kind):
    return is_dataclass(kind) or (isinstance(kind, type) and issubclass(kind, tuple) and hasattr(kind, "_fields"))


def is_plain(kind):
    origin, inner = get_origin(kind), get_args(kind)
    if kind in (int, float, str, bool, NoneType) or isinstance(kind, TypeVar) or origin is Literal:
        return True
    if origin in (Union, UnionType, tuple):
        return all(is_plain(part) for part in inner if part is not Ellipsis)
    if origin is dict:
        return inner[0] is str and (inner[1] is Any or is_plain(inner[1]))
    return is_record(origin or kind) and all(map(is_plain, fields(kind).values()))


def test_results_have_fields_of_plain_types():
    modules = pkgutil.walk_packages(metrics.__path__, metrics.__name__ + ".")
    found = [kind for module in modules for kind in vars(importlib.import_module(module.name)).values()]
    records = {kind.__name__: kind for kind in found if is_record(kind) and not kind.__name__.startswith("_")}
    here = {name: kind for name, kind in records.items() if kind.__module__.startswith(metrics.__name__)}
    assert len(here) > 40
    assert {name for name, kind in here.items() if not is_plain(kind)} == WITH_TENSORS


def test_results_come_back_from_their_json():
    sae, x = make_sae("cosine_batchtopk").eval(), make_activations(60, D_IN)
    with torch.no_grad():
        codes = sparse_codes(sae, x)
    results = [
        (Cofiring, cofiring(codes, 2)),
        (EncoderGradients, encoder_gradients(sae, x, batch=30)),
        (NormNoise, norm_noise(sae, x)),
        (ReconstructionDiagnostics, diagnose_reconstruction(sae, x, batch=20)),
    ]
    for kind, result in results:
        assert from_plain(kind, json.loads(json.dumps(plain(result), allow_nan=False)), "the result") == result


class Pair(NamedTuple):
    low: float
    high: float | None


@dataclass(frozen=True)
class Row:
    pairs: tuple[Pair, ...]
    name: str = ""


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (list[float], [1.0, 2.0]),
        (list[Row], [Row((Pair(1.0, None),)), Row(())]),
        (Sequence[int], (1, 2)),
        (Mapping[str, float], {"a": 1.0}),
        (dict[int, float], {1: 2.0, 10: 3.0}),
        (dict[float, str], {0.5: "half"}),
        (int | str, "x"),
        (str | None, None),
        (None | float, 2.0),
        (Row | Pair, Pair(1.0, 2.0)),
        (Literal[1, "all", None], 1),
        (Literal[1, "all", None], None),
        (tuple[()], ()),
        (tuple[tuple[int, ...], ...], ((1, 2), ())),
        (dict[str, tuple[Row | None, ...]], {"a": (None, Row(()))}),
    ],
)
def test_whatever_type_a_result_is_annotated_with_comes_back(kind, value):
    found = from_plain(kind, json.loads(json.dumps(plain(value), allow_nan=False)), "it")
    assert found == value
    assert type(found) is type(value)


def test_numbers_of_numpy_are_numbers():
    given = {"f": np.float32(0.5), "i": np.int64(3), "b": np.bool_(True), "nan": np.float32("nan")}
    assert json.dumps(plain(given), allow_nan=False) == '{"f": 0.5, "i": 3, "b": true, "nan": null}'


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (int, 3.0),
        (bool, 1),
        (int | str, 1.5),
        (Literal[1, 2], True),
        (Literal["a"], 1),
        (list[int], "12"),
        (Pair, [1.0]),
    ],
)
def test_what_is_of_no_such_type_is_refused(kind, value):
    with pytest.raises(ValueError, match="it is "):
        from_plain(kind, value, "it")

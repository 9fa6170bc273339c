"""What a file of the authors is: its entries, tensors and name, checked and compared before anything is read.

Facts are those of the paper's released code; numbers of experiments are its folders'.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from saelens_cosine.loading.errors import CheckpointError, listed
from saelens_cosine.loading.tensor_file import TensorFile

STANDARD = frozenset({"b_enc"})
COSINE = frozenset({"b_enc", "scale_a", "scale_b"})
BASE_DELTA = frozenset({"b_enc", "scale_a_base", "scale_a_delta", "scale_b"})
_SCALE = frozenset({"b_enc", "scale_b"})
_LOG_SCALE = frozenset({"b_enc", "log_scale"})
_EXPONENT = frozenset({"b_enc", "scale_a"})
BYPASS = frozenset[str]()


class Score(NamedTuple):
    """
    What a file's tensors are combined to.

    Args:
        unit_rows (bool): Encoder rows count by direction.
        inner (bool): The centred input is not normalised, and scale tensors, if there are any, are not used.
        kept (float): What remains of the exponents: they were trained with dropout, which scales them at use.
        unit_decoder (bool): Decoder rows count by direction.
        restored (bool): The output is given the norm of the centred input.
    """

    unit_rows: bool
    inner: bool = False
    kept: float = 1.0
    unit_decoder: bool = False
    restored: bool = False


_OF_TENSORS = {
    STANDARD: Score(unit_rows=False, inner=True),
    COSINE: Score(unit_rows=True),
    BASE_DELTA: Score(unit_rows=True),
    _SCALE: Score(unit_rows=True),
    _LOG_SCALE: Score(unit_rows=True),
    _EXPONENT: Score(unit_rows=False),
    BYPASS: Score(unit_rows=True, unit_decoder=True, restored=True),
}
"""Of files that say no more. `COSINE` with one exponent and a scale per feature is `_EXPONENT` with a scale (experiment 48)."""

_OF_SCORE_MODES = {
    "inner": (Score(unit_rows=False, inner=True), (STANDARD, COSINE), (0, 1)),
    "inner_unitenc": (Score(unit_rows=True, inner=True), (STANDARD,), (0,)),
    "cosine": (Score(unit_rows=True), (COSINE,), (0,)),
    "cos_global": (Score(unit_rows=True), (COSINE,), (0,)),
    "cos_perfeature": (Score(unit_rows=True), (COSINE,), (1,)),
}
"""The entry `score_mode` (experiments 63, 64): score, the tensors it goes with, and the dimensions of their scale."""

_SWITCHES = ("config/normalize_encoder", "config/normalize_decoder", "config/restore_output_norm")
"""Entries of the factorial on the magnitude bypass (experiment 46)."""

_CELLS = {
    "noc_baseline": (True, True, True),
    "noc_dec_free_restore": (True, False, True),
    "noc_dec_free_no_restore": (True, False, False),
    "noc_enc_free": (False, True, True),
    "noc_input_only_restore": (False, False, True),
    "noc_input_only_no_restore": (False, False, False),
}


def _cell(encoder: bool, decoder: bool, restored: bool) -> Score:
    return Score(unit_rows=encoder, unit_decoder=decoder, restored=restored)


_OF_NAMES: dict[str, tuple[frozenset[str], Score | None]] = {
    "cosine": (STANDARD, Score(unit_rows=True)),  # experiment 39: no scale at all
    "standard_inputnorm": (STANDARD, Score(unit_rows=False)),  # 48
    "inputnorm_standard": (_SCALE, Score(unit_rows=False)),  # 23
    "inner_unitenc": (STANDARD, Score(unit_rows=True, inner=True)),  # 63
    "cos_then_inner_ft": (COSINE, Score(unit_rows=False, inner=True)),  # 64
    "perfeature_bd_no_enc_norm": (BASE_DELTA, None),  # 48
    "noc_": (BYPASS, None),
    **{name: (BYPASS, _cell(*cell)) for name, cell in _CELLS.items()},  # 46, 48
}
"""What the start of a file's name says of these tensors, where no entry does; None: no SAE class here has that score."""

_SELECTORS = {"topk": "topk", "abs_topk": "abstopk"}
"""The entry `selector` (experiment 63); a threshold selects without one."""

_USED = ("score_mode", "selector", "k", *_SWITCHES)
_IGNORED = ("num_tokens_since_fired", "step", "log", "optimizer", "scheduler", "config/aux_k_enabled")
"""Entries of training, which change no code."""


class AuthorsFile(NamedTuple):
    """
    What a file is.

    Args:
        state (str): How names of its state dict start.
        tensors (frozenset[str]): Those of the score.
        score (Score): What they make.
        selector (str): As the end of an architecture: `jumprelu`, `topk`, `abstopk`.
        k (int | None): Features of a token; None with a threshold.
        plain (bool): Whether the tensors alone say it.
    """

    state: str
    tensors: frozenset[str]
    score: Score
    selector: str
    k: int | None
    plain: bool


def what_it_is(file: TensorFile, k: int | None) -> AuthorsFile:
    """What the file says of itself, after all its names, shapes and kinds were found to be known ones."""
    state = "state_dict/" if any(name.startswith("state_dict/") for name in file.records) else ""
    entries = _entries(file, state)
    d_sae, d_in = file.shape(f"{state}W_enc", 2)
    telling = frozenset.union(*_OF_TENSORS)
    tensors = frozenset(name for name in telling if f"{state}{name}" in file.records)
    if tensors not in _OF_TENSORS:
        known = "; ".join(", ".join(sorted(names)) or "none" for names in _OF_TENSORS)
        raise CheckpointError(f"{file.path} has the score tensors {sorted(tensors)}; known are: {known}.")
    shapes = _shapes(file, state, tensors, d_sae)
    selector = _selector(file, state, entries)
    weights: dict[str, tuple[int, ...]] = {"W_enc": (d_sae, d_in), "W_dec": (d_sae, d_in), "b_dec": (d_in,)}
    if selector == "jumprelu":
        weights["threshold"] = ()
    counters = {"num_tokens_since_fired": (d_sae,)}
    file.expect(
        floats={f"{state}{name}": shape for name, shape in {**weights, **shapes}.items()},
        integers={name: shape for name, shape in counters.items() if name in file.records},
        optional=set(),
        beside=_beside(file, state) - set(counters),
    )
    score = _score(file, tensors, shapes, entries)
    return AuthorsFile(
        state, tensors, score, selector, _k(file, entries, k, selector, d_sae), score == _OF_TENSORS[tensors]
    )


def _beside(file: TensorFile, state: str) -> set[str]:
    """Names of all that is not in the state dict; in a bare one, of what is no tensor."""
    names = set(file.plain) | (set(file.records) if state else set[str]())
    return {name for name in names if not (state and name.startswith(state))}


def _entries(file: TensorFile, state: str) -> dict[str, Any]:
    """Values of the entries beside the state dict that say what it is."""
    known = {name for name in _USED if name in file.plain}
    ignored = {name for name in _beside(file, state) if not {name, name.split("/")[0]}.isdisjoint(_IGNORED)}
    unknown = sorted(_beside(file, state) - known - ignored)
    if unknown:
        raise CheckpointError(
            f"{file.path} has entries beside its weights that are not known: {listed(unknown)}. Known are {listed(_USED)} "
            f"and, as they change no code, {listed(_IGNORED)}. If yours change none either, save the file without them."
        )
    return {name: file.plain[name] for name in known}


def _shapes(file: TensorFile, state: str, tensors: frozenset[str], d_sae: int) -> dict[str, tuple[int, ...]]:
    """What the score's tensors must have."""
    shapes = dict.fromkeys(tensors, (d_sae,))
    if tensors in (_SCALE, _LOG_SCALE, _EXPONENT):  # theirs have one value
        return {name: (d_sae,) if name == "b_enc" else () for name in tensors}
    if tensors == BASE_DELTA:
        return {**shapes, "scale_a_base": ()}
    if tensors == COSINE:
        a, b = (file.records[f"{state}{name}"].shape for name in ("scale_a", "scale_b"))
        if len(a) > 1 or (a and not 0 < a[0] <= d_sae):
            raise CheckpointError(
                f"scale_a in {file.path} has shape {list(a)}; expected [], [{d_sae}] or [groups] below that."
            )
        return {**shapes, "scale_a": a, "scale_b": (d_sae,) if not a and b else a}
    return shapes


def _score(
    file: TensorFile, tensors: frozenset[str], shapes: dict[str, tuple[int, ...]], entries: dict[str, Any]
) -> Score:
    dimensions = len(shapes.get("scale_b", ()))
    raw = tensors == COSINE and shapes["scale_a"] != shapes["scale_b"]
    switches = [entries.get(name) for name in _SWITCHES]
    switched = not entries.keys().isdisjoint(_SWITCHES)
    if "score_mode" in entries:
        mode = entries["score_mode"]
        if mode not in tuple(_OF_SCORE_MODES):
            raise CheckpointError(f"{file.path} has score_mode={mode!r}; known are {listed(_OF_SCORE_MODES)}.")
        score, its_tensors, its_dimensions = _OF_SCORE_MODES[mode]
        if tensors not in its_tensors or dimensions not in its_dimensions or raw or switched:
            scale = f" of {dimensions} dimensions" if "scale_b" in tensors else ""
            raise CheckpointError(
                f"{file.path} has score_mode={mode!r}, which does not go with {sorted(tensors)}{scale}"
                + (f" and {listed(_SWITCHES)}." if switched else ".")
            )
        return score
    if switched:
        if tensors != BYPASS or not all(type(value) is bool for value in switches):
            said = ", ".join(f"{name}={value!r}" for name, value in zip(_SWITCHES, switches, strict=True))
            raise CheckpointError(
                f"{file.path} has {said} beside {sorted(tensors) or 'no tensors of a score'}; they are three booleans of "
                "SAEs without b_enc and scale."
            )
        encoder, decoder, restored = map(bool, switches)
        return _cell(encoder, decoder, restored)
    return _named(file, tensors, shapes) or (_OF_TENSORS[_EXPONENT] if raw else _OF_TENSORS[tensors])


def _named(file: TensorFile, tensors: frozenset[str], shapes: dict[str, tuple[int, ...]]) -> Score | None:
    """What the file's name says of these tensors, if anything."""
    name = re.sub("^(abs)?topk_", "", file.path.name)
    if name.startswith("dropout_p") and tensors == COSINE and shapes["scale_a"]:  # experiment 37
        share = re.match(r"dropout_p(0?\.\d+|0)(?=[_.])", name)
        if share is None:
            raise CheckpointError(
                f"{file.path}: which share of exponents was dropped? Expected a name like dropout_p0.3_..."
            )
        return _OF_TENSORS[COSINE]._replace(kept=1 - float(share[1]))
    start = max((start for start in _OF_NAMES if name.startswith(start)), key=len, default=None)
    if start is None:
        return None
    of_tensors, score = _OF_NAMES[start]
    if tensors != of_tensors and start == "cosine":  # with a scale it is what the tensors say
        return None
    if tensors != of_tensors or score is None:
        reason = (
            "names an ablation whose score no SAE class here has"
            if score is None
            else f"names a variant with {sorted(of_tensors) or 'no tensors of a score'}, and has {sorted(tensors)}"
        )
        raise CheckpointError(
            f"{file.path}: {file.path.name!r} {reason}. If the name does not mean that, rename the file."
        )
    return score


def _selector(file: TensorFile, state: str, entries: dict[str, Any]) -> str:
    has_threshold = f"{state}threshold" in file.records
    if "selector" in entries:
        selector = entries["selector"]
        if selector not in tuple(_SELECTORS) or has_threshold:
            raise CheckpointError(
                f"{file.path} has selector={selector!r} and {'a' if has_threshold else 'no'} threshold; known are "
                f"{listed(_SELECTORS)}, without a threshold, and a threshold without a selector."
            )
        return _SELECTORS[selector]
    named = re.match("(abstopk|topk)_", file.path.name)
    if not has_threshold and not named:
        raise CheckpointError(
            f"{file.path} has no threshold and does not say how it selects. If it keeps k features per token, add an entry "
            "'selector' beside its state dict: 'topk' for the k largest rectified scores, 'abs_topk' for the k largest "
            "magnitudes."
        )
    return "jumprelu" if has_threshold or not named else named[1]


def _k(file: TensorFile, entries: dict[str, Any], given: int | None, selector: str, d_sae: int) -> int | None:
    stated = entries.get("k")
    for value in (stated, given):
        if value is not None and (type(value) is not int or not 0 < value <= d_sae):
            raise CheckpointError(f"k={value!r} for {file.path} is no number of its {d_sae} features.")
    if selector == "jumprelu":  # their k is then that of training
        if given is not None:
            raise CheckpointError(
                f"{file.path} selects by a threshold, so k={given} has no meaning for it; leave it out."
            )
        return None
    if stated is not None and given is not None and stated != given:
        raise CheckpointError(f"{file.path} has k={stated}, not k={given}.")
    if stated is None and given is None:
        raise CheckpointError(
            f"{file.path} keeps k features per token and does not say k. Give it: k=80 in from_pretrained, --k 80 to "
            "convert, cfg_overrides={'k': 80} to a converter. (The paper's experiment 63 has 80.)"
        )
    return given if stated is None else stated

"""Every setting that is one of a few words refuses another word, in all configs of this package."""

from dataclasses import dataclass, fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
from helpers import make_config
from sae_lens.registry import get_sae_class, get_sae_training_class

from saelens_cosine import INFERENCE_ARCHITECTURES, TRAINING_ARCHITECTURES
from saelens_cosine.cli import main

OPEN = {"device"}
"""Words that no list holds: which devices there are depends on the machine and on torch, which refuses others itself."""

DTYPES = ("float32", "float64", "float16", "bfloat16")


def inference_config(name: str, **overrides: Any) -> Any:
    config_class = get_sae_class(name)[1]
    k = {"k": 3} if "k" in {field.name for field in fields(config_class)} else {}
    return config_class(**{"d_in": 8, "d_sae": 16, **k, **overrides})


def closed_fields(config_class: Any) -> dict[str, tuple[Any, ...]]:
    """By annotation; a plain `str` must be listed here as a dtype or as open."""
    hints = get_type_hints(config_class)
    closed: dict[str, tuple[Any, ...]] = {}
    for field in fields(config_class):
        kind = hints[field.name]
        if get_origin(kind) is Literal:
            closed[field.name] = get_args(kind)
        elif kind is bool:
            closed[field.name] = (True, False)
        elif field.name == "dtype":
            closed[field.name] = DTYPES
        else:
            assert not (kind is str or str in get_args(kind)) or field.name in OPEN, f"{field.name}: open or closed?"
            assert not any(get_origin(part) is Literal for part in get_args(kind)), f"{field.name}: look into it"
    return closed


CASES = [
    *(
        (make, name, field)
        for make, names, get in (
            (make_config, TRAINING_ARCHITECTURES, get_sae_training_class),
            (inference_config, INFERENCE_ARCHITECTURES, get_sae_class),
        )
        for name in names
        for field in closed_fields(get(name)[1])
    ),
]


def test_all_configs_are_walked():
    assert len({name for make, name, _ in CASES if make is make_config}) == len(TRAINING_ARCHITECTURES) == 24
    assert len({name for make, name, _ in CASES if make is inference_config}) == len(INFERENCE_ARCHITECTURES) == 13
    of_cosine_jumprelu = {field for _, name, field in CASES if name == "per_feature_cosine_jumprelu"}
    assert of_cosine_jumprelu >= {
        "jumprelu_sparsity_loss_mode", "b_dec_init", "token_weighting", "kernels", "exponent_sharing",
        "reshape_activations", "normalize_activations", "dtype", "learn_norm_exponent",
    }  # fmt: skip


@pytest.mark.parametrize(("make", "name", "field"), CASES)
def test_a_wrong_word_is_refused(make, name, field):
    choices = closed_fields(type(make(name)))[field]
    wrong = "False" if choices == (True, False) else f"{choices[0]}x"
    with pytest.raises(ValueError, match=field) as caught:
        make(name, **{field: wrong})
    for word in (wrong, *map(str, choices)):
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("name", "field", "word"),
    [
        ("cosine_jumprelu", "jumprelu_sparsity_loss_mode", "quadradic"),  # trained as "step" before
        ("inner_product_topk", "b_dec_init", "geometric-median"),  # as "zeros"
        ("cosine_topk", "reshape_activations", "hook-z"),  # as "none"
        ("cosine_topk", "learn_norm_exponent", "False"),  # as True
        ("top_afa", "match", "first-exceed"),
    ],
)
def test_words_that_were_taken_for_another(name, field, word):
    with pytest.raises(ValueError, match=f"{field}={word!r} is none of "):
        make_config(name, **{field: word})


@pytest.mark.parametrize("dtype", ["float32", "torch.float32", "bfloat16"])
def test_saelens_spellings_of_a_dtype_are_kept(dtype):
    assert make_config("cosine_topk", dtype=dtype).dtype == dtype


def test_a_saved_config_is_read_back_and_a_mistyped_one_is_not():
    config = make_config("per_feature_cosine_jumprelu").to_dict()
    config_class = get_sae_training_class("per_feature_cosine_jumprelu")[1]
    assert config_class.from_dict(config).jumprelu_sparsity_loss_mode == config["jumprelu_sparsity_loss_mode"]
    with pytest.raises(ValueError, match="b_dec_init='zero' is none of 'geometric_median', 'mean', 'zeros'"):
        config_class.from_dict({**config, "b_dec_init": "zero"})


def test_a_users_config_with_a_type_that_only_a_type_checker_knows_is_still_checked():
    base = get_sae_training_class("cosine_topk")[1]

    @dataclass
    class Mine(base):
        taste: Literal["sweet", "sour"] = "sweet"
        other: "OnlyForTypeCheckers" = None  # type: ignore[name-defined]  # noqa: F821

    with pytest.raises(ValueError, match="b_dec_init='zero'"):
        Mine(d_in=8, d_sae=16, k=3, b_dec_init="zero")
    assert Mine(d_in=8, d_sae=16, k=3).taste == "sweet"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--jumprelu_sparsity_loss_mode", "quadradic"], ["quadradic", "'step', 'tanh', 'quadratic'"]),
        (["--b_dec_init", "geometric-median"], ["geometric-median", "'geometric_median', 'mean', 'zeros'"]),
        (["--sae.dtype", "float23"], ["dtype", "float23", "'bfloat16'"]),
    ],
)
def test_the_command_line_says_so_in_one_line(flags, words, capsys):
    required = ["--architecture", "cosine_jumprelu", "--d_in", "8", "--d_sae", "16"]
    assert main(["train", *required, *flags]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("saelens-cosine train: ")
    for word in words:
        assert word in line

"""What SAELens' flags of `saelens-cosine train` must be: said in one line, before anything is loaded or written."""

from __future__ import annotations

import argparse
import io
import math
import re
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout, suppress
from difflib import get_close_matches
from typing import Any

from sae_lens.llm_sae_training_runner import (
    _parse_cfg_args,  # pyright: ignore[reportPrivateUsage]  (SAELens' parser has no public name)
)
from sae_lens.util import str_to_dtype
from transformer_lens.supported_models import MODEL_ALIASES, OFFICIAL_MODEL_NAMES

from saelens_cosine.activations.contexts import check_context_size
from saelens_cosine.activations.gguf import is_gguf
from saelens_cosine.activations.models import HUGGING_FACE, TRANSFORMER_LENS, known_to_transformer_lens
from saelens_cosine.devices import check_device
from saelens_cosine.files.secrets import as_typed

POSITIVE = (
    "training_tokens",
    "train_batch_size_tokens",
    "n_batches_in_buffer",
    "store_batch_size_prompts",
    "feature_sampling_window",
    "dead_feature_window",
)
"""Flags that are 1 or more."""

DEVICES = ("device", "llm_device", "act_store_device")

LARGEST_SEED = 2**63 - 1

N_CHECKPOINTS = 10
"""Checkpoints in the course of a run, where SAELens' --n_checkpoints is not given, or 0."""

_ABOUT_CHECKPOINTS = re.compile(r"(--n_checkpoints int\s+).*?\(default:\s+0\)", re.DOTALL)

OWN_FLAGS = ("--max-norm-multiple", "--resume", "--overwrite", "--keep", "--stop-on", "--deterministic")
"""Those of `saelens-cosine train` itself, which SAELens' parser does not see; suggested for one that is misspelt."""


def parse_flags(arguments: Sequence[str]) -> Any:
    """SAELens' config of its flags.

    Raises:
        argparse.ArgumentError, ValueError: a flag that there is not, or with a value that it cannot have.
    """
    said, shown = io.StringIO(), io.StringIO()
    try:
        with redirect_stderr(said), redirect_stdout(shown):
            return _parse_cfg_args(arguments)
    except SystemExit as stop:
        if not stop.code:  # --help
            indent = "\n" + 24 * " "
            ours = f"Checkpoints in the course of a run, beside the one at{indent}its end. (default: {N_CHECKPOINTS})"
            print(_ABOUT_CHECKPOINTS.sub(rf"\g<1>{ours}", shown.getvalue()), end="")  # noqa: T201
            raise
        raise _refused(said.getvalue().strip().rpartition("error: ")[2]) from None
    except argparse.ArgumentError as error:
        if "unrecognized arguments" not in str(error):
            raise
        raise _refused(str(error)) from None  # from Python 3.13 on; before, argparse exits
    except ZeroDivisionError:  # SAELens divides by them for what it tells of the run
        raise ValueError(
            "--train_batch_size_tokens, --feature_sampling_window and --wandb_log_frequency must be 1 or more."
        ) from None


def check_run(cfg: Any) -> None:
    """Refuse what cannot be trained.

    Raises:
        ValueError: names the flag, its value and what it may be.
    """
    for name in POSITIVE:
        if getattr(cfg, name) < 1:
            raise ValueError(f"{name}={getattr(cfg, name)} must be positive; pass --{name} 1 or more.")
    if cfg.n_checkpoints < 0:
        raise ValueError(f"n_checkpoints={cfg.n_checkpoints} must not be negative.")
    if not (math.isfinite(cfg.lr) and cfg.lr > 0):
        raise ValueError(f"lr={cfg.lr} is no learning rate; pass --lr with a positive number, such as 3e-4.")
    if not 0 <= cfg.seed <= LARGEST_SEED:
        raise ValueError(f"seed={cfg.seed} must be from 0 to {LARGEST_SEED}.")
    str_to_dtype(cfg.dtype)
    if not cfg.use_cached_activations:
        check_context_size(cfg.context_size)
    seen = len(range(cfg.context_size)[slice(*cfg.seqpos_slice)])
    if seen * cfg.n_batches_in_buffer < cfg.train_batch_size_tokens:
        raise ValueError(
            f"A buffer of n_batches_in_buffer={cfg.n_batches_in_buffer} contexts of {seen} tokens is smaller than a batch of "
            f"{cfg.train_batch_size_tokens}; pass --n_batches_in_buffer {-(-cfg.train_batch_size_tokens // seen)} or more, or "
            f"--train_batch_size_tokens {seen * cfg.n_batches_in_buffer} or less."
        )
    for name in DEVICES:
        if getattr(cfg, name) not in (None, "with_model"):
            check_device(getattr(cfg, name), name)
    _check_model(cfg.model_name, cfg.model_class_name)


def _check_model(name: str, class_name: str) -> None:
    """TransformerLens answers an unknown name with all 200 that it knows."""
    if class_name == TRANSFORMER_LENS and not (is_gguf(name) or known_to_transformer_lens(name)):
        known = [*OFFICIAL_MODEL_NAMES, *(alias for aliases in MODEL_ALIASES.values() for alias in aliases)]
        near = get_close_matches(name, known, n=1)
        meant = f" Is {near[0]!r} meant?" if near else ""
        raise ValueError(
            f"TransformerLens knows no model {name!r}.{meant} For any other on Hugging Face or in a folder, pass "
            f"--model_class_name {HUGGING_FACE} and a --hook_name such as model.layers.3."
        )


def _refused(reason: str) -> ValueError:
    """What argparse says of flags, without secrets and with those that may be meant."""
    before, unknown, words = reason.partition("unrecognized arguments: ")
    reason = f"{before}{unknown}{as_typed(words.split())}" if unknown else reason
    shown = io.StringIO()
    with suppress(SystemExit), redirect_stdout(shown):
        _parse_cfg_args(["--help"])
    usage = shown.getvalue().partition("\n\n")[0]
    return ValueError(reason + _meant(reason, sorted({*re.findall(r"--[\w-]+", usage), *OWN_FLAGS})))


def _meant(reason: str, flags: list[str]) -> str:
    misspelt = re.findall(r"--[\w-]+", reason) if reason.startswith("unrecognized") else []
    found = [near for flag in misspelt for near in get_close_matches(flag, flags, n=1)]
    if found:
        return f". Is {', '.join(found)} meant?"
    return ". See saelens-cosine train --help." if misspelt else ""

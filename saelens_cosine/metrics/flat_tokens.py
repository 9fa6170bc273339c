"""What every diagnostic asks of an SAE: one token in, the same token out, whatever else is in the batch."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from sae_lens.saes.sae import SAE, TrainingSAE
from sae_lens.saes.temporal_sae import TemporalSAE
from sae_lens.saes.transcoder import Transcoder


@contextmanager
def flat_heads(sae: SAE[Any]) -> Generator[None]:
    """Within it an SAE on attention heads takes `[tokens, d_in]`, as every other."""
    reshaping = getattr(sae, "hook_z_reshaping_mode", False)
    if reshaping:
        sae.turn_off_forward_pass_hook_z_reshaping()
    try:
        yield
    finally:
        if reshaping:
            sae.turn_on_forward_pass_hook_z_reshaping()


def check_eval_mode(sae: SAE[Any]) -> None:
    """Raise ValueError for a training form in training mode, whose selection may depend on the batch."""
    if isinstance(sae, TrainingSAE) and sae.training:
        raise ValueError(
            f"{type(sae).__name__} is in training mode, where codes depend on the batch. Call sae.eval(), or load what was "
            "saved."
        )


@contextmanager
def on_flat_tokens(sae: SAE[Any]) -> Generator[None]:
    """Within it `sae` takes `[tokens, d_in]`, heads flattened; afterwards it is as it was.

    Raises:
        ValueError: a training form in training mode, whose selection may depend on the batch; a transcoder, whose output is not
            its input; a temporal SAE, whose output depends on the tokens before.
    """
    check_eval_mode(sae)
    if isinstance(sae, Transcoder | TemporalSAE):
        why = (
            "does not reconstruct what it reads" if isinstance(sae, Transcoder) else "reads whole contexts, not tokens"
        )
        raise ValueError(f"{type(sae).__name__} {why}; this is measured on autoencoders of single tokens.")
    with flat_heads(sae):
        yield

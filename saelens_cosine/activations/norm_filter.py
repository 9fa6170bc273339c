"""Drop attention-sink tokens before they reach an SAE, wherever SAELens' activation store feeds one.

A handful of tokens (the first of a context, some delimiters) carry activations 10 to 1000 times longer than the rest. The
paper trains without them and evaluates with them, which decides several of its headline numbers; so the filter is one
object that counts what it drops and writes the share into each SAE's metadata. Source: the released recipe keeps a token
when its norm is below 10 times the median of the batch that the language model produced.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from sae_lens import ActivationsStore
from sae_lens.saes.sae import SAE

from saelens_cosine.score import wide


def token_norms(activations: torch.Tensor) -> torch.Tensor:
    """`[..., d_in] -> [...]`, float32 or wider: finite where the token is, also where squares are out of range."""
    activations = activations.to(wide(activations.dtype))
    largest = activations.abs().amax(dim=-1, keepdim=True)
    unit = torch.where(largest.isfinite() & (largest > 0), largest, 1)
    norms = (activations / unit).norm(dim=-1, keepdim=True) * unit
    longest = torch.finfo(norms.dtype).max
    return torch.where(largest.isfinite(), norms.clamp_max(longest), norms).squeeze(-1)


def check_max_norm_multiple(
    multiple: float | None, keeping_all: str = "None ('none' on the command line) to keep every token"
) -> None:
    """Raise ValueError for a bound that keeps no tokens apart, or half of them; `keeping_all` says how to have none."""
    if multiple is not None and not (math.isfinite(multiple) and multiple > 1):
        raise ValueError(
            f"max_norm_multiple={multiple} is no bound for high norms: it multiplies the median norm. Use a finite number "
            f"well above 1 (the paper: 10), or {keeping_all}."
        )


@dataclass
class HighNormFilter:
    """
    Keeps activations whose norm is at most `max_norm_multiple` times their batch's median norm.

    Args:
        max_norm_multiple (float | None): The bound, as a multiple of the median. None keeps everything.
        tokens_seen (int): Tokens that passed through so far.
        tokens_dropped (int): Of these, dropped.
    """

    max_norm_multiple: float | None = 10.0
    tokens_seen: int = 0
    tokens_dropped: int = 0
    saes: list[SAE[Any]] = field(default_factory=list[SAE[Any]], repr=False)

    def __post_init__(self) -> None:
        check_max_norm_multiple(self.max_norm_multiple)

    @property
    def dropped_share(self) -> float:
        """Share of the tokens seen so far that was dropped, 0 before the first."""
        return self.tokens_dropped / self.tokens_seen if self.tokens_seen else 0.0

    def state_dict(self) -> dict[str, int]:
        """What it has counted."""
        return {"tokens_seen": self.tokens_seen, "tokens_dropped": self.tokens_dropped}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on counting from there."""
        self.tokens_seen, self.tokens_dropped = state["tokens_seen"], state["tokens_dropped"]
        self._note()  # a run that has nothing left to train sees no more tokens

    def keep(self, activations: torch.Tensor) -> torch.Tensor:
        """`[tokens, d_in]` activations of one batch -> `[tokens]` booleans.

        Rows of zeros are no tokens for the median; they are kept, as every short row is. Non-finite rows are kept, to be
        noticed.
        """
        if self.max_norm_multiple is None:
            return torch.ones(len(activations), dtype=torch.bool, device=activations.device)
        norms = token_norms(activations)
        tokens = norms[norms.isfinite() & (norms > 0)]
        if len(tokens) == 0:
            return torch.ones_like(norms, dtype=torch.bool)
        return ~(norms > self.max_norm_multiple * tokens.median()) | ~norms.isfinite()

    def __call__(self, activations: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Drop tokens that are high at any hook: `{hook: [tokens, d_in]}` -> the same with fewer tokens, still aligned.

        Raises:
            FloatingPointError: SAEs train on these activations and some are not finite.
        """
        if self.saes:
            self._refuse_non_finite(activations)
        keep = torch.stack([self.keep(at_hook) for at_hook in activations.values()]).all(dim=0)
        self.tokens_seen += len(keep)
        self.tokens_dropped += len(keep) - int(keep.sum())
        self._note()
        return {hook: at_hook[keep] for hook, at_hook in activations.items()}

    def _note(self) -> None:
        for sae in self.saes:
            sae.cfg.metadata.max_norm_multiple = self.max_norm_multiple
            sae.cfg.metadata.high_norm_share_dropped = self.dropped_share

    def _refuse_non_finite(self, activations: dict[str, torch.Tensor]) -> None:
        for hook, at_hook in activations.items():
            bad = int((~at_hook.isfinite()).any(dim=-1).sum())
            if bad:
                raise FloatingPointError(
                    f"{bad:,} of {len(at_hook):,} activations of the language model at "
                    f"{hook or self.saes[0].cfg.metadata.hook_name} are not finite, after {self.tokens_seen:,} tokens that "
                    "were. Run it in bfloat16 or float32, or leave out the text that does this. Checkpoints written so far "
                    "are kept."
                )

    def attach(self, store: ActivationsStore, saes: Iterable[SAE[Any]] = ()) -> HighNormFilter:
        """Filter every activation that this store yields from now on, and keep these SAEs' metadata up to date.

        SAELens' `run_evals` takes tokens from a store and activations from the model, so its metrics keep high-norm tokens.

        SAELens' runners build their store themselves and offer no place for a filter, so two methods of this one store
        are wrapped: the single-hook and the multi-hook source of its mixing buffer. Attach before training starts.
        """
        self.saes.extend(saes)
        single = store.get_filtered_llm_batch
        multiple = store._get_filtered_multi_hook_llm_batch  # pyright: ignore[reportPrivateUsage]

        def filtered(raise_on_epoch_end: bool = False) -> torch.Tensor:
            return self({"": single(raise_on_epoch_end)})[""]

        def filtered_multi_hook(raise_on_epoch_end: bool = False) -> dict[str, torch.Tensor]:
            return self(multiple(raise_on_epoch_end))

        store.get_filtered_llm_batch = filtered
        store._get_filtered_multi_hook_llm_batch = filtered_multi_hook  # pyright: ignore[reportPrivateUsage]
        return self


def filter_high_norm_tokens(runner: Any, max_norm_multiple: float | None = 10.0) -> HighNormFilter:
    """Attach a filter to a SAELens runner, single or multi-SAE, that has been built but not run."""
    saes = runner.saes.values() if hasattr(runner, "saes") else [runner.sae]
    return HighNormFilter(max_norm_multiple).attach(runner.activations_store, saes)

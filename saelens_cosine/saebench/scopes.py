"""Settings that SAEBench offers no argument for, changed while a block runs and put back afterwards."""

from __future__ import annotations

import contextlib
import io
import os
import random
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import torch

from saelens_cosine.files.secrets import without_secrets
from saelens_cosine.hooked_transformer import hooked_transformer
from saelens_cosine.plain import digest


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Generator[None, None, None]:
    """An attribute has another value."""
    before = owner.__dict__[name]
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextlib.contextmanager
def serving(model: Any) -> Generator[None, None, None]:
    """SAEBench gets this model whenever it loads one: any HookedTransformer, and loaded once."""

    def loaded(*args: Any, **kwargs: Any) -> Any:  # noqa: ARG001
        return model

    with replaced(hooked_transformer(), "from_pretrained_no_processing", loaded):
        yield


REMEMBERED_BYTES = 2**30
"""Of activations, at most; the first to come are the first to go."""

_remembered: dict[str, torch.Tensor] = {}


@contextlib.contextmanager
def remembering(model: Any, identity: str) -> Generator[None, None, None]:
    """A HookedTransformer gives activations at one hook that it gave before in this process: core reads the same tokens for each SAE.

    Args:
        model: HookedTransformer.
        identity: stands for what it computes.
    """
    run: Callable[..., Any] = model.run_with_cache

    def remembered(tokens: torch.Tensor, **how: Any) -> Any:
        hooks = how.get("names_filter")
        if not (isinstance(hooks, list) and len(hooks) == 1 and how.get("stop_at_layer")):
            return run(tokens, **how)
        key = digest([identity, str(model.cfg.dtype), sorted(map(repr, how.items()))], {"tokens": tokens})
        if key not in _remembered:
            _remembered[key] = run(tokens, **how)[1][hooks[0]]
            while len(_remembered) > 1 and sum(kept.nbytes for kept in _remembered.values()) > REMEMBERED_BYTES:
                del _remembered[next(iter(_remembered))]
        return None, {hooks[0]: _remembered[key].clone()}

    model.run_with_cache = remembered
    try:
        yield
    finally:
        del model.run_with_cache


@contextlib.contextmanager
def without_shape_checks() -> Generator[None, None, None]:
    """jaxtyping checks nothing. With beartype 0.18.5 and later it rejects sparse probing's own arguments, wrongly."""
    import jaxtyping

    config: Any = jaxtyping.config
    before = config.jaxtyping_disable
    config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        config.update("jaxtyping_disable", before)


TOKENS_AT_ONCE = 8192
"""What sae-probes' language model reads in one batch, padding included, unless one text is longer."""


@contextlib.contextmanager
def within_the_context() -> Generator[None, None, None]:
    """sae-probes cuts texts to what the model takes, and reads those of like length together.

    It cuts them to 1,024 tokens, at which a smaller model fails, and reads 32 at once, short or long as they come: on a CPU most
    of its time goes to padding, or to the many batches of short texts.
    """
    import sae_probes.generate_model_activations as module

    process: Callable[..., Any] = vars(module)["_process_activations"]

    def cut(*, model: Any, texts: list[str], max_seq_len: int, batch_size: int, **kwargs: Any) -> Any:  # noqa: ARG001
        longest = min(max_seq_len, model.cfg.n_ctx)
        lengths = [min(longest, len(ids)) for ids in model.tokenizer(texts)["input_ids"]]
        batches = of_like_length(lengths, TOKENS_AT_ONCE)
        found = [
            process(model=model, texts=[texts[i] for i in batch], max_seq_len=longest, batch_size=len(batch), **kwargs)
            for batch in batches
        ]
        back = torch.tensor([i for batch in batches for i in batch]).argsort()
        return {hook: torch.cat([part[hook] for part in found])[back] for hook in kwargs["hook_names"]}

    with replaced(module, "_process_activations", cut):
        yield


def of_like_length(lengths: Sequence[int], tokens: int) -> list[list[int]]:
    """Indices of all texts, shortest first, in batches that hold at most so many tokens when padded, or one text."""
    batches: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if batches and (len(batches[-1]) + 1) * lengths[i] <= tokens:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


@contextlib.contextmanager
def working_in(folder: Path) -> Generator[None, None, None]:
    """The working directory is `folder`."""
    before = Path.cwd()
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@contextlib.contextmanager
def seeded(seed: int) -> Generator[None, None, None]:
    """Random numbers start from a seed, and go on afterwards as if nothing had happened; so does gradient mode."""
    import numpy as np

    gradients = torch.is_grad_enabled()
    python_state, numpy_state = random.getstate(), np.random.get_state()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        torch.set_grad_enabled(True)
        try:
            yield
        finally:
            torch.set_grad_enabled(gradients)
            random.setstate(python_state)
            np.random.set_state(numpy_state)


@dataclass
class HighNormMask:
    """
    Zeroes high-norm tokens in pooled activations, as SAEBench zeroes special ones: its means leave out zero rows.

    The bound is a multiple of the median norm of a data set's training tokens, special ones left out, and holds for its test
    tokens too. A text all of whose tokens are above keeps them.

    Args:
        max_norm_multiple (float): Multiple of the median norm.
        tokens_seen (int): Tokens that came through, special ones left out.
        tokens_dropped (int): Of these, zeroed.
    """

    max_norm_multiple: float
    tokens_seen: int = 0
    tokens_dropped: int = 0
    _bound: float = field(default=0.0, repr=False)

    def __call__(self, splits: tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]) -> tuple[dict[str, Any], ...]:
        """Training and test activations, class -> `[texts, tokens, d_in]`, changed in place."""
        norms = torch.cat([_norms(acts).flatten() for acts in splits[0].values()])
        self._bound = self.max_norm_multiple * norms[norms > 0].median().item()
        for split in splits:
            for acts in split.values():
                self._mask(acts)
        return splits

    def _mask(self, acts: torch.Tensor) -> None:
        norms = _norms(acts)
        high = norms > self._bound
        high &= ((norms > 0) & ~high).any(dim=-1, keepdim=True)
        self.tokens_seen += int((norms > 0).sum())
        self.tokens_dropped += int(high.sum())
        acts[high] = 0

    def on(self, module: Any) -> contextlib.AbstractContextManager[None]:
        """Every data set's activations that this eval's module collects pass through the mask."""
        collect: Callable[..., Any] = module.get_dataset_activations

        def masked(*args: Any, **kwargs: Any) -> Any:
            return self(collect(*args, **kwargs))

        return replaced(module, "get_dataset_activations", masked)


def _norms(acts: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(acts, dim=-1, dtype=torch.float32)


class LogWithoutSecrets(io.TextIOBase):
    """A file to which text goes without secrets: a judge may answer with the key that it was asked with."""

    def __init__(self, file: TextIO):
        self.file = file

    def write(self, text: str, /) -> int:
        self.file.write(without_secrets(text))
        return len(text)

    def flush(self) -> None:
        self.file.flush()

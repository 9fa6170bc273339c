"""Forward passes of a hooked model that go on from given activations at a hook.

They start there where the model can do that: in the residual stream of a HookedTransformer, at a block's output in a Hugging Face
model. Elsewhere the whole model runs and the activation there is replaced.
"""

from __future__ import annotations

import re
from collections.abc import Generator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from saelens_cosine.activations.bridges import restore_hook_names
from saelens_cosine.activations.hook_points import device_of, of_head
from saelens_cosine.hooked_transformer import is_hooked_transformer

LOGITS_AT_ONCE = 2**22
"""Log-probabilities held at a time: 16 MiB. A few times as many take three times as long on a CPU, whose caches they leave."""


class Forward(NamedTuple):
    """
    What a model makes of contexts, on its device.

    Args:
        hidden (torch.Tensor): `[contexts, length, d_in]`, activations at the hook in the model's dtype, of the head or heads flattened.
        unembedded (torch.Tensor): `[contexts, length, d_model]`, what the unembedding takes.
        logits (torch.Tensor): `[contexts, length, vocabulary]`.
    """

    hidden: torch.Tensor
    unembedded: torch.Tensor
    logits: torch.Tensor


class ResumedModel:
    """
    A hooked model that goes on from given activations at a hook.

    Args:
        model (Any): HookedTransformer, TransformerBridge, or SAELens' wrapper of a Hugging Face model.
        hook_name (str): A hook point of it.
        head (int | None): The attention head whose activations are given, the others staying what they are; None for all.

    Raises:
        ValueError: no such hook point.
    """

    def __init__(self, model: Any, hook_name: str, head: int | None = None):
        if hook_name not in model.hook_dict:
            raise ValueError(f"{type(model).__name__} has no hook point {hook_name!r}.")
        self.model, self.hook_name, self.head = model, hook_name, head
        self.start_at_layer = _first_layer_after(model, hook_name)
        self._unembedding = model.unembed if hasattr(model, "unembed") else model.model.get_output_embeddings()
        self.passed_over = PassedOver.of(model, hook_name)
        if self.passed_over is not None and not self._can_pass_over():
            self.passed_over = None

    @property
    def device(self) -> torch.device:
        """Where the model's inputs go."""
        return device_of(self.model)

    @torch.no_grad()
    def forward(self, tokens: torch.Tensor) -> Forward:
        """The model as it is, on `tokens [n, length]`."""
        found: list[torch.Tensor] = []
        handle = self._unembedding.register_forward_pre_hook(lambda _module, inputs: found.append(inputs[0]))
        try:
            logits, cache = self._clean(tokens)
        finally:
            handle.remove()
        return Forward(of_head(cache[self.hook_name], self.head), found[-1], logits)

    @torch.no_grad()
    def unembed(self, unembedded: torch.Tensor) -> torch.Tensor:
        """Logits of what the unembedding takes, but for what some models do to them after it."""
        return self._unembedding(unembedded.to(self.device))

    @torch.no_grad()
    def run(self, tokens: torch.Tensor, read: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The model as it is, on `tokens [n, length]`.

        Returns:
            Activations at the hook `[n, length, d_in]`, of the head or heads flattened, in the model's dtype, and log-probabilities
            `[n, vocabulary]` after the token at position `read [n]`; on the model's device.
        """
        with self._reading(read):
            logits, cache = self._clean(tokens)
        return of_head(cache[self.hook_name], self.head), _log_softmax(logits).squeeze(1)

    def _clean(self, tokens: torch.Tensor) -> tuple[torch.Tensor, Any]:
        return self.model.run_with_cache(tokens.to(self.device), names_filter=[self.hook_name], prepend_bos=False)

    @torch.no_grad()
    def logits(self, hidden: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Logits `[n, length, vocabulary]` with other activations at the hook, on the model's device.

        Args:
            hidden: `[n, length, d_in]`, in the model's dtype.
            tokens: `[n, length]`, the contexts that they belong to.
        """
        hidden = hidden.to(self.device)
        if self.start_at_layer is not None:
            return self.model(hidden, start_at_layer=self.start_at_layer)
        restore_hook_names(self.model)
        with nullcontext() if self.passed_over is None else self.passed_over.passing():
            return self.model.run_with_hooks(
                tokens.to(self.device),
                fwd_hooks=[(self.hook_name, lambda activations, hook: self._replaced(activations, hidden))],  # noqa: ARG005
                prepend_bos=False,
            )

    @torch.no_grad()
    def log_probs(self, hidden: torch.Tensor, tokens: torch.Tensor, read: torch.Tensor | None = None) -> torch.Tensor:
        """Log-probabilities of the next token with other activations at the hook, on the model's device.

        Args:
            hidden: `[n, length, d_in]`, in the model's dtype.
            tokens: `[n, length]`, the contexts that they belong to.
            read: `[n]` or `[n, m]`, the positions whose predictions are wanted; None for all.

        Returns:
            `[n, vocabulary]` or `[n, m, vocabulary]`, or `[n, length, vocabulary]` if read is None; float32 whatever the model's
            dtype.
        """
        with self._reading(read):
            logits = self.logits(hidden, tokens)
        return _log_softmax(logits if read is None or read.ndim == 2 else logits.squeeze(1))

    @torch.no_grad()
    def _can_pass_over(self) -> bool:
        """Whether that gives the same to the bit: some models' later blocks read more than the block before."""
        blocks, tokens = self.passed_over, torch.arange(4, device=self.device).unsqueeze(0)
        _, cache = self._clean(tokens)
        changed = 0.5 * of_head(cache[self.hook_name], self.head)
        self.passed_over = None
        whole = self.logits(changed, tokens)
        self.passed_over = blocks
        try:
            return torch.equal(self.logits(changed, tokens), whole)
        except (
            AttributeError,
            IndexError,
            KeyError,
            RuntimeError,
            TypeError,
            ValueError,
        ):  # it reads what is not there
            return False

    def _replaced(self, activations: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        if self.head is None:
            return hidden.reshape(activations.shape)
        edited = activations.clone()
        edited[:, :, self.head] = hidden
        return edited

    @contextmanager
    def _reading(self, read: torch.Tensor | None) -> Generator[None]:
        """Have only some positions of each context unembedded: all logits of a large vocabulary would fill the memory."""
        if read is None:
            yield
            return
        places = read.unsqueeze(1) if read.ndim == 1 else read

        def pick(_module: Any, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            final, *others = inputs
            return (final[torch.arange(len(places)).unsqueeze(1), places.to(final.device)], *others)

        handle = self._unembedding.register_forward_pre_hook(pick)
        try:
            yield
        finally:
            handle.remove()


@dataclass(frozen=True)
class PassedOver:
    """
    Blocks of a Hugging Face model that a pass need not run, for the last one's output is replaced.

    Transformers' models have no way to start at a later block. But what a block is called with, it can hand on.

    Args:
        blocks (tuple[torch.nn.Module, ...]): From the first to the hooked one.
    """

    blocks: tuple[torch.nn.Module, ...]

    @classmethod
    def of(cls, model: Any, hook_name: str) -> PassedOver | None:
        """Those before a hook such as `model.layers.15` of SAELens' wrapper; None if the hook is no block's output."""
        path, _, number = hook_name.rpartition(".")
        blocks = getattr(model, "named_modules_dict", {}).get(path)
        return cls(tuple(blocks)[: int(number) + 1]) if isinstance(blocks, torch.nn.ModuleList) else None

    @contextmanager
    def passing(self) -> Generator[None]:
        """Within it each block returns its input, on which the hooks at its output still run."""
        before = [vars(block).get("forward") for block in self.blocks]
        try:
            for block in self.blocks:
                vars(block)["forward"] = _hand_on
            yield
        finally:
            for block, its in zip(self.blocks, before, strict=True):
                vars(block).pop("forward", None)
                if its is not None:
                    vars(block)["forward"] = its


def _hand_on(hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    return hidden_states


def _first_layer_after(model: Any, hook_name: str) -> int | None:
    """The layer that a HookedTransformer can start at with this hook's activations as its residual stream."""
    found = re.fullmatch(r"blocks\.(\d+)\.hook_resid_(pre|post)", hook_name)
    if not found or not is_hooked_transformer(model):
        return None
    masks = getattr(model.tokenizer, "padding_side", "right") == "left"  # made from tokens, which a later start lacks
    if masks or model.cfg.positional_embedding_type == "shortformer":
        return None
    return int(found[1]) + (found[2] == "post")


def _log_softmax(logits: torch.Tensor) -> torch.Tensor:
    return logits.log_softmax(dim=-1, dtype=torch.float32)

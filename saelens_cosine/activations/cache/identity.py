"""What a cache of activations is of: the model, its hooks, the text, and how text became contexts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

import torch

from saelens_cosine.activations.contexts import ContextForm
from saelens_cosine.activations.hook_points import activations_at, device_of
from saelens_cosine.activations.models import HookedModel
from saelens_cosine.activations.text import TextSplits
from saelens_cosine.files.secrets import without_secrets
from saelens_cosine.plain import digest, model_fingerprint


@dataclass(frozen=True)
class CacheIdentity:
    """
    What a cache is of. All but the two names must be the same for a cache to be read or added to.

    Args:
        model (str): What the language model is called.
        model_sha256 (str): Hash of its weights and config.
        planted_sinks (tuple[str, ...]): Hook points at which sinks are planted in it.
        hooks (dict[str, tuple[int, ...]]): By hook point, the shape of one token's activations: `[d_in]`, or `[heads, d_head]`.
        dtype (str): Of the activations, as they are kept.
        tokenizer_sha256 (str): Hash of its vocabulary and its special tokens.
        dataset (str): What the text is called.
        text (str): Its fingerprint, see `activations.text.TextSplits`; its name, of a stream.
        heldout_rule (str): Which documents are held out.
        context_size (int): Tokens of a context.
        prepend_bos, sequence_separator_token, disable_concat_sequences, use_chat_formatting: As in `ContextForm`. What an SAE sees of a context, its other fields, changes no activation.
    """

    model: str
    model_sha256: str
    planted_sinks: tuple[str, ...]
    hooks: dict[str, tuple[int, ...]]
    dtype: str
    tokenizer_sha256: str
    dataset: str
    text: str
    heldout_rule: str
    context_size: int
    prepend_bos: bool
    sequence_separator_token: int | str | None
    disable_concat_sequences: bool
    use_chat_formatting: bool

    @classmethod
    def of(
        cls,
        model: HookedModel,
        hooks: Iterable[str],
        form: ContextForm,
        dataset: str,
        text: TextSplits,
        planted_sinks: Iterable[str] = (),
        model_sha256: str | None = None,
    ) -> CacheIdentity:
        """Of a model that is loaded, with its sinks planted, and a text.

        Args:
            model: the model.
            hooks: the hook points whose activations are wanted.
            form: how text becomes contexts.
            dataset: the text's name.
            text: the text.
            planted_sinks: hook points at which sinks are planted.
            model_sha256: its `model_fingerprint`, where that is known already.

        Raises:
            ValueError: activations at a hook are not `[contexts, length, ...]`, or none pass it.
        """
        return cls(
            model=model.name,
            model_sha256=model_sha256 or model_fingerprint(model.model),
            planted_sinks=tuple(sorted(planted_sinks)),
            hooks=_shapes(model.model, sorted(set(hooks))),
            dtype="bfloat16",
            tokenizer_sha256=_tokenizer_sha256(model.model.tokenizer),
            dataset=without_secrets(dataset),
            text=text.fingerprint or without_secrets(dataset),
            heldout_rule=text.rule,
            context_size=form.context_size,
            prepend_bos=form.prepend_bos,
            sequence_separator_token=form.sequence_separator_token,
            disable_concat_sequences=form.disable_concat_sequences,
            use_chat_formatting=form.use_chat_formatting,
        )

    @property
    def bytes_per_context(self) -> int:
        """Of a context's activations at all hooks, and its tokens."""
        values = sum(torch.Size(shape).numel() for shape in self.hooks.values())
        return self.context_size * (2 * values + 4)

    def differences(self, asked: CacheIdentity) -> list[str]:
        """What a cache of this lacks or has otherwise for one who asks for another, in words; empty if it serves."""
        found: list[str] = []
        for part in fields(self):
            there, here = getattr(self, part.name), getattr(asked, part.name)
            if part.name in ("model", "dataset"):
                continue
            if part.name == "hooks":
                if not here.items() <= there.items():
                    found.append(f"hooks are {_listed(there)} there and {_listed(here)} here")
            elif there != here:
                of = {"model_sha256": "model", "text": "dataset", "heldout_rule": "dataset"}.get(part.name)
                there, here = (
                    f"{value!r}" + (f" ({getattr(whose, of)})" if of else "")
                    for value, whose in ((there, self), (here, asked))
                )
                found.append(f"{part.name} is {there} there and {here} here")
        return found


def _listed(hooks: dict[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{hook} {list(shape)}" for hook, shape in hooks.items())


def _tokenizer_sha256(tokenizer: Any) -> str:
    return digest([tokenizer.get_vocab(), tokenizer.special_tokens_map])


@torch.no_grad()
def _shapes(model: Any, hooks: list[str]) -> dict[str, tuple[int, ...]]:
    tokens = torch.zeros((1, 3), dtype=torch.long, device=device_of(model))
    found = activations_at(model.run_with_cache, hooks, tokens)
    shapes: dict[str, tuple[int, ...]] = {}
    for hook in hooks:
        shape = tuple(found[hook].shape) if hook in found.keys() else ()  # noqa: SIM118  (TransformerLens' cache is no mapping)
        if shape[:2] != tokens.shape or len(shape) < 3:
            raise ValueError(
                f"Activations at {hook} have shape {shape} for one context of three tokens. Those that are "
                "[contexts, length, ...] can be cached, as in the residual stream."
            )
        shapes[hook] = shape[2:]
    return shapes

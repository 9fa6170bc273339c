"""A cache in the place of its model's forward pass, and how it is filled."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import torch

from saelens_cosine.activations.cache.cache import ActivationCache
from saelens_cosine.activations.contexts import CONTEXTS_AT_ONCE
from saelens_cosine.activations.hook_points import activations_at, device_of
from saelens_cosine.progress import Progress

_UNDERSTOOD = {"names_filter", "stop_at_layer", "prepend_bos"}


@contextmanager
def standing_in(model: Any, cache: ActivationCache) -> Generator[None]:
    """Have a cache answer `model.run_with_cache` in a with block, wherever a call asks for no more than it can have.

    These are the calls of SAELens' activation store and of `sample_tokens`: tokens alone, hooks all of which the cache has, contexts
    of its length, a layer to stop at, and the model's own precision. Contexts that it lacks are run and added. What is found and what is
    run anew are the same, rounded to bfloat16; in place of the layer's output is None. All other calls go to the model.

    What is hooked into the model while this is open is not seen by it: planted sinks belong to the cache's identity and are
    planted before.

    Args:
        model: HookedTransformer, TransformerBridge, or SAELens' wrapper of a Hugging Face model.
        cache: of this model.
    """
    own: Callable[..., Any] = model.run_with_cache

    def run_with_cache(*args: Any, **kwargs: Any) -> Any:
        hooks = _answered(cache, args, kwargs)
        if hooks is None:
            return own(*args, **kwargs)
        tokens: torch.Tensor = args[0]
        # as wide as the model's own, and float32 for float16, which lacks the range
        dtype = torch.promote_types(torch.bfloat16, next(model.parameters()).dtype)
        with cache.lock:
            missing = cache.missing(tokens)
            if len(missing):
                _run(own, missing, cache)
            found = cache.read(tokens, hooks)
        return None, {hook: activations.to(tokens.device).to(dtype) for hook, activations in found.items()}

    attributes = vars(model)
    before = attributes.get("run_with_cache")
    attributes["run_with_cache"] = run_with_cache
    try:
        yield
    finally:
        if before is None:
            del attributes["run_with_cache"]
        else:
            attributes["run_with_cache"] = before


def fill(cache: ActivationCache, model: Any, contexts: torch.Tensor, progress: Progress) -> None:
    """Have a cache hold all these contexts; those that it has are not run again.

    Args:
        cache: of this model.
        model: as in `standing_in`.
        contexts: `[n, length]` int64.
        progress: told of tokens.

    Raises:
        OSError: the disk has no room for them; said before the first is run.
    """
    missing = cache.missing(contexts)
    cache.check_space(len(missing))
    total = contexts.numel()
    done = total - missing.numel()
    for batch in missing.split(CONTEXTS_AT_ONCE) if len(missing) else ():
        progress("Activations", done, total)
        with cache.lock:
            _run(model.run_with_cache, batch.to(device_of(model)), cache)
        done += batch.numel()
    with cache.lock:
        cache.flush()
    progress("Activations", total, total)


@torch.no_grad()
def _run(run_with_cache: Callable[..., Any], tokens: torch.Tensor, cache: ActivationCache) -> None:
    """Contexts through the model in its own precision, as far as the last of the cache's hooks."""
    hooks = list(cache.identity.hooks)
    with torch.autocast(tokens.device.type, enabled=False):
        found = activations_at(run_with_cache, hooks, tokens)
    cache.add(tokens.cpu(), {hook: found[hook].to(torch.bfloat16).cpu() for hook in hooks})


def _answered(cache: ActivationCache, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[str] | None:
    """The hooks that a call of `run_with_cache` asks for, if the cache can have all that it asks for."""
    if len(args) != 1 or kwargs.keys() != _UNDERSTOOD or kwargs["prepend_bos"] is not False:
        return None
    tokens, hooks = args[0], kwargs["names_filter"]
    if not isinstance(hooks, list) or not cache.identity.hooks.keys() >= set(hooks):
        return None
    if not isinstance(tokens, torch.Tensor) or tokens.ndim != 2 or tokens.shape[1] != cache.identity.context_size:
        return None
    return None if torch.is_autocast_enabled(tokens.device.type) else hooks

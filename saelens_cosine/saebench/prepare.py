"""Any SAELens SAE in the form whose units SAEBench assumes: decoder rows of norm 1, all scale in the codes, nothing remembered.

Several of its evals take code i for a length in the residual stream along `W_dec[i]`, and `decode` for the affine map
`codes @ W_dec + b_dec`: one function with its scale split differently between codes and decoder has other absorption, sparse
probing and unlearning scores. Here `W_dec_i <- d_i / ||d_i||` and `f_i <- f_i ||d_i||`, for every SAE that is compared.
"""

from __future__ import annotations

import copy
import re
from typing import Any

import torch
from sae_lens.saes.sae import SAE
from sae_lens.saes.transcoder import Transcoder
from torch import nn
from typing_extensions import override

from saelens_cosine.activations.hook_points import BLOCK_OUTPUT
from saelens_cosine.files.names import check_name
from saelens_cosine.loading.formats.saelens import inference_copy
from saelens_cosine.metrics.codes import code_units
from saelens_cosine.plain import digest, fingerprint
from saelens_cosine.score import wide

_FROM_METADATA = (
    *("model_name", "hook_name", "hook_head_index", "context_size", "prepend_bos", "exclude_special_tokens"),
    "dataset_trust_remote_code",
)
"""What SAEBench reads from `cfg` and SAELens has in `cfg.metadata`."""

READ_BY_SAEBENCH = (
    "model_name",
    "model_from_pretrained_kwargs",
    "hook_name",
    "hook_head_index",
    "context_size",
    "prepend_bos",
    "sequence_separator_token",
    "disable_concat_sequences",
    "exclude_special_tokens",
    "seqpos_slice",
)
"""Metadata that its evals, or SAELens' activation store in them, take from an SAE; a note beside them changes no score."""

_REMEMBERED = {
    "layer_norm": "each token's mean and standard deviation",
    "constant_norm_rescale": "each token's norm",
}


class PreparedSAE(nn.Module):
    """An SAE as SAEBench takes it. `encode` and `decode` as in SAELens, for `[..., d_in]`, in the dtype of what they are given.

    Args:
        sae: in an inference form, on flat activations; not changed.
        name: stands for this SAE in file names.
        silence_padding: give no codes to rows that are exactly zero. SAEBench zeroes tokens that it leaves out and still
            encodes them; where b_dec is not zero they fire, and ablation in SCR and TPP shifts them. Not stock SAEBench.
    """

    W_dec: torch.Tensor
    gain: torch.Tensor

    def __init__(self, sae: SAE[Any], name: str, silence_padding: bool = False):
        super().__init__()
        self.sae, self.name, self.silence_padding = sae, name, silence_padding
        self.cfg: Any = sae.cfg
        self.hook_z_reshaping_mode = False
        norms = sae.W_dec.detach().to(wide(sae.dtype)).norm(dim=-1)
        rows = sae.W_dec.detach() / norms.clamp_min(torch.finfo(norms.dtype).tiny).unsqueeze(-1)
        self.register_buffer("W_dec", rows.to(sae.dtype))
        self.register_buffer("gain", code_units(sae).to(norms) * (norms > 0))

    @property
    def device(self) -> torch.device:
        return self.W_dec.device

    @property
    def dtype(self) -> torch.dtype:
        return self.sae.dtype

    @property
    def b_dec(self) -> torch.Tensor:
        """`[d_in]`."""
        return self.sae.b_dec  # pyright: ignore[reportReturnType]

    @property
    def W_enc(self) -> torch.Tensor:
        """`[d_in, d_sae]`, columns in the codes' units. SAEBench reports cosines with them, and no score depends on them."""
        return self.sae.W_enc * self.gain.to(self.dtype)

    @property
    def b_enc(self) -> torch.Tensor:
        """`[d_sae]`, in the codes' units; zeros for an SAE without."""
        for name in ("b_mag", "b_enc"):
            if hasattr(self.sae, name):
                return getattr(self.sae, name) * self.gain.to(self.dtype)
        return torch.zeros_like(self.W_dec[:, 0])

    b_mag = b_enc

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., d_in] -> [..., d_sae]`, a new dense tensor."""
        codes = self.sae.encode(x).to_dense()
        codes = (codes * self.gain).to(x.dtype)
        return codes * (x != 0).any(dim=-1, keepdim=True) if self.silence_padding else codes

    def decode(self, feature_acts: torch.Tensor) -> torch.Tensor:
        """`[..., d_sae] -> [..., d_in]`."""
        return (feature_acts.to(self.dtype) @ self.W_dec + self.b_dec).to(feature_acts.dtype)

    @override
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.decode(self.encode(x))

    @override
    def to(self, *args: Any, **kwargs: Any) -> PreparedSAE:
        self.sae.to(*args, **kwargs)  # SAELens notes the device and dtype there
        super().to(*args, **kwargs)
        return self

    @override
    def _apply(self, fn: Any, recurse: bool = True) -> PreparedSAE:
        gain = self.gain
        super()._apply(fn, recurse)
        self.gain = gain.to(self.gain.device)  # a scale, never rounded
        return self

    def turn_off_forward_pass_hook_z_reshaping(self) -> None:
        """As SAEBench's core eval asks for: it is off."""

    turn_on_forward_pass_hook_z_reshaping = turn_off_forward_pass_hook_z_reshaping


@torch.no_grad()
def prepare(
    sae: SAE[Any] | PreparedSAE,
    name: str | None = None,
    *,
    model_name: str | None = None,
    hook_name: str | None = None,
    silence_padding: bool = False,
) -> PreparedSAE:
    """A copy for SAEBench: canonical units, TransformerLens' names, and a name that depends on the content.

    The same function as the SAE, whatever its architecture, which is checked on random inputs. The one passed in is left
    alone; SAEBench casts and writes into what it is given.

    Args:
        sae: any SAELens SAE, in an inference form or a training form (then as it would be saved).
        name: beginning of the copy's name, the architecture by default. Twelve digits of a hash of its weights, settings and
            hook follow, since SAEBench reuses what it finds under a name.
        model_name, hook_name: in place of what the metadata say. A decoder block's path in a Hugging Face model
            (`model.layers.18`) is translated.
        silence_padding: as in `PreparedSAE`; use it for all SAEs of a comparison or for none.

    Raises:
        ValueError: the SAE has no form without memory (per-token normalisation), is no autoencoder of its hook (transcoders),
            does not decode linearly, gives NaN for a zero input, or its model or hook has no TransformerLens name.
    """
    if isinstance(sae, PreparedSAE):
        return copy.deepcopy(sae)
    architecture = sae.cfg.architecture()
    mode = str(sae.cfg.normalize_activations)
    if mode in _REMEMBERED:
        raise ValueError(
            f"normalize_activations={mode!r}: this SAE's decode needs {_REMEMBERED[mode]}, remembered from the last encode. "
            "No decoder of codes alone is the same function, and SAEBench encodes and decodes in different batches."
        )
    if isinstance(sae, Transcoder) or getattr(sae.cfg.metadata, "hook_name_out", None) not in (
        None,
        sae.cfg.metadata.hook_name,
    ):
        raise ValueError(f"{architecture!r} writes to another hook than it reads from; SAEBench scores autoencoders.")
    own = inference_copy(sae)
    metadata = own.cfg.metadata
    metadata.model_name = model_name or metadata.model_name
    metadata.hook_name = lens_hook(hook_name or metadata.hook_name)
    if not metadata.model_name:
        raise ValueError("The SAE's metadata name no model; say which with model_name=, as TransformerLens calls it.")
    if metadata.prepend_bos is None:
        metadata.prepend_bos = True  # SAELens' default, without which SAEBench's core eval writes nothing
    _name_fields(own.cfg)
    own.turn_off_forward_pass_hook_z_reshaping()
    content = content_hash(own, silence_padding)
    called = check_name(f"{name or own.cfg.architecture()}-{content}".replace("/", "_"), "name of the copy")
    prepared = PreparedSAE(own.eval(), called, silence_padding)
    _check(prepared)
    return prepared


def _name_fields(cfg: Any) -> None:
    """Put on the config what SAEBench's own `run_eval` puts there, so that its other functions can be called too."""
    for name in _FROM_METADATA:
        setattr(cfg, name, cfg.metadata.get(name))
    cfg.hook_layer = int(cfg.metadata.hook_name.split(".")[1])
    cfg.model_from_pretrained_kwargs = cfg.metadata.get("model_from_pretrained_kwargs") or {}
    cfg.architecture_str = cfg.architecture()


def content_hash(sae: SAE[Any], silence_padding: bool = False) -> str:
    """Twelve hexadecimal digits of what decides an SAE's scores: weights, config, and `READ_BY_SAEBENCH`."""
    return digest([fingerprint(sae, READ_BY_SAEBENCH), silence_padding])[:12]


def lens_hook(hook_name: str | None) -> str:
    """A HookedTransformer's name for a hook: block outputs of Hugging Face models and of bridges are
    `blocks.<layer>.hook_resid_post`, a bridge's block inputs `hook_resid_pre`.

    Raises:
        ValueError: nothing is known of it, or SAEBench could read no layer from it.
    """
    if not hook_name:
        raise ValueError("The SAE's metadata name no hook; say which with hook_name='blocks.<layer>.hook_resid_post'.")
    if path := BLOCK_OUTPUT.fullmatch(hook_name):
        return f"blocks.{path[1]}.hook_resid_post"
    if bridged := re.fullmatch(r"(blocks\.\d+)\.hook_(in|out)", hook_name):
        return f"{bridged[1]}.hook_resid_{'pre' if bridged[2] == 'in' else 'post'}"
    if not re.match(r"blocks\.\d+\.", hook_name):
        raise ValueError(
            f"{hook_name!r} is no hook of a block in TransformerLens, which SAEBench needs. Give its name there, such as "
            "hook_name='blocks.<layer>.hook_mlp_out'."
        )
    return hook_name


def _check(prepared: PreparedSAE) -> None:
    """Compare with the SAE itself on random inputs and codes."""
    sae, rng = prepared.sae, torch.Generator().manual_seed(0)
    scale = float(prepared.b_dec.detach().float().norm()) + sae.cfg.d_in**0.5
    x = torch.randn(2, 3, sae.cfg.d_in, generator=rng).to(prepared.device, prepared.dtype) * scale
    if not prepared.encode(torch.zeros_like(x)).isfinite().all():
        raise ValueError(
            f"{sae.cfg.architecture()!r} gives codes that are not finite for a zero input. SAEBench encodes zeros in place of "
            "the tokens that it leaves out, and would report chance."
        )
    wanted, got = sae(x).float(), prepared(x).float()
    tolerance = 1e-4 if prepared.dtype in (torch.float32, torch.float64) else 3e-2
    if not (wanted - got).norm() <= tolerance * wanted.norm():
        raise ValueError(
            f"{sae.cfg.architecture()!r} is not `codes @ W_dec + b_dec`: its reconstruction of random inputs differs by "
            f"{float((wanted - got).norm() / wanted.norm()):.2g} of their norm, so that SAEBench's ablations would not be its own."
        )

"""Read a trained SAE with the other score: a standard one by cosine, a cosine-scored one by inner product.

The paper swaps scores with the threshold and the scale left as training had them, so L0 changes with the score and the
comparison is not at equal sparsity (arXiv 2606.15054, released code: experiment 29 reads standard weights by cosine, 64
swaps both ways). Here the threshold is fitted again, to a target L0, and the scale keeps codes at their size or is fitted.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from sae_lens.registry import SAE_CLASS_REGISTRY
from sae_lens.saes.sae import SAE, TrainingSAE
from tqdm.auto import tqdm

from saelens_cosine.loading.formats.saelens import inference_copy
from saelens_cosine.metrics.codes import most_at_once
from saelens_cosine.metrics.reconstruction.by_norm import evaluate_reconstruction
from saelens_cosine.metrics.threshold import Threshold, fit_threshold
from saelens_cosine.saes.cosine import PLUGIN_NOTE
from saelens_cosine.score import NORM_FLOOR, centred_norm, wide

RESCORED_AS = {"standard": "jumprelu", "jumprelu": "jumprelu", "topk": "topk", "abstopk": "abstopk"}
"""Selectors that can be rescored, and what each becomes: a ReLU has no threshold to fit."""

RELATIVE_SCALES = [4 ** (i / 10) for i in range(-10, 11)]
"""What a fit tries, relative to the scale that keeps codes at their size. 4 either way, in steps of 15 %."""


@torch.no_grad()
def rescore(
    sae: SAE[Any],
    activations: torch.Tensor,
    score: Literal["cosine", "inner_product"],
    target_l0: float | None = None,
    scale: float | Literal["keep", "fit"] = "keep",
    progress: bool = True,
) -> SAE[Any]:
    """The same dictionary with another score, as a new inference SAE. The one passed in is left alone.

    Decoder norms are folded into the encoder first, which is exact, so that one threshold compares scores in units of the
    activations (a TopK that was not trained for that keeps its own units; it has no threshold). Then feature i scores
    `scale * length_i * cos(x_c, w_i) + b_enc_i`, times `||x_c||` for an inner product. `length_i` is the length of its
    column `W_enc[:, i]`, exp(b_i) in a cosine SAE, and in a per-feature one that times m^(a_i - mean a), with m the geometric
    mean of the centred norms, so that features keep their weight among each other. It is 1 when a standard SAE is read by
    cosine, whose lengths belong to the score that is given up.

    Args:
        sae: an SAE with a ReLU, JumpReLU, TopK or AbsTopK, or one that is saved as such (BatchTopK), of SAELens or of this
            package. In a training form or an inference form.
        activations: `[tokens, d_in]` as the SAE takes them, that scale and threshold are fitted on. Measure on others. Leave
            high-norm tokens out as in training: an inner product fires hundreds of features at one, out of everyone's L0.
        score: `"cosine"` gives exponent 0, `"inner_product"` SAELens' own class.
        target_l0: active features per token on these activations; None for what `sae` has. Not for TopK, which keeps k.
        scale: a number; `"keep"`, such that the features which `sae` activates keep their mean score before `b_enc`;
            or `"fit"`, the one with the highest fraction of variance explained, each at the target L0, of 21 from a quarter
            of that to four times that. (Experiment 29 tries 20 from 0.1 sqrt(d_in) to 5 mean ||x||, which can lie wholly
            below the best one.)
        progress: show a bar while scales are tried.

    Returns:
        `cosine_jumprelu`, `cosine_topk` or `cosine_abstopk`, or the same of SAELens without `cosine_`. A ReLU becomes a
        JumpReLU. `cfg.metadata.rescored` lists what was done, the last entry for this call.

    Raises:
        ValueError: an architecture that has no one score per feature, activations of another size, or a target L0 or scale
            that is out of range.
    """
    swap = _prepare(sae, activations, score)
    original = _measure(swap, activations)
    if swap.has_threshold:
        target_l0 = original.l0 if target_l0 is None else target_l0
    elif target_l0 is not None:
        raise ValueError(
            f"target_l0={target_l0} does not go with {swap.architecture!r}, which keeps its k={sae.cfg.k}."
        )

    def at(c: float) -> tuple[SAE[Any], Threshold | None]:
        candidate = swap.at(c)
        return candidate, None if target_l0 is None else fit_threshold(candidate, activations, target_l0)

    chosen = original.kept_scale if scale in ("keep", "fit") else float(scale)
    if not (math.isfinite(chosen) and chosen > 0):
        raise ValueError(
            f"scale={chosen} must be a positive number, 'keep' or 'fit'; for these two, some feature must fire."
        )
    if scale == "fit":
        bar = tqdm([chosen * r for r in RELATIVE_SCALES], desc="scale", leave=False, disable=not progress)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of scales that cannot reach the L0
            chosen = max(bar, key=lambda c: evaluate_reconstruction(at(c)[0], activations).fve)
    result, threshold = at(chosen)
    note = {
        "from_architecture": swap.source.cfg.architecture(),
        "score": score,
        "scale": chosen,
        "scale_chosen_by": scale if isinstance(scale, str) else "caller",
        "threshold": threshold and threshold.value,
        "l0": threshold.l0 if threshold else _l0(result, activations),
        "l0_before": original.l0,
        "tokens": len(activations),
        "decoder_norms_folded": swap.folded,
    }
    result.cfg.metadata.rescored = [*(result.cfg.metadata.rescored or []), note]
    if result.cfg.reshape_activations == "hook_z":
        result.turn_on_forward_pass_hook_z_reshaping()
    return result


@dataclass(frozen=True)
class _Swap:
    """An SAE and what becomes of it, up to the scale."""

    source: SAE[Any]
    architecture: str
    lengths: torch.Tensor  # of the source's columns
    kept_lengths: torch.Tensor  # of the result's at scale 1
    folded: bool

    @property
    def has_threshold(self) -> bool:
        return self.architecture.endswith("jumprelu")

    @property
    def norm_exponent(self) -> float:
        return 0.0 if self.architecture.startswith("cosine_") else 1.0

    def at(self, scale: float) -> SAE[Any]:
        """The rescored SAE for `[tokens, d_in]`, with its thresholds at 0."""
        state = self.source.state_dict()
        gain = scale * self.kept_lengths / self.lengths.clamp_min(NORM_FLOOR)
        state["W_enc"] = (state["W_enc"].to(gain.dtype) * gain).to(self.source.dtype).contiguous()
        state.pop("norm_exponent", None)
        config = self.source.cfg.to_dict()
        config["metadata"].pop("requires", None)
        if self.norm_exponent == 0:
            state["norm_exponent"] = gain.new_zeros(())
            config["metadata"]["requires"] = PLUGIN_NOTE
        if self.has_threshold:
            state["threshold"] = torch.zeros_like(gain)
        return _build({**config, "architecture": self.architecture}, state)


class _Original(NamedTuple):
    """What is measured on the SAE before the swap."""

    l0: float
    kept_scale: float


def _prepare(sae: SAE[Any], activations: torch.Tensor, score: str) -> _Swap:
    if score not in ("cosine", "inner_product"):
        raise ValueError(f"score={score!r} is none of 'cosine', 'inner_product'.")
    if activations.ndim != 2 or activations.shape[-1] != sae.cfg.d_in or len(activations) == 0:
        raise ValueError(
            f"activations of shape {tuple(activations.shape)} are not [tokens, d_in] with d_in={sae.cfg.d_in}; flatten "
            "batch and position, and heads if there are any."
        )
    source = _inference_copy(sae)
    selector = _selector(source.cfg.architecture())
    folded = getattr(source.cfg, "rescale_acts_by_decoder_norm", True)  # only a TopK has the option
    if folded:
        source.fold_W_dec_norm()
    lengths = source.W_enc.detach().to(wide(source.dtype)).norm(dim=0)
    keeps_lengths = score == "inner_product" or hasattr(source, "norm_exponent")
    kept = lengths if keeps_lengths else torch.ones_like(lengths)
    exponents = getattr(source, "norm_exponent", None)
    if exponents is not None and exponents.ndim:
        # without its own exponent a feature keeps its weight among the others at the mean log norm
        log_norm = torch.stack([centred_norm(source.process_sae_in(x)).log().sum() for x in activations.split(4096)])
        kept = kept * ((exponents.detach() - exponents.detach().mean()) * log_norm.sum() / len(activations)).exp()
    return _Swap(source, ("cosine_" if score == "cosine" else "") + RESCORED_AS[selector], lengths, kept, folded)


def _measure(swap: _Swap, activations: torch.Tensor) -> _Original:
    weights: Any = swap.source
    exponent = getattr(weights, "norm_exponent", swap.lengths.new_ones(())).expand_as(swap.lengths)
    active, before, after = 0, 0.0, 0.0
    for chunk in activations.split(most_at_once(weights)):
        x = chunk.to(weights.device)
        codes = weights.encode(x)
        token, feature = codes.nonzero(as_tuple=True)
        score = codes[token, feature].to(swap.lengths.dtype) - weights.b_enc[feature]
        norm = centred_norm(weights.process_sae_in(x)).squeeze(-1)[token]
        cosine = score / (norm ** exponent[feature] * swap.lengths[feature])
        active += len(token)
        before += score.abs().sum().item()
        after += (norm**swap.norm_exponent * swap.kept_lengths[feature] * cosine).abs().sum().item()
    return _Original(active / len(activations), before / after if after > 0 else math.nan)


def _selector(architecture: str) -> str:
    selector = architecture.removeprefix("per_feature_").removeprefix("cosine_")
    if selector not in RESCORED_AS:
        raise ValueError(
            f"Architecture {architecture!r} cannot be rescored: it does not select from one score per feature, or scores "
            f"otherwise. Those that can, with or without 'cosine_' or 'per_feature_cosine_': {', '.join(RESCORED_AS)}, and "
            "what is saved as one of them. Train the other score instead."
        )
    return selector


def _inference_copy(sae: SAE[Any]) -> SAE[Any]:
    """A copy that shares nothing with `sae`, in the form in which it would be saved."""
    if isinstance(sae, TrainingSAE):
        _selector(sae.cfg.get_inference_config_class().architecture())
    else:
        _selector(sae.cfg.architecture())
    return _ready(inference_copy(sae))


def _build(config: dict[str, Any], state: dict[str, torch.Tensor]) -> SAE[Any]:
    """What SAELens makes of a saved SAE, from memory."""
    if config["architecture"] not in SAE_CLASS_REGISTRY:
        raise ValueError(f"{config['architecture']!r} is not registered in SAELens; import saelens_cosine first.")

    def in_memory(path: Any, device: str, cfg_overrides: dict[str, Any] | None = None) -> Any:  # noqa: ARG001
        return config, state

    return _ready(SAE.load_from_disk("", device=config["device"], converter=in_memory))


def _ready(sae: SAE[Any]) -> SAE[Any]:
    sae.eval().turn_off_forward_pass_hook_z_reshaping()  # activations here are [tokens, d_in]
    return sae


def _l0(sae: SAE[Any], activations: torch.Tensor) -> float:
    active = sum(int((sae.encode(x.to(sae.device)) != 0).sum()) for x in activations.split(most_at_once(sae)))
    return active / len(activations)

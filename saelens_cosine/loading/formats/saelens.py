"""SAELens' own format. Its training checkpoints lie in the same files, and are told from what is saved for use."""

from __future__ import annotations

import copy
import math
from dataclasses import fields
from pathlib import Path
from typing import Any, cast

import torch
from sae_lens.constants import ACTIVATION_SCALER_CFG_FILENAME, SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME
from sae_lens.loading.pretrained_sae_loaders import handle_config_defaulting
from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY
from sae_lens.saes.sae import SAE, TrainingSAE
from sae_lens.training.activation_scaler import ActivationScaler

from saelens_cosine.loading.errors import CheckpointError
from saelens_cosine.loading.formats.format import Converted, Format
from saelens_cosine.loading.formats.saelens_config import check_config
from saelens_cosine.loading.reading import open_safetensors
from saelens_cosine.loading.tensor_file import read_config, refusing


def _nothing_to_convert(path: Path, device: str, dtype: torch.dtype | None) -> Converted:
    raise NotImplementedError("SAELens reads its own format.")


SAELENS = Format("saelens", (SAE_WEIGHTS_FILENAME, SAE_CFG_FILENAME), _nothing_to_convert)


def load_saelens(folder: Path, device: str = "cpu") -> SAE[Any]:
    """The SAE that SAELens saved in a folder.

    Raises:
        CheckpointError: a training checkpoint, an architecture that SAELens does not know, a config that is none, or weights
            that are damaged, not finite or do not fit it.
    """
    _check_architecture(folder)
    return _load(folder, device)


def inference_form(folder: str | Path, device: str = "cpu") -> SAE[Any]:
    """The SAE that a checkpoint of SAELens' training holds, as it would be saved had training ended there.

    Where training scales or whitens its activations, that is folded into the weights, as SAELens' trainer does at the end.
    `inference_form(checkpoint).save_model(folder)` writes it.

    Args:
        folder: with `cfg.json`, `sae_weights.safetensors` and, where there was a scale, `activation_scaler.json`.
        device: where the SAE shall be.

    Raises:
        CheckpointError: a file is damaged, or they do not fit each other.
    """
    sae = cast("TrainingSAE[Any]", _load(Path(folder), device, training=True))
    scaler = ActivationScaler()
    scale = Path(folder) / ACTIVATION_SCALER_CFG_FILENAME
    if scale.exists():
        factor = read_config(scale).get("scaling_factor")
        if factor is not None and not (type(factor) in (int, float) and 0 < factor < math.inf):
            raise CheckpointError(f"'scaling_factor' in {scale} is {factor!r}; expected a positive number.")
        with refusing(scale):
            scaler.load(scale)
    if scaler.scaling_factor is not None:
        sae.fold_activation_norm_scaling_factor(scaler.scaling_factor)
    if scaler.whitening is not None:
        whitening = scaler.whitening.to(sae.device)
        sae.fold_activation_whitening(whitening.mean, whitening.matrix, whitening.inverse_matrix)
    return inference_copy(sae)


def inference_copy(sae: SAE[Any]) -> SAE[Any]:
    """A copy that shares nothing with `sae`, in the form in which SAELens would save it."""
    state = {name: tensor.detach().clone() for name, tensor in sae.state_dict().items()}
    if isinstance(sae, TrainingSAE):
        sae.process_state_dict_for_saving_inference(state)
        config = sae.cfg.get_inference_sae_cfg_dict()
    else:
        sae.process_state_dict_for_saving(state)
        config = sae.cfg.to_dict()

    def in_memory(path: Any, device: str, cfg_overrides: dict[str, Any] | None = None) -> Any:  # noqa: ARG001
        return copy.deepcopy(config), state

    return SAE.load_from_disk("", device=config["device"], converter=in_memory)


def _load(folder: Path, device: str, training: bool = False) -> SAE[Any]:
    """SAELens' own loading, of files that were found to be what it takes them for."""
    expected = check_config(folder / SAE_CFG_FILENAME, training)
    weights = folder / SAE_WEIGHTS_FILENAME
    with open_safetensors(weights) as file:
        for name, record in file.records.items():
            if name in expected and expected[name].is_floating_point() and not record.dtype.is_floating_point:
                raise CheckpointError(f"{name!r} in {weights} is {record.dtype}; expected a floating dtype.")
    with refusing(weights, f"does not fit the {SAE_CFG_FILENAME} beside it"):
        sae: SAE[Any] = (TrainingSAE if training else SAE).load_from_disk(folder, device=device)
    for name, tensor in sae.state_dict().items():
        if tensor.is_floating_point() and tensor.numel() and not all(bound.isfinite() for bound in tensor.aminmax()):
            raise CheckpointError(f"{name!r} in {weights} has values that are not finite.")
    return sae


def _check_architecture(folder: Path) -> None:
    """Refuse a config of an unknown architecture, and one that is not of a saved SAE."""
    config = read_config(folder / SAE_CFG_FILENAME)
    name = str(config.get("architecture", "standard"))
    if name not in SAE_CLASS_REGISTRY and name not in SAE_TRAINING_CLASS_REGISTRY:
        raise CheckpointError(
            f"{folder} has architecture {name!r}, which SAELens does not know. If a package of yours registers it, import "
            "that first, and do this from Python."
        )
    with refusing(
        folder / SAE_CFG_FILENAME
    ):  # a config from before SAELens 6 becomes one of use, whatever fields it had
        training = name not in SAE_CLASS_REGISTRY or _training_fields(name) & set(handle_config_defaulting(config))
    if training:
        raise CheckpointError(
            f"{folder} is a training checkpoint ({name!r}): SAE.from_pretrained cannot load it, or not as what it is. Write "
            f'its inference form, saelens_cosine.loading.inference_form("{folder}").save_model("a new folder"), and use that.'
        )


def _training_fields(name: str) -> set[str]:
    """Fields that only the training config of an architecture has, when training and inference share its name."""
    if name not in SAE_TRAINING_CLASS_REGISTRY:
        return set()
    training, inference = SAE_TRAINING_CLASS_REGISTRY[name][1], SAE_CLASS_REGISTRY[name][1]
    return {field.name for field in fields(training)} - {field.name for field in fields(inference)}

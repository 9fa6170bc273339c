"""Small SAEs of the bundled model, saved, and settings under which an evaluation of them takes a moment."""

import dataclasses

from helpers import make_sae
from sae_lens import SAE

from saelens_cosine.experiments.evaluate.settings import EvaluationSettings

HOOK = "blocks.3.hook_resid_post"
SETTINGS = EvaluationSettings(
    evals=("tokens", "reconstruction", "dictionary", "matching"),
    tokens=600,
    max_norm_multiple=3.0,
    context_size=32,
    dataset="bundled",
)

TASKS = ("bundled:loop", "bundled:method")


def with_evals(*evals, **changes):
    return dataclasses.replace(SETTINGS, evals=evals, **changes)


def saved_sae(folder, seed=1, name="cosine_topk", bias=0.0):
    sae = make_sae(name, seed=seed, d_in=192, d_sae=64)
    sae.W_enc.data /= 14
    sae.b_dec.data.fill_(bias)
    sae.cfg.metadata.model_name, sae.cfg.metadata.hook_name = "bundled", HOOK
    sae.cfg.metadata.dataset_path = "bundled"
    sae.save_inference_model(folder)
    return str(folder)


def with_metadata(source, folder, **metadata):
    sae = SAE.load_from_disk(source)
    for name, value in metadata.items():
        sae.cfg.metadata[name] = value
    sae.save_model(folder)
    return str(folder)

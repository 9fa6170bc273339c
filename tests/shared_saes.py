"""SAEs and comparisons as they stand before they are shared, and `saelens-cosine share` on them."""

from pathlib import Path

import huggingface_hub
import pytest
from helpers import D_IN, make_sae
from sae_lens import SAE

from saelens_cosine.cli import main
from saelens_cosine.experiments.compare.results import ArmResult, Comparison, HookResult
from saelens_cosine.experiments.compare.settings import ComparisonSettings
from saelens_cosine.experiments.compare.tables import write_json
from saelens_cosine.metrics.reconstruction.by_norm import NormBin, Reconstruction

HOOK = "blocks.3.hook_resid_post"


@pytest.fixture
def logged_in(hub, monkeypatch):
    """The same Hub for huggingface_hub in this process, with a token."""
    constants = huggingface_hub.constants
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, hub.endpoint)
    settings = {"ENDPOINT": hub.endpoint, "HUGGINGFACE_CO_URL_TEMPLATE": template, "HF_HUB_OFFLINE": False}
    for name, value in {**settings, "HF_HUB_DISABLE_XET": True}.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setenv("HF_TOKEN", "hf_write")
    return hub


def save_sae(path: Path, name: str = "cosine_batchtopk", seed: int = 1, hook: str = HOOK) -> SAE:
    """A saved inference SAE with the metadata that training on a model leaves."""
    sae = make_sae(name, seed=seed)
    metadata = sae.cfg.metadata
    metadata.hook_name, metadata.model_name, metadata.dataset_path = hook, "gpt2-small", "NeelNanda/pile-10k"
    metadata.max_norm_multiple, metadata.high_norm_share_dropped = 10.0, 0.0125
    sae.save_inference_model(path)
    return SAE.load_from_disk(path)


def save_comparison(path: Path) -> None:
    """The folder of a comparison of two arms, the first of them SAELens' own architecture."""
    arms = []
    for i, name in enumerate(["inner_product_batchtopk", "cosine_batchtopk"]):
        save_sae(path / name / "seed0", name, seed=i + 1)
        by_norm = tuple(NormBin(float(q), q + 1.0, 25, 0.5 + q / 10 + i / 100) for q in range(4))
        measured = Reconstruction(tokens=100, fve=0.75 + i / 100, l0=3.25, dead_fraction=0.125, by_norm=by_norm)
        arms.append(ArmResult(name, 0, f"{name}/seed0", measured, 0.9 + i / 100, None, 1.0, (), "", HOOK, 3, 1e-3))
    settings = ComparisonSettings(arms=("inner_product_batchtopk", "cosine_batchtopk"), k=3, d_sae=13)
    write_json(Comparison(settings, (HookResult(HOOK, D_IN, 0.0125, 0.02),), tuple(arms)), path / "comparison.json")
    (path / "comparison.png").write_bytes(b"\x89PNG a picture")


def share(*arguments) -> int:
    return main(["share", "--quiet", *map(str, arguments)])

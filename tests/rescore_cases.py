"""What tests of rescoring and of fitted thresholds share."""

import torch
from helpers import (
    D_IN,
    SELECTORS,
    TRAINING,
    make_activations,
    make_sae,
    selector_of,
)
from sae_lens.registry import get_sae_class

STOCK = ["standard", "jumprelu", "topk", "abstopk", "batchtopk", "matryoshka_batchtopk"]
SCORED = [name for name in TRAINING if name.startswith(("inner_product_", "cosine_", "per_feature_cosine_"))]
SWAPPABLE = [*(name for name in SCORED if selector_of(name) in STOCK), *STOCK]
THRESHOLD = [name for name in SWAPPABLE if SELECTORS[selector_of(name)].saved_as in ("standard", "jumprelu")]
PER_TOKEN = [name for name in SWAPPABLE if name not in THRESHOLD]
X = make_activations(400, D_IN, seed=3)


def trained(name):
    """An inference SAE of SAELens or of this package, with parameters far from their starts."""
    sae = make_sae(name)
    if name == "jumprelu":
        sae.threshold.data.uniform_(0.2, 1.5)
    return sae


def build(architecture, **tensors):
    """An inference SAE with these tensors."""
    sae_class, config_class = get_sae_class(architecture)
    d_in, d_sae = tensors["W_enc"].shape
    options = {"k": tensors.pop("k")} if "k" in tensors else {}
    sae = sae_class(config_class(d_in=d_in, d_sae=d_sae, **options))
    sae.load_state_dict({name: torch.as_tensor(tensor) for name, tensor in tensors.items()})
    return sae


def note(sae):
    return sae.cfg.metadata.rescored[-1]


def l0(sae, x):
    return (sae.encode(x) != 0).sum().item() / len(x)


def by_hand(**changes):
    """Columns (3, 4) and (0, 2), decoder rows of norm 2 and 1, centre (1, 0), ReLU."""
    tensors = {
        "W_enc": torch.tensor([[3.0, 0.0], [4.0, 2.0]]),
        "b_enc": torch.tensor([0.5, 1.0]),
        "W_dec": torch.tensor([[0.0, 2.0], [1.0, 0.0]]),
        "b_dec": torch.tensor([1.0, 0.0]),
    }
    return build("standard", **{**tensors, **changes})

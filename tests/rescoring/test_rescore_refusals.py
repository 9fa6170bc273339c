"""What cannot be rescored is refused with the reason."""

import pytest
from helpers import (
    D_IN,
    D_SAE,
    TRAINING,
    make_sae,
)
from rescore_cases import SWAPPABLE, X, l0, trained
from sae_lens.registry import get_sae_class, get_sae_training_class

from saelens_cosine.rescoring import rescore


@pytest.mark.parametrize("name", [*(name for name in TRAINING if name not in SWAPPABLE), "gated", "matching_pursuit"])
def test_architectures_without_one_score(name):
    if name in TRAINING:
        sae = make_sae(name)
    else:
        sae_class, config_class = get_sae_training_class(name)
        sae = sae_class(config_class(d_in=D_IN, d_sae=D_SAE))
    with pytest.raises(ValueError, match="cannot be rescored.*standard, jumprelu, topk, abstopk"):
        rescore(sae, X, "cosine")


def test_transcoder():
    sae_class, config_class = get_sae_class("transcoder")
    config = config_class(d_in=D_IN, d_out=D_IN, d_sae=D_SAE, apply_b_dec_to_input=False)
    with pytest.raises(ValueError, match="'transcoder' cannot be rescored"):
        rescore(sae_class(config), X, "cosine")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"score": "euclidean"}, "'euclidean' is none of 'cosine', 'inner_product'"),
        ({"target_l0": 0.0}, "target_l0=0.0 must be above 0 and below d_sae=13"),
        ({"target_l0": 13}, "below d_sae=13"),
        ({"scale": 0.0}, "scale=0.0 must be a positive number"),
        ({"activations": X[:, :5]}, r"\(400, 5\).*d_in=7"),
        ({"activations": X[None]}, r"\(1, 400, 7\).*flatten batch and position"),
        ({"activations": X[:0]}, r"\(0, 7\)"),
    ],
)
def test_impossible_requests(options, message):
    with pytest.raises(ValueError, match=message):
        rescore(trained("standard"), **{"activations": X, "score": "cosine", **options})


def test_an_sae_that_never_fires():
    sae = trained("jumprelu")
    sae.threshold.data.fill_(1e9)
    with pytest.raises(ValueError, match="some feature must fire"):
        rescore(sae, X, "cosine")
    assert l0(rescore(sae, X, "cosine", target_l0=2.0, scale=5.0), X) == 2.0


def test_normalisation_that_a_cosine_cannot_have():
    sae = trained("standard")
    sae.cfg.normalize_activations = "layer_norm"
    with pytest.raises(ValueError, match="normalize_activations='layer_norm' does not go with"):
        rescore(sae, X, "cosine")

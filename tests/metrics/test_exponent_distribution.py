import dataclasses
import json
import math

import pytest
import torch
from helpers import TRAINING, make_sae, save_inference
from sae_lens import StandardSAE, StandardSAEConfig

from saelens_cosine.metrics.norms.exponents import exponent_distribution, norm_exponents


def with_exponents(values):
    sae = make_sae("per_feature_cosine_batchtopk", d_sae=len(values))
    sae.norm_exponent.data = torch.tensor(values)
    return sae


def test_figures_by_hand():
    sae = with_exponents([-0.3, 0.0, 0.04, 0.1, 0.5])
    result = exponent_distribution(sae)
    every = result.every
    assert (every.features, every.minimum, every.median, every.maximum) == pytest.approx((5, -0.3, 0.04, 0.5))
    assert every.mean == pytest.approx(0.068)
    squares = 0.368**2 + 0.068**2 + 0.028**2 + 0.032**2 + 0.432**2
    assert every.std == pytest.approx(math.sqrt(squares / 5))
    assert (every.p5, every.p95) == pytest.approx((-0.24, 0.42))  # a fifth of the way to the next
    assert every.shares == pytest.approx((0.4, 0.2, 0.2, 0.2))  # |a|: 0, 0.04; 0.1; 0.3; 0.5
    assert every.negative == pytest.approx(0.2)
    assert not result.shared
    assert result.alive is None
    assert result.firing_rate_correlation is None
    assert (len(result.histogram_edges), len(result.histogram), sum(result.histogram)) == (51, 50, 5)
    assert (result.histogram[0], result.histogram[-1]) == (1, 1)
    assert json.loads(json.dumps(dataclasses.asdict(result)))["every"]["features"] == 5


def test_dead_features_stay_out_of_the_correlation():
    sae = with_exponents([0.1, 0.2, 0.3, 0.4, 0.0])
    # ranks of a 1 2 3 4, of the rate 1 2 4 3: Spearman's is 1 - 6 * 2 / (4 * 15) = 0.8. The dead feature would raise it
    result = exponent_distribution(sae, torch.tensor([0.001, 0.01, 0.2, 0.1, 0.0]))
    assert result.firing_rate_correlation == pytest.approx(0.8)
    assert result.alive.features == 4
    assert result.alive.mean == pytest.approx(0.25)
    assert result.every.mean == pytest.approx(0.2)
    flat = exponent_distribution(sae, torch.tensor([0.1, 0.1, 0.1, 0.1, 0.0]))
    assert flat.firing_rate_correlation is None
    silent = exponent_distribution(sae, torch.zeros(5))
    assert silent.alive.features == 0
    assert math.isnan(silent.alive.mean)
    assert silent.firing_rate_correlation is None


def test_a_shared_exponent_is_one_number():
    result = exponent_distribution(make_sae("cosine_topk"), torch.rand(13))
    assert result.shared
    assert result.every.features == 1
    assert (result.every.mean, result.every.std) == pytest.approx((0.7, 0))
    assert result.alive is None
    assert result.firing_rate_correlation is None


@pytest.mark.parametrize("name", TRAINING)
def test_training_and_saved_form_have_the_same(name, tmp_path):
    sae = make_sae(name)
    trained, saved = norm_exponents(sae), norm_exponents(save_inference(sae, tmp_path))
    if "cosine" not in name:
        assert trained is saved is None
        assert exponent_distribution(sae) is None
    else:
        assert torch.equal(trained, saved)
        assert trained.shape == ((13,) if name.startswith("per_feature") else ())


def test_what_features_share_and_multipliers_are_in_the_exponents():
    sae = make_sae("per_feature_cosine_topk", exponent_sharing="base_delta", norm_exponent_lr_multiplier=10.0)
    sae.norm_exponent.data.fill_(0.01)
    sae.norm_exponent_base.data.fill_(0.02)
    assert norm_exponents(sae) == pytest.approx(torch.full((13,), 0.3))


def test_another_saes_exponent_is_none_and_other_rates_are_refused():
    assert exponent_distribution(StandardSAE(StandardSAEConfig(d_in=3, d_sae=4))) is None
    with pytest.raises(ValueError, match="d_sae=13"):
        exponent_distribution(make_sae("cosine_topk"), torch.zeros(4))

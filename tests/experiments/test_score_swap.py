"""One dictionary under two scores at one L0: small cases by hand, and a planted concept that only one of the scores shows."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from helpers import D_IN, assert_same_function, make_activations, make_sae, save_inference
from planted_concept import STRENGTH, best_by_inner_product, concept, identity_sae, sample_of
from sae_lens import JumpReLUSAE, JumpReLUSAEConfig, TopKSAE, TopKSAEConfig
from scipy.stats import norm

from saelens_cosine.experiments.evaluate.evals.of_sae.score_swap import score_swap
from saelens_cosine.metrics.reconstruction.by_norm import evaluate_reconstruction
from saelens_cosine.rescoring import RELATIVE_SCALES, rescore

# features are the two axes; lengths 10, 1, 1. Inner products 8, 6; 0.28, 0.96; 0, 1, cosines 0.8, 0.6; 0.28, 0.96; 0, 1
THREE = torch.tensor([[8.0, 6.0], [0.28, 0.96], [0.0, 1.0]])


def axes(d, threshold):
    """A JumpReLU SAE whose feature i is dimension i."""
    sae = JumpReLUSAE(JumpReLUSAEConfig(d_in=d, d_sae=d))
    sae.load_state_dict({**identity_sae(d).state_dict(), "threshold": torch.full((d,), threshold)})
    return sae.eval()


def swap(sae, fit_on, measured_on=None, **options):
    fit_on, measured_on = (
        sample_of(x, range(len(x))) for x in (fit_on, fit_on if measured_on is None else measured_on)
    )
    return score_swap(sae, fit_on, measured_on, progress=False, **options)


def fve(x, x_hat):
    x, x_hat = np.asarray(x, dtype=np.float64), np.asarray(x_hat, dtype=np.float64)
    return 1 - (x - x_hat).var(axis=0).sum() / x.var(axis=0).sum()


def test_where_norms_vary_the_scores_choose_other_tokens():
    # three codes of three tokens at threshold 0.97: 8, 6 and 1. The second token has none
    result = swap(axes(2, 0.97), THREE)
    own, cosine, inner = result.readings
    assert [reading.score for reading in result.readings] == ["own", "cosine", "inner_product"]
    assert (result.fitted_on_tokens, result.target_l0) == (3, 1)
    assert [reading.reconstruction.l0 for reading in result.readings] == [1, 1, 1]
    # errors (0, 0), (0.28, 0.96), (0, 0): variance 1/3 - 1/9 = 2/9; variance of the tokens 34 - 2.76^2 - 2.6533^2 = 19.342
    assert own.reconstruction.fve == pytest.approx(1 - 2 / 9 / 19.34222, rel=1e-6)
    assert inner.reconstruction.fve == pytest.approx(own.reconstruction.fve, rel=1e-6)
    # the three largest cosines are one of each token, 0.8, 0.96 and 1. Features that were active have codes 8, 6, 1 and
    # cosines 0.8, 0.6, 1: 15 / 2.4 = 6.25 keeps their mean. So codes are 5, 6 and 6.25
    assert cosine.scale == pytest.approx(6.25)
    assert inner.scale == pytest.approx(1)
    assert 0.6 * 6.25 <= cosine.threshold < 5
    assert 0.96 <= inner.threshold < 1
    assert cosine.reconstruction.fve == pytest.approx(fve(THREE, [[5, 0], [0, 6], [0, 6.25]]), rel=1e-5)
    assert cosine.reconstruction.fve < 0 < own.reconstruction.fve
    assert (own.scale, own.threshold, own.probing) == (None, None, None)
    assert [reading.architecture for reading in result.readings] == ["jumprelu", "cosine_jumprelu", "jumprelu"]
    assert json.loads(json.dumps(dataclasses.asdict(result), allow_nan=False))["readings"][1]["score"] == "cosine"


def test_a_fitted_scale_is_the_best_of_its_grid():
    result = swap(axes(2, 0.97), THREE, scale="fit")
    _, cosine, inner = result.readings
    by_scale = {c: fve(THREE, [[0.8 * c, 0], [0, 0.96 * c], [0, c]]) for c in (6.25 * r for r in RELATIVE_SCALES)}
    best = max(by_scale, key=by_scale.get)
    assert best != 6.25
    assert cosine.scale == pytest.approx(best)
    assert cosine.reconstruction.fve == pytest.approx(by_scale[best], rel=1e-5)
    assert inner.scale == pytest.approx(1)  # codes are the tokens' own coordinates
    assert [reading.reconstruction.l0 for reading in result.readings] == [1, 1, 1]


def test_longer_tokens_than_those_of_the_fit_have_more_codes_by_inner_product_only():
    x = make_activations(500, D_IN, seed=1, spread=0.5)
    own, cosine, inner = swap(axes(D_IN, 1.2), x).readings
    wanted = (x > 1.2).sum().item() / 500
    assert [own.reconstruction.l0, cosine.reconstruction.l0, inner.reconstruction.l0] == pytest.approx([wanted] * 3)
    own, cosine, inner = swap(axes(D_IN, 1.2), x, 50 * x).readings
    assert own.reconstruction.l0 == inner.reconstruction.l0 == (50 * x > 1.2).sum().item() / 500 > 1.5 * wanted
    assert cosine.reconstruction.l0 == pytest.approx(wanted, abs=0.005)


@pytest.mark.parametrize("name, score", [
    ("cosine_batchtopk", 1), ("cosine_topk", 1), ("cosine_abstopk", 1),
    ("inner_product_batchtopk", 2), ("inner_product_topk", 2),
])  # fmt: skip
def test_an_sae_read_by_its_own_kind_of_score_is_itself(name, score, tmp_path):
    sae = make_sae(name)
    if score == 1:
        sae.norm_exponent.data.zero_()  # make_sae's is 0.7, which is neither
    sae = save_inference(sae, tmp_path)
    before = {key: tensor.clone() for key, tensor in sae.state_dict().items()}
    x = make_activations(400, D_IN, spread=0.7)
    readings = swap(sae, x).readings
    own, same, other = readings[0], readings[score], readings[3 - score]
    assert same.architecture == own.architecture != other.architecture
    assert same.scale == pytest.approx(1, rel=1e-5)
    assert same.reconstruction.l0 == own.reconstruction.l0
    assert same.reconstruction.fve == pytest.approx(own.reconstruction.fve, rel=1e-5)
    assert same.reconstruction.dead_fraction == own.reconstruction.dead_fraction
    assert other.reconstruction.fve != pytest.approx(own.reconstruction.fve, abs=0.01)
    assert all(torch.equal(before[key], tensor) for key, tensor in sae.state_dict().items())
    assert sae.cfg.metadata.rescored is None
    assert_same_function(rescore(sae, x, ("cosine", "inner_product")[score - 1], progress=False), sae, x, 1e-5)


def test_a_relu_has_a_threshold_of_zero():
    own, _, inner = swap(identity_sae(D_IN), make_activations(400, D_IN)).readings
    assert (own.architecture, inner.architecture) == ("standard", "jumprelu")
    assert inner.reconstruction.fve == pytest.approx(own.reconstruction.fve, rel=1e-5)
    assert inner.reconstruction.l0 == own.reconstruction.l0


def test_ties_may_miss_the_l0_that_was_wanted():
    # thresholds of their own: two codes, 1 and 2, of feature 0. With one threshold 2, 1 and 1 are left to choose two from
    sae = axes(2, 0.5)
    sae.threshold.data[1] = 1.5
    own, _, inner = (result := swap(sae, torch.tensor([[1.0, 1.0], [2.0, 0.0]]))).readings
    assert result.target_l0 == own.reconstruction.l0 == 1
    assert inner.reconstruction.l0 == 1 / 2


def test_exponents_of_their_own_are_in_own_alone_and_tokens_of_the_fit_are_not_measured(tmp_path):
    sae = save_inference(make_sae("per_feature_cosine_batchtopk"), tmp_path)
    fit_on, x = make_activations(300, D_IN, seed=1), make_activations(100, D_IN, seed=2)
    result = swap(sae, fit_on, x)
    assert (result.fitted_on_tokens, [reading.reconstruction.tokens for reading in result.readings]) == (300, [100] * 3)
    assert result.target_l0 == pytest.approx((sae.encode(fit_on) != 0).sum().item() / 300)
    assert result.readings[0].reconstruction == evaluate_reconstruction(sae, x)
    for reading in result.readings[1:]:
        by_hand = rescore(sae, fit_on, reading.score, progress=False)
        assert reading.threshold == by_hand.threshold[0].item()
        assert reading.reconstruction == evaluate_reconstruction(by_hand, x)


def test_a_topk_has_no_threshold_and_keeps_its_k():
    # encoder columns of length 1 and 3. Inner products 2, 3 and 1, 6, so feature 1 wins both tokens with codes 3 and 6
    sae = TopKSAE(TopKSAEConfig(d_in=2, d_sae=2, k=1))
    weights = {"W_enc": torch.diag(torch.tensor([1.0, 3.0])), "W_dec": torch.eye(2)}
    sae.load_state_dict({**sae.state_dict(), **weights, "b_enc": torch.zeros(2), "b_dec": torch.zeros(2)})
    x = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
    result = swap(sae.eval(), x)
    own, cosine, inner = result.readings
    assert result.target_l0 is None
    assert [reading.threshold for reading in result.readings] == [None] * 3
    assert [reading.reconstruction.l0 for reading in result.readings] == [1, 1, 1]
    assert [reading.architecture for reading in result.readings] == ["topk", "cosine_topk", "topk"]
    assert own.reconstruction.fve == pytest.approx(fve(x, [[0, 3], [0, 6]]))
    assert inner.reconstruction.fve == pytest.approx(fve(x, [[0, 3], [0, 6]]))
    # by cosine, 2 / sqrt(5) and 1 / sqrt(5), each token has the axis it is nearer to; 3 + 6 over 3 / sqrt(5) is the scale
    assert cosine.scale == pytest.approx(3 * math.sqrt(5))
    assert cosine.reconstruction.fve == pytest.approx(fve(x, [[6, 0], [0, 6]]))


def test_a_cosine_shows_the_concept_that_an_inner_product_hides():
    x, truth = concept(3000)
    result = swap(axes(3, 0.0), x, labels=truth, ks=(1,))
    own, cosine, inner = (reading.probing.scale_free[0].accuracy for reading in result.readings)
    assert cosine == pytest.approx(norm.cdf(STRENGTH / 2), abs=0.02)  # two normal classes, 2 sd apart
    best = best_by_inner_product()
    assert best < norm.cdf(STRENGTH / 2) - 0.15
    assert 0.5 < own < best + 0.02
    assert own == pytest.approx(inner, abs=0.01)


def test_arguments_of_the_probe_are_passed_on():
    x, truth = concept(100)
    result = swap(axes(3, 0.0), x, labels=truth, ks=(1, 2), splits=4, pooling="last", seed=3)
    for reading in result.readings:
        assert [(probe.k, len(probe.accuracies)) for probe in reading.probing.canonical] == [(1, 4), (2, 4)]
        assert (reading.probing.pooling, reading.probing.contexts) == ("last", 100)
    json.dumps(dataclasses.asdict(result))


def test_what_cannot_be_swapped_is_refused(tmp_path):
    x = make_activations(50, D_IN)
    with pytest.raises(ValueError, match="'cosine_gated' cannot be rescored"):
        swap(save_inference(make_sae("cosine_gated"), tmp_path), x)
    with pytest.raises(ValueError, match="scale=nan"):
        swap(axes(D_IN, 1e9), x)  # nothing fires
    with pytest.raises(ValueError, match="context numbers"):
        swap(axes(D_IN, 1.0), x, labels=np.arange(20) % 2)
    with pytest.raises(ValueError, match="not \\[tokens, d_in\\]"):
        swap(axes(D_IN, 1.0), x[:, :3], x)

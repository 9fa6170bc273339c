import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from scipy import sparse

from saelens_cosine.metrics.norms.norm_detectors import norm_detectors


def codes_of(firing):
    """`[tokens, features]` booleans -> codes."""
    return sparse.csr_array(firing.astype(np.float32) * 2.5)


def test_shares_by_hand():
    # norms 1 to 8: quartile edges 2.75, 4.5, 6.25, two tokens in each
    norms = torch.arange(1.0, 9.0)
    fires = np.zeros((8, 3), dtype=bool)
    fires[:, 0] = True  # everywhere
    fires[[6, 7], 1] = True  # in the top quartile only
    fires[[0, 7], 2] = True
    result = norm_detectors(codes_of(fires), norms, min_firings=2)
    assert result.edges == pytest.approx((2.75, 4.5, 6.25))
    assert result.quartile_tokens == (2, 2, 2, 2)
    assert result.weighted_shares == pytest.approx((3 / 12, 2 / 12, 2 / 12, 5 / 12))  # of 8 + 2 + 2 firings
    # per feature (1/4, 1/4, 1/4, 1/4), (0, 0, 0, 1), (1/2, 0, 0, 1/2)
    assert result.median_shares == pytest.approx((0.25, 0, 0, 0.5))
    assert result.top_quartile_percentiles == pytest.approx((0.275, 0.375, 0.5, 0.75, 0.95))
    assert result.detectors == pytest.approx(1 / 3)
    assert result.weighted_mean_norm == pytest.approx((36 + 15 + 9) / 12)
    assert result.median_mean_norm == pytest.approx(4.5)  # of 4.5, 7.5, 4.5
    assert (result.mean_norm, result.median_norm) == pytest.approx((4.5, 4.5))
    assert result.largest_norms_share == pytest.approx(3 / 12)  # the token of norm 8
    assert json.loads(json.dumps(dataclasses.asdict(result)))["counted"] == 3


def test_a_norm_on_an_edge_belongs_above_it():
    # norms 1 to 5: edges 2, 3, 4
    result = norm_detectors(codes_of(np.ones((5, 1), dtype=bool)), torch.arange(1.0, 6.0), min_firings=1)
    assert result.quartile_tokens == (1, 1, 1, 2)
    assert result.median_shares == pytest.approx((0.2, 0.2, 0.2, 0.4))


def test_a_set_of_features_and_its_rare_ones():
    norms = torch.arange(1.0, 9.0)
    fires = np.zeros((8, 3), dtype=bool)
    fires[:, 0] = fires[[6, 7], 1] = fires[0, 2] = True
    result = norm_detectors(codes_of(fires), norms, features=[1, 2], min_firings=2)
    assert (result.features, result.counted) == (2, 1)
    assert result.median_shares == (0, 0, 0, 1)
    assert result.weighted_shares == pytest.approx((1 / 3, 0, 0, 2 / 3))  # the rare one counts here
    silent = norm_detectors(codes_of(fires), norms, features=[])
    assert (silent.features, silent.counted) == (0, 0)
    fields = (*silent.weighted_shares, *silent.median_shares, *silent.top_quartile_percentiles, silent.detectors)
    assert all(map(math.isnan, (*fields, silent.median_mean_norm, silent.weighted_mean_norm)))
    assert math.isnan(silent.largest_norms_share)


def test_one_sink_decides_the_papers_form_and_not_the_median():
    # 400 features that fire on 5 % of the tokens whatever their norm, and all together on 10 sinks of 1,000 times the norm
    rng = np.random.default_rng(0)
    fires = rng.random((2000, 400)) < 0.05
    fires[:10] = True
    norms = torch.from_numpy(np.where(np.arange(2000) < 10, 1000.0, rng.uniform(0.9, 1.1, 2000)))
    result = norm_detectors(codes_of(fires), norms)
    sinks = 10 / (10 + 0.05 * 1990)  # share of a feature's firings, and of all, that are on sinks: 0.091
    expected = sinks + (1 - sinks) * 490 / 1990  # the other 490 tokens of the top quartile: 0.315
    assert result.median_shares[3] == pytest.approx(expected, abs=0.01)
    assert result.weighted_mean_norm == pytest.approx(1000 * sinks + 1, rel=0.02)
    # the heaviest 1 % are the 10 sinks and 10 ordinary tokens
    assert result.largest_norms_share == pytest.approx(sinks + 0.005 * (1 - sinks), abs=0.002)
    fires = np.concatenate([fires, rng.random((2000, 20)) < 0.01], axis=1)
    fires[:10, 400:] = False
    # with 20,000 silent features that fire on sinks alone, the paper's form is theirs; the median feature has not moved
    fires = np.concatenate([fires, np.zeros((2000, 390), dtype=bool)], axis=1)
    fires[:10, 420:] = True
    crowded = norm_detectors(codes_of(fires), norms, min_firings=11)
    assert crowded.median_shares[3] == pytest.approx(expected, abs=0.02)
    assert crowded.weighted_shares[3] > result.weighted_shares[3] + 0.04


def test_planted_detectors_are_found():
    rng = np.random.default_rng(1)
    norms = torch.from_numpy(np.exp(rng.normal(size=4000)))
    top = norms.numpy() > np.quantile(norms, 0.75)
    fires = rng.random((4000, 50)) < 0.2
    fires[:, :20] &= top[:, None]
    result = norm_detectors(codes_of(fires), norms)
    assert result.detectors == pytest.approx(0.4)
    assert norm_detectors(codes_of(fires), norms, features=range(20)).median_shares == (0, 0, 0, 1)
    others = norm_detectors(codes_of(fires), norms, features=range(20, 50))
    assert others.detectors == 0
    assert others.median_shares == pytest.approx((0.25, 0.25, 0.25, 0.25), abs=0.02)


def test_norms_of_other_tokens_are_refused():
    with pytest.raises(ValueError, match="8 tokens"):
        norm_detectors(codes_of(np.ones((8, 2), dtype=bool)), torch.ones(7))

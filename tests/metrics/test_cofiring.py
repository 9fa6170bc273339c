import dataclasses
import json
import math

import numpy as np
import pytest
from scipy import sparse

from saelens_cosine.metrics import token_gram
from saelens_cosine.metrics.dictionary.cofiring import cofiring


def csr(dense):
    return sparse.csr_array(np.asarray(dense, dtype=np.float32))


def test_pairs_by_hand():
    # 8 tokens; 0 fires on 0-3, 1 on 0-2 and 7, 2 on 2-5, 3 never
    codes = np.zeros((8, 4))
    codes[[0, 1, 2, 3], 0] = codes[[0, 1, 2, 7], 1] = codes[[2, 3, 4, 5], 2] = 0.5
    result = cofiring(csr(codes), min_joint_firings=2)
    assert (result.tokens, result.alive, result.counted_pairs) == (8, 3, 2)
    first, second = result.top
    # together on 3 tokens where 4 * 4 / 8 = 2 are expected
    assert (first.feature, first.other, first.joint_firings, first.lift) == (0, 1, 3, 1.5)
    assert first.pmi == pytest.approx(math.log(1.5))
    assert first.normalised_pmi == pytest.approx(math.log(1.5) / math.log(8 / 3))
    assert (second.feature, second.other, second.joint_firings, second.lift) == (0, 2, 2, 1.0)
    assert second.normalised_pmi == 0
    assert result.pairs_above_lift == ((1.0, 1), (2.0, 0), (10.0, 0), (100.0, 0))
    # codes per token 2, 2, 3, 2, 1, 1, 0, 1: 1 + 1 + 3 + 1 pairs on 8 tokens; three pairs of rates 1/2
    assert result.pairs_per_token == pytest.approx(6 / 8)
    assert result.expected_pairs_per_token == pytest.approx(3 / 4)
    assert result.lift == pytest.approx(1.0)
    assert json.loads(json.dumps(dataclasses.asdict(result)))["top"][0]["other"] == 1


def test_planted_pairs_come_first_and_independent_features_have_lift_one(monkeypatch):
    rng = np.random.default_rng(0)
    fires = rng.random((20_000, 60)) < 0.05
    fires[:, 41] = fires[:, 7]  # never apart
    fires[:, 50] = fires[:, 3] & (rng.random(20_000) < 0.5)  # only where 3 fires
    for block in (60 * 11, 2**22):
        monkeypatch.setattr(token_gram, "BLOCK_ENTRIES", block)
        result = cofiring(csr(fires), top=2)
        assert [(pair.feature, pair.other) for pair in result.top] == [(7, 41), (3, 50)]
        assert result.top[0].normalised_pmi == pytest.approx(1)
        assert result.top[0].lift == pytest.approx(20_000 / fires[:, 7].sum())
        assert result.top[1].lift == pytest.approx(20_000 / fires[:, 3].sum())
        joint = fires.T.astype(float) @ fires
        n = fires.sum(axis=0)
        pairs = np.triu_indices(60, 1)
        lift = (joint * 20_000 / np.outer(n, n))[pairs]
        assert result.counted_pairs == int((joint[pairs] >= 10).sum())
        counted = joint[pairs] >= 10
        assert [count for _, count in result.pairs_above_lift] == [
            int((lift[counted] > b).sum()) for b in (1, 2, 10, 100)
        ]
        assert result.pairs_per_token == pytest.approx(joint[pairs].sum() / 20_000)
        assert result.lift == pytest.approx(joint[pairs].sum() * 20_000 / np.outer(n, n)[pairs].sum())


def test_tokens_with_many_codes_make_pairs():
    # 100 features on 1 % of the tokens each, and all of them on 1 token in 100
    rng = np.random.default_rng(1)
    fires = rng.random((10_000, 100)) < 0.01
    quiet = cofiring(csr(fires))
    fires[:100] = True
    sinks = cofiring(csr(fires))
    assert quiet.lift == pytest.approx(1, abs=0.05)
    # rates 0.02; 100 codes on 1 % of the tokens and 1 on the others: about 49.5 + 0.5 pairs against 4950 * 0.0004 = 1.98
    assert sinks.lift == pytest.approx(50 / 1.98, rel=0.05)


def test_the_most_frequent_of_equal_pairs_comes_first_and_silence_gives_nan():
    fires = np.zeros((100, 6), dtype=bool)
    fires[:10, 0:2] = fires[20:50, 2:4] = fires[60:70, 4:6] = True
    result = cofiring(csr(fires), min_joint_firings=1)
    assert [(p.feature, p.other) for p in result.top] == [(2, 3), (0, 1), (4, 5)]
    silent = cofiring(csr(np.zeros((5, 3))))
    assert (silent.alive, silent.counted_pairs, silent.top) == (0, 0, ())
    assert math.isnan(silent.lift)
    everywhere = cofiring(csr(np.ones((20, 2))))
    assert (everywhere.top[0].lift, everywhere.top[0].pmi, everywhere.top[0].normalised_pmi) == (1, 0, 1)

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from scipy import sparse
from test_reconstruction import Fixed

from saelens_cosine.metrics import token_gram
from saelens_cosine.metrics.codes import sparse_codes
from saelens_cosine.metrics.dictionary.matching import match_codes
from saelens_cosine.metrics.token_gram import TokenGram, firings


def csr(columns, tokens=None):
    """Columns given as lists of codes, or as {token: code} with a number of tokens."""
    if tokens is not None:
        columns = [[column.get(t, 0.0) for t in range(tokens)] for column in columns]
    return sparse.csr_array(np.array(columns, dtype=np.float32).T)


def planted(tokens=3000, n_a=40, n_b=50, seed=0):
    """Random codes; features 0 to 9 of both are the same at twice the size, 10 to 19 the same on 80 % of the tokens."""
    rng = np.random.default_rng(seed)
    a, b = (rng.exponential(size=(tokens, n)) * (rng.random((tokens, n)) < 0.05) for n in (n_a, n_b))
    b[:, :10] = 2 * a[:, :10]
    b[:, 10:20] = np.where(rng.random((tokens, 10)) < 0.8, a[:, 10:20], b[:, 10:20])
    crowd = rng.random(tokens) < 0.02  # sinks: everything fires, as in an inner-product SAE
    a[crowd] += rng.random((crowd.sum(), n_a))
    b[crowd] += rng.random((crowd.sum(), n_b))
    return a.astype(np.float32), b.astype(np.float32)


def test_a_small_case_by_hand():
    # feature 0 of A is feature 1 of B at three times the size; feature 1 of A fires on the two tokens where B's 0 does, and
    # on two more; feature 2 of A never meets a feature of B; B's 2 is dead
    a = csr([{0: 1, 1: 2, 2: 3}, {3: 1, 4: 1, 5: 1, 6: 1}, {7: 1, 8: 2}], 10)
    b = csr([{3: 1, 4: 1}, {0: 3, 1: 6, 2: 9}, {}], 10)
    W_a = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
    W_b = torch.tensor([[3.0, 4.0], [5.0, 0.0], [0.0, 1.0]])
    result = match_codes(a, b, W_a, W_b, min_joint_firings=2, pairs="all")
    # 0 and 1 on 10 tokens: means 0.4 and 0.2, covariance 0.2 - 0.08, variances 0.24 and 0.16
    phi = 0.12 / math.sqrt(0.24 * 0.16)  # 0.612
    pairs = result.a.pairs
    assert pairs.features == (0, 1)
    assert pairs.partners == (1, 0)
    assert pairs.correlations == pytest.approx((1.0, phi))
    assert pairs.decoder_cosines == pytest.approx((1.0, 0.8))  # (0, 2) and (3, 4)
    assert pairs.joint_firings == (3, 2)
    assert pairs.mutual == (True, True)
    assert (result.a.alive, result.a.strong, result.a.weak, result.a.unmatched) == (3, 1, 1, 1)
    assert (result.b.alive, result.b.strong, result.b.weak, result.b.unmatched) == (2, 1, 1, 0)
    assert (result.a.matched_features, result.a.unique_features) == ((0,), (1, 2))
    assert (result.b.matched_features, result.b.unique_features) == ((1,), (0,))
    assert result.a.matched == result.a.mutual == 1
    assert result.a.strong_decoder_cosine == pytest.approx(1.0)  # not of the weak one
    assert (result.a.matched_correlation, result.a.matched_decoder_cosine) == pytest.approx((1.0, 1.0))
    assert result.tokens == 10


def test_agrees_with_numpy_in_any_blocks(monkeypatch):
    a, b = planted()
    W = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    for block in (50 * 7, 2**22):
        monkeypatch.setattr(token_gram, "BLOCK_ENTRIES", block)
        result = match_codes(sparse.csr_array(a), sparse.csr_array(b), W[:40], W, min_joint_firings=5, pairs="all")
        correlation = np.corrcoef(a.T.astype(np.float64), b.T.astype(np.float64))[:40, 40:]
        joint = (a > 0).T.astype(int) @ (b > 0)
        correlation[joint < 5] = -np.inf
        for found, expected, joint_firings in ((result.a, correlation, joint), (result.b, correlation.T, joint.T)):
            order = np.argsort(-expected.max(axis=1))
            partners = expected.argmax(axis=1)
            assert found.pairs.features == tuple(order)
            assert found.pairs.partners == tuple(partners[order])
            assert found.pairs.correlations == pytest.approx(
                expected.max(axis=1)[order], abs=1e-6
            )  # float32 sums on crowded tokens
            assert found.pairs.joint_firings == tuple(joint_firings[order, partners[order]])
            assert found.pairs.mutual == tuple(expected.T.argmax(axis=1)[partners[order]] == order)
            bounds = [(expected.max(axis=1) >= bound).sum() for bound in (0.7, 0.3)]
            assert (found.strong, found.weak) == (bounds[0], bounds[1] - bounds[0])
            assert found.unmatched == len(expected) - bounds[1] > 0
        assert set(range(20)) <= set(result.a.matched_features)  # what was planted, at the same places of W


def test_sums_over_tokens_with_and_without_crowded_ones(monkeypatch):
    monkeypatch.setattr(token_gram, "BLOCK_ENTRIES", 50 * 7)
    a, b = (sparse.csr_array(x) for x in planted())
    dense = np.diff(a.indptr) * np.diff(b.indptr) * token_gram.SPARSE_COST > 40 * 50
    assert 0 < dense.sum() < len(dense)  # both ways are taken
    gram = TokenGram(a, b)
    blocks = list(gram)
    assert [start for start, _ in blocks] == [0, 7, 14, 21, 28, 35]
    assert len(gram) == 6
    products = np.concatenate([block for _, block in blocks])
    assert np.allclose(products, a.toarray().T.astype(np.float64) @ b.toarray(), rtol=1e-6)
    joint = np.concatenate([block for _, block in gram.joint()])
    assert np.array_equal(joint, (a.toarray() > 0).T.astype(int) @ (b.toarray() > 0))
    assert np.array_equal(firings(a), (a.toarray() > 0).sum(axis=0))


def test_two_features_that_fire_once_together_are_not_matched():
    # 5,000 features of either SAE fire on one token each: without a minimum, each finds a partner of correlation 1
    tokens, n = 2000, 5000
    rng = np.random.default_rng(0)
    a, b = (
        sparse.csr_array((np.ones(n, np.float32), (rng.integers(tokens, size=n), np.arange(n))), shape=(tokens, n))
        for _ in range(2)
    )
    W = torch.randn(2, n, 16, generator=torch.Generator().manual_seed(0))
    chance = match_codes(a, b, W[0], W[1], min_joint_firings=1)
    assert chance.a.strong > 4000
    assert abs(chance.a.strong_decoder_cosine) < 0.05  # which is how chance shows
    assert chance.a.matched < 0.02 * chance.a.strong
    guarded = match_codes(a, b, W[0], W[1], min_joint_firings=2)
    assert (guarded.a.strong, guarded.a.weak, guarded.a.unmatched) == (0, 0, 5000)
    assert math.isnan(guarded.a.matched_correlation)
    assert math.isnan(guarded.a.strong_decoder_cosine)
    assert guarded.a.pairs.features == ()


def test_each_direction_has_its_own_matches():
    # both features of A copy B's only one, the second with an extra firing
    a = csr([{0: 1, 1: 1, 2: 1}, {0: 1, 1: 1, 2: 1, 3: 1}], 20)
    b = csr([{0: 1, 1: 1, 2: 1}], 20)
    W = torch.ones(2, 3)
    result = match_codes(a, b, W, W[:1], min_joint_firings=1, pairs="matched")
    assert (result.a.matched, result.a.mutual) == (2, 1)
    assert result.a.pairs.mutual == (True, False)
    assert (result.b.matched, result.b.mutual, result.b.pairs.partners) == (1, 1, (0,))


def test_strong_features_need_decoders_that_agree_to_be_matched():
    a = csr([{0: 1, 1: 1, 2: 1}, {3: 1, 4: 1, 5: 1}], 20)
    W_a, W_b = torch.eye(2), torch.tensor([[1.0, 0.0], [1.0, 0.2]])
    result = match_codes(a, a, W_a, W_b, min_joint_firings=3)
    assert (result.a.strong, result.a.matched, result.a.matched_features) == (2, 1, (0,))
    assert result.a.strong_decoder_cosine == pytest.approx((1 + 0.2 / math.sqrt(1.04)) / 2)  # median of two
    assert match_codes(a, a, W_a, W_b, min_joint_firings=3, min_decoder_cosine=-1).a.matched == 2


def test_of_equal_partners_the_first_stays(monkeypatch):
    a = csr([{0: 1, 1: 1, 5: 2}], 9)
    b = csr([{3: 1, 4: 1}, *[{0: 1, 1: 1, 5: 2}] * 3], 9)
    for block in (1, 100):  # partners in blocks of their own, and in one
        monkeypatch.setattr(token_gram, "BLOCK_ENTRIES", block)
        result = match_codes(b, a, torch.ones(4, 2), torch.ones(1, 2), min_joint_firings=1)
        assert result.b.pairs.partners == (1,), block


def test_the_alive_rate_is_a_share_of_the_tokens():
    a = csr([dict.fromkeys(range(10), 1), {0: 1}, {0: 1, 1: 1}, {}], 1000)
    W = torch.eye(4)
    assert match_codes(a, a, W, W, min_joint_firings=1).a.alive == 3
    assert match_codes(a, a, W, W, min_joint_firings=1, alive_rate=0.001).a.alive == 2  # more than one in a thousand
    assert match_codes(a, a, W, W, min_joint_firings=1, alive_rate=0.001).a.matched_features == (0, 2)


@pytest.mark.parametrize("tokens", [30, 37, 1000])
def test_a_feature_that_never_varies_correlates_with_nothing(tokens):
    # but for rounding: the mean of 37 times 0.1 is not 0.1
    constants = [[value] * tokens for value in (0.1, 0.3, 0.7, 1 / 3, 1e-3)]
    a = csr([*constants, [1.0, 0.0] * (tokens // 2) + [0.0] * (tokens % 2)])
    result = match_codes(a, a, torch.eye(6), torch.eye(6), pairs="all")
    assert result.a.pairs.features == (5,)
    assert result.a.unmatched == 5


def test_saes_are_encoded_on_the_same_tokens_and_the_result_is_json():
    x = torch.rand(200, 2, generator=torch.Generator().manual_seed(0)) - 0.3
    one, other = (Fixed(2, lambda x, s=s: (s * x).relu(), lambda x: x) for s in (1.0, 2.0))
    one.W_dec = torch.eye(2)
    other.W_dec = 3 * torch.eye(2)
    codes = [sparse_codes(sae, x) for sae in (one, other)]
    result = match_codes(*codes, one.W_dec, other.W_dec)
    assert result.a.matched_features == result.b.matched_features == (0, 1)
    read = json.loads(json.dumps(dataclasses.asdict(result)))
    assert read["a"]["pairs"]["partners"] == [read["a"]["pairs"]["features"][0], read["a"]["pairs"]["features"][1]]


def test_codes_of_other_tokens_are_refused():
    a = csr([[1.0, 0.0, 1.0]])
    with pytest.raises(ValueError, match="same tokens"):
        match_codes(a, csr([[1.0, 0.0]]), torch.ones(1, 2), torch.ones(1, 2))
    with pytest.raises(ValueError, match="one width"):
        match_codes(a, a, torch.ones(1, 2), torch.ones(1, 3))

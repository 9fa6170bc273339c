import dataclasses
import json
import warnings

import numpy as np
import pytest
import torch
from planted_concept import STRENGTH, best_by_inner_product, concept, identity_sae, sample_of
from sae_lens import TopKSAE, TopKSAEConfig
from scipy import optimize, sparse
from scipy.stats import norm

from saelens_cosine.metrics.codes import canonical_codes
from saelens_cosine.metrics.probing import decomposition, probing
from saelens_cosine.metrics.probing.decomposition import decompose, over_tasks
from saelens_cosine.metrics.probing.probing import pool, probe, probe_activations, probe_in_units, probe_sae
from saelens_cosine.rescoring import rescore

pytest.importorskip("sklearn", reason="probing needs scikit-learn")


def flipped(truth, *which):
    """A binary feature that equals the labels but in these places."""
    feature = truth.astype(float)
    feature[list(which)] = 1 - feature[list(which)]
    return feature


# pooling and units


def test_pooling_by_hand():
    codes = sparse.csr_array(np.array([[2.0, 0], [4, 6], [0, 5], [8, 0]]))
    contexts = [0, 0, 2, 2]
    assert pool(codes, contexts, 4).toarray().tolist() == [[3, 3], [0, 0], [4, 2.5], [0, 0]]
    assert pool(codes, contexts, 4, "last").toarray().tolist() == [[4, 6], [0, 0], [8, 0], [0, 0]]
    with pytest.raises(ValueError, match="contexts 0 to 1"):
        pool(codes, contexts, 2)
    with pytest.raises(ValueError, match="'max'"):
        pool(codes, contexts, 4, "max")


def test_codes_count_by_the_length_of_their_decoder_rows():
    sae = identity_sae(2, [2.0, 0.5])
    assert canonical_codes(sae, torch.tensor([[3.0, 4.0]])).toarray().tolist() == [[6, 2]]


def test_a_topk_that_rescales_by_decoder_norms_is_in_these_units_already():
    sae = TopKSAE(TopKSAEConfig(d_in=2, d_sae=2, k=2, rescale_acts_by_decoder_norm=True))
    sae.load_state_dict(
        {"W_enc": torch.eye(2), "b_enc": torch.zeros(2), "W_dec": torch.eye(2) * 2, "b_dec": torch.zeros(2)}
    )
    assert canonical_codes(sae.eval(), torch.tensor([[3.0, 4.0]])).toarray().tolist() == [[6, 8]]


# the probe


TRUTH = np.arange(100) % 2 == 0


def test_every_context_is_tested_once():
    # wrong in 10 of 100 places, 5 of each class: whatever the parts are, 10 tests fail
    codes = sparse.csr_array(flipped(TRUTH, *range(10))[:, None])
    (one,) = probe(codes, TRUTH, (1,))
    assert one.accuracy == pytest.approx(0.9)
    assert len(one.accuracies) == 5
    assert one.features == ((0,),) * 5
    assert probe(codes, TRUTH, (1,), seed=1)[0].accuracies != one.accuracies


def test_features_are_chosen_by_difference_of_means_in_both_units():
    # feature 0 is large and unreliable, feature 1 small and always right
    codes = sparse.csr_array(np.stack([100 * flipped(TRUTH, *range(20)), TRUTH * 2.0], axis=1))
    raw, free = (probe(codes, TRUTH, (1, 2), units) for units in ("canonical", "scale_free"))
    assert raw[0].features == ((0,),) * 5
    assert free[0].features == ((1,),) * 5
    assert raw[0].accuracy == pytest.approx(0.8)
    assert free[0].accuracy == free[0].auc == 1
    assert raw[1].accuracy == 1  # both features
    assert raw[1].features == ((0, 1),) * 5


def test_the_same_features_are_probed_once_for_both_units(monkeypatch):
    # feature 0 is large and unreliable, feature 1 small and nearly right, feature 2 says nothing: each unit has its best, and both two
    few = [flipped(TRUTH, *wrong) for wrong in (range(20), range(30, 34), range(0, 100, 2))]
    codes, truth, ks = sparse.csr_array(np.stack(few, axis=1) * [100, 2, 0.1]), TRUTH, (1, None, 2)
    expected = {units: probe(codes, truth, ks, units, 2) for units in ("canonical", "scale_free")}
    seen, fit = [], probing._fit
    monkeypatch.setattr(probing, "_fit", lambda x, *args: seen.append(x.shape[1]) or fit(x, *args))
    found = probe_in_units(codes, truth, ks, splits=2)
    assert sorted(seen) == sorted(2 * [1, 1, 2, 3])  # in each split: feature 0, feature 1, the two, all
    for units, probes in expected.items():
        assert [one.k for one in found[units]] == list(ks)
        for one, other in zip(found[units], probes, strict=True):
            assert (one.features, one.accuracies) == (other.features, other.accuracies)


def test_scale_free_probes_do_not_see_gains():
    rng = np.random.default_rng(0)
    codes = rng.exponential(size=(60, 20)) * (rng.random((60, 20)) < 0.4)
    gains = np.exp(3 * rng.normal(size=20))
    truth = np.arange(60) < 30
    one, other = (probe(sparse.csr_array(c), truth, units="scale_free") for c in (codes, codes * gains))
    for p, q in zip(one, other, strict=True):
        assert p.features == q.features
        assert p.accuracies == q.accuracies
    raw = [probe(sparse.csr_array(c), truth, (1,))[0].features for c in (codes, codes * gains)]
    assert raw[0] != raw[1]


def test_units_are_not_taken_from_the_test_contexts():
    # feature 0 is right throughout; feature 1 misses every tenth positive, and is 100 times smaller in the second part. By its
    # mean size over both, it would look twice as far apart as feature 0 in the first
    (first, second), *_ = full_parts(TRUTH)
    missed = np.isin(np.arange(100), np.flatnonzero(TRUTH)[::10])
    feature = np.where(TRUTH & ~missed, 1.0, 0)
    feature[second] /= 100
    (one,) = probe(sparse.csr_array(np.stack([TRUTH * 1.0, feature], axis=1)), TRUTH, (1,), "scale_free", splits=2)
    assert one.features == ((0,), (0,))


def test_units_are_sizes_of_codes_with_signs():
    # feature 0 is 1 or -1, 55 to 45 in one class and 45 to 55 in the other: means 0.1 and -0.1 of size 1, together nearly 0
    sign = np.where(np.arange(200) // 2 % 20 < 11, 1.0, -1.0) * np.where(EVEN, 1, -1)
    codes = np.stack([sign, flipped(EVEN, *range(60))], axis=1)  # 0.7 against 0.3
    (one,) = probe(sparse.csr_array(codes), EVEN, (1,), "scale_free")
    assert one.features == ((1,),) * 5


def test_area_under_the_curve_is_the_share_of_pairs_in_order():
    rng = np.random.default_rng(2)
    x = rng.normal(size=100) + TRUTH
    (one,) = probe(sparse.csr_array(x[:, None]), TRUTH, (1,), splits=2)
    expected = [(x[test][TRUTH[test]][:, None] > x[test][~TRUTH[test]]).mean() for _, test in full_parts(TRUTH)]
    assert one.aucs == pytest.approx(expected)
    assert one.auc == pytest.approx(np.mean(expected))
    assert 0.6 < one.auc < 0.9


def test_pairs_that_tie_count_by_half():
    # of six pairs of a positive (2, 1) and a negative (1, 0, 3) context: three in order, one tied
    margin, truth = np.array([2.0, 1.0, 1.0, 0.0, 3.0]), np.array([True, True, False, False, False])
    assert probing._area_under_curve(margin, truth) == pytest.approx(3.5 / 6)


@pytest.mark.parametrize("n_features", [3, 300])
def test_codes_that_are_never_active_are_a_guess_at_the_larger_class(n_features):
    truth = np.arange(40) < 16
    (one,) = probe(sparse.csr_array((40, n_features)), truth, (None,), splits=4)
    assert one.accuracies == (0.6, 0.6, 0.6, 0.6)  # of ten, four are positive
    assert one.aucs == (0.5, 0.5, 0.5, 0.5)


def test_features_are_not_chosen_on_the_test_contexts():
    # 3000 features of pure noise: chosen on all contexts, the best tells 80 % of them apart
    rng = np.random.default_rng(0)
    codes = sparse.csr_array((rng.random((60, 3000)) < 0.5).astype(float))
    (best,) = probe(codes, np.arange(60) < 30, (1,))
    assert 0.3 < best.accuracy < 0.65


def test_all_features_agree_with_an_independent_fit():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(80, 4))
    truth = x @ [1, -1, 0.5, 0] + rng.normal(size=80) > 0
    x = x * [1, 10, 0.1, 1] + [0, 0, 0, 3]
    (full,) = probe(sparse.csr_array(x), truth, (None,), splits=2)
    right = 0.0
    for part in full_parts(truth):
        sign = np.where(truth[part[0]], 1, -1)
        train, test = (x[rows] / x[part[0]].std(axis=0) for rows in part)  # the penalty weighs all features alike

        def loss(w, x=train, sign=sign):
            return 0.5 * w[:4] @ w[:4] + np.logaddexp(0, -sign * (x @ w[:4] + w[4])).sum()

        w = optimize.minimize(loss, np.zeros(5)).x
        right += ((test @ w[:4] + w[4] > 0) == truth[part[1]]).mean() / 2
    assert full.accuracy == pytest.approx(right)
    assert full.features == ((), ())


@pytest.mark.parametrize("few, within", [(2000, 1e-5), (0, 5e-2)])  # by second derivatives, and without
@pytest.mark.parametrize("n_features", [3, 60, 300])
def test_margins_are_those_of_the_penalised_regression(n_features, few, within, monkeypatch):
    # features that never fire or are twice there, and contexts that are twice there: what has no unique basis
    monkeypatch.setattr(probing, "FEW", few)
    rng = np.random.default_rng(5)
    x = rng.exponential(size=(90, n_features)) * (rng.random((90, n_features)) < 0.3)
    x[:, 1], x[10], x[:, -1] = x[:, 0], x[11], 0
    truth = x[:, 0] + 0.5 * rng.normal(size=90) > 0.3
    train, test = np.arange(60), np.arange(60, 90)
    spread = x[train].std(axis=0)
    scaled = x / np.where(spread > 0, spread, 1)
    sign = np.where(truth[train], 1, -1)

    def loss(w):  # C = 1, no penalty on the intercept
        margin = scaled[train] @ w[:-1] + w[-1]
        pull = -sign / (1 + np.exp(sign * margin))
        gradient = np.append(w[:-1] + pull @ scaled[train], pull.sum())
        return 0.5 * w[:-1] @ w[:-1] + np.logaddexp(0, -sign * margin).sum(), gradient

    w = optimize.minimize(loss, np.zeros(n_features + 1), jac=True, method="BFGS", options={"gtol": 1e-9}).x
    for codes in (x, sparse.csr_array(x)):
        found = probing._margins(codes, truth, train, test)
        assert found == pytest.approx(scaled[test] @ w[:-1] + w[-1], abs=within)


def test_probes_converge_whatever_the_units_and_all_features_read_the_same_in_any():
    rng = np.random.default_rng(3)
    codes = rng.exponential(size=(200, 50)) * (rng.random((200, 50)) < 0.3)
    truth = codes[:, 0] > codes[:, 1] + rng.normal(size=200)
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # scikit-learn's on convergence among them
        for gains in (1.0, 1e3, np.exp(5 * rng.normal(size=50))):
            found += [
                probe(sparse.csr_array(codes * gains), truth, (None,), units) for units in ("canonical", "scale_free")
            ]
    for (one,) in found[1:]:
        assert one.aucs == pytest.approx(found[0][0].aucs, abs=2e-3)


def full_parts(truth):
    from sklearn.model_selection import StratifiedKFold

    return StratifiedKFold(2, shuffle=True, random_state=0).split(truth, truth)


@pytest.mark.parametrize(
    "labels, options, message",
    [
        ([0, 1, 2, 1], {}, "true or false"),
        ([[0, 1], [0, 1]], {}, r"\(2, 2\)"),
        ([0, 0, 0, 1], {"splits": 2}, "smaller class, 1"),
        ([0, 1, 0, 1], {"splits": 1}, "splits=1"),
        ([0, 1] * 3, {"splits": 2}, "6 labels for 4 contexts"),
        ([0, 1, 0, 1], {"splits": 2, "ks": (1, 4)}, "k=4"),
        ([0, 1, 0, 1], {"splits": 2, "units": "raw"}, "'raw'"),
    ],
)
def test_what_cannot_be_probed_is_refused(labels, options, message):
    with pytest.raises(ValueError, match=message):
        probe(sparse.csr_array(np.ones((4, 3))), labels, **options)


def reader(score):
    sae = identity_sae(3)
    if score == "cosine":
        return rescore(sae, torch.rand(50, 3) * torch.tensor([1, 1, -1]), "cosine", scale=1.0, progress=False)
    return sae


def test_a_planted_concept_is_read_as_well_as_an_oracle_would():
    x, truth = concept()
    sample = sample_of(x, range(len(x)))
    oracle = norm.cdf(STRENGTH / 2)  # 0.841: two normal classes, 2 sd apart; the cosine is monotone in c
    cosine, inner = (probe_sae(reader(score), sample, truth, (1,)) for score in ("cosine", "inner_product"))
    assert cosine.scale_free[0].features == ((0,),) * 5
    assert cosine.scale_free[0].accuracy == pytest.approx(oracle, abs=0.02)  # standard error 0.007
    best = best_by_inner_product()
    assert best < oracle - 0.15
    assert 0.5 < inner.scale_free[0].accuracy < best + 0.02
    # the direction is there all the same: with ||x|| beside it, the activations give it away up to the scale
    assert probe_activations(sample, truth).accuracy < oracle + 0.02
    assert cosine.contexts == cosine.tokens == 3000
    assert cosine.positive_share == 0.5


def test_sinks_hide_a_concept_from_the_mean_and_dropping_them_brings_it_back():
    # two tokens a context: one that is read, one sink with noise 200 times as long
    x, truth = concept(600)
    x = torch.nn.functional.normalize(x, dim=-1)
    sinks = 200 * torch.rand(600, 3, generator=torch.Generator().manual_seed(0))
    tokens = torch.stack([x, sinks], dim=1).flatten(0, 1)
    sample = sample_of(tokens, torch.arange(600).repeat_interleave(2), torch.tensor([True, False]).repeat(600))
    treated = (sample, sample.without_sinks())
    with_sinks, without = (probe_sae(reader("inner_product"), s, truth, (1,)) for s in treated)
    assert with_sinks.scale_free[0].accuracy < 0.6
    assert without.scale_free[0].accuracy == pytest.approx(norm.cdf(1), abs=0.04)
    assert (with_sinks.tokens, without.tokens) == (1200, 600)
    # the sink is each context's last token: of all tokens, only it is read; of the ordinary ones, the other
    last_with, last_without = (probe_sae(reader("inner_product"), s, truth, (1,), "last") for s in treated)
    only_sinks = sample_of(sinks, range(600))
    assert last_with.scale_free == probe_sae(reader("inner_product"), only_sinks, truth, (1,)).scale_free
    assert last_with.scale_free != with_sinks.scale_free
    assert last_without.scale_free == without.scale_free


def test_results_are_json():
    x, truth = concept(100)
    result = probe_sae(reader("cosine"), sample_of(x, range(100)), truth, (1, None))
    assert json.loads(json.dumps(dataclasses.asdict(result)))["canonical"][1]["k"] is None


# decomposition


EVEN = np.arange(200) % 2 == 0


def codes_of(*features):
    return sparse.csr_array(np.stack(features, axis=1))


def test_decomposition_by_hand():
    # matched features are right in 180 (a) and 160 (b) of 200 contexts; a has one more, right in all
    a = codes_of(EVEN.astype(float), flipped(EVEN, *range(20)))
    b = codes_of(np.zeros(200), flipped(EVEN, *range(40)))
    (one,) = decompose(a, b, EVEN, [1], [1], (1,), units="scale_free")
    assert one.gap.mean == pytest.approx(1 - 0.8)
    assert one.matched_gap.mean == pytest.approx(0.9 - 0.8)
    assert one.separability == pytest.approx(0.5)
    assert one.discovery == pytest.approx(0.5)
    assert one.matched_features == (1, 1)
    assert len(one.accuracies) == 4
    assert np.mean(one.accuracies, axis=1) == pytest.approx([1, 0.8, 0.9, 0.8])


def test_what_is_known_is_not_probed_again(monkeypatch):
    a, b = codes_of(EVEN.astype(float), flipped(EVEN, *range(20))), codes_of(np.zeros(200), flipped(EVEN, *range(40)))
    known = [probe(codes, EVEN, (1,), "scale_free") for codes in (a, b)]
    read = []
    monkeypatch.setattr(decomposition, "probe", lambda codes, *given: read.append(codes.shape) or probe(codes, *given))
    (one,) = decompose(a, b, EVEN, [1], [1], (1,), units="scale_free", known=known)
    assert read == [(200, 1), (200, 1)]  # the matched features alone
    assert np.mean(one.accuracies, axis=1) == pytest.approx([1, 0.8, 0.9, 0.8])


def test_units_splits_and_seed_are_those_of_the_probes():
    # as above: feature 0 is large and unreliable, feature 1 small and always right
    a = codes_of(100 * flipped(EVEN, *range(40)), EVEN * 2.0)
    gaps = [decompose(a, a[:, :1], EVEN, [0], [0], (1,), units)[0].gap.mean for units in ("canonical", "scale_free")]
    assert gaps == pytest.approx([0, 1 - 0.8])
    b = codes_of(flipped(EVEN, *range(40)))
    (one,) = decompose(b, b, EVEN, [0], [0], (1,), splits=4, seed=7)
    (alone,) = probe(b, EVEN, (1,), splits=4, seed=7)
    assert one.accuracies == (alone.accuracies,) * 4
    assert alone.accuracies != probe(b, EVEN, (1,), splits=4)[0].accuracies


def test_no_gap_has_no_shares():
    a = codes_of(flipped(EVEN, *range(20)))
    (one,) = decompose(a, a, EVEN, [0, 0], [0, 0], (1,))
    assert one.separability is None
    assert one.discovery is None
    assert not one.gap.seen
    assert one.matched_features == (1, 1)


def test_tasks_are_averaged_and_are_part_of_the_noise():
    # b is wrong in 40, 60 and 50 of 200: gaps 0.2, 0.3, 0.25; a's matched feature in 20: matched gaps 0.1, 0.2, 0.15
    a = codes_of(EVEN.astype(float), flipped(EVEN, *range(20)))
    parts = [decompose(a, codes_of(flipped(EVEN, *range(n))), EVEN, [1], [0], (1,))[0] for n in (40, 60, 50)]
    all_three = over_tasks(parts)
    # sd 0.05, t(0.975, 2) = 4.30265
    half = 4.30265 * 0.05 / 3**0.5
    assert (all_three.gap.mean, all_three.gap.high) == pytest.approx((0.25, 0.25 + half))
    assert all_three.separability == pytest.approx(0.15 / 0.25)
    assert all_three.accuracies[0] == pytest.approx((1, 1, 1))
    assert over_tasks([dataclasses.replace(parts[0], matched_features=(2, 2)), *parts]).matched_features == (2, 2)
    assert over_tasks(parts[:2]).separability is None  # two tasks are too few to see a gap
    with pytest.raises(ValueError, match="one k"):
        over_tasks([])

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from causal_models import FormulaModel, kl, log_p, normal, relu_sae

from saelens_cosine.metrics.causal.ablation import ablation_precision
from saelens_cosine.metrics.causal.forward import clean_run
from saelens_cosine.metrics.causal.patching import direction_norm_patching
from saelens_cosine.metrics.causal.steering import steering


def a_run(read_out, n=60, length=3, d=5, v=8, spread=0.7, gain=0.5):
    x = normal(n, d) * (spread * normal(n, 1, seed=1)).exp()
    W_U = gain * normal(d, v, seed=2)
    return clean_run(FormulaModel(x, W_U, read_out), "hook", torch.arange(n).view(-1, length)), x.double(), W_U


# --- direction against norm ---


@pytest.mark.parametrize("context", ["alone", "text"])
def test_a_model_that_reads_the_direction(context):
    run, *_ = a_run("direction")
    result = direction_norm_patching(run, run.sample(None), pairs=50, rescaled_tokens=10, context=context)
    assert result.random.direction_kl.low > 0.01
    assert result.random.norm_kl.mean < 1e-10
    assert result.random.direction_larger == 1.0
    assert result.random.median_ratio > 1e6
    assert [part.factor for part in result.scaled] == [0.5, 2, 5]
    assert all(part.kl.mean < 1e-10 for part in result.scaled)
    assert result.rotated.mean > 0.01


def test_a_model_that_reads_the_norm():
    run, x, W_U = a_run("norm")
    result = direction_norm_patching(run, run.sample(None), pairs=50, rescaled_tokens=10)
    assert result.random.direction_kl.mean < 1e-10
    assert result.random.norm_kl.low > 0.01
    assert result.random.direction_larger < 0.05  # norms of a pair can agree by chance
    assert result.random.median_ratio < 1e-6
    assert result.rotated.mean < 1e-10


def test_controls_hold_what_they_say():
    # most pairs have a cosine above 0.5 and norms less than 1.5 times apart, which each control has to leave out
    x = torch.nn.functional.normalize(normal(600, 3) + 1.5, dim=-1) * (0.2 * normal(600, 1, seed=1)).exp()
    run = clean_run(FormulaModel(x, normal(3, 8, seed=2)), "hook", torch.arange(600).view(-1, 3))
    result = direction_norm_patching(run, run.sample(None), pairs=100, control_pairs=40)
    assert result.random.mean_cosine > 0.6
    assert result.random.mean_norm_ratio < 1.4
    assert (result.same_norm.pairs, result.same_direction.pairs) == (40, 40)
    assert 1 <= result.same_norm.mean_norm_ratio < 1.1
    assert result.same_norm.mean_cosine < 0.5
    assert result.same_direction.mean_norm_ratio > 1.5
    assert result.same_direction.mean_cosine > 0.7
    assert result.tokens == 600
    json.dumps(dataclasses.asdict(result))


def test_controls_that_do_not_exist_are_empty():
    run, *_ = a_run("itself", spread=0.0, d=200, n=12)  # cosines near 0, norms near each other
    result = direction_norm_patching(run, run.sample(None), pairs=10, control_pairs=5, rescaled_tokens=3)
    assert result.same_direction.pairs == 0
    assert math.isnan(result.same_direction.direction_kl.mean)
    assert math.isnan(result.same_direction.median_ratio)
    assert result.same_norm.pairs == 5


@pytest.mark.parametrize("context, before", [("alone", 0), ("text", 1)])
def test_patches_by_a_formula(context, before):
    # two contexts, of which only the second tokens are in the sample: every pair is those two, either way round
    run, x, W_U = a_run("sum", n=4, length=2)
    sample = run.sample(None)
    sample = sample.where(sample.positions == 1)
    result = direction_norm_patching(run, sample, pairs=400, control_pairs=0, rescaled_tokens=4, context=context)
    expected = {"direction": [], "norm": []}
    for a, b, first in ((x[1], x[3], x[0]), (x[3], x[1], x[2])):
        prefix = before * first
        expected["direction"].append(kl(prefix + a, prefix + b / b.norm() * a.norm(), W_U))
        expected["norm"].append(kl(prefix + a, prefix + a / a.norm() * b.norm(), W_U))
    for patch, found in (("direction", result.random.direction_kl), ("norm", result.random.norm_kl)):
        one, other = expected[patch]
        share = (found.mean - other) / (one - other)  # of the pairs that are the first way round
        assert 0.4 < share < 0.6
        assert round(share * 400) == pytest.approx(share * 400, abs=0.05)
        sd = abs(one - other) * (share * (1 - share) * 400 / 399) ** 0.5
        assert found.high - found.mean == pytest.approx(1.96 * sd / 20, rel=1e-3)
        assert found.mean - found.low == pytest.approx(1.96 * sd / 20, rel=1e-3)
    ratios = np.divide(expected["direction"], expected["norm"])
    assert result.random.median_ratio == pytest.approx(ratios[0], rel=1e-3) or result.random.median_ratio == (
        pytest.approx(ratios[1], rel=1e-3)
    )
    assert result.random.mean_cosine == pytest.approx(torch.cosine_similarity(x[1], x[3], dim=0).item(), abs=1e-5)
    longer, shorter = max(x[1].norm(), x[3].norm()), min(x[1].norm(), x[3].norm())
    assert result.random.mean_norm_ratio == pytest.approx((longer / shorter).item(), rel=1e-5)

    shares = []
    for part, factor in zip(result.scaled, (0.5, 2, 5), strict=True):
        one, other = (
            kl(before * first + a, before * first + factor * a, W_U) for a, first in ((x[1], x[0]), (x[3], x[2]))
        )
        assert part.factor == factor
        shares.append((part.kl.mean - other) / (one - other))  # of the four rescaled tokens that are the first one
    assert shares == pytest.approx([round(4 * shares[0]) / 4] * 3, abs=2e-3)
    assert 0 <= shares[0] <= 1


def test_pairs_are_of_different_contexts():
    # tokens of a context have one direction, at right angles to every other context's
    x = torch.eye(5).repeat_interleave(3, dim=0) * torch.arange(1.0, 16).unsqueeze(-1)
    run = clean_run(FormulaModel(x, normal(5, 8)), "hook", torch.arange(15).view(5, 3))
    result = direction_norm_patching(run, run.sample(None), pairs=200, control_pairs=20, rescaled_tokens=3)
    assert (result.random.pairs, result.random.mean_cosine) == (200, 0)
    assert result.same_direction.pairs == 0


def test_patching_refuses():
    run, *_ = a_run("itself", n=6)
    sample = run.sample(None)
    with pytest.raises(ValueError, match="All tokens of the sample are of one context"):
        direction_norm_patching(run, sample.where(sample.contexts == 1))
    with pytest.raises(ValueError, match="context='both' is none of"):
        direction_norm_patching(run, sample, context="both")


# --- ablation ---


def concept_texts():
    """Twelve texts of two tokens. Feature 0 decides the next token of texts labelled 1, feature 1 is on in those labelled 0.

    The SAE's bias keeps 0.25 of each code out of it, so zeroing a code leaves 0.25 of the direction behind. Feature 2 is on
    in every text, feature 3 in the first tokens.
    """
    d, labels = 5, torch.tensor([1, 0] * 6)
    x = torch.zeros(24, d)
    last, first = x[1::2], x[0::2]
    last[labels == 1, 0] = torch.tensor([1.0, 1.5, 2.0, 2.5, 3.0, 3.5])
    last[labels == 0, 1] = torch.tensor([1.0, 1.5, 2.0, 2.5, 3.0, 3.5])
    last[:, 2] = 1.0
    first[:, 3] = 2.0
    W_U = torch.zeros(d, 6)
    W_U[0, 0], W_U[1, 1], W_U[2, 2], W_U[3, 3] = 3.0, 2.0, 1.0, 1.0
    sae = relu_sae(torch.eye(d), b_enc=torch.full((d,), -0.25))
    return x, labels, W_U, sae


def test_the_direction_that_decides_the_next_token_is_found_and_ablated():
    x, labels, W_U, sae = concept_texts()
    run = clean_run(FormulaModel(x, W_U), "hook", torch.arange(24).view(12, 2))
    result = ablation_precision(run, sae, run.sample(None), labels, n_features=(1, 5))
    assert (result.ablated, result.held_out) == ("read", True)
    zero, one = result.concepts
    assert (zero.concept, one.concept) == (0, 1)
    assert (one.texts, one.other_texts) == (3, 3)
    assert one.features[0] == 0
    assert zero.features[0] == 1
    # measured on the second, fourth and sixth text of each label: lengths 1.5, 2.5, 3.5
    lengths = np.array([1.5, 2.5, 3.5])
    h = np.zeros((3, 5))
    h[:, 0], h[:, 2] = lengths, 1.0
    left = h.copy()
    left[:, 0] = 0.25  # the SAE's error stays
    first, all_five = one.effects
    assert first.intended_kl == pytest.approx(kl(h, left, W_U).mean(), rel=1e-5)
    assert (first.k, first.collateral_kl, first.precision) == (1, 0.0, math.inf)
    assert (first.intended_share, first.collateral_share) == (1.0, 0.0)
    assert first.selectivity == first.intended_kl
    # all five features: everything but the errors goes, in both kinds of texts
    other = np.zeros((3, 5))
    other[:, 1], other[:, 2] = lengths, 1.0
    intended, collateral = (kl(part, part.clip(0, 0.25), W_U).mean() for part in (h, other))
    assert all_five.intended_kl == pytest.approx(intended, rel=1e-5)
    assert all_five.collateral_kl == pytest.approx(collateral, rel=1e-5)
    assert all_five.precision == pytest.approx(intended / collateral, rel=1e-5)
    assert all_five.selectivity == pytest.approx(intended - collateral, rel=1e-4)
    assert (all_five.intended_share, all_five.collateral_share) == (1.0, 1.0)
    mean = result.mean[1]
    assert mean.precision == pytest.approx(1.0, rel=1e-5)  # what is intended for one is collateral for the other
    assert result.mean[0].intended_kl == pytest.approx((first.intended_kl + zero.effects[0].intended_kl) / 2)
    json.dumps(dataclasses.asdict(result))


def test_features_that_nothing_activates_have_no_precision():
    x, labels, W_U, sae = concept_texts()
    run = clean_run(FormulaModel(x, W_U), "hook", torch.arange(24).view(12, 2))
    result = ablation_precision(run, sae, run.sample(None), labels, (1,), ranked={0: [4], 1: [0]})
    assert not result.held_out
    effect = result.concepts[0].effects[0]
    assert (effect.intended_kl, effect.collateral_kl) == (0, 0)
    assert math.isnan(effect.precision)
    assert result.concepts[1].texts == 6


def test_ablation_at_all_tokens_of_the_sample():
    x, labels, W_U, sae = concept_texts()
    run = clean_run(FormulaModel(x, W_U, "sum"), "hook", torch.arange(24).view(12, 2))
    sample = run.sample(None)
    ranked = {0: [3], 1: [3]}  # on at first tokens alone

    def effect(sample, ablated):
        return ablation_precision(run, sae, sample, labels, (1,), ablated, ranked).concepts[1].effects[0]

    assert effect(sample, "read").intended_kl == 0
    sums = x.view(12, 2, 5).sum(1)[labels == 1].numpy()
    left = sums.copy()
    left[:, 3] = 0.25
    assert effect(sample, "all").intended_kl == pytest.approx(kl(sums, left, W_U).mean(), rel=1e-5)
    assert effect(sample.where(sample.positions == 1), "all").intended_kl == 0


def test_ranking_is_in_units_of_activations():
    # feature 1 has half the code of feature 0 and four times its decoder norm
    x, labels, W_U, _ = concept_texts()
    x[:, :2] = 0
    x[1::2][labels == 1, :2] = 1.0
    x[1::2, 2] = 9.0  # in texts with and without
    scale = torch.tensor([1.0, 0.5, 1, 1, 1])
    sae = relu_sae(torch.eye(5) * scale, torch.eye(5) * torch.tensor([1.0, 4, 1, 1, 1])[:, None])
    run = clean_run(FormulaModel(x, W_U), "hook", torch.arange(24).view(12, 2))
    result = ablation_precision(run, sae, run.sample(None), labels, (2,))
    assert result.concepts[1].features == (1, 0)


def test_features_are_ranked_and_measured_on_different_texts():
    # with no relation between codes and labels, ranking and measuring on the same texts would look precise
    x = normal(400, 5)
    run = clean_run(FormulaModel(x, normal(5, 8, seed=1)), "hook", torch.arange(400).view(400, 1))
    sae = relu_sae(torch.nn.functional.normalize(normal(5, 300, seed=2), dim=0))
    labels = (torch.arange(400) // 2) % 2
    result = ablation_precision(run, sae, run.sample(None), labels, (5,))
    assert result.mean[0].precision == pytest.approx(1, abs=0.15)


def test_ablation_refuses():
    x, labels, W_U, sae = concept_texts()
    run = clean_run(FormulaModel(x, W_U), "hook", torch.arange(24).view(12, 2))
    sample = run.sample(None)
    with pytest.raises(ValueError, match="one label for each of 12 texts"):
        ablation_precision(run, sae, sample, labels[:3])
    with pytest.raises(ValueError, match="two labels"):
        ablation_precision(run, sae, sample, 0 * labels)
    with pytest.raises(ValueError, match="two texts each"):
        ablation_precision(run, sae, sample, torch.tensor([0] * 11 + [1]))
    with pytest.raises(ValueError, match="n_features"):
        ablation_precision(run, sae, sample, labels, (0,))
    with pytest.raises(ValueError, match="ablated='last'"):
        ablation_precision(run, sae, sample, labels, ablated="last")


# --- steering ---


def steering_scene():
    """Ten texts of two tokens: at the last, feature 0 on in five with code 2, feature 1 in two with code 9, 2 in all with 0.5.

    Decoder rows have lengths 1, 1 and 3.
    """
    x = torch.zeros(20, 4)
    last = x[1::2]
    last[:5, 0], last[:2, 1], last[:, 2], last[:, 3] = 2.0, 9.0, 0.5, torch.arange(10.0) + 1
    x[0::2, 1] = 7.0
    W_dec = torch.diag(torch.tensor([1.0, 1.0, 3.0, 1.0]))[:3]
    return x, normal(4, 9, seed=5), relu_sae(torch.eye(4)[:, :3], W_dec)


def test_steering_by_a_formula():
    x, W_U, sae = steering_scene()
    run = clean_run(FormulaModel(x, W_U), "hook", torch.arange(20).view(10, 2))
    result = steering(run, sae, run.sample(None), factors=(0, 1, 5), n_features=10)
    # feature 1 fires on 0.2 of the texts; mean codes 1 for feature 0 and 0.5 for feature 2, times decoder norms 1 and 1.5
    assert (result.texts, result.features) == (10, (2, 0))
    assert result.active_share == 15 / 20
    h = x[1::2].double().numpy()
    for effect, f in zip(result.effects, (0, 1, 5), strict=True):
        kls, changes, lengths = [], [], []
        for row in h:
            for feature, length in ((2, 3.0), (0, 1.0)):
                steered = row.copy()
                steered[feature] += (f - 1) * row[feature] * length
                kls.append(kl(row, steered, W_U))
                p, q = np.exp(log_p(row, W_U)), np.exp(log_p(steered, W_U))
                top = np.argsort(p)[-5:]
                changes.append(abs(q - p)[top].sum())
                lengths.append(abs(f - 1) * row[feature] * length / np.linalg.norm(row))
        on = np.array([(row[2] > 0, row[0] > 0) for row in h]).flatten()
        assert effect.factor == f
        assert effect.kl == pytest.approx(np.mean(kls), rel=1e-4)
        assert effect.kl_where_active == pytest.approx(np.array(kls)[on].mean(), rel=1e-4)
        assert effect.top_change == pytest.approx(np.mean(changes), rel=1e-4)
        assert effect.top_change_where_active == pytest.approx(np.array(changes)[on].mean(), rel=1e-4)
        assert effect.edit_norm == pytest.approx(np.array(lengths)[on].mean(), rel=1e-4)
    assert result.effects[1].kl == result.effects[1].top_change == 0
    assert steering(run, sae, run.sample(None), n_features=1).features == (2,)
    assert steering(run, sae, run.sample(None), min_firing_share=0.5).features == (2,)  # feature 0 is not above it
    json.dumps(dataclasses.asdict(result))


def test_no_feature_that_is_active_often_enough():
    x, W_U, sae = steering_scene()
    run = clean_run(FormulaModel(x, W_U), "hook", torch.arange(20).view(10, 2))
    sample = run.sample(None)
    result = steering(run, sae, sample, factors=(0,), min_firing_share=1.0)
    assert result.features == ()
    assert np.isnan([result.active_share, *dataclasses.astuple(result.effects[0])[1:]]).all()
    with pytest.raises(ValueError, match="last token of no context"):
        steering(run, sae, sample.where(sample.positions == 0))

import dataclasses
import json

import numpy as np
import pytest
import torch
from causal_models import FormulaModel, kl, normal, relu_sae

from saelens_cosine.metrics.causal.correlations import correlations
from saelens_cosine.metrics.causal.forward import clean_run
from saelens_cosine.metrics.causal.win_rate import NormRangeWinRate, win_rate
from saelens_cosine.metrics.causal.win_rate_protocol import PROTOCOLS

D, V = 6, 9


def scene(read_out, n=240, length=3, spread=1.0, seed=0, gain=1.0):
    """Random tokens of log-normal norms in contexts of `length`, a model that reads them out, and an SAE on 5 directions.

    The directions are at right angles to each other, and their features active where the inner product is positive.
    """
    x = torch.nn.functional.normalize(normal(n, D, seed=seed), dim=-1) * (spread * normal(n, 1, seed=seed + 1)).exp()
    W_U = gain * normal(D, V, seed=seed + 2)
    model = FormulaModel(x, W_U, read_out)
    run = clean_run(model, "hook", torch.arange(n).view(-1, length))
    directions = torch.linalg.qr(normal(D, 5, seed=seed + 3)).Q
    return run, relu_sae(directions), x.double().numpy(), W_U, directions.double().numpy()


def correlation(a, b):
    return float(np.corrcoef(a, b)[0, 1])


def read_of(x, read_out):
    return x / np.linalg.norm(x, axis=-1, keepdims=True) if read_out == "direction" else x


@pytest.mark.parametrize("name, context, ablated, chosen_by, chosen_on, features, min_active, compared", [
    ("A", "alone", "read", "firing_rate", None, 30, 20, "absolute_correlations"),
    ("B", "text", "all", "mean_code", None, 100, 1, "correlations"),
    ("C", "text", "read", "mean_code", 50, 100, 1, "absolute_predictors"),
])  # fmt: skip
def test_protocols_of_the_paper(name, context, ablated, chosen_by, chosen_on, features, min_active, compared):
    protocol = PROTOCOLS[name]
    assert (protocol.context, protocol.ablated, protocol.compared) == (context, ablated, compared)
    assert (protocol.chosen_by, protocol.chosen_on, protocol.features) == (chosen_by, chosen_on, features)
    assert (protocol.min_active, protocol.removed) == (min_active, "inner_product")


@pytest.mark.parametrize("read_out, rate", [("direction", 1.0), ("itself", 0.0)])
@pytest.mark.parametrize("name", ["A", "C"])
def test_the_score_that_the_model_reads_wins_every_feature(read_out, rate, name):
    # after a normalisation the effect of removing a direction is a function of the cosine alone, and without one of the
    # inner product: with small logits, of its square
    run, sae, *_ = scene(read_out, n=600, gain=0.05)
    result = win_rate(run, sae, run.sample(None), dataclasses.replace(PROTOCOLS[name], chosen_on=None))
    assert result.win_rate == rate
    assert (result.features, result.wins, result.features_left_out) == (5, 5 * rate, 0)
    best, other = ("cosine", "inner_product") if rate else ("inner_product", "cosine")
    assert getattr(result, best) > getattr(result, other)


@pytest.mark.parametrize("read_out", ["direction", "itself"])
def test_protocol_c_by_a_formula(read_out):
    run, sae, x, W_U, d = scene(read_out)
    result = win_rate(run, sae, run.sample(None), dataclasses.replace(PROTOCOLS["C"], chosen_on=None))
    last = x[2::3]
    norms = np.linalg.norm(last, axis=-1)
    assert [feature.samples for feature in result.per_feature] == [80] * 5
    for feature in result.per_feature:
        f = d[:, feature.feature]
        inner = last @ f
        ablated = kl(read_of(last, read_out), read_of(last - inner[:, None] * f, read_out), W_U)
        assert feature.mean_kl == pytest.approx(ablated.mean(), rel=1e-4)
        assert feature.cosine == pytest.approx(correlation(ablated, abs(inner / norms)), abs=1e-4)
        assert feature.inner_product == pytest.approx(correlation(ablated, abs(inner)), abs=1e-4)
        assert feature.activation == pytest.approx(correlation(ablated, inner.clip(0)), abs=1e-4)
        assert feature.norm == pytest.approx(correlation(ablated, norms), abs=1e-4)
        assert feature.advantage == pytest.approx(feature.cosine - feature.inner_product, abs=1e-9)
        assert feature.active_share == pytest.approx((inner > 0).mean())
    assert result.cosine == pytest.approx(np.mean([feature.cosine for feature in result.per_feature]))
    assert result.win_rate == np.mean([feature.advantage > 0 for feature in result.per_feature])


def test_protocol_b_removes_the_direction_at_all_tokens_and_keeps_signs():
    run, sae, x, W_U, d = scene("sum")
    result = win_rate(run, sae, run.sample(None), PROTOCOLS["B"])
    texts = x.reshape(80, 3, D)
    sums, last = texts.sum(1), texts[:, -1]
    for feature in result.per_feature:
        f = d[:, feature.feature]
        ablated = kl(sums, sums - (sums @ f)[:, None] * f, W_U)
        assert feature.cosine == pytest.approx(correlation(ablated, last @ f / np.linalg.norm(last, axis=-1)), abs=1e-4)
        assert feature.inner_product == pytest.approx(correlation(ablated, last @ f), abs=1e-4)
        assert feature.advantage == pytest.approx(feature.cosine - feature.inner_product, abs=1e-9)
    # the same by absolute correlations: some are negative
    absolute = win_rate(
        run, sae, run.sample(None), dataclasses.replace(PROTOCOLS["B"], compared="absolute_correlations")
    )
    assert min(feature.cosine for feature in absolute.per_feature) < -0.05
    for feature, signed in zip(absolute.per_feature, result.per_feature, strict=True):
        assert (feature.cosine, feature.inner_product) == (signed.cosine, signed.inner_product)
        assert feature.advantage == pytest.approx(abs(feature.cosine) - abs(feature.inner_product), abs=1e-9)
    # the read token alone, another effect
    read = win_rate(run, sae, run.sample(None), dataclasses.replace(PROTOCOLS["B"], ablated="read"))
    f = d[:, read.per_feature[0].feature]
    ablated = kl(sums, sums - (last @ f)[:, None] * f, W_U)
    assert read.per_feature[0].mean_kl == pytest.approx(ablated.mean(), rel=1e-4)


def test_protocol_a_takes_active_tokens_alone():
    run, sae, x, W_U, d = scene("sum", n=90)
    protocol = dataclasses.replace(PROTOCOLS["A"], samples=1000)
    result = win_rate(run, sae, run.sample(None), protocol)
    for feature in result.per_feature:
        f = d[:, feature.feature]
        tokens = x[x @ f > 0]
        inner = tokens @ f
        ablated = kl(tokens, tokens - inner[:, None] * f, W_U)  # no sum: each token is by itself
        assert (feature.samples, feature.active_share) == (len(tokens), 1)
        assert feature.mean_kl == pytest.approx(ablated.mean(), rel=1e-4)
        cosine = correlation(ablated, inner / np.linalg.norm(tokens, axis=-1))
        assert feature.cosine == pytest.approx(cosine, abs=1e-4)
        assert feature.advantage == pytest.approx(abs(cosine) - abs(correlation(ablated, inner)), abs=1e-4)
    few = win_rate(run, sae, run.sample(None), dataclasses.replace(protocol, samples=12))
    assert [feature.samples for feature in few.per_feature] == [12] * 5
    again, another = (
        win_rate(run, sae, run.sample(None), dataclasses.replace(protocol, samples=12), seed=seed) for seed in (0, 1)
    )
    assert few.per_feature == again.per_feature != another.per_feature


def test_win_rates_within_norm_quartiles():
    run, sae, x, W_U, d = scene("itself")
    result = win_rate(run, sae, run.sample(None), dataclasses.replace(PROTOCOLS["C"], chosen_on=None))
    last = x[2::3]
    norms = np.linalg.norm(last, axis=-1)
    edges = np.quantile(norms, [0, 0.25, 0.5, 0.75, 1])
    advantages = np.zeros((4, 5))
    for q in range(4):
        rows = last[(norms >= edges[q]) & (norms < edges[q + 1] + (q == 3))]
        for i, f in enumerate(d.T):
            inner = rows @ f
            ablated = kl(rows, rows - inner[:, None] * f, W_U)
            cosine = correlation(ablated, abs(inner / np.linalg.norm(rows, axis=-1)))
            advantages[q, i] = cosine - correlation(ablated, abs(inner))
    for q, part in enumerate(result.by_norm):
        assert part == NormRangeWinRate(
            low=pytest.approx(edges[q]),
            high=pytest.approx(edges[q + 1]),
            samples=20 * 5,
            features=5,
            win_rate=(advantages[q] > 0).mean(),
            median_advantage=pytest.approx(np.median(advantages[q]), abs=1e-4),
        )
    assert result.win_rate_within_quartiles == pytest.approx((advantages > 0).mean())


def test_a_spread_of_norms_alone_can_decide_the_pooled_winner():
    # Simpson: the model reads the cosine, but only as far as it varies; at one norm per quartile both scores tie inside it
    run, sae, x, *_ = scene("direction", n=480)
    levels = torch.tensor([1.0, 4.0, 16.0, 64.0]).repeat_interleave(30)
    table = run.resumed.model.embed.weight.data
    last = torch.arange(2, 360, 3)
    table[last] = torch.nn.functional.normalize(table[last], dim=-1) * levels[:, None]
    run = clean_run(run.resumed.model, "hook", torch.arange(360).view(-1, 3))
    result = win_rate(run, sae, run.sample(None), dataclasses.replace(PROTOCOLS["C"], chosen_on=None))
    assert result.win_rate == 1.0
    assert [part.features for part in result.by_norm] == [5, 5, 5, 5]
    assert result.win_rate_within_quartiles == 0.5


def test_equal_norms_are_ties():
    run, sae, *_ = scene("itself", spread=0.0)
    result = win_rate(run, sae, run.sample(None), dataclasses.replace(PROTOCOLS["C"], chosen_on=None))
    assert (result.wins, result.ties, result.win_rate) == (0, 5, 0.5)


def test_the_cosine_ablation_takes_the_same_length_off_every_norm():
    run, sae, x, W_U, d = scene("itself")
    protocol = dataclasses.replace(PROTOCOLS["C"], removed="cosine", chosen_on=None)
    sample = run.sample(None)
    result = win_rate(run, sae, sample, protocol)
    last, median = x[2::3], sample.norms.median().item()
    for feature in result.per_feature:
        f = d[:, feature.feature]
        cosine = last @ f / np.linalg.norm(last, axis=-1)
        ablated = kl(last, last - median * cosine[:, None] * f, W_U)
        assert feature.mean_kl == pytest.approx(ablated.mean(), rel=1e-4)


def test_how_features_are_chosen():
    # feature 0 fires on every token at 1, feature 1 on three tokens at 50, feature 2 on half at 3, feature 3 never
    x = torch.zeros(40, 4)
    x[:, 0] = 1.0
    x[-3:, 1] = 50.0
    x[::2, 2] = 3.0
    sae = relu_sae(torch.eye(4))
    run = clean_run(FormulaModel(x, normal(4, V)), "hook", torch.arange(40).view(20, 2))

    def chosen(**changes):
        result = win_rate(run, sae, run.sample(None), dataclasses.replace(PROTOCOLS["B"], **changes))
        return [feature.feature for feature in result.per_feature]

    assert chosen() == [1, 2, 0]  # mean codes 3.75, 1.5, 1
    assert chosen(features=2) == [1, 2]
    assert chosen(chosen_by="firing_rate") == [0, 2, 1]
    assert chosen(min_active=4) == [2, 0]
    assert chosen(chosen_on=10) == [2, 0]
    sample = run.sample(None)
    earlier = sample.where(sample.contexts < 15)
    result = win_rate(run, sae, earlier, PROTOCOLS["B"])
    assert [feature.feature for feature in result.per_feature] == [2, 0]
    assert (result.tokens, result.samples) == (30, 2 * 15)
    with pytest.raises(ValueError, match="No feature is active on 41"):
        chosen(min_active=41)


def test_sinks_left_out_are_neither_chosen_by_nor_ablated_nor_counted():
    run, sae, x, W_U, d = scene("sum", n=90)
    table = run.resumed.model.embed.weight.data
    table[0::3] *= 1000  # the first token of every context
    table[5] *= 1000  # and the last of the second
    x = table.double().numpy()
    run = clean_run(run.resumed.model, "hook", torch.arange(90).view(-1, 3))
    sample = run.sample(100.0)
    assert int((~sample.ordinary).sum()) == 31
    result = win_rate(run, sae, sample.without_sinks(), PROTOCOLS["B"])
    assert result.samples == 5 * 29
    texts = np.delete(x.reshape(30, 3, D), 1, axis=0)
    for feature in result.per_feature:
        f = d[:, feature.feature]
        removed = (texts[:, 1:] @ f).sum(1)[:, None] * f
        expected = kl(texts.sum(1), texts.sum(1) - removed, W_U)
        assert feature.mean_kl == pytest.approx(expected.mean(), rel=1e-3)


def test_features_without_a_correlation_are_left_out():
    run, sae, *_ = scene("itself", n=27)  # 9 texts are fewer than 10
    result = win_rate(run, sae, run.sample(None), PROTOCOLS["B"])
    assert (result.features, result.features_left_out) == (0, 5)
    assert np.isnan([result.win_rate, result.win_rate_within_quartiles, result.cosine]).all()
    run, sae, *_ = scene("itself", n=90)
    sae.W_dec.data[2] = 0  # a direction of no length removes nothing
    result = win_rate(run, sae, run.sample(None), PROTOCOLS["B"])
    assert (result.features, result.features_left_out) == (4, 1)
    assert np.isnan(next(f.advantage for f in result.per_feature if f.feature == 2))


def test_rounding_noise_is_no_correlation():
    noise = 1e-12 * torch.arange(20, dtype=torch.float64)
    varied = torch.arange(20, dtype=torch.float64) ** 2
    predictors, group = torch.stack([noise, varied], dim=-1), torch.zeros(20, dtype=torch.int64)
    found = correlations(predictors, varied, group, 1)[0]
    assert found[0].isnan()
    assert found[1] == pytest.approx(1.0)
    assert correlations(predictors, noise, group, 1).isnan().all()


def test_the_result_is_json_and_a_protocol_that_is_none_is_refused():
    run, sae, *_ = scene("itself", n=60)
    for protocol in PROTOCOLS.values():
        result = win_rate(run, sae, run.sample(None), protocol)
        json.dumps(dataclasses.asdict(result))
    with pytest.raises(ValueError, match="context='texts' is none of 'alone', 'text'"):
        dataclasses.replace(PROTOCOLS["B"], context="texts")
    sample = run.sample(None)
    with pytest.raises(ValueError, match="the last token of no context"):
        win_rate(run, sae, sample.where(sample.positions == 0), PROTOCOLS["B"])

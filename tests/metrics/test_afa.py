"""AFA, epsilon-LBO and the ZF plot: the paper's formulas in float64, by hand and as bounds that must hold."""

import dataclasses
import json
import math

import pytest
import torch
from helpers import D_IN, ONE_PER_SELECTOR, make_activations, make_sae, save_inference
from sae_lens import StandardSAE, StandardSAEConfig, TopKSAE, TopKSAEConfig
from sae_lens.saes.transcoder import Transcoder, TranscoderConfig

from saelens_cosine.metrics.reconstruction.afa import afa, distribution, measure_afa, summarize_afa
from saelens_cosine.metrics.reconstruction.zf_points import zf_points

X = make_activations(200, D_IN, seed=4)


def hand_made(
    b_dec=(0.0, 0.0), rows=((3.0, 0.0), (0.0, 2.0), (0.6, 0.8)), cls=StandardSAE, cfg=StandardSAEConfig, **kw
):
    """Decoder rows of norm 3, 2 and 1; codes of (x, y) are relu of x, y and -x."""
    sae = cls(cfg(d_in=2, d_sae=3, apply_b_dec_to_input=False, **kw))
    sae.W_enc.data = torch.tensor([[1.0, 0.0, -1.0], [0.0, 1.0, 0.0]])
    sae.W_dec.data = torch.tensor(rows)
    sae.b_dec.data = torch.tensor(b_dec)
    return sae


def unit_dictionary(sae, bias):
    """Unit decoder rows `[h or h + 1, d_in]`, b_dec's direction the last, float64."""
    rows = sae.W_dec.detach().double()
    rows = torch.cat([rows, sae.b_dec.detach().double()[None]]) if bias == "augment" else rows
    return torch.nn.functional.normalize(rows, dim=-1)


def coefficients(sae, x, bias):
    """f of the paper by its definition, `[tokens, h or h + 1]` float64."""
    codes = sae.encode(x).to_dense().detach().double()
    if not getattr(sae.cfg, "rescale_acts_by_decoder_norm", False):
        codes = codes * sae.W_dec.detach().double().norm(dim=-1)
    b = sae.b_dec.detach().double().norm().expand(len(x), 1)
    return torch.cat([codes, b], dim=-1) if bias == "augment" else codes


def test_afa_is_the_norm():
    assert afa(torch.tensor([[3.0, 4.0]], dtype=torch.bfloat16)).dtype == torch.float32
    assert afa(torch.tensor([[3.0, 4.0], [0.0, 0.0]])).tolist() == [5, 0]


def test_one_token_by_hand():
    # z = (1, 2): codes (1, 2, 0), on unit directions f = (3, 4, 0); b_dec of norm 12; x_hat = (3, 4) + (0, 12)
    tokens = measure_afa(hand_made(b_dec=(0.0, 12.0)), torch.tensor([[1.0, 2.0]]))
    assert tokens.afa.item() == pytest.approx(math.sqrt(5))
    assert tokens.feature_norm.item() == pytest.approx(13)  # 9 + 16 + 144 = 169
    assert tokens.bias_norm == 12
    assert tokens.scale_free.item() == pytest.approx((169 - 5) / 169)
    assert tokens.epsilon_lbo.item() == pytest.approx((169 - 5) / (2 * 169))  # h - 1 = 2
    assert tokens.epsilon_active.item() == pytest.approx((169 - 5) / (2 * 169))  # K = 3 with the bias
    assert tokens.epsilon_l1.item() == pytest.approx((169 - 5) / (19**2 - 169))
    assert tokens.signed_gap.item() == pytest.approx((13 - math.sqrt(5)) / math.sqrt(5))
    assert tokens.normalized_mse.item() == pytest.approx((2**2 + 14**2) / 5)


@pytest.mark.parametrize("reference, bias, z, f, active", [
    ("input", "augment", math.sqrt(5), 13, 3),
    ("input", "center", math.sqrt(1 + 100), 5, 2),
    ("input", "ignore", math.sqrt(5), 5, 2),
    ("reconstruction", "augment", math.sqrt(9 + 256), 13, 3),
    ("reconstruction", "center", 5, 5, 2),
    ("reconstruction", "ignore", math.sqrt(9 + 256), 5, 2),
])  # fmt: skip
def test_references_and_biases_by_hand(reference, bias, z, f, active):
    tokens = measure_afa(hand_made(b_dec=(0.0, 12.0)), torch.tensor([[1.0, 2.0]]), reference, bias)
    assert (tokens.afa.item(), tokens.feature_norm.item()) == pytest.approx((z, f))
    assert tokens.active.item() == active
    assert tokens.scale_free.item() == pytest.approx(abs(z**2 / f**2 - 1))


@pytest.mark.parametrize("name", ONE_PER_SELECTOR)
def test_the_augmented_unit_dictionary_times_the_coefficients_is_the_reconstruction(name, tmp_path):
    # SAELens' training TopK rescales its codes by decoder norms in one of the two; both must come out the same
    for sae in (make_sae(name), save_inference(make_sae(name), tmp_path)):
        f, unit = coefficients(sae, X, "augment"), unit_dictionary(sae, "augment")
        tokens = measure_afa(sae, X, "reconstruction", "augment")
        torch.testing.assert_close(f @ unit, sae.decode(sae.encode(X)).detach().double(), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(tokens.afa, (f @ unit).norm(dim=-1), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(tokens.feature_norm, f.norm(dim=-1), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(tokens.l1, f.abs().sum(dim=-1), rtol=1e-5, atol=1e-6)
        assert torch.equal(tokens.active, (f != 0).sum(dim=-1).double())


@pytest.mark.parametrize("bias", ["augment", "ignore"])
def test_every_form_is_below_the_largest_cosine_of_the_dictionary(bias):
    sae = make_sae("cosine_standard")  # many active features, all cosines of 7 dimensions
    if bias == "ignore":
        sae.b_dec.data.zero_()
    unit = unit_dictionary(sae, bias)
    gram = (unit @ unit.T).abs() - torch.eye(len(unit))
    tokens = measure_afa(sae, X, "reconstruction", bias)
    pairs = tokens.active >= 2
    assert pairs.sum() > 190
    assert (tokens.epsilon_lbo <= tokens.epsilon_active + 1e-12)[pairs].all()
    assert (tokens.epsilon_active <= tokens.epsilon_l1 + 1e-12)[pairs].all()
    assert 0.05 < tokens.epsilon_l1.nan_to_num().max() <= gram.max() + 1e-6
    # two active unit directions: (f1^2 + f2^2 + 2 f1 f2 c) - (f1^2 + f2^2) over 2 f1 f2 is their cosine itself
    two = measure_afa(hand_made(rows=((3.0, 0.0), (1.2, 1.6), (0.6, 0.8))), 0.5 + X[:, :2].abs(), "reconstruction")
    assert two.epsilon_l1.tolist() == pytest.approx([0.6] * len(X), rel=1e-5)


def test_the_scale_free_value_is_that_of_the_ratio():
    tokens = measure_afa(make_sae("cosine_standard"), X)
    r = tokens.feature_norm / tokens.afa
    torch.testing.assert_close(tokens.epsilon_lbo * (13 - 1), (1 / r**2 - 1).abs())
    torch.testing.assert_close(tokens.scale_free, (1 / r**2 - 1).abs())
    torch.testing.assert_close(tokens.signed_gap, r - 1)
    doubled = measure_afa(make_sae("cosine_standard"), X)
    larger = dataclasses.replace(doubled, feature_norm=1e6 * doubled.feature_norm)
    assert larger.epsilon_lbo.max() <= 1 / 12  # too much activation never costs more than 1 / (h - 1)


def test_codes_that_hold_the_decoder_norms_already():
    topk = {"cls": TopKSAE, "cfg": TopKSAEConfig, "k": 2}
    x = torch.tensor([[1.0, 2.0]])
    plain = measure_afa(hand_made(**topk, rescale_acts_by_decoder_norm=False), x)
    assert plain.feature_norm.item() == pytest.approx(5)
    # the same weights with rescaled codes: code i is x_i times the norm of row i, 3 and 4, on unit rows
    rescaled = measure_afa(hand_made(**topk, rescale_acts_by_decoder_norm=True), x)
    assert rescaled.feature_norm.item() == pytest.approx(5)
    assert rescaled.normalized_mse.item() == plain.normalized_mse.item() == pytest.approx((2**2 + 2**2) / 5)


def test_sparse_codes():
    sae = make_sae("cosine_topk", use_sparse_activations=True)
    assert sae.encode(X).is_sparse
    dense = make_sae("cosine_topk", use_sparse_activations=False)
    torch.testing.assert_close(measure_afa(sae, X).feature_norm, measure_afa(dense, X).feature_norm)


def test_a_normalised_input_is_compared_where_the_decoder_writes():
    torch.manual_seed(0)
    sae = StandardSAE(StandardSAEConfig(d_in=D_IN, d_sae=20, normalize_activations="layer_norm"))
    sae.b_dec.data.normal_()
    tokens = measure_afa(sae, 100 + 50 * X, "input", "center")
    mu, std = (100 + 50 * X).mean(-1, keepdim=True), (100 + 50 * X).std(-1, keepdim=True)
    z = ((100 + 50 * X) - mu) / (std + 1e-5)
    torch.testing.assert_close(tokens.afa, (z - sae.b_dec).norm(dim=-1).double(), rtol=1e-4, atol=1e-4)
    x_hat = (sae.forward(100 + 50 * X) - mu) / std
    mse = (z - x_hat).square().sum(-1) / z.square().sum(-1)
    torch.testing.assert_close(tokens.normalized_mse, mse.double().detach(), rtol=1e-3, atol=1e-4)
    assert not hasattr(sae, "ln_mu")  # nothing is left on the SAE


def test_no_active_features_have_no_epsilon():
    x = torch.tensor([[1.0, 2.0], [0.0, -1.0], [0.0, 1.0], [0.0, 0.0]])  # codes (1, 2, 0), none, (0, 1, 0), none
    tokens = measure_afa(hand_made(), x)
    assert tokens.feature_norm.tolist() == pytest.approx([5, 0, 2, 0])
    for values in (tokens.epsilon_lbo, tokens.scale_free):
        assert values.isnan().tolist() == [False, True, False, True]
    for values in (tokens.epsilon_active, tokens.epsilon_l1):  # one active feature makes no pair
        assert values.isnan().tolist() == [False, True, True, True]
    assert tokens.signed_gap[1:3].tolist() == [-1, 1]
    assert tokens.signed_gap[3].isnan()
    assert tokens.normalized_mse.isnan().tolist() == [False, False, False, True]
    summary = summarize_afa(tokens)
    assert (summary.tokens, summary.without_features) == (4, 2)
    assert (summary.epsilon_lbo.tokens, summary.epsilon_lbo.undefined) == (2, 2)
    assert summary.scale_free.median == pytest.approx((20 / 25 + 3 / 4) / 2)
    assert summary.share_below == 1 / 4
    # with a bias every token has features
    assert summarize_afa(measure_afa(hand_made(b_dec=(0.0, 12.0)), x)).without_features == 0
    silent = summarize_afa(measure_afa(hand_made(), x[1:2]))
    assert math.isnan(silent.epsilon_lbo.median)
    assert (silent.epsilon_lbo.tokens, silent.epsilon_lbo.undefined) == (0, 1)


@pytest.mark.parametrize("bias", ["augment", "center"])
def test_a_summary_has_each_value_under_its_name(bias):
    sae = make_sae("cosine_topk")
    sae.log_scale.data -= 0.9  # to where some tokens have less than their norm and some more
    tokens = measure_afa(sae, X, bias=bias)
    summary = summarize_afa(tokens)
    names = ["afa", "feature_norm", "signed_gap", "scale_free", "epsilon_lbo", "epsilon_active", "epsilon_l1", "normalized_mse"]  # fmt: skip
    medians = [getattr(summary, name).median for name in names]
    assert medians == pytest.approx([getattr(tokens, name).double().nanquantile(0.5).item() for name in names])
    assert len(set(medians)) == 8
    assert summary.signed_gap.lower_quartile < 0 < summary.signed_gap.percentile_99
    assert (summary.tokens, summary.d_sae, summary.reference, summary.bias) == (200, 13, "input", bias)
    assert summary.bias_norm == tokens.bias_norm > 0


def test_distribution_by_hand():
    values = torch.cat([torch.arange(100.0), torch.tensor([1e6, torch.nan])])
    d = distribution(values)
    assert (d.tokens, d.undefined) == (101, 1)
    assert (d.lower_quartile, d.median, d.upper_quartile, d.percentile_99) == (25, 50, 75, 99)
    assert d.winsorised_mean == pytest.approx((4950 + 99) / 101)
    assert json.dumps(dataclasses.asdict(d))


def test_pieces_give_the_same(monkeypatch):
    sae = make_sae("per_feature_cosine_batchtopk")
    whole = summarize_afa(measure_afa(sae, X))
    monkeypatch.setattr("saelens_cosine.metrics.reconstruction.afa.tokens_at_once", lambda *_: 9)
    pieces = summarize_afa(measure_afa(sae, X))
    assert dataclasses.astuple(pieces.epsilon_lbo) == pytest.approx(dataclasses.astuple(whole.epsilon_lbo), rel=1e-5)


def test_refusals():
    sae = make_sae("cosine_topk")
    for wrong in [("output", "augment"), ("input", "subtract")]:
        with pytest.raises(ValueError, match="neither|none of"):
            measure_afa(sae, X, *wrong)
    with pytest.raises(ValueError, match="no tokens"):
        measure_afa(sae, X[:0])
    transcoder = Transcoder(TranscoderConfig(d_in=D_IN, d_sae=4, d_out=D_IN, apply_b_dec_to_input=False))
    with pytest.raises(ValueError, match="does not reconstruct"):
        measure_afa(transcoder, X)


def test_points():
    tokens = measure_afa(make_sae("cosine_batchtopk"), X)
    every = zf_points(tokens, "arm")
    assert (every.afa, every.feature_norm) == (tuple(tokens.afa.tolist()), tuple(tokens.feature_norm.tolist()))
    some = zf_points(tokens, "arm", max_points=50)
    assert len(some.afa) == len(some.feature_norm) == 50
    assert set(zip(some.afa, some.feature_norm, strict=True)) <= set(zip(every.afa, every.feature_norm, strict=True))
    assert some == zf_points(tokens, "arm", max_points=50)
    assert some != zf_points(tokens, "arm", max_points=50, seed=1)
    assert json.loads(json.dumps(dataclasses.asdict(some)))["reference"] == "input"

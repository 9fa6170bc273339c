"""Scaled inputs: codes go as s^a where nothing else intervenes, and noise on the norms costs what the formula says."""

import copy
import dataclasses
import importlib
import json
import math

import pytest
import torch
from helpers import D_IN, make_activations, make_sae, save_inference
from sae_lens import JumpReLUSAE, JumpReLUSAEConfig, StandardSAE, StandardSAEConfig

from saelens_cosine.metrics.codes import tokens_at_once
from saelens_cosine.metrics.norms.norm_noise import norm_noise, with_threshold_for
from saelens_cosine.metrics.norms.norm_response import code_exponents, norm_response, scores_about
from saelens_cosine.metrics.reconstruction.afa import measure_afa
from saelens_cosine.metrics.reconstruction.fve import explained_variance
from saelens_cosine.saes import CosineJumpReLUSAE, CosineJumpReLUSAEConfig

X = make_activations(300, D_IN, seed=3, spread=0.5)


def without_biases(name, **overrides):
    """In eval mode, b_enc and b_dec at 0."""
    sae = make_sae(name, **overrides)
    sae.b_enc.data.zero_()
    sae.b_dec.data.zero_()
    return sae


def jumprelu(threshold, d=2):
    sae = JumpReLUSAE(JumpReLUSAEConfig(d_in=d, d_sae=d))
    sae.W_enc.data, sae.W_dec.data = torch.eye(d), torch.eye(d)
    sae.threshold.data.fill_(threshold)
    return sae


def test_a_threshold_by_hand():
    # codes of (1, 2) above 1.5: at 1 only 2; at 1/2 none; at 2 both, 2 and 4
    half, twice = norm_response(jumprelu(1.5), torch.tensor([[1.0, 2.0]]), (0.5, 2.0)).at_scales
    assert twice.code_ratio == pytest.approx(3 / 2)  # (2 + 4) / 2 over 2
    assert twice.joint_code_ratio == twice.expected_ratio == pytest.approx(2)  # 4 over 2
    assert (twice.identical_sets, twice.overlap, twice.l0) == (0, 1 / 2, 2)
    assert twice.cosine == pytest.approx(4 / math.sqrt(4 + 16))
    assert (half.identical_sets, half.overlap, half.cosine, half.l0) == (0, 0, 0, 0)
    assert math.isnan(half.code_ratio)
    assert math.isnan(half.joint_code_ratio)


def test_tokens_without_codes():
    # (0, 0) has no codes at any scale, (1, 2) as above: sets agree for one of two, the cosine is that of the other
    measured = norm_response(jumprelu(1.5), torch.tensor([[0.0, 0.0], [1.0, 2.0]]), (2.0,))
    assert (measured.l0, measured.mean_code) == (0.5, 2)
    (twice,) = measured.at_scales
    assert twice.identical_sets == 0.5
    assert twice.overlap == pytest.approx((1 + 1 / 2) / 2)
    assert twice.cosine == pytest.approx(4 / math.sqrt(20))
    silent = norm_response(jumprelu(1.5), torch.zeros(3, 2), (2.0,)).at_scales[0]
    assert silent.identical_sets == silent.overlap == 1
    assert math.isnan(silent.cosine)


@pytest.mark.parametrize("name, power", [
    ("cosine_topk", 0.7), ("cosine_abstopk", 0.7), ("inner_product_topk", 1.0), ("magnitude_bypass_topk", 1.0),
    ("top_afa", 1.0),
])  # fmt: skip
def test_codes_grow_with_the_exponent(name, power):
    measured = norm_response(without_biases(name), X)
    assert [at.scale for at in measured.at_scales] == [0.5, 2, 5]
    for at in measured.at_scales:
        assert at.expected_ratio == pytest.approx(at.scale**power)
        assert at.code_ratio == pytest.approx(at.scale**power, rel=1e-3)
        assert at.joint_code_ratio == pytest.approx(at.scale**power, rel=1e-3)
        assert at.identical_sets > 0.99
        assert at.cosine == pytest.approx(1, abs=1e-4)
        assert at.l0 == pytest.approx(measured.l0, rel=0.01)


def test_features_with_exponents_of_their_own(tmp_path):
    sae = without_biases("per_feature_cosine_standard")
    a = torch.linspace(-0.5, 1.5, 13, dtype=torch.float64)
    w = sae.W_enc.detach().double()
    x = X.double()
    scale = x.norm(dim=-1, keepdim=True) ** a * sae.log_scale.detach().double().exp()
    codes = (scale * (x @ (w / w.norm(dim=0))) / x.norm(dim=-1, keepdim=True)).relu()
    for form in (sae, save_inference(sae, tmp_path)):
        assert code_exponents(form).tolist() == pytest.approx(a.tolist(), abs=1e-6)
        for at in norm_response(form, X).at_scales:
            scaled = codes * at.scale**a
            assert at.code_ratio == pytest.approx((scaled.sum() / codes.sum()).item(), rel=1e-4)
            assert at.joint_code_ratio == pytest.approx(at.expected_ratio, rel=1e-6)
            assert at.expected_ratio == pytest.approx((scaled.sum() / codes.sum()).item(), rel=1e-4)
            assert at.identical_sets == 1
            cosine = torch.nn.functional.cosine_similarity(codes, scaled, dim=-1)
            assert at.cosine == pytest.approx(cosine[codes.sum(dim=-1) > 0].mean().item(), rel=1e-4)


def test_the_decoder_bias_can_stay_in_place():
    sae = without_biases("cosine_topk")
    sae.b_dec.data.fill_(3.0)
    about_zero, about_b_dec = (norm_response(sae, X + 3, about=about) for about in ("zero", "b_dec"))
    assert about_b_dec.about == "b_dec"
    for at in about_b_dec.at_scales:
        assert at.code_ratio == pytest.approx(at.scale**0.7, rel=1e-3)
    assert all(at.identical_sets < 0.6 for at in about_zero.at_scales)


def two_axes(exponent, threshold, **settings):
    """Codes are the score along each of two axes, of what is left of b_dec = (0, 4)."""
    sae = CosineJumpReLUSAE(CosineJumpReLUSAEConfig(d_in=2, d_sae=2, **settings))
    sae.W_enc.data, sae.W_dec.data = torch.eye(2), torch.eye(2)
    sae.norm_exponent.data.fill_(exponent)
    sae.threshold.data.fill_(threshold)
    sae.b_dec.data = torch.tensor([0.0, 4.0])
    return sae


# b_dec and (3, 1), (1, 3), (1, 1), (3, 3)
PLANE = torch.tensor([[3.0, 5.0], [1.0, 7.0], [1.0, 5.0], [3.0, 7.0]])


def overlap_at_half(sae, about):
    return norm_response(sae, PLANE, (0.5,), about=about).at_scales[0].overlap


def test_a_cosine_keeps_its_active_features_about_b_dec_and_not_about_zero():
    # cosines with the axes .95 .32, .32 .95, .71 .71, .71 .71; above .5: {0}, {1}, both, both
    cosine = two_axes(0.0, 0.5)
    assert norm_response(cosine, PLANE, (0.5,)).l0 == 6 / 4
    assert overlap_at_half(cosine, "b_dec") == 1
    # x / 2 - b_dec is (1.5, -1.5), (.5, -.5), (.5, -1.5), (1.5, -.5), with cosines .71, .71, .32, .95 to the first axis, below 0
    # to the other: {0}, {0}, none, {0} of {0}, {1}, both, both
    assert overlap_at_half(cosine, "zero") == (1 + 0 + 0 + 1 / 2) / 4
    # an inner product above .9, which all of 3 1, 1 3, 1 1, 3 3 are: of 1.5 .5, .5 1.5, .5 .5, 1.5 1.5 not
    assert overlap_at_half(two_axes(1.0, 0.9), "b_dec") == (1 / 2 + 1 / 2 + 0 + 1) / 4


def test_a_response_says_how_long_b_dec_is():
    # norms of PLANE: 34, 50, 26, 58 under the root
    median = (34**0.5 + 50**0.5) / 2
    for about in ("zero", "b_dec"):
        measured = norm_response(two_axes(0.0, 0.5), PLANE, about=about)
        assert measured.bias_ratio == pytest.approx(4 / median)
        assert (measured.about, measured.scores_about) == (about, "b_dec")
    assert norm_noise(two_axes(0.0, 0.5), PLANE, about="b_dec").about == "b_dec"
    assert norm_response(without_biases("cosine_topk"), X).bias_ratio == 0


def test_an_sae_that_does_not_subtract_b_dec_keeps_its_active_features_about_zero():
    # scores are of x: cosines with the axes .51 .86, .14 .99, .20 .98, .39 .92, above .5 {both}, {1}, {1}, {1}
    uncentred = two_axes(0.0, 0.5, apply_b_dec_to_input=False)
    assert scores_about(uncentred) == norm_response(uncentred, PLANE).scores_about == "zero"
    assert overlap_at_half(uncentred, "zero") == 1
    # b_dec + (x - b_dec) / 2 is (1.5, 4.5), (.5, 5.5), (.5, 4.5), (1.5, 5.5): the first axis is below .5 everywhere
    assert overlap_at_half(uncentred, "b_dec") == (1 / 2 + 1 + 1 + 1) / 4
    normalised = StandardSAE(StandardSAEConfig(d_in=D_IN, d_sae=20, normalize_activations="layer_norm"))
    assert scores_about(normalised) is None
    assert math.isnan(norm_response(normalised, X, (2.0,)).bias_ratio)


def test_noise_about_b_dec_is_that_of_the_formula():
    # an inner-product TopK without b_enc reconstructs b_dec + u (x - b_dec) as b_dec + u (x_hat - b_dec)
    sae = without_biases("inner_product_topk")
    b = torch.full((D_IN,), 3.0)
    sae.b_dec.data.copy_(b)
    x = X + 3
    u = 0.5 + 1.5 * torch.rand(300, 1, generator=torch.Generator().manual_seed(5))
    x_hat = sae.decode(sae.encode(x)).detach()
    measured = norm_noise(sae, x, seed=5, about="b_dec")
    assert measured.noisy.fve == pytest.approx(explained_variance(b + u * X, b + u * (x_hat - b)), rel=1e-4)
    assert measured.noisy.l0 == measured.clean.l0
    assert norm_noise(sae, x, seed=5).noisy.fve != pytest.approx(measured.noisy.fve, rel=0.05)  # codes turn


@pytest.mark.parametrize("mode, power", [("none", 1), ("layer_norm", 0), ("constant_norm_rescale", 0)])
def test_saelens_own_classes(mode, power):
    torch.manual_seed(0)
    sae = StandardSAE(StandardSAEConfig(d_in=D_IN, d_sae=20, normalize_activations=mode))
    (at,) = norm_response(sae, X, (2.0,)).at_scales
    assert at.expected_ratio == 2**power
    assert at.code_ratio == pytest.approx(2**power, rel=1e-4)
    if mode != "none":
        with pytest.raises(ValueError, match="about='b_dec'"):
            norm_response(sae, X, about="b_dec")


def test_pieces_give_the_same(monkeypatch):
    sae = make_sae("per_feature_cosine_batchtopk")
    whole = norm_response(sae, X)
    monkeypatch.setattr("saelens_cosine.metrics.norms.norm_response.tokens_at_once", lambda *_: 7)
    pieces = norm_response(sae, X)
    for one, other in zip(pieces.at_scales, whole.at_scales, strict=True):
        assert dataclasses.astuple(one) == pytest.approx(dataclasses.astuple(other), rel=1e-5)


@pytest.mark.parametrize(
    "module, run, bound, sizes",
    [
        ("norms.norm_response", norm_response, "SCALED", "d_sae"),
        ("reconstruction.afa", measure_afa, "MEASURED", "d_in"),
    ],
)
def test_few_tokens_are_held_at_a_time_however_many_are_encoded(module, run, bound, sizes, tmp_path, monkeypatch):
    # of long tokens nearly all features may be active, and inputs are held in float64
    sae = save_inference(make_sae("cosine_batchtopk"), tmp_path)
    assert tokens_at_once(sae, X) > 1024
    where = importlib.import_module(f"saelens_cosine.metrics.{module}")
    read = "entry_codes" if run is norm_response else "reconstruct"
    held, own = [], getattr(where, read)
    monkeypatch.setattr(where, read, lambda sae, x: held.append(len(x)) or own(sae, x))
    for tokens in (1200, 1024):
        held.clear()
        monkeypatch.setattr(where, f"{bound}_AT_ONCE", tokens * getattr(sae.cfg, sizes) if tokens > 1024 else 1)
        run(sae, X.repeat(10, 1))
        assert max(held) == tokens


def test_refusals():
    for wrong in [{"scales": (0.0,)}, {"scales": (math.inf,)}, {"about": "mean"}, {"activations": X[:0]}]:
        with pytest.raises(ValueError, match="positive scales|about='mean'"):
            norm_response(make_sae("cosine_topk"), **{"activations": X, **wrong})
    with pytest.raises(ValueError, match=r"sae\.eval\(\)"):
        norm_response(make_sae("cosine_batchtopk").train(), X)
    with pytest.raises(ValueError, match="about='mean'"):
        norm_noise(make_sae("cosine_topk"), X, about="mean")
    for low, high in [(0.0, 1.0), (2.0, 1.0)]:
        with pytest.raises(ValueError, match="low"):
            norm_noise(make_sae("cosine_topk"), X, low, high)


def test_noise_on_an_sae_that_scales_with_its_input():
    # without biases an inner-product TopK reconstructs u x as u x_hat, so both figures follow from x and x_hat
    sae = without_biases("inner_product_topk")
    measured = norm_noise(sae, X, seed=5)
    u = 0.5 + 1.5 * torch.rand(300, 1, generator=torch.Generator().manual_seed(5))
    x_hat = sae.decode(sae.encode(X)).detach()
    assert measured.clean.fve == pytest.approx(explained_variance(X, x_hat), rel=1e-5)
    assert measured.noisy.fve == pytest.approx(explained_variance(u * X, u * x_hat), rel=1e-4)
    assert measured.drop == pytest.approx(measured.clean.fve - measured.noisy.fve)
    assert measured.noisy_refitted is measured.clean_refitted is measured.drop_refitted is None


def test_noise_with_the_threshold_fitted_again():
    sae = jumprelu(1.0, d=D_IN)
    before = copy.deepcopy(sae.state_dict())
    measured = norm_noise(sae, X)
    assert all(torch.equal(before[name], value) for name, value in sae.state_dict().items())
    u = 0.5 + 1.5 * torch.rand(300, 1, generator=torch.Generator().manual_seed(0))
    noisy = (u * X).double()
    wanted = int((X > 1).sum())
    assert measured.clean.l0 == measured.clean_refitted.l0 == measured.noisy_refitted.l0 == wanted / 300
    assert measured.noisy.l0 == (noisy > 1).sum() / 300
    assert measured.noisy.l0 > 1.05 * measured.clean.l0
    assert measured.clean_refitted.fve == pytest.approx(measured.clean.fve, rel=1e-6)  # one threshold before and after
    cut = noisy.flatten().sort(descending=True).values[wanted - 1]

    def fve(threshold):  # identity weights: what is above the threshold is reconstructed exactly
        return 1 - (noisy * (noisy <= threshold)).var(0).sum() / noisy.var(0).sum()

    assert measured.noisy.fve == pytest.approx(fve(1.0).item(), rel=1e-5)
    assert measured.noisy_refitted.fve == pytest.approx(fve(cut * (1 - 1e-12)).item(), rel=1e-5)
    assert measured.drop_refitted == measured.clean_refitted.fve - measured.noisy_refitted.fve
    assert json.loads(json.dumps(dataclasses.asdict(measured), allow_nan=False))["clean"]["l0"] == wanted / 300


def test_thresholds_of_their_own_become_one_in_the_control_too():
    sae = jumprelu(1.0, d=D_IN)
    sae.threshold.data = torch.linspace(0.2, 3, D_IN)
    measured = norm_noise(sae, X, 1.0, 1.0)  # no noise
    assert measured.drop == measured.drop_refitted == 0
    assert measured.clean_refitted.fve != pytest.approx(measured.clean.fve, rel=1e-3)
    assert measured.clean_refitted.l0 == measured.clean.l0


def test_a_refitted_sae_shares_its_weights():
    sae = jumprelu(1.0, d=D_IN)
    refitted, threshold = with_threshold_for(sae, X, 2.0)
    assert threshold.l0 == 2
    assert refitted.W_dec.data_ptr() == sae.W_dec.data_ptr()
    assert (sae.threshold == 1).all()
    assert (refitted.threshold != 1).all()
    assert (refitted.encode(X) != 0).sum() == 2 * len(X)

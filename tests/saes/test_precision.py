"""What stays float32 or wider, whatever the dtype of the SAE, and what bfloat16 costs."""

import copy

import pytest
import torch
from helpers import (
    BATCHTOPK,
    COSINE,
    EXPONENT,
    FAST,
    FREE_DECODER,
    OURS,
    TRAINING,
    Batches,
    make_activations,
    make_sae,
    make_trainer,
    save_inference,
    train_step,
)
from sae_lens import SAE, TrainingSAE

from saelens_cosine.saes.scored_sae import ScoredSAE

U = 2.0**-8
"""Unit roundoff of bfloat16: rounding to 8 significant bits changes a value by at most this share of itself."""

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def wide_tensors(sae):
    names = ("norm_exponent", "norm_exponent_base", "log_scale", "threshold", "threshold_unit", "topk_threshold")
    found = {name: getattr(sae, name) for name in names if hasattr(sae, name)}
    return {name: tensor.detach().clone() for name, tensor in found.items()}


def assert_unrounded(before, after):
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert after[name].dtype in (torch.float32, torch.float64), name
        assert torch.equal(after[name].double(), value.to(after[name].dtype).double()), name


@pytest.mark.parametrize("name", TRAINING)
@pytest.mark.parametrize("narrow", [lambda s: s.to(torch.bfloat16), lambda s: s.bfloat16(), lambda s: s.half()])
def test_training_sae_cast(name, narrow):
    sae = make_sae(name)
    before = wide_tensors(sae)
    narrow(sae)
    assert sae.W_enc.dtype in (torch.bfloat16, torch.float16)
    assert_unrounded(before, wide_tensors(sae))


@pytest.mark.parametrize("name", EXPONENT)
def test_inference_sae_cast(name, tmp_path):
    sae = save_inference(make_sae(name), tmp_path)
    before = wide_tensors(sae)
    assert "norm_exponent" in before
    sae.to(torch.bfloat16)
    assert sae.W_enc.dtype == torch.bfloat16
    assert_unrounded(before, wide_tensors(sae))


def test_cast_there_and_back_changes_no_exponent():
    sae = make_sae("per_feature_cosine_batchtopk", exponent_sharing="base_delta")
    sae.norm_exponent_base.data.fill_(0.3)
    before = wide_tensors(sae)
    sae.to(torch.bfloat16).to(torch.float32)
    assert_unrounded(before, wide_tensors(sae))
    assert sae.norm_exponent.dtype == sae.W_enc.dtype == torch.float32


def test_built_in_bfloat16():
    # log sqrt(7) = 0.97296; the nearest bfloat16 is 0.97265625
    sae = make_sae("cosine_topk", seed=None, dtype="bfloat16", norm_exponent_init=0.3)
    assert sae.W_enc.dtype == torch.bfloat16
    assert sae.norm_exponent.dtype == sae.log_scale.dtype == torch.float32
    assert sae.log_scale.item() == pytest.approx(0.97296, abs=1e-5)


def fit_few_steps(sae, steps=4, **overrides):
    data = Batches(lambda i: make_activations(32, sae.cfg.d_in, seed=i))
    make_trainer(sae, data, steps=steps, batch=32, **overrides).fit()


@pytest.mark.parametrize("name", [*COSINE, "inner_product_batchtopk"])
def test_autocast_training_updates_what_stays_wide(name):
    sae = make_sae(name)
    before = wide_tensors(sae)
    fit_few_steps(sae, autocast=True)
    after = wide_tensors(sae)
    assert before
    for key, value in before.items():
        assert after[key].dtype == value.dtype
        assert not torch.equal(after[key], value), key


@pytest.mark.parametrize("name", COSINE)
def test_training_in_bfloat16_moves_by_less_than_a_bfloat16_step(name):
    # Adam's first step is lr = 1e-4. A bfloat16 near 3.125 moves in steps of 2^-6 = 0.0156, so it would not move.
    sae = make_sae(name, seed=None, dtype="bfloat16", log_scale_init=3.125)
    fit_few_steps(sae, steps=1, lr=1e-4)
    moved = (sae.log_scale.detach() - 3.125).abs()
    assert moved.max().item() == pytest.approx(1e-4, rel=0.05)


@pytest.mark.parametrize("name", BATCHTOPK)
def test_threshold_average_is_not_rounded_by_a_bfloat16_sae(name):
    # 1 + 0.05 (1.0078125 - 1) = 1.000390625; bfloat16 has nothing between 1 and 1.0078125
    sae = make_sae(name, topk_threshold_lr=0.05).to(torch.bfloat16)
    sae.topk_threshold.fill_(1.0)
    sae.update_topk_threshold(torch.tensor([[1.0078125, 0.0]], dtype=torch.bfloat16))
    assert sae.topk_threshold.item() == pytest.approx(1.000390625, abs=1e-7)


@pytest.mark.parametrize("name", COSINE)
def test_saved_sae_loaded_in_bfloat16(name, tmp_path):
    # SAELens rounds every tensor before the class sees it, so one rounding is allowed and no more
    sae = make_sae(name)
    sae.save_inference_model(tmp_path)
    narrow = SAE.load_from_disk(tmp_path, dtype="bfloat16")
    assert narrow.W_enc.dtype == torch.bfloat16
    assert narrow.norm_exponent.dtype == torch.float32
    assert torch.equal(narrow.norm_exponent.double(), sae.norm_exponent.bfloat16().double())
    if hasattr(narrow, "threshold"):
        assert narrow.threshold.dtype == torch.float32
        exact = sae.topk_threshold if name in BATCHTOPK else sae.score_thresholds()
        assert torch.equal(narrow.threshold, exact.bfloat16().float().expand(13))


@pytest.mark.parametrize("name", TRAINING)
def test_checkpoint_loaded_in_bfloat16(name, tmp_path):
    sae = make_sae(name)
    sae.save_model(tmp_path)
    narrow = TrainingSAE.load_from_disk(tmp_path, dtype="bfloat16")
    assert narrow.W_enc.dtype == torch.bfloat16
    for key, value in wide_tensors(sae).items():
        loaded = getattr(narrow, key)
        assert loaded.dtype in (torch.float32, torch.float64), key
        assert torch.equal(loaded.double(), value.bfloat16().double()), key


@pytest.mark.parametrize("name", TRAINING)
def test_float64_stays_float64(name, tmp_path):
    sae = make_sae(name, dtype="float64")
    inference = save_inference(sae, tmp_path)
    x = make_activations(6, 7, dtype=torch.float64)
    for each in (sae, inference):
        for key, tensor in each.named_parameters():
            # SAELens trains thresholds in float32, whatever the SAE is
            assert tensor.dtype == (torch.float32 if key == "threshold" and each is sae else torch.float64), key
        assert each.encode(x).dtype == each(x).dtype == torch.float64
    # a float32 anywhere on the way would leave 1e-8
    torch.testing.assert_close(inference(x), sae(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["cosine_topk", "cosine_batchtopk"])
def test_float64_scores_are_computed_in_float64(name):
    sae = make_sae(name, dtype="float64")
    x = make_activations(6, 7, dtype=torch.float64)
    x_c = x - sae.b_dec
    n = x_c.square().sum(-1, keepdim=True).sqrt()
    cosine = x_c @ (sae.W_enc / sae.W_enc.square().sum(0).sqrt()) / n
    expected = sae.log_scale.exp() * n**sae.norm_exponent * cosine + sae.b_enc
    torch.testing.assert_close(sae.encode_with_hidden_pre(x)[1], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", TRAINING)
@pytest.mark.parametrize("x_dtype", DTYPES)
@pytest.mark.parametrize("sae_dtype", [torch.float32, torch.bfloat16])
def test_output_has_the_input_s_dtype_and_codes_the_sae_s(name, x_dtype, sae_dtype, tmp_path):
    sae = make_sae(name)
    for each in (sae, save_inference(sae, tmp_path)) if name in OURS else (sae,):
        each.to(sae_dtype)
        x = make_activations(5, 7, dtype=x_dtype)
        assert each(x).dtype == x_dtype
        assert each.encode(x).dtype == sae_dtype


def test_centring_keeps_bits_that_bfloat16_has_no_room_for():
    # 258 and 1 are bfloat16 numbers, their difference 257 is not: neighbours in [256, 512) are 2 apart
    sae = make_sae("cosine_topk", d_in=2, d_sae=1, k=1, dtype="bfloat16")
    sae.b_dec.data = torch.tensor([1.0, 0.0], dtype=torch.bfloat16)
    centred = sae.process_sae_in(torch.tensor([[258.0, 0.0]]))
    assert centred.dtype == torch.float32
    assert centred.tolist() == [[257.0, 0.0]]


@pytest.mark.parametrize("name", ["cosine_topk", "cosine_batchtopk"])
def test_norm_is_taken_of_the_unrounded_centred_input(name):
    # x_c = (257, 0), w = (1, 0): cos = 1 exactly, so at a = 1, b = 0 the score is n = 257; centred in bfloat16, 256.
    sae = make_sae(name, d_in=2, d_sae=1, k=1, dtype="bfloat16", norm_exponent_init=1.0, log_scale_init=0.0, seed=None)
    sae.b_dec.data = torch.tensor([1.0, 0.0], dtype=torch.bfloat16)
    sae.W_enc.data = torch.tensor([[1.0], [0.0]], dtype=torch.bfloat16)
    score = sae.encode_with_hidden_pre(torch.tensor([[258.0, 0.0]], dtype=torch.bfloat16))[1]
    assert score.item() == pytest.approx(257.0, abs=1e-3)


def score_error_and_bound(sae, x):
    """Error of a bfloat16 copy's scores, and the largest that the rounding of its inputs can make it.

    x_j, b_dec_j and w_ij round to within U of themselves, so x_c,j moves by up to e_j = U (|x_j| + |b_dec_j|): where
    ||b_dec|| is much larger than ||x_c|| this dominates, and no precision of the subtraction can undo it. What float32
    centring and norms save is a rounding of x_c itself, which would add U sum |terms|, and of n.
    A term is S x_c,j w_ij with S = e^b n^(a-1) / ||w_i||. To first order:
        sum_j S e_j |w_ij|                     from x_c
        |a - 1| ||e|| / n * sum |terms|        from n
        U (1 + 1 + 1 + 1) sum |terms|          from w_ij, ||w_i||, the operand's cast and the product's
        U |b_enc|
    Second order is covered by 1.2 as long as ||e|| / n < 0.1: 0.9^(a-1) <= 0.9^-1.5 = 1.17 here.
    """
    narrow = copy.deepcopy(sae).to(torch.bfloat16)
    error = (narrow.encode_with_hidden_pre(x)[1] - sae.encode_with_hidden_pre(x)[1]).abs()
    x_c = x - sae.b_dec
    n = x_c.norm(dim=-1, keepdim=True)
    a = sae.norm_exponent
    e = U * (x.abs() + sae.b_dec.abs())
    assert (e.norm(dim=-1, keepdim=True) / n).max() < 0.1
    S = sae.log_scale.exp() * n ** (a - 1) / sae.W_enc.norm(dim=0)
    terms = S * (x_c.abs() @ sae.W_enc.abs())
    from_input = S * (e @ sae.W_enc.abs())
    from_norm = (a - 1).abs() * e.norm(dim=-1, keepdim=True) / n * terms
    return error, 1.2 * (from_input + from_norm + 4 * U * terms + U * sae.b_enc.abs())


@pytest.mark.parametrize("name", ["cosine_batchtopk", "per_feature_cosine_topk"])
@pytest.mark.parametrize("ratio", [0.0, 1.0, 5.0])
@torch.no_grad()
def test_bfloat16_costs_no_more_than_rounding_its_inputs(name, ratio):
    # ratio: ||b_dec|| / ||x - b_dec||
    sae = make_sae(name, d_in=64, d_sae=33)
    centred = make_activations(200, 64, spread=0.2)
    sae.b_dec.copy_(ratio * centred.norm(dim=-1).mean() * torch.nn.functional.normalize(sae.b_dec, dim=0))
    error, bound = score_error_and_bound(sae, centred + sae.b_dec)
    assert error.max() > 1e-3  # bfloat16 was really used
    assert (error <= bound).all()


@torch.no_grad()
def test_bfloat16_bound_catches_a_rounded_exponent():
    # a = 1.496 rounds to 1.5; at n = e^20 that is exp(0.004 * 20) = 1.08 times the score, against about 6 U = 1.02
    sae = make_sae("cosine_topk", d_in=64, d_sae=33)
    sae.norm_exponent.fill_(1.496)
    sae.b_dec.zero_()
    sae.b_enc.zero_()
    x = make_activations(50, 64, spread=0.0)
    x = x / x.norm(dim=-1, keepdim=True) * 4.85e8
    sae.W_enc.copy_(x[:33].T)  # aligned, so that sum |terms| is the score itself for the first 33 pairs
    error, bound = score_error_and_bound(sae, x)
    assert (error <= bound).all()
    exact = copy.deepcopy(sae)
    exact.norm_exponent.fill_(1.5)
    error = (exact.encode_with_hidden_pre(x)[1] - sae.encode_with_hidden_pre(x)[1]).abs()
    assert (error > bound).any()


def test_decoder_norms_in_the_selection_keep_their_dtype(tmp_path):
    sae = make_sae("per_feature_cosine_batchtopk", **FREE_DECODER).to(torch.bfloat16)
    assert sae.encode_with_hidden_pre(make_activations(4, 7))[1].dtype == torch.float32


def scored_in_float64(sae, x):
    """The definition, in float64 from the parameters of a training or an inference form: scores before the selection."""
    p = {name: tensor.double() for name, tensor in sae.state_dict().items()}
    x_c = x.double() - p["b_dec"]
    n = x_c.square().sum(-1, keepdim=True).sqrt()
    a = p.get("norm_exponent", torch.tensor(0.0 if "magnitude" in sae.cfg.architecture() else 1.0).double())
    product = x_c / n @ p["W_enc"]
    if "log_scale" in p or (isinstance(sae, TrainingSAE) and "magnitude" in sae.cfg.architecture()):
        product = product / p["W_enc"].square().sum(0).sqrt()
    scale = (a * n.log() + p.get("log_scale", torch.zeros(()).double())).exp()
    return scale * product + (0 if "gated" in sae.cfg.architecture() else p["b_enc"])


@pytest.mark.parametrize("name", TRAINING)
@torch.no_grad()
def test_double_is_exact_to_the_formula_in_float64(name, tmp_path):
    sae = make_sae(name)
    x = make_activations(6, 7, dtype=torch.float64)
    for each in (sae, save_inference(sae, tmp_path)):
        if not isinstance(each, ScoredSAE):  # inner products are saved as SAELens' own
            continue
        each.double()
        assert each.cfg.dtype == "float64"
        assert each.encode(x).dtype == each(x).dtype == each.W_enc.dtype == each.dtype == torch.float64
        assert each(x.float()).dtype == torch.float32
        wanted = scored_in_float64(each, x)
        torch.testing.assert_close(each.score(each.process_sae_in(x)), wanted, rtol=1e-12, atol=1e-12)
        codes = each.encode(x)
        # a selected score is the code, but for what a selector does with it
        if not any(part in name for part in ("gated", "magnitude", "top_afa")):
            assert (codes != 0).any()
            torch.testing.assert_close(codes, torch.where(codes != 0, wanted, 0), rtol=1e-12, atol=1e-12)
        if not getattr(each.cfg, "rescale_acts_by_decoder_norm", False):
            torch.testing.assert_close(each(x), codes @ each.W_dec + each.b_dec, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", FAST)
def test_double_trains_in_float64(name):
    gradients = []
    for kernels in ("reference", "fast"):
        sae = make_sae(name, kernels=kernels).double().train()
        step = train_step(sae, make_activations(16, 7, dtype=torch.float64), step=1)
        assert step.loss.dtype == step.sae_out.dtype == torch.float64
        step.loss.backward()
        gradients.append(sae.W_enc.grad)
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-10)  # a float32 on the way would leave 1e-7

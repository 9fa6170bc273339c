"""The score against its formula, written out a second time in float64."""

import math

import pytest
import torch
from helpers import make_activations

from saelens_cosine.score import NORM_FLOOR, cosine_score, fold_scale, folded_score

SIZES = [(7, 13), (1, 1), (3, 1), (1, 5), (16, 33)]
SHAPES = [(), (4,), (2, 3)]


def make_weights(d_in=7, d_sae=13, per_feature=True, seed=3, dtype=torch.float64):
    """W_enc, b_enc, norm_exponent, log_scale; exponents from -0.5 to 1.5, or 0.7."""
    rng = torch.Generator().manual_seed(seed)
    W_enc = torch.randn(d_in, d_sae, generator=rng, dtype=torch.float64)
    b_enc = torch.randn(d_sae, generator=rng, dtype=torch.float64)
    if per_feature:
        a = torch.linspace(-0.5, 1.5, d_sae, dtype=torch.float64)
        b = torch.randn(d_sae, generator=rng, dtype=torch.float64)
    else:
        a, b = torch.tensor(0.7, dtype=torch.float64), torch.tensor(-0.4, dtype=torch.float64)
    return [t.to(dtype) for t in (W_enc, b_enc, a, b)]


def score_by_loops(x_centered, W_enc, b_enc, a, b):
    """pre_i = exp(a_i log n + b_i) cos_i + b_enc_i for one token, in Python floats."""
    x = x_centered.tolist()
    d_in, d_sae = W_enc.shape
    n = max(math.sqrt(sum(v * v for v in x)), 1e-8)
    scores = []
    for i in range(d_sae):
        w = W_enc[:, i].tolist()
        w_norm = math.sqrt(sum(v * v for v in w))
        cosine = sum(x[j] / n * w[j] / w_norm for j in range(d_in))
        a_i, b_i = (t.item() if t.ndim == 0 else t[i].item() for t in (a, b))
        scores.append(math.exp(a_i * math.log(n) + b_i) * cosine + b_enc[i].item())
    return torch.tensor(scores, dtype=torch.float64)


def score_by_powers(x, b_dec, W_enc, b_enc, a, b):
    """The same, differentiable, with the powers written as powers: e^b n^(a-1) <x_c, w / |w|> + b_enc."""
    x_c = x - b_dec
    n = x_c.square().sum(-1, keepdim=True) ** 0.5
    unit = W_enc / W_enc.square().sum(0) ** 0.5
    return torch.exp(b) * n ** (a - 1) * torch.einsum("...d,df->...f", x_c, unit) + b_enc


def test_by_hand():
    # x_c = (3, 4): n = 5. Columns (2, 0), (0, -1), (3, 4) have cosines 3/5, -4/5, 1.
    # a = (0, 1, 2), b = (0, log 2, 0): scales 1, 2 * 5, 25. Scores 0.6 + 1, -8 + 1, 25 + 1.
    x = torch.tensor([3.0, 4.0])
    W_enc = torch.tensor([[2.0, 0.0, 3.0], [0.0, -1.0, 4.0]])
    a, b = torch.tensor([0.0, 1.0, 2.0]), torch.tensor([0.0, math.log(2), 0.0])
    scores = cosine_score(x, W_enc, torch.ones(3), a, b)
    torch.testing.assert_close(scores, torch.tensor([1.6, -7.0, 26.0]))


@pytest.mark.parametrize(("d_in", "d_sae"), SIZES)
@pytest.mark.parametrize("per_feature", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_values(d_in, d_sae, per_feature, shape):
    weights = make_weights(d_in, d_sae, per_feature)
    x = make_activations(*shape, d_in, spread=2.0, dtype=torch.float64)
    expected = torch.stack([score_by_loops(row, *weights) for row in x.reshape(-1, d_in)])
    scores = cosine_score(x, *weights)
    assert scores.shape == (*shape, d_sae)
    torch.testing.assert_close(scores, expected.reshape(*shape, d_sae), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("per_feature", [False, True])
def test_every_gradient_equals_the_formula_s(per_feature):
    weights = make_weights(per_feature=per_feature)
    x = make_activations(5, 7, spread=1.0, dtype=torch.float64)
    b_dec = make_activations(7, seed=9, spread=0.0, dtype=torch.float64)
    upstream = make_activations(5, 13, seed=8, dtype=torch.float64)
    names = ("x", "b_dec", "W_enc", "b_enc", "norm_exponent", "log_scale")
    ours = [t.clone().requires_grad_() for t in (x, b_dec, *weights)]
    theirs = [t.clone().requires_grad_() for t in (x, b_dec, *weights)]
    cosine_score(ours[0] - ours[1], *ours[2:]).backward(upstream)
    score_by_powers(*theirs).backward(upstream)
    for name, one, other in zip(names, ours, theirs, strict=True):
        assert other.grad.abs().max() > 0.1, name
        torch.testing.assert_close(
            one.grad, other.grad, rtol=1e-10, atol=1e-11, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize("per_feature", [False, True])
def test_every_gradient_equals_finite_differences(per_feature):
    x = make_activations(3, 7, dtype=torch.float64)
    b_dec = make_activations(7, seed=9, dtype=torch.float64)
    inputs = [t.requires_grad_() for t in (x, b_dec, *make_weights(per_feature=per_feature))]
    assert torch.autograd.gradcheck(lambda x, b_dec, *weights: cosine_score(x - b_dec, *weights), inputs)


@pytest.mark.parametrize("per_feature", [False, True])
def test_folded_gradients_equal_finite_differences(per_feature):
    x = make_activations(3, 7, dtype=torch.float64)
    W_enc, b_enc, a, _ = make_weights(per_feature=per_feature)
    inputs = [t.requires_grad_() for t in (x, W_enc, b_enc, a)]
    assert torch.autograd.gradcheck(folded_score, inputs)


def test_gradient_of_the_encoder_is_orthogonal_to_it():
    # a cosine does not see the length of w_i
    W_enc, *rest = make_weights()
    W_enc.requires_grad_()
    cosine_score(make_activations(5, 7, dtype=torch.float64), W_enc, *rest).square().sum().backward()
    inner = (W_enc.grad * W_enc.detach()).sum(0).abs() / W_enc.grad.norm(dim=0) / W_enc.detach().norm(dim=0)
    assert inner.max() < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("per_feature", [False, True])
def test_finite_where_the_input_is_the_decoder_bias(dtype, per_feature):
    # x_c = 0: every cosine is 0, so the score is b_enc whatever n's floor is
    inputs = [torch.zeros(2, 7, dtype=dtype), *make_weights(per_feature=per_feature, dtype=dtype)]
    inputs = [t.requires_grad_() for t in inputs]
    scores = cosine_score(*inputs)
    assert torch.equal(scores, inputs[2].expand(2, 13))
    scores.sum().backward()
    for tensor in inputs:
        assert tensor.grad.isfinite().all()


@pytest.mark.parametrize("per_feature", [False, True])
def test_folded_is_finite_where_the_input_is_the_decoder_bias(per_feature):
    W_enc, b_enc, a, b = make_weights(per_feature=per_feature, dtype=torch.float32)
    inputs = [t.requires_grad_() for t in (torch.zeros(2, 7), fold_scale(W_enc, b), b_enc, a)]
    scores = folded_score(*inputs)
    assert torch.equal(scores, inputs[2].expand(2, 13))
    scores.sum().backward()
    for tensor in inputs:
        assert tensor.grad.isfinite().all()


def test_below_the_floor_the_norm_is_the_floor():
    # x_c = (1e-9, 0), w = (1, 0): n = 1e-8, cos = 0.1; a = 1, b = 0: 1e-8 * 0.1
    zero, one = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    score = cosine_score(
        torch.tensor([1e-9, 0.0], dtype=torch.float64), torch.eye(2, 1, dtype=torch.float64), zero, one, zero
    )
    assert NORM_FLOOR == 1e-8
    assert score.item() == pytest.approx(1e-9)


@pytest.mark.parametrize("norm", [1e-6, 1e-3, 1.0, 1e3, 1e5])
@pytest.mark.parametrize("form", ["training", "inference"])
def test_float32_rounding(norm, form):
    # Each of the 7 products and 6 sums, the norms and the last products round once: (D + 8) u sum |terms|, u = 2^-24.
    # The exponent t = a log n + b rounds to 2 u |t|, its log to u |log n| a, which exp turns into relative errors.
    W_enc, b_enc, a, b = make_weights(dtype=torch.float32)
    direction = make_activations(20, 7, spread=0.0)
    x = norm * direction / direction.norm(dim=-1, keepdim=True)
    wide = [t.double() for t in (x, W_enc, b_enc, a, b)]
    expected = score_by_powers(wide[0], torch.zeros(7, dtype=torch.float64), *wide[1:])
    if form == "training":
        scores = cosine_score(x, W_enc, b_enc, a, b)
    else:
        scores = folded_score(x, fold_scale(W_enc, b), b_enc, a)
    unit = wide[1] / wide[1].norm(dim=0)
    terms = (wide[0] / norm).abs() @ unit.abs() * torch.exp(wide[3] * math.log(norm) + wide[4])
    exponent = (wide[3].abs() + 1) * abs(math.log(norm)) + wide[4].abs()
    bound = 2**-24 * ((7 + 8 + 4 * exponent) * terms + 2 * wide[2].abs() + 2 * expected.abs())
    assert scores.dtype == torch.float32
    assert ((scores - expected).abs() <= bound).all()


def test_exponent_zero_does_not_see_the_norm():
    W_enc, b_enc, _, b = make_weights()
    x = make_activations(4, 7, dtype=torch.float64)
    zero = torch.zeros(13, dtype=torch.float64)
    torch.testing.assert_close(cosine_score(1000 * x, W_enc, b_enc, zero, b), cosine_score(x, W_enc, b_enc, zero, b))


def test_exponent_one_is_the_inner_product_with_unit_columns():
    W_enc, b_enc, _, _ = make_weights()
    x = make_activations(4, 7, spread=2.0, dtype=torch.float64)
    unit = W_enc / W_enc.pow(2).sum(0).sqrt()
    one, zero = torch.tensor(1.0, dtype=torch.float64), torch.tensor(0.0, dtype=torch.float64)
    torch.testing.assert_close(cosine_score(x, W_enc, b_enc, one, zero), x @ unit + b_enc, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("s", [1e-3, 0.5, 7.0, 1e4])
@pytest.mark.parametrize("per_feature", [False, True])
def test_scaling_the_input_scales_the_score_by_a_power(s, per_feature):
    W_enc, b_enc, a, b = make_weights(per_feature=per_feature)
    x = make_activations(4, 7, dtype=torch.float64)
    none = torch.zeros_like(b_enc)
    torch.testing.assert_close(
        cosine_score(s * x, W_enc, none, a, b), s**a * cosine_score(x, W_enc, none, a, b), rtol=1e-11, atol=0
    )


def test_the_length_of_encoder_columns_does_not_matter():
    W_enc, *rest = make_weights()
    x = make_activations(4, 7, dtype=torch.float64)
    lengths = torch.logspace(-3, 3, 13, dtype=torch.float64)
    torch.testing.assert_close(cosine_score(x, W_enc * lengths, *rest), cosine_score(x, W_enc, *rest))


@pytest.mark.parametrize(("d_in", "d_sae"), SIZES)
@pytest.mark.parametrize("per_feature", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_folded_form_is_the_same_function(d_in, d_sae, per_feature, shape):
    W_enc, b_enc, a, b = make_weights(d_in, d_sae, per_feature)
    x = make_activations(*shape, d_in, spread=2.0, dtype=torch.float64)
    folded = folded_score(x, fold_scale(W_enc, b), b_enc, a)
    assert folded.shape == (*shape, d_sae)
    torch.testing.assert_close(folded, cosine_score(x, W_enc, b_enc, a, b), rtol=1e-12, atol=1e-12)


def test_folded_columns_are_as_long_as_the_scale():
    # columns (3, 4) and (0, 2) with b = log 10, log 3: (6, 8) and (0, 3)
    W_enc = torch.tensor([[3.0, 0.0], [4.0, 2.0]])
    expected = torch.tensor([[6.0, 0.0], [8.0, 3.0]])
    torch.testing.assert_close(fold_scale(W_enc, torch.tensor([10.0, 3.0]).log()), expected)


@pytest.mark.parametrize("per_feature", [False, True])
def test_folded_form_with_exponent_one_is_the_inner_product_bit_for_bit(per_feature):
    x = make_activations(64, 33, spread=3.0)
    W_enc, b_enc = torch.randn(33, 65), torch.randn(65)
    a = torch.ones(65) if per_feature else torch.tensor(1.0)
    assert torch.equal(folded_score(x, W_enc, b_enc, a), x @ W_enc + b_enc)

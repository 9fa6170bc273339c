import dataclasses
import json
import math

import pytest
import torch
from helpers import ONE_PER_SCORE, TRAINING, make_activations, make_sae, save_inference, train_step
from sae_lens import StandardTrainingSAE, StandardTrainingSAEConfig

from saelens_cosine.metrics.norms.encoder_gradients import encoder_gradients


def aligned(scores, dtype=torch.float64):
    """`W_enc = W_dec = I` in 4 dimensions, zero biases: feature i sees axis i alone."""
    sae = StandardTrainingSAE(StandardTrainingSAEConfig(d_in=4, d_sae=4, dtype=str(dtype).removeprefix("torch.")))
    sae.W_enc.data, sae.W_dec.data = (
        torch.eye(4, dtype=dtype) * torch.tensor(scores, dtype=dtype),
        torch.eye(4, dtype=dtype),
    )
    return sae


def test_ratios_by_hand():
    # tokens along one axis each. x on axis i with code c x: error (c - 1) x, gradient of its square by the column 2 (c - 1) x * x
    # quartiles of the norm: {1, 1}, {2, 2}, {3, 3}, {4, 6}, the loss is a mean of two
    x = torch.zeros(8, 4)
    for token, (axis, norm) in enumerate([(0, 1), (1, 1), (2, 2), (2, 2), (2, 3), (2, 3), (0, 4), (3, 6)]):
        x[token, axis] = norm
    result = encoder_gradients(aligned([1.5, 1.5, 1.5, 1.5]), x)
    # c = 1.5: gradient 2 * 0.5 * norm^2 / 2 = norm^2 / 2. Feature 0: 0.5 and 8; 1: 0.5 and 0; 3: 0 and 18; 2: in the middle
    assert (result.features, result.only_smallest, result.only_largest, result.larger_from_smallest) == (3, 1, 1, 1)
    assert result.median_ratio == pytest.approx(16)  # of 0, 16 and 18e12
    assert result.median_ratio_of_both == pytest.approx(16)
    assert result.ratio_percentiles == pytest.approx((16,) * 5)
    assert (result.above_2, result.above_5, result.above_10) == pytest.approx((2 / 3,) * 3)
    # 2 and 3 twice on axis 2: 2 * 0.5 * 4 = 4 and 9
    assert result.mean_gradients == pytest.approx((1 / 4, 4 / 4, 9 / 4, 26 / 4))
    assert (result.tokens, result.batches, result.form) == (8, 1, "training")
    norms = torch.tensor([1.0, 1, 2, 2, 3, 3, 4, 6])
    assert result.norm_variation == pytest.approx((norms.std(correction=0) / norms.mean()).item())
    assert json.loads(json.dumps(dataclasses.asdict(result)))["features"] == 3


def test_gradients_are_averaged_over_batches_before_their_ratio():
    # feature 0 alone; batches with norms 1 (three times) and 2, and 1 and 4: g_4 = 4 and 16 times g_1, so 10
    x = torch.zeros(8, 4)
    x[:, 0] = torch.tensor([1.0, 1.1, 1.2, 2.0, 1.0, 1.1, 1.2, 4.0])
    result = encoder_gradients(aligned([1.5] * 4), x, batch=4)
    assert result.median_ratio == pytest.approx(10)
    x = torch.cat([x, 100 * x[:3]])  # a shorter last batch is left out
    assert encoder_gradients(aligned([1.5] * 4), x, batch=4).median_ratio == pytest.approx(10)


def test_batchtopk_selects_among_the_tokens_of_a_quartile():
    # with k = 1 feature per token, a batch-wide selection over all tokens would take the longest ones' two features each
    sae = make_sae("inner_product_batchtopk", d_in=2, d_sae=2, k=1, kernels="reference").eval()
    sae.W_enc.data, sae.W_dec.data = 1.5 * torch.eye(2), torch.eye(2)
    sae.b_enc.data.zero_()
    sae.b_dec.data.zero_()
    # direction (4, 1) / sqrt(17): feature 1 has a quarter of feature 0's score
    direction = torch.tensor([4.0, 1.0]) / math.sqrt(17)
    x = torch.tensor([1.0, 1, 10, 10, 100, 100, 1000, 1000]).unsqueeze(-1) * direction
    result = encoder_gradients(sae, x)
    # of the 4 scores of a quartile the largest two are taken, feature 0's, whatever the norm: feature 1 has no gradient
    assert result.features == 1
    assert result.median_ratio == pytest.approx(1e6, rel=1e-4)  # norm^2
    assert not sae.training


@pytest.mark.parametrize("name", TRAINING)
def test_the_sae_is_left_as_it_was_and_mode_does_not_matter(name):
    sae, x = make_sae(name), make_activations(64, 7)
    before = {key: tensor.clone() for key, tensor in sae.state_dict().items()}
    result = encoder_gradients(sae, x, batch=32)
    assert result.features > 0
    assert all(torch.equal(before[key], tensor) for key, tensor in sae.state_dict().items())
    assert not sae.training
    assert sae.W_enc.grad is None
    torch.nn.Module.train(sae, True)
    assert encoder_gradients(sae, x, batch=32) == result
    assert sae.training


@pytest.mark.parametrize("name", ONE_PER_SCORE)
def test_agrees_with_gradients_of_the_training_loss(name):
    # the squared error that SAELens' step reports, from one quartile alone; the step may first set b_dec and column lengths
    sae, x = make_sae(name, b_dec_init="zeros", dtype="float64"), make_activations(40, 7, dtype=torch.float64)
    sae.W_enc.data /= sae.W_enc.data.norm(dim=0)
    result = encoder_gradients(sae, x)
    quarters = x[x.norm(dim=-1).argsort()].split(10)
    torch.nn.Module.train(sae, True)
    expected = []
    for quarter in quarters:
        (gradient,) = torch.autograd.grad(train_step(sae, quarter, step=1).losses["mse_loss"], [sae.W_enc])
        expected.append(gradient.norm(dim=0).mean().item())
    assert result.mean_gradients == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    "name", ["inner_product_topk", "cosine_topk", "per_feature_cosine_topk", "magnitude_bypass_topk"]
)
def test_the_saved_form_has_the_training_forms_ratios(name, tmp_path):
    # a TopK selects alike in both forms
    sae, x = make_sae(name), make_activations(400, 7)
    saved = save_inference(sae, tmp_path)
    trained, loaded = encoder_gradients(sae, x), encoder_gradients(saved, x)
    assert (trained.form, loaded.form) == ("training", "inference")
    assert trained.features > 3
    assert loaded.ratio_percentiles == pytest.approx(trained.ratio_percentiles, rel=1e-3)
    assert loaded.median_ratio == pytest.approx(trained.median_ratio, rel=1e-3)


def test_a_frozen_sae_stays_frozen(tmp_path):
    saved = save_inference(make_sae("cosine_batchtopk"), tmp_path).requires_grad_(False)
    result = encoder_gradients(saved, make_activations(64, 7))
    assert result.features > 0
    assert not saved.W_enc.requires_grad


def test_tokens_of_one_norm_have_one_quartile():
    x = torch.eye(4).repeat(2, 1)
    result = encoder_gradients(aligned([1.5] * 4), x)
    assert result.mean_gradients[:3] == (0, 0, 0)  # nothing lies below the edge
    assert (result.features, result.only_largest) == (4, 4)
    assert math.isnan(result.median_ratio_of_both)


def test_a_silent_sae_gives_nan():
    result = encoder_gradients(aligned([-1.0] * 4), torch.eye(4) * torch.arange(1.0, 5.0))
    assert result.features == 0
    assert math.isnan(result.median_ratio)
    assert result.mean_gradients == (0, 0, 0, 0)


def test_three_tokens_are_refused():
    with pytest.raises(ValueError, match="3 tokens"):
        encoder_gradients(aligned([1.0] * 4), torch.ones(3, 4))

"""Starts from a first batch that says nothing of the others: zeros, one token, the same token again and again, an outlier."""

import math
import warnings

import pytest
import torch
from helpers import COSINE, TRAINING, make_activations, make_sae, planted_batches, train_step

from saelens_cosine.saes.recipe.training_sae import geometric_median

D_IN = 16


def first_batch(kind):
    x = next(planted_batches(d_in=D_IN, n_features=24, active=3, batch=64, scale=20.0))
    return {
        "zeros": torch.zeros_like(x),
        "the same token": x[:1].repeat(64, 1),
        "one token": x[:1],
        "an outlier": torch.cat([x[:-1], 1e5 * x[-1:]]),
    }[kind]


KINDS = ["zeros", "the same token", "one token", "an outlier"]


def steps_on(sae, first, n=15):
    """Steps of plain Adam on a first batch and ordinary ones after it."""
    batches = planted_batches(d_in=D_IN, n_features=24, active=3, batch=64, scale=20.0)
    optimizer = torch.optim.Adam(sae.parameters(), lr=3e-3)
    for step in range(n):
        optimizer.zero_grad()
        output = train_step(sae, first if step == 0 else next(batches), step=step)
        output.loss.backward()
        optimizer.step()
    return output


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", COSINE)
def test_log_scale_falls_back_to_log_sqrt_d_in(name, kind, dtype):
    sae = make_sae(name, seed=None, d_in=D_IN, d_sae=32, log_scale_from_data=True, dtype=dtype).train()
    with pytest.warns(UserWarning, match=r"log_scale starts at log sqrt\(d_in\) = 1.386"):
        train_step(sae, first_batch(kind).to(sae.dtype))
    assert torch.equal(sae.log_scale.detach(), torch.full_like(sae.log_scale, math.log(4)))
    assert all(tensor.isfinite().all() for tensor in sae.state_dict().values())


@pytest.mark.parametrize("kind", ["half zeros", "sinks"])
def test_log_scale_takes_what_is_usable(kind):
    # norms 5, 5, 5, 5 and 4 zeros: mean 2.5. Or 99 tokens of 5 and one of 500, as with attention sinks: 9.95
    x = torch.zeros(8, 2) if kind == "half zeros" else torch.tensor([[3.0, 4.0]]).repeat(100, 1)
    x[:4] = torch.tensor([3.0, 4.0])
    x[0] *= 1 if kind == "half zeros" else 100
    sae = make_sae("cosine_topk", seed=None, d_in=2, log_scale_from_data=True, b_dec_init="zeros").train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train_step(sae, x)
    assert sae.log_scale.item() == pytest.approx(math.log(2.5 if kind == "half zeros" else 9.95))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", TRAINING)
def test_training_lives_on_after_it(name, kind):
    settings = {"log_scale_from_data": True} if name in COSINE else {}
    sae = make_sae(name, seed=None, d_in=D_IN, d_sae=32, **settings).train()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        output = steps_on(sae, first_batch(kind))
    assert output.loss.isfinite()
    assert (output.feature_acts.to_dense() != 0).any(dim=-1).float().mean() > 0.5
    assert (output.sae_out - sae.b_dec).norm(dim=-1).mean() > 1  # of activations whose norms are around 30
    assert all(tensor.isfinite().all() for tensor in sae.state_dict().values())


@pytest.mark.parametrize("kind", ["the same token", "one token", "zeros"])
def test_geometric_median_of_one_point_is_that_point(kind):
    x = first_batch(kind)
    torch.testing.assert_close(geometric_median(x), x[0])


def test_geometric_median_with_a_norm_whose_square_overflows():
    # one of five: the other four's middle, (0, 0), moved by the fifth's pull as in `test_geometric_median`
    x = torch.tensor([[-1.0, 0], [1, 0], [0, -1], [0, 1], [1e20, 0]])
    torch.testing.assert_close(geometric_median(x), torch.tensor([1 / math.sqrt(3), 0]), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", TRAINING)
def test_saving_a_dead_sae_warns(name, tmp_path):
    sae = make_sae(name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sae.save_inference_model(tmp_path)  # it has seen no token
        sae.tokens_since_fired[:-1] = 500
        sae.save_inference_model(tmp_path)  # one feature fires
    sae.tokens_since_fired[:] = 500
    with pytest.warns(UserWarning, match=f"{name} .* is saved dead: no feature has fired for 500 training tokens"):
        sae.save_inference_model(tmp_path)


@pytest.mark.parametrize("name", COSINE)
def test_saving_an_sae_of_scale_zero_warns(name, tmp_path):
    sae = make_sae(name).train()
    sae.log_scale.data.fill_(-math.inf)  # as degenerate batches used to leave it
    train_step(sae, make_activations(8, 7), step=1)
    with pytest.warns(UserWarning, match="is saved dead"):
        sae.save_inference_model(tmp_path)

"""The top-AFA SAE (arXiv 2503.24277): which features are kept, exact folds, the loss, and training."""

import copy
import json
import math
from itertools import accumulate

import pytest
import torch
from helpers import (
    assert_close,
    codes_and_output,
    make_activations,
    make_trainer,
    planted_batches,
    read_config,
    save_inference,
    train_step,
)
from sae_lens import SAE, TrainingSAE, TrainingSAEConfig
from safetensors.torch import load_file

from saelens_cosine.saes.top_afa_sae import (
    TopAFASAE,
    TopAFASAEConfig,
    TopAFATrainingSAE,
    TopAFATrainingSAEConfig,
    afa_prefix,
)

D_IN, D_SAE = 7, 40
EXACT = 1e-12
RAW_CODES = {"rescale_acts_by_decoder_norm": False}
UNIT = {"rescale_acts_by_decoder_norm": False, "unit_decoder": True}
DECODERS = [{}, RAW_CODES, UNIT]


def make_top_afa(**overrides) -> TopAFATrainingSAE:
    """float64, random weights, decoder rows of norm 0.2 to 3 unless they are to be 1; about half the features positive."""
    config = TopAFATrainingSAEConfig(**{"d_in": D_IN, "d_sae": D_SAE, "dtype": "float64", **overrides})
    sae = TopAFATrainingSAE(config)
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(0.15 * torch.randn(parameter.shape, generator=rng, dtype=torch.float64))
        sae.W_dec.div_(sae.W_dec.norm(dim=-1, keepdim=True))
        if not config.unit_decoder:
            sae.W_dec.mul_(torch.linspace(0.2, 3, config.d_sae, dtype=torch.float64).unsqueeze(-1))
    return sae.eval()


def doubles(*shape: int, seed: int = 0) -> torch.Tensor:
    return make_activations(*shape, seed=seed, dtype=torch.float64)


# --- the rule ---


@pytest.mark.parametrize(
    "codes, kept, target",
    [
        # s_i = (a_i n_i)^2 = 125, 400, 549; C = 23.43, 30.81, never; t = 54.41: the largest raw code is the one that goes
        ((5.0, 4.0, 3.0), (0.0, 4.0, 3.0), 54.41),
        # s = 5, 25, 61; C = 7.81, 9.27; t = 15
        ((1.0, 1.0, 1.0), (0.0, 1.0, 1.0), 15.0),
        # s = 5, 2500, 244; C = 50, 52.38; t = 67.80
        ((1.0, 10.0, 2.0), (0.0, 10.0, 2.0), 67.80),
    ],
)
def test_the_papers_worked_example(codes, kept, target):
    sae = TopAFASAE(TopAFASAEConfig(d_in=2, d_sae=3))
    sae.W_dec.data = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    a = torch.tensor([codes])
    x_centered = a @ sae.W_dec.detach()
    assert x_centered.norm().item() == pytest.approx(target, abs=0.01)
    assert sae.finish(a, x_centered).tolist() == [list(kept)]


@pytest.mark.parametrize(
    "coefficients, target, match, kept",
    [
        ([3.0, 4.0, 12.0, 0.0], 12.8, "nearest", [0, 1, 1, 0]),  # C = 12, 12.65, 13
        ([3.0, 4.0, 12.0, 0.0], 12.9, "nearest", [1, 1, 1, 0]),
        ([12.0, 5.0, 0.0], 12.4, "nearest", [1, 0, 0]),  # C = 12, 13
        ([12.0, 5.0, 0.0], 12.4, "first_exceed", [1, 1, 0]),
        ([12.0, 5.0, 0.0], 12.5, "nearest", [1, 0, 0]),  # equally near: the smaller k
        ([12.0, 5.0, 0.0], 12.6, "nearest", [1, 1, 0]),
        ([12.0, 5.0, 0.0], 12.0, "first_exceed", [1, 0, 0]),
        ([12.0, 5.0, 0.0], 0.0, "nearest", [1, 0, 0]),  # never fewer than one
        ([12.0, 5.0, 0.0], 0.0, "first_exceed", [1, 0, 0]),
        ([0.0, 0.0, 0.0], 0.0, "nearest", [0, 0, 0]),
        ([0.0, 0.0, 0.0], 2.0, "nearest", [0, 0, 0]),
        ([1.0] * 6, 2.0, "nearest", [1, 1, 1, 1, 0, 0]),  # C_j = sqrt(j); of equals the first
        ([1.0, 2.0, 1.0, 2.0, 1.0], 3.0, "nearest", [1, 1, 0, 1, 0]),  # C = 2, 2.83, 3
        ([1.0, 0.0, 2.0, 3.0], 99.0, "nearest", [1, 0, 1, 1]),  # saturated: every positive one
        ([1.0, 0.0, 2.0, 3.0], 99.0, "first_exceed", [1, 0, 1, 1]),
        ([1.0, 2.0, 3.0], 99.0, "nearest", [0, 1, 1]),  # the paper's code never keeps all F
        ([5.0], 3.0, "nearest", [1]),
        ([5.0], 9.0, "nearest", [1]),
    ],
)
def test_prefix_by_hand(coefficients, target, match, kept):
    mask = afa_prefix(torch.tensor(coefficients), torch.tensor(target), match)
    assert mask.dtype == torch.bool
    assert mask.int().tolist() == kept


@pytest.mark.parametrize(
    "k_min, k_max, target, n_kept",
    [
        (1, 3, 99.0, 3),
        (1, 3, 1.4, 2),
        (3, None, 0.0, 3),
        (3, 3, 1.4, 3),
        (1, 6, 99.0, 6),
        (1, None, 99.0, 5),
        (6, 6, 0.0, 6),
    ],
)
def test_clamps(k_min, k_max, target, n_kept):
    # six ones: C_j = sqrt(j), and 1.4 is nearest to sqrt(2)
    mask = afa_prefix(torch.ones(6), torch.tensor(target), k_min=k_min, k_max=k_max)
    assert mask.tolist() == [True] * n_kept + [False] * (6 - n_kept)


def by_full_sort(row: list[float], target: float, match: str, k_min: int, k_max: int | None) -> list[bool]:
    """The definition, in Python's floats: all prefixes of positive coefficients, and the first of the best."""
    order = sorted((i for i in range(len(row)) if row[i] > 0), key=lambda i: (-row[i], i))
    most = max(1, len(row) - 1) if k_max is None else k_max
    norms = [math.sqrt(square) for square in accumulate(row[i] ** 2 for i in order)]
    if not norms or norms[-1] <= target:
        k = len(order)
    elif match == "first_exceed":
        k = next(j for j, norm in enumerate(norms, 1) if norm >= target)
    else:
        k = min(range(1, len(norms) + 1), key=lambda j: (abs(norms[j - 1] - target), j))
    kept = set(order[: min(max(k, k_min), most)])
    return [i in kept for i in range(len(row))]


@pytest.mark.parametrize("d_sae", [1, 2, 13, 64, 65, 700])
@pytest.mark.parametrize("match", ["nearest", "first_exceed"])
@pytest.mark.parametrize("k_min, k_max", [(1, None), (1, 5), (3, 90), (70, None)])
@pytest.mark.parametrize("ties", [False, True])
def test_prefix_is_that_of_a_full_sort(d_sae, match, k_min, k_max, ties):
    # 700 features go through widths of 64, 256 and 699; whole numbers tie at the cut and reach norms exactly
    k_min, k_max = min(k_min, max(1, d_sae - 1)), k_max and min(k_max, d_sae)
    rng = torch.Generator().manual_seed(d_sae)
    a = torch.randn(40, d_sae, generator=rng, dtype=torch.float64)
    a = torch.randint(-2, 4, a.shape, generator=rng).double().relu() if ties else a.relu()
    whole = a.norm(dim=-1)
    share = torch.linspace(0, 1.2, 40, dtype=torch.float64)
    target = (share * whole).round() if ties else share * whole
    a[5], a[6, 1:], target[7] = 0, 0, whole[7]
    mask = afa_prefix(a, target, match, k_min, k_max)
    expected = [by_full_sort(a[i].tolist(), target[i].item(), match, k_min, k_max) for i in range(40)]
    assert mask.tolist() == expected


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4 / 3, 1e8])
def test_the_rule_has_no_scale(scale):
    # at 1e4 / 3 the target is 1e4, where the paper's code switches on the whole dictionary
    mask = afa_prefix(scale * torch.tensor([1.0, 2.0, 2.0, 8.0, 0.0]), torch.tensor(3.0 * scale))
    assert mask.int().tolist() == [0, 0, 0, 1, 0]
    mask = afa_prefix(scale * torch.tensor([1.0, 2.0, 2.0, 0.5, 0.0]), torch.tensor(3.0 * scale))
    assert mask.int().tolist() == [1, 1, 1, 0, 0]


def test_a_saturated_token_keeps_what_float32_cannot_add():
    # 20 ones and 980 of 1e-6: the norm stops growing at the 20th in float32
    a = torch.tensor([1.0] * 20 + [1e-6] * 980 + [0.0])
    assert afa_prefix(a, torch.tensor(100.0)).sum() == 1000


@pytest.mark.parametrize("make, config", [(TopAFASAE, TopAFASAEConfig), (TopAFATrainingSAE, TopAFATrainingSAEConfig)])
def test_bfloat16_does_not_decide(make, config):
    # 1001 scores of 1 in a bfloat16 SAE: C_900 = 30; a sum of squares in bfloat16 stops at 256
    sae = make(config(d_in=1, d_sae=1001, dtype="bfloat16"))
    sae.W_enc.data.zero_()
    sae.b_enc.data.fill_(1.0)
    sae.W_dec.data.fill_(1.0)
    codes = sae.encode(torch.tensor([[30.0]]))
    assert codes.dtype == torch.bfloat16
    assert codes.sum(dtype=torch.float32) == 900


def test_bfloat16_decoder_norms_rank_unrounded():
    # the second row is 1.00195 long, which bfloat16 rounds to 1, where the first feature would be the one to stay
    sae = TopAFASAE(TopAFASAEConfig(d_in=2, d_sae=3, dtype="bfloat16"))
    sae.W_enc.data.zero_()
    sae.b_enc.data.fill_(1.0)
    sae.W_dec.data = torch.tensor([[1.0, 0.0], [1.0, 1 / 16], [0.0, 1.0]], dtype=torch.bfloat16)
    assert sae.encode(torch.zeros(2)).tolist() == [0, 1, 0]


# --- the SAE ---


def by_formula(sae: TopAFATrainingSAE, x: torch.Tensor) -> torch.Tensor:
    """Coefficients on unit directions, token by token."""
    norms = sae.W_dec.detach().norm(dim=-1)
    x_centered = x - sae.b_dec.detach()
    inputs = x_centered if sae.cfg.apply_b_dec_to_input else x
    a = ((inputs @ sae.W_enc + sae.b_enc).relu() * norms).detach()
    targets = x_centered.norm(dim=-1)
    masks = [by_full_sort(row.tolist(), t.item(), "nearest", 1, None) for row, t in zip(a, targets, strict=True)]
    return a * torch.tensor(masks)


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("apply_b_dec_to_input", [True, False])
def test_codes_and_output_are_the_definition(decoder, apply_b_dec_to_input):
    sae = make_top_afa(apply_b_dec_to_input=apply_b_dec_to_input, **decoder)
    x = doubles(60, D_IN)
    coefficients, norms = by_formula(sae, x), sae.W_dec.detach().norm(dim=-1)
    l0 = (coefficients != 0).sum(-1)
    assert len(l0.unique()) > 5  # it adapts
    codes, output = codes_and_output(sae, x)
    assert_close(codes, coefficients if not decoder else coefficients / norms, EXACT)
    assert_close(output, coefficients @ (sae.W_dec / norms.unsqueeze(-1)) + sae.b_dec, EXACT)
    assert torch.equal(codes != 0, coefficients != 0)


def test_units_of_the_codes_change_nothing_else():
    scaled, raw = make_top_afa(), make_top_afa(**RAW_CODES)
    x = doubles(30, D_IN)
    for sae in (scaled, raw):
        train_step(sae.train(), x).loss.backward()
    assert_close(scaled(x), raw(x), EXACT)
    for one, other in zip(scaled.parameters(), raw.parameters(), strict=True):
        assert_close(one.grad, other.grad, 1e-10)


@pytest.mark.parametrize("decoder", DECODERS)
def test_every_way_to_encode_agrees(decoder, tmp_path):
    sae = make_top_afa(**decoder)
    x = doubles(2, 15, D_IN)
    expected = sae.encode(x)
    for each in (sae, save_inference(sae, tmp_path)):
        with torch.no_grad():
            assert_close(each.encode(x), expected, EXACT)
            assert_close(each.encode(x.reshape(30, D_IN)), expected.reshape(30, D_SAE), EXACT)
            assert_close(each.encode(x[1, 3]), expected[1, 3], EXACT)
            values, indices = each.encode_sparse(x)
        assert_close(torch.zeros_like(expected).scatter_add(-1, indices, values), expected, EXACT)
        assert values.shape[-1] == (expected != 0).sum(-1).max()
        assert_close(each.run_with_cache(x)[1]["hook_sae_acts_post"], expected, EXACT)
        assert each.encode(x[:0]).shape == (0, 15, D_SAE)


def test_tokens_do_not_see_each_other():
    sae = make_top_afa()
    x = doubles(20, D_IN)
    codes = sae.encode(x)
    for i in (0, 7, 19):
        assert torch.equal(sae.encode(x[i : i + 1]) != 0, codes[i : i + 1] != 0)
    louder = torch.cat([1e3 * x[:10], x[10:]])
    assert torch.equal(sae.encode(louder)[10:], codes[10:])


def test_an_input_at_b_dec_keeps_the_strongest_feature():
    sae = make_top_afa()
    scaled = (sae.b_enc * sae.W_dec.norm(dim=-1)).detach()
    codes = sae.encode(sae.b_dec.detach())
    assert codes.nonzero().flatten().tolist() == [scaled.argmax().item()]
    sae.b_enc.data.zero_()
    assert not sae.encode(sae.b_dec.detach()).any()


def test_no_feature_positive():
    sae = make_top_afa()
    sae.b_enc.data.fill_(-1e6)
    x = doubles(5, D_IN)
    assert not sae.encode(x).any()
    assert torch.equal(sae(x), sae.b_dec.expand(5, D_IN))
    loss = train_step(sae.train(), x).loss
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in sae.parameters() if p.grad is not None)


def test_gradients_are_a_relus_on_kept_features_and_none_on_the_others():
    sae = make_top_afa()
    x = doubles(1, D_IN)
    codes = sae.encode(x)
    kept = codes[0] != 0
    assert 1 <= kept.sum() < (sae.encode_with_hidden_pre(x)[1][0] > 0).sum()  # some positive ones are dropped
    weights = torch.linspace(1, 2, D_SAE, dtype=torch.float64)
    (codes * weights).sum().backward()
    norms, x_centered = sae.W_dec.detach().norm(dim=-1), (x - sae.b_dec).detach()[0]
    pull = weights * norms * kept
    assert_close(sae.b_enc.grad, pull, EXACT)
    assert_close(sae.W_enc.grad, torch.outer(x_centered, pull), EXACT)
    assert_close(sae.b_dec.grad, -(sae.W_enc @ pull).detach(), EXACT)
    assert not sae.W_enc.grad[:, ~kept].any()


# --- saving and folds, in float64 ---


@pytest.mark.parametrize("decoder", DECODERS)
def test_saved_sae_is_the_trained_sae(decoder, tmp_path):
    sae = make_top_afa(k_min=2, k_max=30, match="first_exceed", **decoder)
    before = copy.deepcopy(sae.state_dict())
    saved = save_inference(sae, tmp_path)
    x = doubles(100, D_IN)
    for one, other in zip(codes_and_output(saved, x), codes_and_output(sae, x), strict=True):
        assert_close(one, other, EXACT)
    assert set(load_file(tmp_path / "sae_weights.safetensors")) == {"W_enc", "b_enc", "W_dec", "b_dec"}
    assert type(saved) is TopAFASAE
    assert (saved.cfg.match, saved.cfg.k_min, saved.cfg.k_max) == ("first_exceed", 2, 30)
    assert "import saelens_cosine" in read_config(tmp_path)["metadata"]["requires"]
    if "rescale_acts_by_decoder_norm" not in decoder:
        assert_close(saved.W_dec.norm(dim=-1), torch.ones(D_SAE), EXACT)
    for name, tensor in sae.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_decoder_norms_fold_into_a_loaded_sae(tmp_path):
    saved = save_inference(make_top_afa(**RAW_CODES), tmp_path)
    norms = saved.W_dec.detach().norm(dim=-1)
    assert norms.max() > 2.9  # it was saved as it was
    x = doubles(100, D_IN)
    codes, output = codes_and_output(saved, x)
    saved.fold_W_dec_norm()
    folded = codes_and_output(saved, x)
    assert_close(folded[0], codes * norms, EXACT)
    assert_close(folded[1], output, EXACT)


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("scale", [0.1, 4.0])
@pytest.mark.parametrize("saved_first", [False, True])
def test_input_scale_folds(decoder, scale, saved_first, tmp_path):
    sae = make_top_afa(**decoder)
    x = doubles(100, D_IN)
    _, output = codes_and_output(sae, scale * x)
    support = sae.encode(scale * x) != 0
    each = save_inference(sae, tmp_path / "saved") if saved_first else sae
    each.fold_activation_norm_scaling_factor(scale)
    forms = [each] if saved_first else [each, save_inference(each, tmp_path / "folded")]
    for form in forms:
        assert_close(form(x), output / scale, EXACT)
        assert torch.equal(form.encode(x) != 0, support)


@pytest.mark.parametrize("config", [TopAFASAEConfig, TopAFATrainingSAEConfig])
def test_whitening_is_refused_in_configs(config):
    with pytest.raises(ValueError, match=r"normalize_activations='covariance_whitening'.*'top_afa'.*Mahalanobis"):
        config(d_in=D_IN, d_sae=D_SAE, normalize_activations="covariance_whitening")


def test_whitening_is_refused_before_anything_changes(tmp_path):
    sae = make_top_afa()
    for each in (sae, save_inference(sae, tmp_path)):
        before = copy.deepcopy(each.state_dict())
        with pytest.raises(NotImplementedError, match=r"'top_afa'.*Mahalanobis"):
            each.fold_activation_whitening(torch.ones(D_IN), 2 * torch.eye(D_IN), torch.eye(D_IN) / 2)
        assert all(torch.equal(tensor, before[name]) for name, tensor in each.state_dict().items())


# --- the loss ---


def hand_sae(**overrides) -> TopAFATrainingSAE:
    """Two inputs, three features of decoder norms 2, 1 and 1; b_dec = (0, 1), so that x = (3, 4) has x - b_dec = (3, 3)."""
    settings = {"d_in": 2, "d_sae": 3, "dtype": "float64", "aux_loss_coefficient": 0.0, **overrides}
    sae = TopAFATrainingSAE(TopAFATrainingSAEConfig(**settings))
    with torch.no_grad():
        sae.W_enc.copy_(torch.tensor([[1.0, 0.0, -1.0], [0.0, 1.0, 0.0]]))
        sae.W_dec.copy_(torch.tensor([[2.0, 0.0], [0.0, 1.0], [1.0, 0.0]]))
        sae.b_dec.copy_(torch.tensor([0.0, 1.0]))
    return sae.train()


@pytest.mark.parametrize("target, norm", [("input", 5.0), ("centered", math.sqrt(18))])
def test_loss_by_hand(target, norm):
    # codes on unit directions (6, 3, 0), C = 6, 6.71, against 4.24: the first alone is kept, ||f|| = 6
    # x_hat = (6, 1), mse = 9 + 9 = 18; afa: d_in * 1/4 * (6 - norm)^2
    sae = hand_sae(afa_coefficient=0.25, afa_loss_target=target)
    output = train_step(sae, torch.tensor([[3.0, 4.0]], dtype=torch.float64), logging=True)
    assert output.feature_acts.tolist() == [[6.0, 0.0, 0.0]]
    assert output.losses["mse_loss"].item() == pytest.approx(18)
    assert output.losses["afa_loss"].item() == pytest.approx(0.5 * (6 - norm) ** 2)
    assert output.loss.item() == pytest.approx(18 + 0.5 * (6 - norm) ** 2)
    assert output.metrics["afa_squared_gap"].item() == pytest.approx((6 - norm) ** 2)
    output.losses["afa_loss"].backward()
    # d/df = 2 * 0.5 * (6 - norm), f = n (x_1 w_11 + ...): times n = 2 into b_enc, and no part of it through the target
    assert sae.b_enc.grad.tolist() == pytest.approx([2 * (6 - norm), 0, 0])
    assert sae.b_dec.grad.tolist() == pytest.approx([-2 * (6 - norm), 0])


def test_metrics_by_hand():
    # first token: one of two positive features, ||f|| = 6, target sqrt(18). second, x - b_dec = (-4, 3): features 2 and 3
    # with 3 and 4, norm 5 = target: every positive one. third, (0, -1): nothing positive, target 1.
    x = torch.tensor([[3.0, 4.0], [-4.0, 4.0], [0.0, 0.0]], dtype=torch.float64)
    metrics = train_step(hand_sae(), x, logging=True).metrics
    assert metrics["l0_mean"].item() == pytest.approx(1)
    assert (metrics["l0_min"].item(), metrics["l0_max"].item()) == (0, 2)
    assert metrics["saturated_share"].item() == pytest.approx(2 / 3)
    assert metrics["afa_relative_norm_gap"].item() == pytest.approx(((6 - 18**0.5) / 18**0.5 + 0 - 1) / 3)
    assert "l0_mean" not in train_step(hand_sae(), x).metrics


def test_coefficient_warms_up_and_is_logged_in_the_papers_units():
    sae = make_top_afa(afa_coefficient=0.5, afa_warm_up_steps=4, dtype="float32")
    trainer = make_trainer(sae, planted_batches(D_IN, 10, 2, 16), steps=6, batch=16)
    seen = []
    forward = sae.training_forward_pass
    sae.training_forward_pass = lambda step_input: (
        seen.append(step_input.coefficients["afa"]) or forward(step_input=step_input)
    )
    trainer.fit()
    assert seen[0] < 0.2
    assert sorted(seen) == seen
    assert seen[-1] == 0.5


def test_encoder_bias_can_be_left_out(tmp_path):
    sae = make_top_afa(use_encoder_bias=False, dtype="float32")
    sae.b_enc.data.zero_()
    make_trainer(sae, planted_batches(D_IN, 10, 2, 16), steps=3, batch=16, lr=1e-2).fit()
    assert not sae.b_enc.any()
    assert save_inference(sae, tmp_path / "inference").b_enc.shape == (D_SAE,)
    sae.save_model(tmp_path / "checkpoint")
    assert not TrainingSAE.load_from_disk(tmp_path / "checkpoint").b_enc.requires_grad


# --- normalised activations ---


def layer_norm(x: torch.Tensor) -> torch.Tensor:
    return (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-5)


NORMALISATIONS = {
    "layer_norm": layer_norm,
    "constant_norm_rescale": lambda x: x * D_IN**0.5 / x.norm(dim=-1, keepdim=True),
}


@pytest.mark.parametrize("mode", NORMALISATIONS)
def test_training_on_normalised_activations_is_training_on_what_the_norm_makes_of_them(mode, tmp_path):
    # the auxiliary loss, the AFA loss, the start of b_dec and the MSE are all in that space, as in the paper
    settings = {"b_dec_init": "geometric_median", "dead_feature_window_tokens": 1, "aux_loss_coefficient": 1.0}
    normalising, plain = make_top_afa(normalize_activations=mode, **settings), make_top_afa(**settings)
    x = doubles(30, D_IN) + 1
    outputs = [train_step(normalising.train(), x), train_step(plain.train(), NORMALISATIONS[mode](x))]
    for name, loss in outputs[1].losses.items():
        assert outputs[0].losses[name].item() == pytest.approx(loss.item(), rel=1e-9)
        assert loss > 0
    for output in outputs:
        output.loss.backward()
    assert_close(normalising.b_dec, plain.b_dec, EXACT)
    assert_close(normalising.W_enc.grad, plain.W_enc.grad, 1e-9)
    # outside a step it takes and gives raw activations, saved or not
    assert normalising.cfg.normalize_activations == mode
    codes = plain.eval().encode(NORMALISATIONS[mode](x))
    saved = save_inference(normalising.eval(), tmp_path)
    for each in (normalising, saved):
        assert_close(each.encode(x), codes, 1e-10)
    reconstruction = plain.decode(codes)
    undone = x.norm(dim=-1, keepdim=True) / D_IN**0.5 * reconstruction
    if mode == "layer_norm":
        undone = x.std(-1, keepdim=True) * reconstruction + x.mean(-1, keepdim=True)
    for each in (normalising, saved):
        assert_close(each(x), undone, 1e-10)


def test_a_failing_step_leaves_the_normalisation_on():
    sae = make_top_afa(normalize_activations="layer_norm").train()
    with pytest.raises(ValueError, match=f"d_in={D_IN}"):
        train_step(sae, doubles(4, D_IN + 1))
    assert sae.cfg.normalize_activations == "layer_norm"
    x = doubles(4, D_IN)
    assert_close(sae.process_sae_in(x), layer_norm(x) - sae.b_dec.detach(), EXACT)


# --- configs ---


def test_config_survives_json():
    values = {"match": "first_exceed", "k_min": 2, "k_max": 9, "afa_coefficient": 0.5, "afa_warm_up_steps": 3}
    values |= {"afa_loss_target": "centered", "use_encoder_bias": False, "d_in": D_IN, "d_sae": D_SAE}
    config = TopAFATrainingSAEConfig(**values)
    again = TrainingSAEConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert type(again) is TopAFATrainingSAEConfig
    assert {name: getattr(again, name) for name in values} == values
    assert not hasattr(again, "k")


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"match": "squared"}, r"match='squared'.*'nearest'"),
        ({"k_min": 0}, r"k_min=0.*1 <= k_min"),
        ({"k_min": 5, "k_max": 4}, r"k_min=5, k_max=4"),
        ({"k_max": 41}, r"k_max=41, d_sae=40"),
        ({"afa_coefficient": -1.0}, r"afa_coefficient=-1.0"),
        ({"afa_warm_up_steps": -1}, r"afa_warm_up_steps=-1"),
        ({"afa_loss_target": "raw"}, r"afa_loss_target='raw'"),
        ({"unit_decoder": True}, r"unit_decoder=True.*rescale_acts_by_decoder_norm=True"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        TopAFATrainingSAEConfig(d_in=D_IN, d_sae=D_SAE, **settings)


def test_kernels_are_asked_for_in_vain_or_politely():
    x = doubles(8, D_IN)
    assert torch.equal(
        train_step(make_top_afa(kernels="auto").train(), x).loss, train_step(make_top_afa().train(), x).loss
    )
    with pytest.raises(RuntimeError, match='kernels="fast" is impossible'):
        train_step(make_top_afa(kernels="fast").train(), x)


# --- a whole run ---


def trained(coefficient: float, decoder: dict) -> tuple[float, float, SAE]:
    """Mean squared norm gap and FVE on held-out tokens after 250 steps on 40 planted features in 16 dimensions."""
    torch.manual_seed(0)
    settings = {"d_in": 16, "d_sae": 64, "afa_coefficient": coefficient, **decoder}
    sae = TopAFATrainingSAE(TopAFATrainingSAEConfig(**settings))
    data = planted_batches(d_in=16, n_features=40, active=3, batch=256)
    make_trainer(sae, data, steps=250, batch=256, lr=3e-3).fit()
    x = data.sample(10**6)
    codes, output = codes_and_output(sae.eval(), x)
    fve = 1 - (output - x).square().sum() / (x - x.mean(0)).square().sum()
    l0 = (codes != 0).sum(-1).double()
    assert 1 < l0.mean() < 32
    assert l0.std() > 2  # it adapts
    gap = sae.unit_coefficients(codes).norm(dim=-1) - x.norm(dim=-1)
    return gap.square().mean().item(), fve.item(), sae


@pytest.mark.parametrize("decoder", [{}, UNIT])
def test_training_reconstructs_and_the_coefficient_closes_the_norm_gap(decoder, tmp_path):
    (wide, low_fve, sae), (narrow, high_fve, _) = (trained(coefficient, decoder) for coefficient in (1 / 128, 1 / 2))
    assert low_fve > 0.85
    assert high_fve > 0.85
    assert narrow < 0.2 * wide
    x = make_activations(50, 16)
    assert_close(save_inference(sae, tmp_path)(x), sae(x), 1e-5)

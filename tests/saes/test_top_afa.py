"""The rule of top-AFA, and the SAE that keeps to it."""

import math
from itertools import accumulate

import pytest
import torch
from helpers import (
    assert_close,
    codes_and_output,
    save_inference,
    train_step,
)
from top_afa_cases import D_IN, D_SAE, DECODERS, EXACT, RAW_CODES, doubles, make_top_afa

from saelens_cosine.saes.top_afa_sae import (
    TopAFASAE,
    TopAFASAEConfig,
    TopAFATrainingSAE,
    TopAFATrainingSAEConfig,
    afa_prefix,
)


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

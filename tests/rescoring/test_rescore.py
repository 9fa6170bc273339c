"""One dictionary, two scores: against a float64 formula, at the L0 that was asked for."""

import copy

import pytest
import torch
from helpers import (
    D_IN,
    D_SAE,
    assert_close,
    assert_same_function,
    codes_and_output,
    save_inference,
)
from rescore_cases import PER_TOKEN, SWAPPABLE, THRESHOLD, X, build, by_hand, l0, note, trained
from sae_lens import SAE

from saelens_cosine.rescoring import rescore


def reference_scores(sae, x, unit_columns):
    """Scores before scale and threshold in float64: cosine times column length, and b_enc, decoder norms folded in."""
    sae = copy.deepcopy(sae)
    W_enc, b_enc, W_dec = sae.W_enc.double(), sae.b_enc.double(), sae.W_dec.double()
    norms = W_dec.norm(dim=-1)
    W_enc, b_enc = W_enc * norms, b_enc * norms
    x_centered = x.double() - sae.b_dec.double()
    length = W_enc.norm(dim=0)
    norm = x_centered.norm(dim=-1, keepdim=True)
    cosine = x_centered @ W_enc / norm / length
    a = getattr(sae, "norm_exponent", torch.zeros(())).detach().double()
    if a.ndim:  # each feature keeps its weight at the geometric mean norm
        length = length * norm.log().mean().exp() ** (a - a.mean())
    return cosine * (torch.ones_like(length) if unit_columns else length), b_enc, W_dec / norms[:, None]


def test_by_hand():
    # x - b_dec = (0, 2), (-4, 3), (0, -1): lengths 2, 5, 1. Cosines with (.6, .8): .8, 0, -.8; with (0, 1): 1, .6, -1.
    x = torch.tensor([[1.0, 2.0], [-3.0, 3.0], [1.0, -1.0]])
    # scale 10, b_enc of the first times its decoder norm is 1: scores 9, 1, -7 and 11, 7, -9
    sae = rescore(by_hand(), x, "cosine", target_l0=1.0, scale=10.0)
    torch.testing.assert_close(sae.W_enc.data, torch.tensor([[6.0, 0.0], [8.0, 10.0]]))
    assert sae.b_enc.tolist() == [1.0, 1.0]
    assert sae.W_dec.tolist() == [[0.0, 1.0], [1.0, 0.0]]
    assert sae.b_dec.tolist() == [1.0, 0.0]
    assert sae.norm_exponent.item() == 0
    # three codes of three tokens: 11, 9, 7
    torch.testing.assert_close(sae.encode(x).detach(), torch.tensor([[9.0, 11.0], [0.0, 7.0], [0.0, 0.0]]))
    assert sae.cfg.architecture() == "cosine_jumprelu"
    threshold = note(sae)["threshold"]
    assert 1 < threshold < 7
    assert sae.threshold.tolist() == [pytest.approx(threshold)] * 2
    assert note(sae) == {
        "from_architecture": "standard",
        "score": "cosine",
        "scale": 10.0,
        "scale_chosen_by": "caller",
        "threshold": threshold,
        "l0": 1.0,
        # inner products, folded: (0,2).(6,8) + 1 = 17, (-4,3).(6,8) + 1 = 1, -7; 2 * 2 + 1 = 5, 7, -1
        "l0_before": pytest.approx(4 / 3),
        "tokens": 3,
        "decoder_norms_folded": True,
    }


def test_kept_scale_by_hand():
    # active: 17, 1 of the first, 5, 7 of the second; without b_enc 16, 0, 4, 6, mean 6.5. Their cosines: .8, 0, 1, .6
    x = torch.tensor([[1.0, 2.0], [-3.0, 3.0], [1.0, -1.0]])
    assert note(rescore(by_hand(), x, "cosine"))["scale"] == pytest.approx(26 / 2.4)


def test_cosine_to_inner_product_by_hand():
    # a = 0.5, column lengths 5 and 2: x - b_dec = (0, 4), norm 4: scores 2 * 4 and 2 * 2
    tensors = {
        "W_enc": torch.tensor([[3.0, 0.0], [4.0, 2.0]]),
        "b_enc": torch.zeros(2),
        "W_dec": torch.eye(2),
        "b_dec": torch.tensor([1.0, 0.0]),
        "norm_exponent": torch.tensor(0.5),
    }
    sae = build("cosine_topk", k=2, **tensors)
    x = torch.tensor([[1.0, 4.0]])
    torch.testing.assert_close(sae.encode(x).detach(), torch.tensor([[8.0, 4.0]]))
    swapped = rescore(sae, x, "inner_product")
    # inner products 16 and 8, so half keeps the mean of 6
    assert note(swapped)["scale"] == pytest.approx(0.5)
    assert swapped.cfg.architecture() == "topk"
    torch.testing.assert_close(swapped.W_enc.data, tensors["W_enc"] / 2)
    torch.testing.assert_close(swapped.encode(x).detach(), torch.tensor([[8.0, 4.0]]))


@pytest.mark.parametrize("score", ["cosine", "inner_product"])
@pytest.mark.parametrize("name", THRESHOLD)
def test_l0_is_the_target(name, score):
    sae = trained(name)
    for target in (1.5, 4.0):
        swapped = rescore(sae, X, score, target_l0=target)
        assert l0(swapped, X) == pytest.approx(target, rel=0.01)
        assert note(swapped)["l0"] == l0(swapped, X)
        assert len(swapped.threshold.unique()) == 1
    if "standard" not in name:  # a ReLU's L0 may be more than there are positive scores of the other kind
        as_before = rescore(sae, X, score)
        assert l0(as_before, X) == pytest.approx(note(as_before)["l0_before"], rel=0.01)


@pytest.mark.parametrize("score", ["cosine", "inner_product"])
@pytest.mark.parametrize("name", THRESHOLD)
def test_threshold_formula(name, score, tmp_path):
    sae = trained(name)
    saved = save_inference(sae, tmp_path)
    swapped = rescore(sae, X, score, target_l0=2.0, scale=9.0)
    cosine, b_enc, W_dec = reference_scores(saved, X, unit_columns=score == "cosine" and "cosine" not in name)
    norm = 1 if score == "cosine" else (X.double() - saved.b_dec.double()).norm(dim=-1, keepdim=True)
    scores = 9 * norm * cosine + b_enc
    cut = scores.flatten().sort(descending=True).values[2 * len(X) - 1]
    expected = torch.where(scores >= cut, scores, 0)
    codes, output = codes_and_output(swapped, X)
    assert_close(codes, expected)
    assert_close(output, expected @ W_dec + saved.b_dec.double())
    assert torch.equal(codes != 0, expected != 0)


@pytest.mark.parametrize("score", ["cosine", "inner_product"])
@pytest.mark.parametrize("name", PER_TOKEN)
def test_topk_keeps_its_k(name, score):
    sae = trained(name)
    swapped = rescore(sae, X, score)
    selector = "abstopk" if "abstopk" in name else "topk"
    assert swapped.cfg.architecture() == ("cosine_" if score == "cosine" else "") + selector
    assert swapped.cfg.k == sae.cfg.k
    assert note(swapped)["threshold"] is None
    assert note(swapped)["l0"] == l0(swapped, X)
    with pytest.raises(ValueError, match="keeps its k=3"):
        rescore(sae, X, score, target_l0=2.0)


def test_topk_formula():
    # stock TopK selects by score times decoder norm, so they fold
    sae = trained("topk")
    assert sae.cfg.rescale_acts_by_decoder_norm
    swapped = rescore(sae, X, "cosine", scale=9.0)
    cosine, b_enc, W_dec = reference_scores(sae, X, unit_columns=True)
    scores = 9 * cosine + b_enc
    top = scores.topk(3, dim=-1)
    codes, output = codes_and_output(swapped, X)
    expected = torch.zeros_like(scores).scatter(-1, top.indices, top.values.relu())
    assert_close(codes, expected)
    assert_close(output, expected @ W_dec + sae.b_dec.double())
    assert note(swapped)["decoder_norms_folded"]


def test_topk_in_its_own_units():
    sae = build(
        "topk",
        k=1,
        W_enc=torch.eye(2),
        b_enc=torch.zeros(2),
        W_dec=torch.diag(torch.tensor([3.0, 0.5])),
        b_dec=torch.zeros(2),
    )
    swapped = rescore(sae, torch.tensor([[1.0, 2.0]]), "cosine", scale=1.0)
    # its selection does not know decoder norms, so they stay where they are
    assert swapped.W_dec.tolist() == [[3.0, 0.0], [0.0, 0.5]]
    assert not note(swapped)["decoder_norms_folded"]


@pytest.mark.parametrize("name", SWAPPABLE)
def test_the_same_score_is_the_same_function(name):
    score = "cosine" if "cosine" in name else "inner_product"
    once = rescore(trained(name), X, score)
    if score == "inner_product":
        assert note(once)["scale"] == pytest.approx(1, abs=1e-6)
    twice = rescore(once, X, score)
    assert note(twice)["scale"] == pytest.approx(1, abs=1e-6)
    assert_same_function(twice, once, X)


@pytest.mark.parametrize("name", ["cosine_batchtopk", "per_feature_cosine_topk", "inner_product_topk"])
def test_there_and_back(name):
    sae = trained(name)
    first = "inner_product" if "cosine" in name else "cosine"
    there = rescore(sae, X, first)
    back = rescore(there, X, "cosine" if first == "inner_product" else "inner_product")
    cosines = torch.nn.functional.cosine_similarity(back.W_enc, sae.W_enc, dim=0)
    torch.testing.assert_close(cosines, torch.ones(D_SAE))
    torch.testing.assert_close(back.W_dec.data, sae.W_dec.data)
    torch.testing.assert_close(back.b_dec.data, sae.b_dec.data)
    assert [entry["score"] for entry in back.cfg.metadata.rescored] == [first, note(back)["score"]]
    assert back.cfg.metadata.rescored[0] == there.cfg.metadata.rescored[0]


@pytest.mark.parametrize("name", SWAPPABLE)
def test_the_original_is_left_alone(name):
    sae = trained(name)
    state = {key: tensor.clone() for key, tensor in sae.state_dict().items()}
    sae.cfg.metadata.tags = {"mine": []}
    config, rng = copy.deepcopy(sae.cfg.to_dict()), torch.get_rng_state()
    swapped = rescore(sae, X, "cosine")
    swapped.cfg.metadata.tags["mine"].append("changed")
    assert sae.cfg.to_dict() == config
    assert torch.equal(torch.get_rng_state(), rng)
    with torch.no_grad():
        for parameter in swapped.parameters():
            parameter.add_(1)
    assert all(torch.equal(tensor, state[key]) for key, tensor in sae.state_dict().items())


@pytest.mark.parametrize("score", ["cosine", "inner_product"])
@pytest.mark.parametrize("name", ["standard", "per_feature_cosine_batchtopk", "abstopk"])
def test_saved_and_loaded(name, score, tmp_path):
    sae = trained(name)
    sae.cfg.metadata.hook_name = "blocks.3.hook_resid_post"
    swapped = rescore(sae, X, score)
    swapped.save_model(tmp_path)
    loaded = SAE.load_from_disk(tmp_path)
    assert type(loaded) is type(swapped)
    for one, other in zip(codes_and_output(loaded, X), codes_and_output(swapped, X), strict=True):
        assert torch.equal(one, other)
    assert loaded.cfg.metadata.rescored == swapped.cfg.metadata.rescored
    assert loaded.cfg.metadata.hook_name == "blocks.3.hook_resid_post"
    assert ("requires" in loaded.cfg.metadata) == (score == "cosine")


@pytest.mark.parametrize("start", ["standard", "cosine_topk"])
def test_fitted_scale_is_the_best_of_the_grid(start):
    # each feature is a dimension; a uniform b_enc makes scores count against it
    weights = {"W_dec": torch.eye(D_IN), "b_enc": torch.full((D_IN,), 0.1), "b_dec": torch.full((D_IN,), 0.1)}
    weights["W_enc"] = 2 * torch.eye(D_IN)
    if start == "standard":
        sae, score, target = build("standard", **weights), "cosine", 3.0
    else:
        sae = build("cosine_topk", k=3, norm_exponent=torch.tensor(0.0), **weights)
        score, target = "inner_product", None
    kept = note(rescore(sae, X, score, target_l0=target))["scale"]
    swapped = rescore(sae, X, score, target_l0=target, scale="fit", progress=False)
    x_centered = X.double() - 0.1
    norm = x_centered.norm(dim=-1, keepdim=True)

    def fve(scale):
        scores = scale * (x_centered / norm if score == "cosine" else 2 * x_centered) + 0.1
        if target is None:
            cut = scores.topk(3, dim=-1).values[:, -1:].clamp_min(1e-300)
        else:
            cut = scores.flatten().sort(descending=True).values[3 * len(X) - 1].clamp_min(1e-300)
        residual = x_centered - torch.where(scores >= cut, scores, 0)
        return 1 - (residual.var(dim=0).sum() / X.double().var(dim=0).sum()).item()

    grid = [kept * 4 ** (i / 10) for i in range(-10, 11)]
    assert note(swapped)["scale"] == pytest.approx(max(grid, key=fve), rel=1e-6)
    assert grid[0] < note(swapped)["scale"] < grid[-1]
    assert note(swapped)["scale"] != pytest.approx(kept)
    assert note(swapped)["scale_chosen_by"] == "fit"


@pytest.mark.parametrize("name", ["standard", "inner_product_batchtopk", "cosine_batchtopk"])
def test_bfloat16(name):
    sae = trained(name).to(torch.bfloat16)
    for score in ("cosine", "inner_product"):
        swapped = rescore(sae, X, score, target_l0=2.0)
        assert swapped.dtype == swapped.W_enc.dtype == torch.bfloat16
        # SAELens' own scores are bfloat16 there, so several share the cut
        assert l0(swapped, X) == pytest.approx(2.0, rel=0.02)
        assert note(swapped)["l0"] == l0(swapped, X)


def test_heads():
    sae = trained("standard")
    sae.cfg.metadata.hook_name, sae.cfg.reshape_activations = "blocks.0.attn.hook_z", "hook_z"
    swapped = rescore(sae, X, "cosine", target_l0=2.0)
    assert swapped.hook_z_reshaping_mode
    assert (swapped.encode(X[:, None]) != 0).sum() == 2 * len(X)
    assert swapped(X[:, None]).shape == (len(X), 1, D_IN)

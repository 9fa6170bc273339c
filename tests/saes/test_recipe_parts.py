"""The recipe part by part, on numbers small enough to work out by hand."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from recipe_cases import BATCHTOPK, TOPK, gaussian, make_sae, run_trainer, step_input
from sae_lens import TrainingSAE
from sae_lens.registry import get_sae_training_class
from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig

from saelens_cosine.saes.recipe.training_sae import geometric_median

AUX = "auxiliary_reconstruction_loss"


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        ([[0, 0], [1, 0], [10, 0]], [1, 0]),  # on a line: the middle point; the mean is 3.67
        ([[1, 1], [1, -1], [-1, 1], [-1, -1]], [0, 0]),
        # convex quadrilateral: where the diagonals y = x and x + y = 2 cross; the mean is (1.25, 1.25)
        ([[0, 0], [2, 0], [3, 3], [0, 2]], [1, 1]),
        # one outlier: unit vectors cancel on the x axis where 1 + 1 - 1 = 2x / sqrt(1 + x^2); the mean is 200
        ([[-1, 0], [1, 0], [0, -1], [0, 1], [1000, 0]], [1 / math.sqrt(3), 0]),
    ],
    ids=["line", "square", "quadrilateral", "outlier"],
)
def test_geometric_median(points, expected):
    median = geometric_median(torch.tensor(points, dtype=torch.float64))
    torch.testing.assert_close(median, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-4)


# Around (10, 20): the geometric median and the mean of these four are the centre, and the distances are 5, 5, 1, 1
CROSS = torch.tensor([[15, 20], [5, 20], [10, 21], [10, 19]], dtype=torch.float64)


@pytest.mark.parametrize("architecture", [a for a in TOPK + BATCHTOPK if "cosine" in a])
@pytest.mark.parametrize(
    ("b_dec_init", "mean_norm"),
    [
        ("geometric_median", 3.0),
        # from the origin: sqrt(15^2 + 20^2) = 25, and so on
        ("zeros", (25 + math.sqrt(425) + math.sqrt(541) + math.sqrt(461)) / 4),
    ],
)
def test_log_scale_from_data_is_the_log_of_the_mean_centred_norm(architecture, b_dec_init, mean_norm):
    sae = make_sae(architecture, d_in=2, b_dec_init=b_dec_init, log_scale_from_data=True)
    sae.training_forward_pass(step_input(CROSS, step=0))
    torch.testing.assert_close(sae.log_scale.detach(), torch.full_like(sae.log_scale, math.log(mean_norm)))


@pytest.mark.parametrize("architecture", TOPK + BATCHTOPK)
@pytest.mark.parametrize(
    ("b_dec_init", "expected"), [("geometric_median", [1, 1]), ("mean", [2, 3]), ("zeros", [0, 0])]
)
def test_b_dec_starts_at_the_first_batch(architecture, b_dec_init, expected):
    three_alike = torch.tensor([[1, 1], [1, 1], [1, 1], [5, 9]], dtype=torch.float64)
    sae = make_sae(architecture, d_in=2, b_dec_init=b_dec_init)
    sae.training_forward_pass(step_input(three_alike, step=0))
    torch.testing.assert_close(sae.b_dec.detach(), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-4)


@pytest.mark.parametrize("architecture", TOPK + BATCHTOPK)
def test_starts_are_taken_from_data_once(architecture, monkeypatch, tmp_path):
    seen = []
    sae_class = get_sae_training_class(architecture)[0]
    original = sae_class.initialize_from_data
    monkeypatch.setattr(sae_class, "initialize_from_data", lambda sae, x: (seen.append(x), original(sae, x)))
    batches = [gaussian(8, 4, seed=i) for i in range(3)]
    run_trainer(make_sae(architecture), batches, tmp_path, n_checkpoints=1)  # written after 16 of 24 tokens
    assert len(seen) == 1
    assert torch.equal(seen[0], batches[0])

    sae = TrainingSAE.load_from_disk(tmp_path / "16")
    learned = {name: value.clone() for name, value in sae.named_parameters() if name != "W_dec"}
    sae.training_forward_pass(step_input(gaussian(8, 4) + 100, step=0))  # fine-tuning: a new trainer starts at step 0
    assert len(seen) == 1
    assert all(torch.equal(value, getattr(sae, name)) for name, value in learned.items())


@pytest.mark.parametrize("architecture", TOPK + BATCHTOPK)
def test_decoder_gradient_is_projected_once_per_step(architecture):
    sae, x = make_sae(architecture), gaussian(8, 4)
    loss = sae.training_forward_pass(step_input(x)).loss
    rows = sae.W_dec.detach()

    loss.backward(retain_graph=True)
    projected = sae.W_dec.grad.clone()
    torch.testing.assert_close((projected * rows).sum(-1), torch.zeros(6, dtype=torch.float64), rtol=0, atol=1e-14)
    assert projected.norm() > 0.1

    sae.W_dec.grad = None
    loss.backward()  # no hook is left, so this one is the whole gradient
    radial = (sae.W_dec.grad * rows).sum(-1, keepdim=True)
    assert radial.abs().max() > 0.1
    torch.testing.assert_close(sae.W_dec.grad - radial * rows, projected)


def test_a_free_decoder_keeps_its_gradient_and_its_norms():
    sae = make_sae("cosine_topk", unit_decoder=False, decoder_init_norm=0.5)
    sae.training_forward_pass(step_input(gaussian(8, 4))).loss.backward()
    assert (sae.W_dec.grad * sae.W_dec).sum(-1).abs().max() > 0.1
    torch.testing.assert_close(sae.eval().W_dec.norm(dim=-1), torch.full((6,), 0.5, dtype=torch.float64))


@pytest.mark.parametrize("architecture", TOPK + BATCHTOPK)
def test_rows_are_unit_in_eval_mode_and_in_the_next_step(architecture):
    sae = make_sae(architecture)
    one = torch.ones(6, dtype=torch.float64)
    run_trainer(sae, [3 * gaussian(8, 4, seed=i) for i in range(3)])
    moved = sae.W_dec.detach().clone()
    assert (moved.norm(dim=-1) - 1).abs().max() > 1e-5  # a straight step off the sphere of about lr = 0.01
    unit = moved / moved.norm(dim=-1, keepdim=True)

    torch.testing.assert_close(sae.eval().W_dec.norm(dim=-1), one)
    torch.testing.assert_close(sae.W_dec.detach(), unit)
    with torch.no_grad():
        sae.train().W_dec.mul_(3)
    output = sae.training_forward_pass(step_input(gaussian(8, 4)))
    torch.testing.assert_close(output.sae_out, output.feature_acts @ unit + sae.b_dec)


@pytest.mark.parametrize("architecture", BATCHTOPK)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_threshold_average(architecture, dtype):
    sae = make_sae(architecture, dtype=dtype, topk_threshold_lr=0.25)

    def update(codes: list[list[float]]) -> float:
        sae.update_topk_threshold(torch.tensor(codes, dtype=getattr(torch, dtype)))
        return sae.topk_threshold.item()

    assert update([[0, 0], [0, 0]]) == 0
    assert update([[0, 3], [2, 5]]) == 2  # starts at the first batch's smallest code
    assert update([[0, 7], [6, 9]]) == 3  # 2 + (6 - 2) / 4
    assert update([[0, 0], [0, 0]]) == 3  # nothing selected, nothing learned
    assert update([[1, 0], [0, 0]]) == 2.5  # 3 + (1 - 3) / 4
    assert sae.topk_threshold.dtype == torch.float64


def test_threshold_average_does_not_stall_in_float32():
    """1 + 1e-9 is 1 in float32; the average is kept in double, so a thousand such steps add up."""
    sae = make_sae("cosine_batchtopk", dtype="float32", topk_threshold_lr=1e-9)
    sae.update_topk_threshold(torch.tensor([[1.0]]))
    expected = 1.0
    for _ in range(1000):
        sae.update_topk_threshold(torch.tensor([[2.0]]))
        expected += 1e-9 * (2.0 - expected)
    assert sae.topk_threshold.item() == expected


@pytest.mark.parametrize("architecture", BATCHTOPK)
def test_threshold_starts_at_its_step(architecture):
    sae = make_sae(architecture, topk_threshold_start_step=2, topk_threshold_lr=0.5)
    smallest, learned = [], []
    for step in range(4):
        codes = sae.training_forward_pass(step_input(gaussian(8, 4, seed=step), step)).feature_acts
        smallest.append(codes[codes > 0].min().item())
        learned.append(sae.topk_threshold.item())
    assert learned == [0, 0, smallest[2], pytest.approx((smallest[2] + smallest[3]) / 2)]


def test_start_step_leaves_a_checkpoints_threshold_alone():
    """Fine-tuning starts at step 0 again: the threshold that was learned stays until the average goes on."""
    sae = make_sae("cosine_batchtopk", topk_threshold_start_step=2)
    sae.topk_threshold.fill_(0.75)
    sae.initialized_from_data.fill_(True)
    for step in range(2):
        sae.training_forward_pass(step_input(gaussian(8, 4), step))
        assert sae.topk_threshold.item() == 0.75


@pytest.mark.parametrize("architecture", BATCHTOPK)
def test_eval_mode_compares_with_the_threshold_strictly(architecture):
    sae = make_sae(architecture, k=1, d_sae=4)
    scores = torch.tensor([[2.0, 3.0, 2.5, -4.0], [1.0, 2.0, 5.0, 0.0]], dtype=torch.float64)
    sae.topk_threshold.fill_(2.0)
    above = torch.tensor([[0, 3, 2.5, 0], [0, 0, 5, 0]], dtype=torch.float64)
    two_of_the_batch = torch.tensor([[0, 3, 0, 0], [0, 0, 5, 0]], dtype=torch.float64)
    assert torch.equal(sae.eval().select(scores), above)
    assert torch.equal(sae.train().select(scores), two_of_the_batch)
    sae.topk_threshold.fill_(0.0)  # none learned yet
    assert torch.equal(sae.eval().select(scores), two_of_the_batch)


@pytest.mark.parametrize("architecture", BATCHTOPK)
def test_saving_without_a_threshold_warns(architecture, tmp_path):
    sae = make_sae(architecture, topk_threshold_start_step=123)
    with pytest.warns(UserWarning, match=f"{architecture}.*topk_threshold_start_step=123"):
        sae.save_inference_model(tmp_path)
    sae.topk_threshold.fill_(0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sae.save_inference_model(tmp_path)


def aux_loss(sae, residual, hidden_pre, codes=None) -> torch.Tensor:
    """The auxiliary loss of one batch given by hand; without codes no feature fires."""
    residual, hidden_pre = (torch.as_tensor(t, dtype=torch.float64) for t in (residual, hidden_pre))
    codes = torch.zeros_like(hidden_pre) if codes is None else torch.as_tensor(codes, dtype=torch.float64)
    sae_out = torch.ones_like(residual)
    return sae.calculate_aux_loss(step_input(sae_out + residual), codes, hidden_pre, sae_out)[AUX]


@pytest.mark.parametrize("architecture", ["inner_product_topk", "cosine_batchtopk"])
@pytest.mark.parametrize("sparse", [False, True])
def test_tokens_since_fired(architecture, sparse):
    sae = make_sae(architecture, d_sae=4, dead_feature_window_tokens=5)

    def batch(codes: list[list[float]]) -> list[int]:
        dense = torch.tensor(codes, dtype=torch.float64)
        codes_in = dense.to_sparse() if sparse else dense
        sae.calculate_aux_loss(step_input(torch.zeros(len(dense), 4).double()), codes_in, dense, torch.zeros(1, 4))
        return sae.tokens_since_fired.tolist()

    assert batch([[1, 0, 0, 0], [2, 0, 0, -1]]) == [0, 2, 2, 0]  # a negative code is a firing too
    assert batch([[0, 0, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]]) == [3, 5, 0, 3]
    assert sae.dead_features.tolist() == [False, True, False, False]  # at 5 of 5 tokens
    assert batch([[0, 1, 0, 1]]) == [4, 0, 1, 0]
    assert not sae.dead_features.any()
    assert batch([[0, 0, 0, 1]]) == [5, 1, 2, 0]
    assert sae.dead_features.tolist() == [True, False, False, False]
    assert sae.tokens_since_fired.dtype == torch.int64


@pytest.mark.parametrize(
    ("residual", "expected"),
    [
        ([[1, 0], [-1, 0]], 1.0),  # mean 0: error and variance are the same 1
        ([[3, 0], [1, 0]], 5.0),  # error (9 + 1) / 2, variance 1 about the mean (2, 0)
        ([[0, 7], [0, -1]], 25 / 16),  # error (49 + 1) / 2, variance 16 about (0, 3)
    ],
)
def test_aux_loss_of_silent_dead_features(residual, expected):
    sae = make_sae("cosine_topk", d_in=2, d_sae=3, dead_feature_window_tokens=2)
    negative = -torch.ones(2, 3)  # rectified, so the prediction is 0; raw scores would give another loss
    assert aux_loss(sae, residual, negative).item() == pytest.approx(expected / 32, rel=1e-14)


def test_aux_loss_by_hand():
    sae = make_sae("cosine_topk", d_in=2, d_sae=3, dead_feature_window_tokens=2, aux_loss_coefficient=0.5)
    with torch.no_grad():
        sae.W_dec.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]]))
    residual, pre = [[2, 0], [-2, 0]], [[1.0, 0.5, 9.0], [-1.0, -3.0, 9.0]]
    # Feature 2 fires and is alive. d_in // 2 = 1 of the dead 0 and 1 is kept per token: token 0 predicts (1, 0), so
    # its error is 1; token 1 has no positive score, so its error is 4. Variance 4: (2.5 / 4) / 2
    assert aux_loss(sae, residual, pre, codes=[[0, 0, 9], [0, 0, 9]]).item() == pytest.approx(0.3125, rel=1e-14)
    # Everything fires: no dead features, no loss
    assert aux_loss(sae, residual, pre, codes=torch.ones(2, 3)).item() == 0


def test_a_feature_that_fires_is_alive_in_the_same_batch():
    sae = make_sae("cosine_topk", d_in=2, d_sae=2, dead_feature_window_tokens=100)
    with torch.no_grad():
        sae.W_dec.copy_(torch.eye(2))
    sae.tokens_since_fired.copy_(torch.tensor([10**9, 98]))
    # Feature 0 was dead and fires; feature 1 reaches 98 + 2 tokens with this batch. So feature 1 alone predicts:
    # errors |(2, 0) - (0, 1)|^2 = 5 and |(-2, 0) - (0, 1)|^2 = 5, variance 4
    loss = aux_loss(sae, [[2, 0], [-2, 0]], [[7.0, 1.0], [7.0, 1.0]], codes=[[7, 0], [0, 0]])
    assert loss.item() == pytest.approx(5 / 4 / 32, rel=1e-14)
    assert sae.tokens_since_fired.tolist() == [0, 100]


@pytest.mark.parametrize("n_dead", [1, 2, 5])  # fewer than, as many as and more than d_in // 2
def test_aux_loss_agrees_with_loops(n_dead):
    sae = make_sae("per_feature_cosine_batchtopk", d_in=4, d_sae=7)
    sae.tokens_since_fired[:n_dead] = 10**9
    residual, pre = gaussian(5, 4, seed=2) + 1, gaussian(5, 7, seed=3)

    error = variance = 0.0
    mean = [sum(row[j] for row in residual.tolist()) / 5 for j in range(4)]
    for e, scores in zip(residual.tolist(), pre.tolist(), strict=True):
        left = list(e)
        for i in sorted(range(n_dead), key=lambda i: -scores[i])[:2]:
            for j in range(4):
                left[j] -= max(scores[i], 0) * sae.W_dec[i, j].item()
        error += sum(value**2 for value in left) / 5
        variance += sum((e[j] - mean[j]) ** 2 for j in range(4)) / 5
    assert aux_loss(sae, residual, pre).item() == pytest.approx(error / variance / 32, rel=1e-12)


@pytest.mark.parametrize("architecture", TOPK + BATCHTOPK)
def test_aux_gradient_reaches_dead_features_only(architecture):
    sae = make_sae(architecture, d_in=6, d_sae=8, k=1)
    with torch.no_grad():
        sae.b_enc[[0, 2, 3, 5, 6, 7]] = 200.0  # the two others have scores above 0, but never among the k largest
    sae.tokens_since_fired[[1, 4]] = 10**9
    output = sae.training_forward_pass(step_input(3 * gaussian(32, 6)))
    assert sae.dead_features.nonzero().flatten().tolist() == [1, 4]
    assert output.losses[AUX] > 0
    output.losses[AUX].backward()

    def touched(gradient: torch.Tensor) -> list[int]:
        return (gradient.reshape(8, -1) != 0).any(dim=1).nonzero().flatten().tolist()

    per_feature = {"W_enc": sae.W_enc.grad.T, "b_enc": sae.b_enc.grad, "W_dec": sae.W_dec.grad}
    shared = {"b_dec": sae.b_dec.grad}
    if "cosine" in architecture:
        group = per_feature if architecture.startswith("per_feature") else shared
        group |= {"norm_exponent": sae.norm_exponent.grad, "log_scale": sae.log_scale.grad}
    for name, gradient in per_feature.items():
        assert touched(gradient) == [1, 4], name
    assert all(gradient.norm() > 0 for gradient in shared.values())


@pytest.mark.parametrize("architecture", TOPK + BATCHTOPK)
def test_no_aux_loss_without_dead_features(architecture):
    sae, x = make_sae(architecture), gaussian(8, 4)
    output = sae.training_forward_pass(step_input(x, step=10))
    assert output.losses[AUX].item() == 0
    assert output.loss.item() == pytest.approx(((x - output.sae_out) ** 2).sum(-1).mean().item(), rel=1e-14)


@pytest.mark.parametrize("n_dead", [0, 1, 5])
@pytest.mark.parametrize("rescale", [False, True])
def test_aux_loss_not_normalised_is_saelens_own(n_dead, rescale):
    """Every option of the recipe at its SAELens value: the whole step is SAELens' own TopK step, gradients included."""
    options = {"decoder_init_norm": 0.3, "rescale_acts_by_decoder_norm": rescale, "aux_loss_coefficient": 0.7}
    ours = make_sae("inner_product_topk", unit_decoder=False, normalize_aux_loss=False, b_dec_init="zeros", **options)
    stock = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=4, d_sae=6, k=1, dtype="float64", **options))
    ours.cfg.k = ours.activation_fn.k = 1
    ours.tokens_since_fired[:n_dead] = 10**9
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(0.2 * gaussian(*parameter.shape))
        ours.b_enc[5] = 50.0  # the feature that fires on every token, so that the others stay dead
    stock.load_state_dict(ours.state_dict(), strict=False)

    batch = step_input(gaussian(8, 4), step=0)
    mine = ours.training_forward_pass(batch)  # ignores the trainer's mask, which counts forward passes
    batch.dead_neuron_mask = torch.arange(6) < n_dead
    theirs = stock.training_forward_pass(batch)
    assert (theirs.losses[AUX] > 0) == (n_dead > 0)
    mine.loss.backward()
    theirs.loss.backward()
    for name, loss in theirs.losses.items():
        torch.testing.assert_close(mine.losses[name], loss)
    for name, parameter in stock.named_parameters():
        torch.testing.assert_close(ours.get_parameter(name).grad, parameter.grad)


@pytest.mark.parametrize("architecture", TOPK)
def test_sparse_codes_train_as_dense_ones(architecture):
    results = []
    for sparse in (False, True):
        sae = make_sae(architecture, use_sparse_activations=sparse, dead_feature_window_tokens=8)
        output = sae.training_forward_pass(step_input(gaussian(8, 4)))
        output.loss.backward()
        assert output.feature_acts.is_sparse is sparse
        gradients = {name: parameter.grad for name, parameter in sae.named_parameters()}
        results.append({**gradients, "loss": output.loss, "counters": sae.tokens_since_fired})
    torch.testing.assert_close(results[1], results[0])

"""The recipe part by part, on numbers small enough to work out by hand."""

from __future__ import annotations

import math
import warnings
from pathlib import Path

import helpers
import pytest
import torch
from sae_lens import TrainingSAE
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.registry import get_sae_training_class
from sae_lens.saes.sae import SAEMetadata, TrainStepInput
from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.training.sae_trainer import SAETrainer

import saelens_cosine
from saelens_cosine.saes.recipe.training_sae import geometric_median

SCORES = ["inner_product", "cosine", "per_feature_cosine"]
BATCHTOPK = [f"{score}_batchtopk" for score in SCORES]
TOPK = [f"{score}_topk" for score in SCORES]
HOOK = "blocks.3.hook_resid_post"
AUX = "auxiliary_reconstruction_loss"

assert set(BATCHTOPK + TOPK) <= set(saelens_cosine.TRAINING_ARCHITECTURES)


def make_config(architecture: str, **settings):
    defaults = {"d_in": 4, "d_sae": 6, "k": 2, "dtype": "float64", "metadata": SAEMetadata(hook_name=HOOK)}
    return get_sae_training_class(architecture)[1](**{**defaults, **settings})


def make_sae(architecture: str, **settings):
    torch.manual_seed(0)
    return get_sae_training_class(architecture)[0](make_config(architecture, **settings))


def gaussian(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def step_input(x: torch.Tensor, step: int = 1, logging: bool = False) -> TrainStepInput:
    return TrainStepInput(x, coefficients={}, dead_neuron_mask=None, n_training_steps=step, is_logging_step=logging)


def run_trainer(sae, batches: list[torch.Tensor], path: Path | None = None, n_checkpoints: int = 0):
    """SAELens' trainer, once over the batches."""
    config = SAETrainerConfig(
        total_training_samples=sum(map(len, batches)),
        train_batch_size_samples=len(batches[0]),
        lr=0.01,
        lr_end=0.001,
        n_checkpoints=n_checkpoints,
        checkpoint_path=str(path) if path else None,
        logger=LoggingConfig(log_to_wandb=False),
    )
    return SAETrainer(config, sae, iter(batches)).fit()


# --- start ---


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
@pytest.mark.parametrize(("b_dec_init", "expected"), [("geometric_median", [10, 20]), ("zeros", [0, 0])])
def test_b_dec_starts_at_the_first_batch(architecture, b_dec_init, expected):
    sae = make_sae(architecture, d_in=2, b_dec_init=b_dec_init)
    sae.training_forward_pass(step_input(CROSS, step=0))
    torch.testing.assert_close(sae.b_dec.detach(), torch.tensor(expected, dtype=torch.float64))


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


# --- unit decoder ---


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


# --- threshold ---


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


# --- counters and auxiliary loss ---


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


# --- learning or not learning the score's parameters ---


@pytest.mark.parametrize("architecture", [a for a in TOPK + BATCHTOPK if "cosine" in a])
@pytest.mark.parametrize(("frozen", "other"), [("norm_exponent", "log_scale"), ("log_scale", "norm_exponent")])
def test_a_frozen_parameter_is_untouched_by_training(architecture, frozen, other):
    sae = make_sae(architecture, norm_exponent_init=0.25, log_scale_init=0.5, **{f"learn_{frozen}": False})
    before = {name: getattr(sae, name).detach().clone() for name in (frozen, other)}
    run_trainer(sae, [gaussian(8, 4, seed=i) for i in range(5)])
    assert torch.equal(getattr(sae, frozen), before[frozen])
    assert not torch.equal(getattr(sae, other), before[other])


# --- refusals ---


REFUSED = [  # settings, and the change that makes them possible
    ({"unit_decoder": True, "rescale_acts_by_decoder_norm": True}, {"rescale_acts_by_decoder_norm": False}),
    ({"unit_decoder": True, "decoder_init_norm": 0.1}, {"unit_decoder": False}),
    ({"k": 7, "d_sae": 6}, {"k": 6}),
    ({"k": 0, "d_sae": 6}, {"k": 1}),
    ({"dead_feature_window_tokens": 0}, {"dead_feature_window_tokens": 1}),
]
REFUSED_SCALES = [({"log_scale_from_data": True, "log_scale_init": 1.0}, {"log_scale_init": None})]
REFUSED_RATES = [
    ({"topk_threshold_lr": 0.0}, {"topk_threshold_lr": 0.5}),
    ({"topk_threshold_lr": 1.5}, {"topk_threshold_lr": 1.0}),
]


@pytest.mark.parametrize(
    ("architecture", "settings", "way_out"),
    [(a, *case) for a in TOPK + BATCHTOPK for case in REFUSED]
    + [(a, *case) for a in TOPK + BATCHTOPK if "cosine" in a for case in REFUSED_SCALES]
    + [(a, *case) for a in BATCHTOPK for case in REFUSED_RATES],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_impossible_combinations_are_refused_by_name(architecture, settings, way_out):
    every_name = "".join(f"(?=.*{name}=)" for name in settings)
    with pytest.raises(ValueError, match=every_name):
        make_config(architecture, **settings)
    make_config(architecture, **{**settings, **way_out})


# --- non-finite values ---


@pytest.mark.parametrize("architecture", TOPK + BATCHTOPK)
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(
    ("bad_step", "noticed", "cause", "checkpoints"),
    [
        (0, 0, "1 of 8 activations", []),
        (13, 20, "W_enc.* no longer: activations of an earlier batch", ["88"]),
        (20, 20, "1 of 8 activations", ["88"]),
    ],
)
def test_non_finite_activations_stop_training(architecture, value, bad_step, noticed, cause, checkpoints, tmp_path):
    """Checkpoints are due after 88, 168 and 248 of 320 tokens, that is in steps 10, 20 and 30."""
    batches = [gaussian(8, 4, seed=i) for i in range(40)]
    batches[bad_step][3, 1] = value
    assert noticed - bad_step <= 10
    with pytest.raises(FloatingPointError, match=cause) as stop:
        run_trainer(make_sae(architecture), batches, tmp_path, n_checkpoints=3)
    assert f"training step {noticed}," in str(stop.value)
    assert HOOK in str(stop.value)
    assert architecture in str(stop.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == checkpoints
    for name in checkpoints:
        sae = TrainingSAE.load_from_disk(tmp_path / name)
        assert all(tensor.isfinite().all() for tensor in sae.state_dict().values())
        assert sae.eval()(gaussian(8, 4)).isfinite().all()


@pytest.mark.parametrize("architecture", ["inner_product_topk", "cosine_batchtopk"])
def test_an_activation_beyond_the_squares_range_is_named_and_not_the_weights(architecture):
    x = gaussian(8, 4).float()
    x[3, 1] = 1e20  # finite; its square is not, in float32
    sae = make_sae(architecture, dtype="float32")
    with pytest.raises(FloatingPointError, match="reach 1e\\+20, whose square is not; filter_high_norm_tokens"):
        sae.training_forward_pass(step_input(x, step=0))


def test_a_checkpoint_between_two_checks_is_not_poisoned(tmp_path):
    """Checkpoints after 56 and 112 of 160 tokens, in steps 6 and 13; bad in step 12, before the check in step 20."""
    batches = [gaussian(8, 4, seed=i) for i in range(20)]
    batches[12][3, 1] = math.nan
    with pytest.raises(FloatingPointError, match=f"Not saved: .*W_enc.*{HOOK}"):
        run_trainer(make_sae("cosine_batchtopk"), batches, tmp_path, n_checkpoints=2)
    weights = [path.parent.name for path in tmp_path.rglob("*.safetensors") if path.name == "sae_weights.safetensors"]
    assert weights == ["56"]
    sae = TrainingSAE.load_from_disk(tmp_path / "56")
    assert all(tensor.isfinite().all() for tensor in sae.state_dict().values())


def test_a_logging_step_notices_at_once():
    x = gaussian(8, 4)
    x[2:5, 0] = math.inf
    make_sae("cosine_topk").training_forward_pass(step_input(x, step=3))  # neither logged nor every tenth
    with pytest.raises(FloatingPointError, match=r"step 3.*3 of 8 activations"):
        make_sae("cosine_topk").training_forward_pass(step_input(x, step=3, logging=True))


@pytest.mark.parametrize("save", ["save_model", "save_inference_model"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(
    ("architecture", "name"),
    [
        ("inner_product_topk", "b_dec"),
        ("cosine_topk", "norm_exponent"),
        ("per_feature_cosine_topk", "W_dec"),
        ("inner_product_batchtopk", "b_enc"),
        ("cosine_batchtopk", "topk_threshold"),
        ("per_feature_cosine_batchtopk", "W_enc"),
    ],
)
def test_a_poisoned_sae_is_not_saved(save, value, architecture, name, tmp_path):
    sae = make_sae(architecture)
    if hasattr(sae, "topk_threshold"):
        sae.topk_threshold.fill_(0.5)
    getattr(sae, save)(tmp_path / "healthy")
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a NaN threshold also counts as not learned
        tensor = getattr(sae, name)
        tensor[(0,) * tensor.ndim] = value
        with pytest.raises(FloatingPointError, match=f"Not saved: .*{name}.*{HOOK}"):
            getattr(sae, save)(tmp_path / "poisoned")
    assert (tmp_path / "healthy" / "sae_weights.safetensors").exists()
    assert [path for path in (tmp_path / "poisoned").rglob("*") if path.is_file()] == []


# --- metrics ---


def expected_metrics(architecture: str) -> dict[str, float]:
    metrics = {"dead_features_in_token_window": 2, "dead_feature_window_tokens": 50}
    if "cosine" in architecture:
        low, mean, high, share, scale = (
            (-0.5, 0.4, 1.0, 1 / 3, 2.0) if architecture.startswith("per_feature") else (0.7, 0.7, 0.7, 1.0, 1.5)
        )
        metrics |= {
            "norm_exponent_min": low,
            "norm_exponent_mean": mean,
            "norm_exponent_max": high,
            "norm_exponent_share_above_0.5": share,
            "log_scale_mean": scale,
        }
    return metrics | ({"topk_threshold": 0.25} if architecture in BATCHTOPK else {})


@pytest.mark.parametrize("architecture", TOPK + BATCHTOPK)
def test_training_metrics(architecture):
    sae = make_sae(architecture, dead_feature_window_tokens=50)
    sae.tokens_since_fired.copy_(torch.tensor([0, 49, 50, 1000, 3, 7]))  # dead: 50 and 1000
    if architecture.startswith("per_feature"):
        # mean 2.4 / 6 = 0.4; 0.5 itself is not above 0.5, so 2 of 6 are
        sae.norm_exponent.data.copy_(torch.tensor([-0.5, 0.5, 0.9, 1.0, 0.2, 0.3]))
        sae.log_scale.data.copy_(torch.tensor([1.0, 3.0, 2.0, 2.0, 0.0, 4.0]))
    elif "cosine" in architecture:
        sae.norm_exponent.data.fill_(0.7)
        sae.log_scale.data.fill_(1.5)
    if architecture in BATCHTOPK:
        sae.topk_threshold.fill_(0.25)
    metrics = sae.training_metrics()
    assert {name: value.item() for name, value in metrics.items()} == pytest.approx(expected_metrics(architecture))
    assert all(value.ndim == 0 and not value.requires_grad for value in metrics.values())


@pytest.mark.parametrize("architecture", TOPK + BATCHTOPK)
def test_metrics_are_in_the_output_of_logging_steps(architecture):
    sae = make_sae(architecture, topk_threshold_start_step=4) if architecture in BATCHTOPK else make_sae(architecture)
    names = set(expected_metrics(architecture))
    assert not (names - {"topk_threshold"}) & set(sae.training_forward_pass(step_input(gaussian(8, 4))).metrics)
    for step in (2, 4):  # before and after the threshold's start
        logged = sae.training_forward_pass(step_input(gaussian(8, 4), step=step, logging=True)).metrics
        state = sae.training_metrics()
        assert names <= set(logged)
        assert all(torch.equal(logged[name], state[name]) for name in names)


@pytest.mark.parametrize("normalize_aux_loss", [True, False])
@pytest.mark.parametrize("architecture", helpers.FAST)
def test_a_bfloat16_sae_trains_with_dead_features(architecture, normalize_aux_loss):
    options = {"normalize_aux_loss": normalize_aux_loss, "dead_feature_window_tokens": 16}
    sae = helpers.make_sae(architecture, seed=None, d_in=8, d_sae=32, k=2, dtype="bfloat16", **options).train()
    sae.tokens_since_fired += 16
    x = torch.randn(8, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    output = sae.training_forward_pass(TrainStepInput(x, {}, None, 1, False))
    output.loss.backward()
    assert sae.dead_features.sum() >= 32 - 2 * 8
    assert output.losses["auxiliary_reconstruction_loss"] > 0
    assert sae.W_dec.grad.isfinite().all()


def test_a_scale_from_data_leaves_out_the_share_of_the_norm_that_the_exponent_brings():
    # norms 4 and 16, mean 10; with a = 0.5 the score has n ** 0.5 already: b = 0.5 log 10
    config = get_sae_training_class("cosine_topk")[1](
        d_in=2, d_sae=4, k=1, norm_exponent_init=0.5, log_scale_from_data=True, b_dec_init="zeros"
    )
    sae = get_sae_training_class("cosine_topk")[0](config)
    sae.initialize_from_data(torch.tensor([[4.0, 0.0], [0.0, 16.0]]))
    assert sae.log_scale.item() == pytest.approx(0.5 * math.log(10))

"""A training step on the fast path is the dense formula's step, and SAELens' trainer sees no difference."""

import copy
import math

import pytest
import torch
from fast_path_cases import (
    AUX,
    SIZE,
    B,
    D,
    F,
    K,
    _reasons_not_logged_yet,  # noqa: F401
    assert_equal,
    dense,
    descend,
    gradients,
    is_fast,
    make,
    run,
    twin,
)
from helpers import (
    BATCHTOPK,
    FAST,
    FREE_DECODER,
    assert_close,
    make_activations,
    planted_batches,
    randomize,
    train_step,
)

RECTIFIED = [name for name in FAST if "abstopk" not in name and "bypass" not in name]
"""With codes that b_enc can turn on and off."""


def steps(sae, batches, start=1):
    """A training step on each batch; every loss and all tensors at the end."""
    losses = []
    for i, x in enumerate(batches):
        output = train_step(sae, x, step=start + i)
        output.loss.backward()
        descend(sae)
        losses.append(output.loss.detach())
    return {"losses": torch.stack(losses), **sae.state_dict()}


AUX_CASES = {
    "none dead": {},
    "dead": {"dead_feature_window_tokens": 100},  # 64 tokens a batch: from the second on
    "dead, not normalised": {"dead_feature_window_tokens": 100, "normalize_aux_loss": False},
}


@torch.no_grad()
def gap_at_the_cut(sae, x):
    """How far the last score that is kept is above the first that is not, relative to it; the smallest over all cuts."""
    scores = sae.rescale(sae.score(sae.process_sae_in(x)))
    if sae.signed_codes:
        scores = scores.abs()
    k = K
    if sae.cfg.architecture() in BATCHTOPK:
        scores, k = scores.flatten(), K * len(x)
    top = scores.topk(k + 1, dim=-1).values
    return ((top[..., k - 1] - top[..., k]) / top[..., k - 1]).min()


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("aux", AUX_CASES)
@pytest.mark.parametrize("decoder", [{}, FREE_DECODER], ids=["unit", "free"])
@pytest.mark.parametrize("name", FAST)
def test_steps_are_the_reference_paths(name, decoder, aux, dtype):
    tolerance = 1e-12 if dtype == "float64" else 5e-6 if "bypass" in name else 2e-6  # one norm more
    sae = make(name, "reference", dtype=dtype, **decoder, **AUX_CASES[aux])
    saes = [sae, twin(sae, "fast")]
    for step in (1, 2, 3):
        batches = (make_activations(B, D, seed=seed, dtype=sae.dtype) for seed in range(step, 100, 3))
        x = next(x for x in batches if gap_at_the_cut(sae, x) > 1e-5)  # else rounding may choose another code
        expected, output = (train_step(each, x, step=step) for each in saes)
        assert is_fast(output)
        assert type(expected.feature_acts) is type(expected.hidden_pre) is torch.Tensor
        assert output.feature_acts.shape == output.hidden_pre.shape == (B, F)
        assert (expected.losses[AUX] > 0) == (aux != "none dead" and step > 1)
        for key in ("mse_loss", AUX):
            assert output.losses[key].item() == pytest.approx(expected.losses[key].item(), rel=tolerance)
        assert torch.equal(dense(output.feature_acts) != 0, expected.feature_acts != 0)
        for key in ("feature_acts", "hidden_pre", "sae_out"):
            assert_close(dense(getattr(output, key)), getattr(expected, key), tolerance)
        for each in (expected, output):
            each.loss.backward()
        for key, gradient in gradients(sae).items():
            assert_close(gradients(saes[1])[key], gradient, tolerance)
        for each in saes:
            descend(each)
        assert torch.equal(saes[1].tokens_since_fired, sae.tokens_since_fired)
        if name in BATCHTOPK:
            assert saes[1].topk_threshold.item() == pytest.approx(sae.topk_threshold.item(), rel=tolerance)


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize(
    ("tokens", "options"),
    [
        (1, {}),
        (201, {"d_sae": 501, "k": 1}),
        (9, {"d_in": 7, "d_sae": 13, "k": 3}),  # too dense for auto, not for fast
        (9, {"d_in": 7, "d_sae": 13, "k": 13}),
        (9, {"d_in": 1, "d_sae": 20, "k": 2}),
    ],
    ids=["one token", "k 1", "small", "all features", "one input"],
)
def test_awkward_sizes(name, tokens, options):
    if options.get("d_in") == 1 and "bypass" in name:
        pytest.skip("all cosines of one input are 1 or -1, and torch.topk takes any of them")
    size = {**SIZE, **options}
    sae = make(name, "reference", dtype="float64", dead_feature_window_tokens=1, **{**options, "k": 1})
    sae.cfg.k = sae.activation_fn.k = size["k"]
    saes = [sae, twin(sae, "fast")]
    x = make_activations(tokens, size["d_in"], dtype=torch.float64)
    outputs = [train_step(each, x, step=1) for each in saes]
    assert is_fast(outputs[1])
    assert_close(dense(outputs[1].feature_acts), outputs[0].feature_acts, 1e-12)
    for output in outputs:
        output.losses["mse_loss"].backward()
    largest = max(gradient.abs().max() for gradient in gradients(sae).values())
    for key, gradient in gradients(sae).items():
        assert (gradients(saes[1])[key] - gradient).abs().max() <= 1e-12 * largest, key


@pytest.mark.parametrize("name", BATCHTOPK)
def test_a_fraction_of_a_code_per_token(name):
    # int(2.5 * 7) = 17 of 7 tokens
    output = train_step(make(name, "fast", k=2.5), make_activations(7, D), step=1)
    assert (dense(output.feature_acts) > 0).sum() == 17


@pytest.mark.parametrize("name", RECTIFIED)
@pytest.mark.parametrize("n_on", [0, 2], ids=["none", "some"])
def test_fewer_positive_scores_than_wanted(name, n_on):
    sae = make(name, "reference", dtype="float64", dead_feature_window_tokens=1)
    with torch.no_grad():
        sae.b_enc.fill_(-1e4)
        sae.b_enc[:n_on] = 1e4
    saes = [sae, twin(sae, "fast")]
    results = []
    for each in saes:
        output = train_step(each, make_activations(B, D, dtype=torch.float64), step=1)
        output.loss.backward()
        assert (dense(output.feature_acts) != 0).sum() == n_on * B
        results.append(
            {"loss": output.loss, "threshold": getattr(each, "topk_threshold", torch.ones(())), **gradients(each)}
        )
    for key, tensor in results[0].items():
        torch.testing.assert_close(
            results[1][key], tensor, rtol=1e-11, atol=1e-11, msg=lambda m, key=key: f"{key}: {m}"
        )


@pytest.mark.parametrize("name", ["inner_product_topk", "cosine_batchtopk", "per_feature_cosine_topk"])
@pytest.mark.parametrize("options", [{}, {"apply_b_dec_to_input": False}, FREE_DECODER], ids=["centred", "raw", "free"])
def test_gradient_of_the_input(name, options):
    sae = make(name, "reference", dtype="float64", **options)
    with torch.no_grad():
        sae.b_enc[0] = 100  # active on every token
    saes = [sae, twin(sae, "fast")]
    x = make_activations(B, D, dtype=torch.float64)
    x[3] = sae.b_dec.detach() * sae.cfg.apply_b_dec_to_input  # norm 0, where the score is flat along the norm
    inputs = [x.clone().requires_grad_() for _ in saes]
    for each, given in zip(saes, inputs, strict=True):
        output = train_step(each, given, step=1)
        output.loss.backward()
    assert is_fast(output)
    size = inputs[0].grad.abs().amax(dim=1)
    assert (size > 0).all()
    assert ((inputs[1].grad - inputs[0].grad).abs().amax(dim=1) <= 1e-11 * size).all()
    assert (gradients(saes[1])["b_dec"] - gradients(sae)["b_dec"]).abs().max() <= 1e-11 * size.max()


@pytest.mark.parametrize("frozen", ["W_enc", "b_enc", "W_dec", "b_dec", "norm_exponent", "log_scale"])
def test_a_frozen_parameter_gets_no_gradient_and_changes_no_other(frozen):
    sae = make("per_feature_cosine_batchtopk", "reference", dtype="float64", dead_feature_window_tokens=1)
    sae.get_parameter(frozen).requires_grad_(False)
    saes = [sae, twin(sae, "fast")]
    for each in saes:
        train_step(each, make_activations(B, D, dtype=torch.float64), step=1).loss.backward()
        assert each.get_parameter(frozen).grad is None
    for key, gradient in gradients(sae).items():
        assert_close(gradients(saes[1])[key], gradient, 1e-12)


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("options", [{}, FREE_DECODER, AUX_CASES["dead"]], ids=["unit", "free", "dead"])
def test_autocast_loses_no_more_than_the_reference_path(name, options):
    x = make_activations(B, D)
    sae = make(name, "reference", **options)
    exact = train_step(copy.deepcopy(sae).to(torch.float64), x.double(), step=1).loss.item()
    errors = []
    for kernels in ("reference", "fast"):
        each = twin(sae, kernels)
        with torch.autocast("cpu", torch.bfloat16):
            output = train_step(each, x, step=1)
        output.loss.backward()
        assert all(gradient.isfinite().all() for gradient in gradients(each).values())
        assert output.loss.dtype == torch.float32
        errors.append(abs(output.loss.item() - exact))
    assert is_fast(output)
    assert errors[1] <= errors[0] + 1e-6 * exact


RUNS = {
    "default": {},
    "free": FREE_DECODER,
    "scaled": {"normalize_activations": "expected_average_only_in"},
    "raw": {"apply_b_dec_to_input": False},
}


@pytest.mark.parametrize(
    ("name", "options"),
    [(name, RUNS["default"]) for name in FAST]
    + [(name, options) for name in ("inner_product_topk", "per_feature_cosine_batchtopk") for options in list(RUNS.values())[1:]],
    ids=lambda value: value if isinstance(value, str) else next((k for k, v in RUNS.items() if v is value), None),
)  # fmt: skip
def test_a_run_of_saelens_trainer_is_the_same(name, options):
    trainers = [run(name, kernels, dtype="float64", **options) for kernels in ("reference", "fast")]
    expected, found = trainers
    for trainer in trainers:
        trainer.fit()
    assert expected.fast == [False] * 30
    assert found.fast == [True] * 30
    assert sum(log[f"losses/{AUX}"] > 0 for log in expected.logs) > 15
    for key, tensor in expected.sae.state_dict().items():
        assert_close(found.sae.state_dict()[key] + 1, tensor + 1, 1e-9)  # a b_enc that is not trained is 0
    for counter in ("act_freq_scores", "n_forward_passes_since_fired", "n_frac_active_samples"):
        torch.testing.assert_close(getattr(found, counter), getattr(expected, counter), rtol=0, atol=0)
    assert found.log_feature_sparsity.isfinite().all()
    for one, other in zip(found.logs, expected.logs, strict=True):
        assert one == pytest.approx(other, rel=1e-8)
    assert 3 < expected.logs[-1]["metrics/l0"] < 4.001  # k, or less where a token has fewer positive scores


@pytest.mark.parametrize("name", ["per_feature_cosine_batchtopk", "cosine_topk"])
def test_one_seed_gives_one_result(name):
    results = [run(name, "fast", n=8).fit().state_dict() for _ in range(2)]
    assert_equal(*results)


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("saved_after", [1, 7])
def test_resumed_equals_uninterrupted(name, saved_after, tmp_path):
    whole, first = run(name, "fast", n=12), run(name, "fast", n=12)
    whole.fit()
    first.checkpoint_thresholds = [saved_after * 32 - 1]
    first.cfg.checkpoint_path = str(tmp_path)
    first.fit()
    second = run(name, "fast", n=12, start=saved_after)
    randomize(second.sae, seed=4)  # whatever is not restored shows
    second.load_trainer_state(tmp_path / str(saved_after * 32))
    second.sae.load_weights_from_checkpoint(tmp_path / str(saved_after * 32))
    second.fit()
    assert second.fast == [True] * (12 - saved_after)
    for trainer in (whole, second):
        assert all(group["fused"] for group in trainer.optimizer.param_groups)
        assert trainer.logs[-1][f"losses/{AUX}"] > 0
    assert_equal(second.sae.state_dict(), whole.sae.state_dict())
    assert second.logs == whole.logs[saved_after:]


def test_a_resumed_run_notices_its_steps(tmp_path):
    first, second = run("cosine_batchtopk", "fast", n=4), run("cosine_batchtopk", "fast", n=4, start=2)
    for _ in range(2):
        first.step(next(first.data_provider))
        first.n_training_steps += 1
    first.save_checkpoint("two", tmp_path)
    second.load_trainer_state(tmp_path / "two")
    second.sae.load_weights_from_checkpoint(tmp_path / "two")
    for trainer in (first, second):
        output = trainer.step(next(trainer.data_provider))
        assert trainer.optimizer.param_groups[0]["fused"]
        with pytest.raises(RuntimeError, match='kernels="reference"'):
            output.hidden_pre[:, 3]


@pytest.mark.parametrize("name", FAST)
def test_a_copy_trains_on_like_the_original(name):
    sae = make(name, "fast", dead_feature_window_tokens=100)
    batches = [make_activations(B, D, seed=i) for i in range(6)]
    steps(sae, batches[:3])
    other = copy.deepcopy(sae)
    assert_equal(steps(other, batches[3:], start=4), steps(sae, batches[3:], start=4))
    assert (sae.tokens_since_fired >= 100).any()


@pytest.mark.parametrize("hint", [None, 0.0, -1.0, 1e-3, 1e30, math.inf, math.nan])
@pytest.mark.parametrize("name", ["inner_product_batchtopk", "cosine_topk", "per_feature_cosine_batchtopk", "per_feature_cosine_topk"])  # fmt: skip
def test_the_hint_changes_no_result(name, hint):
    sae = make(name, "fast")
    other = copy.deepcopy(sae)
    for step in (1, 2, 3):
        outputs = [train_step(each, make_activations(B, D, seed=step), step=step) for each in (sae, other)]
        assert torch.equal(dense(outputs[1].feature_acts), dense(outputs[0].feature_acts))
        assert (dense(outputs[0].feature_acts) > 0).sum() == K * B
        other.floor_hint = None if hint is None else torch.tensor(hint)


@pytest.mark.parametrize("name", ["per_feature_cosine_batchtopk", "cosine_topk"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("bad_step", [0, 13])
def test_non_finite_activations_stop_training_by_name(name, value, bad_step):
    data = planted_batches(d_in=16, n_features=24, active=3, batch=32)
    batches = [next(data) for _ in range(25)]
    batches[bad_step][3, 1] = value
    trainer = run(name, "fast", n=25)
    trainer.data_provider = iter(batches)
    with pytest.raises(FloatingPointError, match=f"training step {0 if bad_step == 0 else 20}, .*{name}"):
        trainer.fit()


def test_gradients_flow_from_whatever_reads_the_codes():
    # a penalty on the codes and one on the pre-activations, of a user's own: neither has a shortcut
    sae = make("per_feature_cosine_batchtopk", "reference", dtype="float64")
    saes = [sae, twin(sae, "fast")]
    for each in saes:
        output = train_step(each, make_activations(B, D, dtype=torch.float64), step=1)
        (output.feature_acts.sqrt().clamp_max(1).sum() + output.hidden_pre.relu().pow(2).mean()).backward()
    assert is_fast(output)
    for key, gradient in gradients(sae).items():
        if gradient is not None and gradient.any():
            assert_close(gradients(saes[1])[key], gradient, 1e-10)


@pytest.mark.parametrize("options", [{}, {"foreach": False}], ids=["fused", "plain"])
def test_pre_activations_of_an_earlier_step_are_refused(options):
    sae = make("cosine_batchtopk", "fast", **FREE_DECODER)
    optimizer = torch.optim.Adam(sae.parameters(), lr=0.1, **options)
    for step in (0, 1):
        output = train_step(sae, make_activations(B, D), step=step)
        output.loss.backward()
        assert output.hidden_pre[:, 3].isfinite().all()
        optimizer.step()
        assert bool(optimizer.param_groups[0]["fused"]) == (not options)
        with pytest.raises(RuntimeError, match='kernels="reference"'):
            output.hidden_pre[:, 3]
        assert (output.feature_acts > 0).sum() == K * B  # the codes are still there

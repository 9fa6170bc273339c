"""The log of a training run: measured on what the trainer feeds, counted in tokens that were trained on."""

import copy
import math

import pytest
import torch
from helpers import HOOK, make_activations, make_config, make_sae, tiny_dataset
from sae_lens import LoggingConfig, MultiSAETrainingRunner, MultiSAETrainingRunnerConfig
from sae_lens.registry import get_sae_training_class

from saelens_cosine.training.monitor import TrainingMonitor

STEPS, BATCH = 6, 64


class Listening(TrainingMonitor):
    """Keeps what it measures on."""

    def record(self, name, x, training_tokens):
        vars(self).setdefault("inputs", {}).setdefault(name, []).append(x.clone())
        super().record(name, x, training_tokens)


def watched(model, normalize, arms, every_steps=2):
    """A run of `STEPS` steps: the monitor, the batches as forward passes got them, and the SAEs before."""
    configs = {arm: make_config(arm, d_in=16, d_sae=24, k=4, normalize_activations=normalize) for arm in arms}
    saes = {arm: get_sae_training_class(arm)[0](config) for arm, config in configs.items()}
    config = MultiSAETrainingRunnerConfig(
        saes=configs,
        hook_names=HOOK,
        model_name="tiny",
        dataset_path="tiny",
        context_size=8,
        training_tokens=STEPS * BATCH,
        train_batch_size_tokens=BATCH,
        store_batch_size_prompts=16,
        n_batches_in_buffer=8,
        n_batches_for_norm_estimate=3,
        lr=1e-3,
        checkpoint_path=None,
        output_path=None,
        logger=LoggingConfig(log_to_wandb=False),
    )
    runner = MultiSAETrainingRunner(config, override_dataset=tiny_dataset(), override_model=model, override_saes=saes)
    fed, before = {arm: [] for arm in arms}, copy.deepcopy(saes)
    for arm, sae in saes.items():
        forward = sae.training_forward_pass

        def kept(step_input, arm=arm, forward=forward):
            fed[arm].append(step_input.sae_in.clone())
            return forward(step_input=step_input)

        vars(sae)["training_forward_pass"] = kept
    monitor = Listening(saes, config.hook_names_per_sae, every_steps)
    monitor.attach(runner)
    runner.run()
    monitor.finish()
    return monitor, fed, before


@pytest.mark.parametrize("normalize", ["none", "expected_average_only_in"])
def test_the_log_counts_training_tokens_alone_and_measures_scaled_activations(model, normalize):
    arms = ["cosine_topk", "inner_product_batchtopk"]
    monitor, fed, before = watched(model, normalize, arms)
    for arm in arms:
        assert [entry.training_tokens for entry in monitor.log[arm]] == [0, 128, 256, 384]
        inputs = monitor.inputs[arm]
        assert all(torch.equal(x, fed[arm][step]) for x, step in zip(inputs, (0, 2, 4), strict=False))
        mean_norm = torch.cat(fed[arm]).norm(dim=-1).mean().item()
        if normalize == "none":
            assert mean_norm > 12  # about 18
        else:
            assert mean_norm == pytest.approx(4, rel=0.2)  # sqrt(d_in): the trainer's scale
        assert inputs[-1].norm(dim=-1).mean() > 12  # after training the scale is in the SAE
        x = fed[arm][0].double()
        with torch.no_grad():
            error = x - before[arm](fed[arm][0]).double()
        by_hand = 1 - (error - error.mean(0)).square().sum() / (x - x.mean(0)).square().sum()
        assert monitor.log[arm][0].fve == pytest.approx(by_hand.item(), abs=1e-5)
        assert monitor.seconds[arm] > 0
        assert "training_forward_pass" not in vars(monitor.saes[arm])


def test_a_forward_pass_within_its_own_counts_once(model):
    # top-AFA on normalised activations calls itself with these
    monitor, _, _ = watched(model, "layer_norm", ["top_afa"], every_steps=3)
    assert [entry.training_tokens for entry in monitor.log["top_afa"]] == [0, 192, 384]


def test_an_entry_is_measured_as_the_sae_trains_and_leaves_its_next_step_alone(monkeypatch):
    sae, dense = (make_sae("cosine_batchtopk", d_sae=200, kernels=kernels).train() for kernels in ("fast", "reference"))
    x = make_activations(300, sae.cfg.d_in, seed=2)
    with torch.no_grad():
        codes = dense.encode(x)
        error = (x - dense.decode(codes)).double()
    by_hand = 1 - error.var(0, correction=0).sum() / x.double().var(0, correction=0).sum()
    monkeypatch.setattr(type(sae), "encode", lambda *_: pytest.fail("dense codes were made"))
    monitor = TrainingMonitor({"arm": sae}, {"arm": HOOK})
    monitor.log["arm"] = []
    sae.floor_hint = hint = torch.tensor(0.1)
    monitor.record("arm", x, 0)
    (entry,) = monitor.log["arm"]
    assert entry.fve == pytest.approx(by_hand.item(), abs=1e-5)
    assert entry.l0 == codes.count_nonzero() / 300
    assert sae.floor_hint is hint


@pytest.mark.parametrize("where", ["W_enc", "b_dec", "x"])
def test_an_entry_of_what_is_not_finite_is_not_finite(where):
    sae = make_sae("cosine_batchtopk", d_sae=200, kernels="fast").train()
    x = make_activations(300, sae.cfg.d_in, seed=2)
    broken = {"W_enc": sae.W_enc.data[:, 3], "b_dec": sae.b_dec.data[:1], "x": x[7]}[where]
    broken.fill_(torch.nan)
    monitor = TrainingMonitor({"arm": sae}, {"arm": HOOK})
    monitor.log["arm"] = []
    monitor.record("arm", x, 0)
    assert math.isnan(monitor.log["arm"][0].fve)

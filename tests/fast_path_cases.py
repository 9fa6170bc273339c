"""What test_fast_path and its neighbours share."""

import copy

import pytest
import torch
from helpers import (
    make_sae,
    make_trainer,
    planted_batches,
)
from sae_lens.training.sae_trainer import SAETrainer

from saelens_cosine.kernels.codes import EntryCodes, ScoresOnDemand
from saelens_cosine.saes import path

D, F, K, B = 24, 300, 5, 64
AUX = "auxiliary_reconstruction_loss"
SIZE = {"d_in": D, "d_sae": F, "k": K}


@pytest.fixture(autouse=True)
def _reasons_not_logged_yet():
    path._log_once.cache_clear()


def make(name, kernels="auto", seed=1, **options):
    """Training SAE in training mode, of a size that takes the fast path."""
    return make_sae(name, seed=seed, kernels=kernels, **{**SIZE, **options}).train()


def twin(sae, kernels):
    """A deep copy that computes its steps the other way."""
    other = copy.deepcopy(sae)
    other.cfg.kernels = kernels
    return other


def dense(tensor):
    return tensor.dense() if isinstance(tensor, EntryCodes | ScoresOnDemand) else tensor


def is_fast(output):
    return isinstance(output.feature_acts, EntryCodes) and isinstance(output.hidden_pre, ScoresOnDemand)


def gradients(sae):
    return {name: p.grad for name, p in sae.named_parameters() if p.requires_grad}


@torch.no_grad()
def descend(sae):
    """A step that depends on the gradient's direction alone, so that rounding does not grow."""
    for parameter in sae.parameters():
        if parameter.grad is not None:
            parameter -= 0.01 * parameter.grad / parameter.grad.abs().max().clamp_min(1e-30)
            parameter.grad = None


def assert_equal(one, other):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(other[name], tensor), name


class Recording(SAETrainer):
    """SAELens' trainer, keeping each step's log and which path it took."""

    def step(self, batch):
        output = super().step(batch)
        self.logs = [*getattr(self, "logs", []), self.build_train_step_log_dict(output, self.n_training_samples)]
        self.fast = [*getattr(self, "fast", []), is_fast(output)]
        return output


def run(name, kernels, n=30, start=0, batch=32, **options):
    """SAELens' trainer before it has run, at small size, with features that die soon."""
    options = {"d_in": 16, "d_sae": 160, "k": 4, "dead_feature_window_tokens": 100, **options}
    sae = make_sae(name, seed=None, kernels=kernels, **options)
    data = planted_batches(d_in=16, n_features=24, active=3, batch=batch)
    data.position = start
    trainer = make_trainer(sae, data, steps=n, batch=batch, lr=3e-3)
    trainer.__class__ = Recording
    return trainer


def with_hook(point, direction="fwd"):
    return lambda sae: getattr(sae, point).add_hook(lambda *_, **__: None, dir=direction)

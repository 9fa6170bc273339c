"""The bundled model, and what SAEBench collects or was called for."""

import pytest
from saebench_cases import planted

from saelens_cosine.bundled import load_bundled_model
from saelens_cosine.saebench import EVALS
from saelens_cosine.saebench.runner import Runner


@pytest.fixture(scope="module")
def bundled():
    return load_bundled_model()


@pytest.fixture
def scored(monkeypatch):
    """Names of the evals that SAEBench was called for, and on which SAE, in order."""
    calls, call = [], Runner._call

    def recorded(self, row, config, sae, caches, target):
        calls.append((row.name, target.name.split("-")[0]))
        call(self, row, config, sae, caches, target)

    monkeypatch.setattr(Runner, "_call", recorded)
    return calls


@pytest.fixture
def collected(monkeypatch):
    """Plants what sparse probing and TPP collect, so that they need no texts."""

    def collect(sinks: float | None = None):
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")  # read by the preflight; nothing here goes there
        for name in ("sparse_probing", "tpp"):
            monkeypatch.setattr(EVALS[name].module, "get_dataset_activations", planted(sinks))

    return collect

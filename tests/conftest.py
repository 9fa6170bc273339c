"""Shared fixtures: one thread, no network, one tiny language model for the whole session. (`variation.py`: other seeds, more threads.)"""

import os
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "disabled")

import torch

if not torch.cuda.is_available():  # before anything imports triton, which reads it once
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import short_corpus
import variation
from helpers import tiny_model
from watched_run import WatchedRun

WATCHED = pytest.StashKey()


def pytest_configure(config):
    variation.apply()


def pytest_collection_modifyitems(config, items):
    if not config.option.markexpr:
        kills = [item for item in items if item.get_closest_marker("kills")]
        items[:] = [item for item in items if item not in kills]
        config.hook.pytest_deselected(items=kills)
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device; torch sees none here"))


def pytest_collection_finish(session):
    if session.config.option.collectonly or not any("watched_run" in item.fixturenames for item in session.items):
        return
    if Path("/proc/self/statm").is_file():
        folder = tempfile.TemporaryDirectory()
        session.config.stash[WATCHED] = WatchedRun(seconds=120, every=5, folder=Path(folder.name)), folder


def pytest_sessionfinish(session):
    if WATCHED in session.config.stash:
        run, folder = session.config.stash[WATCHED]
        run.stop()
        folder.cleanup()


@pytest.fixture
def watched_run(request):
    """A training of two minutes that has gone on since the session began."""
    if WATCHED not in request.config.stash:
        pytest.skip("looks into /proc, which is not there")
    return request.config.stash[WATCHED][0]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def model():
    """A `HookedSAETransformer` with random weights: 2 layers, d_model 16, 2 heads of 8, vocabulary of 32 words."""
    return tiny_model()


@pytest.fixture(scope="module")
def short_text():
    """The beginnings of the bundled corpus' documents, in place of all of them."""
    with pytest.MonkeyPatch.context() as patch:
        short_corpus.apply(patch.setattr)
        yield


@pytest.fixture
def registries():
    """SAELens' registries and this package's lists of names, put back as they were after the test."""
    from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY

    from saelens_cosine import registry

    dicts = (SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY)
    lists = (registry.TRAINING_ARCHITECTURES, registry.INFERENCE_ARCHITECTURES)
    saved_dicts, saved_lists = [dict(d) for d in dicts], [list(names) for names in lists]
    yield
    for live, saved in zip(dicts, saved_dicts, strict=True):
        live.clear()
        live.update(saved)
    for live, saved in zip(lists, saved_lists, strict=True):
        live[:] = saved

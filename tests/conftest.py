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
FOLDER = "WATCHED_RUN"
"""Environment variable with the folder of the watched run, which the processes of `-n 2` share."""


def pytest_configure(config):
    variation.apply()
    if "PYTEST_XDIST_WORKER" not in os.environ:
        config.stash[WATCHED] = [tempfile.TemporaryDirectory()]
        os.environ[FOLDER] = config.stash[WATCHED][0].name


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
    if "PYTEST_XDIST_WORKER" not in os.environ and not session.config.option.collectonly:
        _watch(session.config, [item.nodeid for item in session.items])


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_node_collection_finished(node, ids):
    _watch(node.config, ids)


def _watch(config, ids):
    """Begin the watched run, once, if a test will ask for it."""
    known = any("test_watched_run.py" in name for name in ids) and Path("/proc/self/statm").is_file()
    if known and len(config.stash[WATCHED]) == 1:
        config.stash[WATCHED].append(WatchedRun(seconds=120, every=5, folder=Path(os.environ[FOLDER])))


def pytest_unconfigure(config):
    if WATCHED in config.stash:
        folder, *runs = config.stash[WATCHED]
        for run in runs:
            run.stop()
        folder.cleanup()


@pytest.fixture
def watched_run():
    """Folder of a training of two minutes that has gone on since the session began."""
    if not Path("/proc/self/statm").is_file():
        pytest.skip("looks into /proc, which is not there")
    return Path(os.environ[FOLDER])


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

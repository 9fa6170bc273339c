"""Hubs on this machine: a folder, and none."""

import socket

import pytest
from huggingface_hub import ModelInfo, close_session, constants
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub that is a folder: files of `owner/repo` lie in `hub / "owner" / "repo"`."""
    root = tmp_path / "hub"

    def download(repo_id, filename, force_download=False):
        path = root / repo_id / filename
        if not path.exists():
            raise LocalEntryNotFoundError(f"no {filename} in {repo_id}")
        return str(path)

    def information(self, repo_id):
        if not (root / repo_id).is_dir():
            raise OfflineModeIsEnabled("offline")
        files = [path.relative_to(root / repo_id).as_posix() for path in (root / repo_id).rglob("*") if path.is_file()]
        return ModelInfo(id=repo_id, siblings=[{"rfilename": file} for file in files])

    monkeypatch.setattr("saelens_cosine.loading.hub.hf_hub_download", download)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", information)
    return root


@pytest.fixture
def no_network(tmp_path, monkeypatch):
    """A Hub that nothing answers for, and an empty cache."""
    with socket.socket() as unheard:
        unheard.bind(("127.0.0.1", 0))  # and never listens
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{unheard.getsockname()[1]}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        close_session()
        yield
    close_session()

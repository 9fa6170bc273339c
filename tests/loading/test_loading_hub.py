"""Which SAE of several, and the Hub: its files, its cache, and that it cannot be reached."""

import hashlib
import http.server
import json
import re
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from foreign import D_IN, write
from foreign_cases import assert_computes
from helpers import make_activations, make_sae
from huggingface_hub import close_session, constants
from huggingface_hub.errors import HTTPError
from sae_lens import SAE

from saelens_cosine.cli import main
from saelens_cosine.loading import (
    FORMATS,
    RELEASES,
    CheckpointError,
    authors_huggingface_loader,
    from_pretrained,
)

# --- which SAE ---


def test_several_saes_are_listed(tmp_path, hub):
    for root in (tmp_path / "local", hub / "owner" / "repo"):
        for arm in ("standard", "perfeature"):
            write(arm, root / "arms" / arm)
    for source in (tmp_path / "local", "owner/repo"):
        with pytest.raises(CheckpointError, match=r"several SAEs: arms/perfeature, arms/standard\..*sae_id"):
            from_pretrained(source)
        with pytest.raises(CheckpointError, match=r"no SAE in 'missing'.* arms/perfeature, arms/standard"):
            from_pretrained(source, "missing")
        for sae_id in ("arms/standard", "arms/standard/"):
            assert from_pretrained(source, sae_id).cfg.architecture() == "jumprelu"


def test_an_unknown_layout_is_listed(tmp_path):
    (tmp_path / "model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"authors: sae_final.pt.*It has model.bin"):
        from_pretrained(tmp_path)


def test_saelens_own_format_passes_through(tmp_path, hub):
    sae = make_sae("per_feature_cosine_batchtopk")
    sae.save_inference_model(hub / "owner" / "repo" / "a")
    x = make_activations(20, D_IN)
    for source in (hub / "owner" / "repo", "owner/repo"):
        assert torch.equal(
            from_pretrained(source).encode(x), SAE.load_from_disk(hub / "owner" / "repo" / "a").encode(x)
        )
    narrow = from_pretrained("owner/repo", dtype="bfloat16")
    assert torch.equal(narrow.norm_exponent, sae.norm_exponent)  # SAELens' loaders would have rounded it


def test_a_repository_with_one_sae_at_its_root(hub):
    folder = write("sparsify", hub / "owner" / "repo")
    assert_computes(from_pretrained("owner/repo"), "sparsify", folder)


def test_names_that_are_nothing(hub):
    with pytest.raises(CheckpointError, match=r"no local folder, no release \(cosine-scored-saes-qwen3-8b"):
        from_pretrained("nothing")
    with pytest.raises(CheckpointError, match=r"holds global-a, perfeature, standard\. Name one as sae_id, not None"):
        from_pretrained("cosine-scored-saes-qwen3-8b")
    with pytest.raises(CheckpointError, match=r"'gemma-scope-2b-pt-res' holds .*sae_id"):
        from_pretrained("gemma-scope-2b-pt-res")


def test_a_saelens_release_goes_to_saelens(monkeypatch):
    seen = {}

    def capture(release, sae_id, **options):
        seen.update(options, release=release, sae_id=sae_id)
        return "an SAE"

    monkeypatch.setattr(SAE, "from_pretrained", capture)
    assert from_pretrained("gpt2-small-res-jb", "blocks.8.hook_resid_pre", dtype=torch.bfloat16) == "an SAE"
    assert seen == {
        "release": "gpt2-small-res-jb",
        "sae_id": "blocks.8.hook_resid_pre",
        "device": "cpu",
        "dtype": "bfloat16",
        "force_download": False,
    }


class HubServer(http.server.BaseHTTPRequestHandler):
    """As much of the Hub as its client asks for to list and download the files in `root`, an only repository."""

    root: Path

    def do_HEAD(self):
        self.answer(with_body=False)

    def do_GET(self):
        self.answer(with_body=True)

    def answer(self, with_body):
        parts = self.path.split("?")[0].split("/")  # /owner/repo/resolve/main/..., /api/models/owner/repo
        file = self.root / "/".join(parts[5:])
        if self.path.startswith("/api/"):
            files = [path.relative_to(self.root).as_posix() for path in self.root.rglob("*") if path.is_file()]
            data = json.dumps({"id": "owner/repo", "siblings": [{"rfilename": file} for file in files]}).encode()
        elif "resolve" in parts and file.is_file():
            data = file.read_bytes()
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", "1" * 40)
        self.end_headers()
        if with_body:
            self.wfile.write(data)

    def log_message(self, *arguments):
        pass


def test_offline_errors_say_what_was_tried(hub, monkeypatch):
    with pytest.raises(ConnectionError, match=r"list .*'owner/repo' \(OfflineModeIsEnabled.*cache.*HF_ENDPOINT"):
        from_pretrained("owner/repo")
    with pytest.raises(ConnectionError, match=r"'standard/sae_final.pt' of 'Silen/.*HF_HUB_OFFLINE.*local folder"):
        from_pretrained("cosine-scored-saes-qwen3-8b", "standard")


def test_a_known_checksum_is_compared(hub, monkeypatch):
    release = RELEASES["cosine-scored-saes-qwen3-8b"]
    path = write("standard", hub / release.repo_id / "standard") / "sae_final.pt"
    digest = hashlib.sha256(path.read_bytes()).hexdigest()

    def with_sha256(value):
        return replace(release, saes={**release.saes, "standard": replace(release.saes["standard"], sha256=value)})

    monkeypatch.setitem(RELEASES, "cosine-scored-saes-qwen3-8b", with_sha256(digest))
    from_pretrained("cosine-scored-saes-qwen3-8b", "standard")
    monkeypatch.setitem(RELEASES, "cosine-scored-saes-qwen3-8b", with_sha256("0" * 64))
    for load in (
        lambda: from_pretrained("cosine-scored-saes-qwen3-8b", "standard"),
        lambda: SAE.from_pretrained(release.repo_id, "standard/", converter=authors_huggingface_loader),
    ):
        with pytest.raises(CheckpointError, match=f"{digest}.*0000"):
            load()


def test_nothing_is_invented_in_the_table():
    for release in RELEASES.values():
        assert release.format in FORMATS
        for sae in release.saes.values():
            assert sae.sha256 is None or len(sae.sha256) == 64


def test_through_the_real_client(tmp_path, monkeypatch):
    folder = write("sparsify", tmp_path / "repo" / "layers.1")
    write("sparsify", tmp_path / "repo" / "layers.2", seed=2)
    (tmp_path / "repo" / "config.json").write_text(json.dumps({"model": "gpt2"}))
    handler = type("Handler", (HubServer,), {"root": tmp_path / "repo"})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        endpoint = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        template = "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        close_session()
        with pytest.raises(CheckpointError, match=r"several SAEs: layers\.1, layers\.2"):
            from_pretrained("owner/repo")
        sae = from_pretrained("owner/repo", "layers.1")
        with pytest.raises(ConnectionError, match=r"'sae_final.pt' of 'owner/repo'.*404"):
            FORMATS["authors"].download("owner/repo", ".")
        server.shutdown()
    assert_computes(sae, "sparsify", folder)
    assert sae.cfg.metadata.model_name == "gpt2"
    # and again from the cache
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    close_session()
    assert_computes(from_pretrained("owner/repo"), "sparsify", folder)


def test_a_folder_that_is_not_there_without_network(no_network, tmp_path, capsys):
    for command in (
        ("convert", "no/where", str(tmp_path / "out")),
        ("evaluate", "no/where", "--output", str(tmp_path / "out")),
    ):
        assert main(command) == 2
        assert re.fullmatch(
            r"saelens-cosine \w+: Could not list the Hub repository 'no/where' \(ConnectError: .*local folder.*",
            capsys.readouterr().err.strip(),
        )
        assert not (tmp_path / "out").exists()


def test_a_network_that_ends_in_the_middle(hub, monkeypatch):
    write("sparsify", hub / "owner" / "repo")

    def broken(repo_id, filename, force_download=False):
        raise HTTPError("peer closed connection")

    monkeypatch.setattr("saelens_cosine.loading.hub.hf_hub_download", broken)
    with pytest.raises(ConnectionError, match=r"get 'sae.safetensors' of 'owner/repo'.*peer closed.*HF_ENDPOINT"):
        from_pretrained("owner/repo")


def test_a_release_of_saelens_is_not_converted(tmp_path, capsys):
    assert main(["convert", "gpt2-small-res-jb", str(tmp_path / "out"), "--sae-id", "blocks.8.hook_resid_pre"]) == 2
    assert "is a release of SAELens, which reads it: SAE.from_pretrained('gpt2" in capsys.readouterr().err

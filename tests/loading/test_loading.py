"""Foreign SAEs compute what their publishers' formulas compute, however they are loaded."""

import hashlib
import http.server
import json
import re
import socket
import threading
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from foreign import D_IN, D_SAE, SOURCES, authors_file, formula, write
from helpers import codes_and_output, make_activations, make_sae
from huggingface_hub import ModelInfo, close_session, constants
from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
from sae_lens import SAE
from sae_lens.training.activations_store import ActivationsStore

from saelens_cosine.cli import main
from saelens_cosine.loading import (
    FORMATS,
    RELEASES,
    CheckpointError,
    authors_disk_loader,
    authors_huggingface_loader,
    from_pretrained,
    sparsify_disk_loader,
    tensor_file,
)
from saelens_cosine.loading.formats import authors


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


def activations(n=400):
    return make_activations(n, D_IN, seed=5, spread=0.7) * 3


def assert_computes(sae, source, folder, x=None, tolerance=1e-5):
    """Same active features as the formula, codes and output within the tolerance of the largest."""
    x = (activations() if x is None else x).to(sae.dtype)
    expected = formula(source, folder, x)
    assert 0.3 < (expected[0] != 0).sum(-1).float().mean() < D_SAE - 1
    codes, output = codes_and_output(sae, x)
    assert torch.equal(codes != 0, expected[0] != 0)
    for ours, theirs in ((codes, expected[0]), (output, expected[1])):
        assert (ours.double() - theirs).abs().max() <= tolerance * theirs.abs().max()


# --- the same function, whichever way ---


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("seed", [0, 1])
def test_computes_the_publishers_formula(source, seed, tmp_path):
    write(source, tmp_path, seed)
    sae = from_pretrained(tmp_path)
    assert isinstance(sae, SAE)
    assert sae.cfg.architecture() == SOURCES[source].architecture
    assert_computes(sae, source, tmp_path)


@pytest.mark.parametrize("source", SOURCES)
def test_through_saelens_own_loaders(source, hub):
    folder = write(source, hub / "owner" / "repo" / "some" / "layers.3")
    layout = FORMATS[SOURCES[source].format]
    for sae in (
        SAE.load_from_disk(folder, converter=layout.disk_loader),
        SAE.from_pretrained("owner/repo", "some/layers.3", converter=layout.huggingface_loader),
    ):
        assert_computes(sae, source, folder)


def test_overrides_of_saelens_win(tmp_path):
    write("standard", tmp_path)
    config, tensors = authors_disk_loader(tmp_path, cfg_overrides={"dtype": "float16", "apply_b_dec_to_input": False})
    assert config["dtype"] == "float16"
    assert config["apply_b_dec_to_input"] is False
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}


@pytest.mark.parametrize("source", SOURCES)
def test_saved_and_loaded_again_by_saelens(source, tmp_path):
    write(source, tmp_path / "foreign")
    sae = from_pretrained(tmp_path / "foreign")
    sae.save_model(tmp_path / "saved")
    assert_computes(SAE.load_from_disk(tmp_path / "saved"), source, tmp_path / "foreign")
    assert from_pretrained(tmp_path / "saved").cfg.to_dict() == sae.cfg.to_dict()


@pytest.mark.parametrize("source", ["standard", "perfeature", "bypass", "BatchTopKSAE", "sparsify"])
def test_float64(source, tmp_path):
    sae = from_pretrained(write(source, tmp_path), dtype=torch.float64)
    assert sae.dtype == sae.W_enc.dtype == torch.float64
    assert_computes(sae, source, tmp_path, tolerance=1e-12)


@pytest.mark.parametrize("source", SOURCES)
def test_bfloat16_rounds_weights_but_no_exponents_or_thresholds_of_ours(source, tmp_path):
    exact = from_pretrained(write(source, tmp_path))
    sae = from_pretrained(tmp_path, dtype="bfloat16")
    assert torch.equal(sae.W_enc, exact.W_enc.to(torch.bfloat16))
    assert sae.cfg.dtype == "bfloat16"
    if "norm_exponent" in exact.state_dict():
        for name in ("norm_exponent", "threshold"):
            assert torch.equal(getattr(sae, name), getattr(exact, name))
            assert getattr(sae, name).dtype == torch.float32


FOLDED = tuple(
    name for name, source in SOURCES.items() if source.format == "authors" and source.architecture != "jumprelu"
)


@pytest.mark.parametrize("source", SOURCES)
def test_a_file_in_bfloat16_stays_in_bfloat16_unless_weights_are_folded(source, tmp_path):
    write(source, tmp_path)
    narrow(tmp_path, SOURCES[source])
    sae = from_pretrained(tmp_path)
    assert sae.W_dec.dtype == (torch.float32 if source in FOLDED else torch.bfloat16)
    assert_computes(from_pretrained(tmp_path, dtype="float32"), source, tmp_path)


def narrow(folder, source):
    from safetensors.torch import load_file, save_file

    path = folder / source.weights
    if path.suffix == ".pt":
        content = torch.load(path, weights_only=True)
        state = content.get("state_dict", content)
        state |= {key: value.bfloat16() for key, value in state.items() if value.is_floating_point()}
        torch.save(content, path)
    else:
        save_file({key: value.bfloat16() for key, value in load_file(path).items()}, path)


@pytest.mark.parametrize("source", ["global-a", "perfeature", "bypass"])
def test_encoder_is_the_file_s_rows_and_no_copy_is_made(source, tmp_path):
    sae = from_pretrained(write(source, tmp_path))
    assert sae.W_enc.shape == (D_IN, D_SAE)
    assert sae.W_enc.T.is_contiguous()


@pytest.mark.parametrize("source", SOURCES)
def test_files_larger_than_a_block(source, tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_file, "BLOCK_BYTES", 64)  # two of the 13 rows of 7 float32 at a time
    monkeypatch.setattr(authors, "FOLD_BLOCK", 3 * D_IN)
    sae = from_pretrained(write(source, tmp_path))
    assert_computes(sae, source, tmp_path)


# --- what the files mean, by hand ---


def hand_made(tmp_path, source, **tensors):
    content = authors_file(source, torch.Generator().manual_seed(0), d_in=2, d_sae=2)
    content["state_dict"] |= {key: torch.tensor(value) for key, value in tensors.items()}
    torch.save(content, tmp_path / "sae_final.pt")
    return from_pretrained(tmp_path)


def test_threshold_is_strict(tmp_path):
    identity, zeros = [[1.0, 0.0], [0.0, 1.0]], [0.0, 0.0]
    sae = hand_made(tmp_path, "standard", W_enc=identity, b_enc=zeros, b_dec=zeros, threshold=2.0)
    # a score of exactly 2 is not above 2
    assert sae.encode(torch.tensor([[2.0, 2.5]])).tolist() == [[0.0, 2.5]]


def test_score_of_a_per_feature_checkpoint_by_hand(tmp_path):
    # rows of lengths 5 and 2 count by direction: cosines of (8, 6) with (0.6, 0.8) and (1, 0) are 0.96 and 0.8
    # norm 10: 10^1 * e^0 * 0.96 + 1 = 10.6 and 10^0 * e^1 * 0.8 - 1 = 1.1746
    sae = hand_made(
        tmp_path,
        "perfeature",
        W_enc=[[3.0, 4.0], [2.0, 0.0]],
        b_enc=[1.0, -1.0],
        b_dec=[1.0, 1.0],
        scale_a=[1.0, 0.0],
        scale_b=[0.0, 1.0],
        threshold=0.5,
    )
    torch.testing.assert_close(sae.encode(torch.tensor([[9.0, 7.0]])), torch.tensor([[10.6, 1.1746255]]))


def test_groups_are_blocks_and_the_last_takes_the_rest(tmp_path):
    write("groups", tmp_path)
    state = torch.load(tmp_path / "sae_final.pt", weights_only=True)["state_dict"]
    a = state["scale_a"].tolist()
    exponent = from_pretrained(tmp_path).norm_exponent.tolist()
    assert exponent == [a[0]] * 4 + [a[1]] * 4 + [a[2]] * 5


def test_magnitude_bypass_restores_the_norm(tmp_path):
    sae = from_pretrained(write("bypass", tmp_path))
    x = activations(50)
    codes, output = codes_and_output(sae, x)
    fires = (codes != 0).any(-1)
    torch.testing.assert_close((output - sae.b_dec).norm(dim=-1)[fires], (x - sae.b_dec).norm(dim=-1)[fires])
    assert torch.equal(output[~fires], sae.b_dec.detach().expand(int((~fires).sum()), -1))


@pytest.mark.parametrize("source", ["standard", "perfeature", "BatchTopKSAE", "MatryoshkaBatchTopKSAE"])
def test_a_threshold_that_was_never_set_is_refused(source, tmp_path):
    write(source, tmp_path)
    path = tmp_path / SOURCES[source].weights
    content = torch.load(path, weights_only=True)
    content.get("state_dict", content)["threshold"] = torch.tensor(-1.0)
    torch.save(content, path)
    # what their code does with it: the authors' takes k of each evaluation batch, dictionary_learning's, whose scores are
    # rectified before they are compared with -1, all that are positive
    then = (
        "selects across the evaluation batch" if SOURCES[source].format == "authors" else "keeps every positive score"
    )
    with pytest.raises(CheckpointError, match=rf"threshold -1.* never set.* {then}.* [Ss]et"):
        from_pretrained(tmp_path)


def test_old_files_without_counter_or_k(tmp_path):
    write("perfeature", tmp_path / "authors")
    content = torch.load(tmp_path / "authors" / "sae_final.pt", weights_only=True)
    torch.save({"state_dict": content["state_dict"]}, tmp_path / "authors" / "sae_final.pt")
    assert_computes(from_pretrained(tmp_path / "authors"), "perfeature", tmp_path / "authors")

    write("AutoEncoderTopK", tmp_path / "topk")
    state = torch.load(tmp_path / "topk" / "ae.pt", weights_only=True)
    torch.save(
        {key: value for key, value in state.items() if key not in ("k", "threshold")}, tmp_path / "topk" / "ae.pt"
    )
    assert from_pretrained(tmp_path / "topk").cfg.k == 3


@pytest.mark.parametrize("source", ["perfeature", "MatryoshkaBatchTopKSAE"])
def test_a_file_saved_from_a_gpu_by_an_older_torch(source, tmp_path):
    # as the published ones may be: tensors are marked with their device, and the archive has no format version
    path = write(source, tmp_path) / SOURCES[source].weights
    with zipfile.ZipFile(path) as archive:
        entries = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in entries.items():
            if name.endswith("data.pkl"):
                assert b"X\x03\x00\x00\x00cpu" in data
                data = data.replace(b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:0")
            if not name.endswith((".format_version", ".storage_alignment")):
                archive.writestr(name, data)
    sae = from_pretrained(tmp_path)
    write(source, tmp_path)
    assert_computes(sae, source, tmp_path)


def test_saelens_own_converter_of_sparsify_files_fails(tmp_path):
    # the reason that this package has its own; when it passes, ours can go
    from sae_lens.loading.pretrained_sae_loaders import sparsify_disk_loader as theirs

    folder = write("sparsify", tmp_path / "layers.3")
    with pytest.raises(RuntimeError, match="size mismatch for W_dec"):
        SAE.load_from_disk(folder, converter=theirs, dtype="float32")
    assert_computes(SAE.load_from_disk(folder, converter=sparsify_disk_loader), "sparsify", folder)


# --- metadata ---


@pytest.mark.parametrize("arm", ["standard", "global-a", "perfeature"])
def test_metadata_of_the_authors_release(arm, hub):
    write(arm, hub / "Silen" / "cosine-scored-saes-qwen3-8b" / arm)
    for sae in (
        SAE.from_pretrained("Silen/cosine-scored-saes-qwen3-8b", arm, converter=authors_huggingface_loader),
        from_pretrained("cosine-scored-saes-qwen3-8b", arm),
        from_pretrained("Silen/cosine-scored-saes-qwen3-8b"),
    ):
        metadata = sae.cfg.metadata
        assert metadata.model_name == "Qwen/Qwen3-8B"
        assert metadata.hook_name == "blocks.18.hook_resid_post"
        assert metadata.context_size == 2048
        assert metadata.prepend_bos is False
        assert metadata.max_norm_multiple == 10.0
        assert metadata.sae_lens_training_version is None
        assert (metadata.requires is not None) == (arm != "standard")


def test_a_local_copy_of_the_release_is_known_by_its_sizes(tmp_path, monkeypatch):
    release = RELEASES["cosine-scored-saes-qwen3-8b"]
    saes = {name: replace(sae, d_sae=D_SAE) for name, sae in release.saes.items()}
    small = replace(release, d_in=D_IN, saes=saes)
    write("perfeature", tmp_path)
    assert from_pretrained(tmp_path).cfg.metadata.model_name is None  # 13 features on 7 dimensions are no Qwen3-8B
    monkeypatch.setitem(RELEASES, "cosine-scored-saes-qwen3-8b", small)
    assert from_pretrained(tmp_path).cfg.metadata.model_name == "Qwen/Qwen3-8B"
    write("base-delta", tmp_path)  # never published
    assert from_pretrained(tmp_path).cfg.metadata.model_name is None


def test_metadata_from_file_names_and_from_the_caller(tmp_path):
    write("base-delta", tmp_path)
    path = (tmp_path / "sae_final.pt").rename(tmp_path / "perfeature_bd_L27_final.pt")
    sae = from_pretrained(path, metadata={"model_name": "gpt2"})
    assert sae.cfg.metadata.hook_name == "blocks.27.hook_resid_post"
    assert sae.cfg.metadata.model_name == "gpt2"


def test_metadata_of_dictionary_learning(tmp_path, hub):
    metadata = from_pretrained(write("BatchTopKSAE", tmp_path)).cfg.metadata
    assert metadata.model_name == "Qwen/Qwen3-8B"
    assert metadata.hook_name == "blocks.18.hook_resid_post"
    assert metadata.context_size == 2048
    assert metadata.prepend_bos is True
    folder = "saes_Qwen_Qwen3-8B_batch_top_k/resid_post_layer_9/trainer_2"
    write("BatchTopKSAE", hub / "adamkarvonen" / "qwen3-8b-saes" / folder)
    metadata = from_pretrained("qwen3-8b-saes", "resid_post_layer_9/trainer_2").cfg.metadata
    assert metadata.prepend_bos is False
    assert metadata.hook_name == "blocks.9.hook_resid_post"


@pytest.mark.parametrize(
    ("module", "hook"),
    [
        (None, "blocks.18.hook_resid_post"),
        ("mlp_layer_18", "blocks.18.hook_mlp_out"),
        ("attention_layer18", "blocks.18.hook_attn_out"),
        ("something", None),
    ],
)
def test_hook_of_dictionary_learning_modules(module, hook, tmp_path):
    write("BatchTopKSAE", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["trainer"]["submodule_name"] = module
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert from_pretrained(tmp_path).cfg.metadata.hook_name == hook


@pytest.mark.parametrize(
    ("folder", "hook"),
    [
        ("layers.10", "blocks.10.hook_resid_post"),
        ("layers.3.mlp", "blocks.3.hook_mlp_out"),
        ("h.5.attn", "blocks.5.hook_attn_out"),
        ("embed_tokens", "hook_embed"),
        ("layers.3.router", None),
        ("other", None),
    ],
)
def test_metadata_of_sparsify(folder, hook, tmp_path):
    write("sparsify", tmp_path / folder)
    run = {"model": "meta-llama/Meta-Llama-3-8B", "dataset": "togethercomputer/RedPajama", "ctx_len": 2048}
    (tmp_path / "config.json").write_text(json.dumps(run))
    metadata = from_pretrained(tmp_path / folder).cfg.metadata
    assert metadata.hook_name == hook
    assert (metadata.model_name, metadata.dataset_path, metadata.context_size) == tuple(run.values())


def test_the_run_config_of_sparsify_is_fetched_too(hub):
    write("sparsify", hub / "owner" / "repo" / "layers.1")
    (hub / "owner" / "repo" / "config.json").write_text(json.dumps({"model": "gpt2"}))
    assert from_pretrained("owner/repo", "layers.1").cfg.metadata.model_name == "gpt2"


def test_metadata_feeds_saelens_activation_store(model, tmp_path):
    write("BatchTopKSAE", tmp_path)
    sae = from_pretrained(tmp_path, metadata={"model_name": "tiny", "hook_name": "blocks.1.hook_resid_pre"})
    from helpers import tiny_dataset

    store = ActivationsStore.from_sae(
        model, sae, dataset=tiny_dataset(), context_size=8, store_batch_size_prompts=2, n_batches_in_buffer=2
    )
    assert store.hook_name == "blocks.1.hook_resid_pre"
    assert store.prepend_bos is True


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


# --- the Hub ---


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


def test_converters_by_name_are_the_formats():
    assert authors_disk_loader == FORMATS["authors"].disk_loader

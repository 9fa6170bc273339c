"""`saelens-cosine share` against a Hub on this machine that speaks the routes huggingface_hub uses."""

import hashlib
import json
from pathlib import Path

import huggingface_hub
import pytest
import torch
from fake_hub import FakeHub
from helpers import D_IN, TRAINING, make_activations, make_sae, run_python
from sae_lens import SAE, TopKTrainingSAE, TopKTrainingSAEConfig
from shared_saes import HOOK, logged_in, save_comparison, save_sae, share  # noqa: F401

from saelens_cosine.sharing.hub import gather, upload, write


@pytest.fixture
def hub():
    """A Hub that only a process started with its endpoint talks to."""
    hub = FakeHub()
    yield hub
    hub.server.shutdown()
    hub.server.server_close()


def test_one_sae_is_published_in_one_commit_and_loads_in_saelens(tmp_path, hub):
    """In a fresh interpreter that knows the Hub by HF_ENDPOINT alone, as a user's shell does."""
    sae = save_sae(tmp_path / "sae")
    x = make_activations(5, D_IN)
    torch.save(x, tmp_path / "x.pt")
    code = """
import os, sys
endpoint, folder = sys.argv[1:]
os.environ |= {"HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "hf_write", "HF_HOME": folder + "/home"}
from saelens_cosine.cli import main
assert "neuronpedia" not in sys.modules  # an extra, which the command line must not need
assert main(["share", folder + "/sae", "--repo", "me/saes", "--license", "mit"]) == 0
import torch
from sae_lens import SAE
sae = SAE.from_pretrained("me/saes", "blocks.3.hook_resid_post")
torch.save(sae.encode(torch.load(folder + "/x.pt")), folder + "/codes.pt")
"""
    result = run_python(code, hub.endpoint, tmp_path)
    assert result.returncode == 0, result.stderr
    assert f'SAE.from_pretrained("me/saes", "{HOOK}")' in result.stdout
    (commit,) = hub.repos["me/saes"]["commits"]
    files = ["README.md", *(f"{HOOK}/{name}" for name in ("README.md", "cfg.json", "sae_weights.safetensors"))]
    assert commit["files"] == files
    card = hub.repos["me/saes"]["files"]["README.md"].decode()
    assert "library_name: saelens\nlicense: mit\n" in card
    assert f'SAE.from_pretrained("me/saes", "{HOOK}")' in card
    codes = torch.load(tmp_path / "codes.pt")
    assert (codes != 0).any()
    assert torch.equal(codes, sae.encode(x))


def test_a_comparison_is_published_whole_under_relative_ids(tmp_path, logged_in, capsys):
    save_comparison(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "cosine_batchtopk" / "seed0" / "trainer_state.pt").write_text("large")
    (tmp_path / ".unfinished-1" / "cosine_batchtopk").mkdir(parents=True)
    (tmp_path / ".unfinished-1" / "cosine_batchtopk" / "cfg.json").write_text("{}")
    assert share(tmp_path, "--repo", "me/compare", "--private") == 0
    repo = logged_in.repos["me/compare"]
    assert repo["private"]
    (commit,) = repo["commits"]
    saes = [f"{arm}/seed0/{file}" for arm in ("cosine_batchtopk", "inner_product_batchtopk")
            for file in ("README.md", "cfg.json", "sae_weights.safetensors")]  # fmt: skip
    assert commit["files"] == sorted([*saes, "README.md", "comparison.json", "comparison.png"])
    card = repo["files"]["README.md"].decode()
    rows = [line for line in card.splitlines() if line.startswith("| `") and "| 0 |" in line]
    assert rows == [
        "| `inner_product_batchtopk` | 0 | 0.7500 | 3.2 | 12.5% | 0.9000 | 0.5000 | 0.6000 | 0.7000 | 0.8000 |",
        "| `cosine_batchtopk` | 0 | 0.7600 | 3.2 | 12.5% | 0.9100 | 0.5100 | 0.6100 | 0.7100 | 0.8100 |",
    ]
    assert "(comparison.png)" in card
    assert 'SAE.from_pretrained("me/compare", "cosine_batchtopk/seed0")' in capsys.readouterr().out


def test_one_sae_of_a_comparison_brings_the_comparison(tmp_path):
    save_comparison(tmp_path / "runs")
    bundle = gather(tmp_path / "runs" / "cosine_batchtopk" / "seed0", "me/saes", sae_id="layer_3")
    assert bundle.sae_ids == ("layer_3",)
    assert {"layer_3/cfg.json", "comparison.json", "comparison.png"} <= set(bundle.files)
    assert b"| `inner_product_batchtopk` | 0 | 0.7500 |" in bundle.files["README.md"]


def test_an_sae_beside_a_comparison_that_did_not_measure_it_goes_without(tmp_path):
    save_comparison(tmp_path)
    save_sae(tmp_path / "other" / "sae")
    bundle = gather(tmp_path / "other" / "sae", "me/saes")
    assert "comparison.json" not in bundle.files
    assert b"## Comparison" not in bundle.files["README.md"]


def test_a_failed_upload_publishes_nothing_and_sends_the_rest_next_time(tmp_path, logged_in, capsys):
    save_comparison(tmp_path)
    weights = [(tmp_path / arm / "seed0" / "sae_weights.safetensors").read_bytes()
               for arm in ("inner_product_batchtopk", "cosine_batchtopk")]  # fmt: skip
    logged_in.refuse_put_of = weights[1]
    assert share(tmp_path, "--repo", "me/saes") == 2
    error = capsys.readouterr().err
    assert "nothing was published" in error
    assert "sae_weights.safetensors" in error
    assert "Run the same command again" in error
    assert logged_in.repos["me/saes"]["commits"] == []
    assert len(logged_in.puts) == 3  # both weights and the picture
    logged_in.refuse_put_of, logged_in.puts = b"", []
    assert share(tmp_path, "--repo", "me/saes") == 0
    assert logged_in.puts == [f"/lfs/{hashlib.sha256(weights[1]).hexdigest()}"]
    assert len(logged_in.repos["me/saes"]["commits"]) == 1


def test_sharing_again_changes_nothing(tmp_path, logged_in, capsys):
    save_sae(tmp_path)
    assert share(tmp_path, "--repo", "me/saes") == 0
    (first,) = logged_in.repos["me/saes"]["commits"]
    logged_in.puts = []
    assert share(tmp_path, "--repo", "me/saes", "--replace-card") == 0
    assert logged_in.repos["me/saes"]["commits"] == [first]
    assert logged_in.puts == []


def test_a_card_that_exists_is_replaced_only_when_asked_to(tmp_path, logged_in, capsys):
    save_sae(tmp_path / "a")
    save_comparison(tmp_path / "b")
    assert share(tmp_path / "a", "--repo", "me/saes") == 0
    files = logged_in.repos["me/saes"]["files"]
    before = files["README.md"]
    capsys.readouterr()
    assert share(tmp_path / "b", "--repo", "me/saes") == 0
    assert "--replace-card" in capsys.readouterr().out
    assert files["README.md"] == before
    assert "comparison.png" not in files  # what the kept card does not show
    assert "cosine_batchtopk/seed0/cfg.json" in files
    assert share(tmp_path / "b", "--repo", "me/saes", "--replace-card") == 0
    assert b"## Comparison" in files["README.md"]
    assert "comparison.png" in files


def test_a_private_upload_never_lands_in_a_public_repository(tmp_path, logged_in, capsys):
    save_sae(tmp_path)
    logged_in.repos["me/saes"] = {"private": False, "files": {}, "commits": []}
    assert share(tmp_path, "--repo", "me/saes", "--private") == 2
    assert "me/saes exists and is public" in capsys.readouterr().err
    assert logged_in.puts == []
    assert logged_in.repos["me/saes"]["commits"] == []


def test_without_a_token_nothing_is_asked_of_the_hub(tmp_path, logged_in, monkeypatch, capsys):
    save_sae(tmp_path)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    assert share(tmp_path, "--repo", "me/saes") == 2
    error = capsys.readouterr().err
    assert "hf auth login" in error
    assert "HF_TOKEN" in error
    assert logged_in.requests == []


def test_a_refused_token_is_an_error_of_the_hub(tmp_path, logged_in, monkeypatch):
    save_sae(tmp_path)
    monkeypatch.setenv("HF_TOKEN", "hf_expired")
    with pytest.raises(OSError, match="nothing was published: .*401"):
        upload(gather(tmp_path, "me/saes"))
    assert logged_in.repos == {}


def test_a_hub_that_cannot_be_reached_is_an_error_with_a_way_out(tmp_path, logged_in, capsys):
    save_sae(tmp_path)
    logged_in.server.shutdown()
    logged_in.server.server_close()
    assert share(tmp_path, "--repo", "me/saes") == 2
    assert "nothing was published" in capsys.readouterr().err


def test_a_dry_run_writes_what_would_be_sent_and_sends_nothing(tmp_path, logged_in, capsys):
    save_comparison(tmp_path / "runs")
    output = tmp_path / "out"
    assert share(tmp_path / "runs", "--repo", "me/saes", "--dry-run", "--output", output) == 0
    assert "Nothing was sent" in capsys.readouterr().out
    assert logged_in.requests == []
    written = {
        file.relative_to(output / "hub").as_posix(): file for file in (output / "hub").rglob("*.*") if file.is_file()
    }
    bundle = gather(tmp_path / "runs", "me/saes")
    assert set(written) == set(bundle.files)
    weights = "cosine_batchtopk/seed0/sae_weights.safetensors"
    assert written[weights].read_bytes() == (tmp_path / "runs" / weights).read_bytes()
    assert written["README.md"].read_text().startswith("---\n")
    assert sorted(path.name for path in output.iterdir()) == ["hub"]  # nothing unfinished stays
    with pytest.raises(FileExistsError, match="exists; choose another place"):
        write(bundle, output / "hub")


@pytest.mark.parametrize("name", TRAINING)
def test_what_every_architecture_saves_for_inference_can_be_shared(tmp_path, name):
    make_sae(name).save_inference_model(tmp_path)
    assert gather(tmp_path, "me/saes", sae_id="a").sae_ids == ("a",)


@pytest.mark.parametrize("name", TRAINING)
def test_a_training_checkpoint_is_refused_with_the_way_out(tmp_path, name):
    make_sae(name).save_model(tmp_path)
    with pytest.raises(ValueError, match=f"training checkpoint \\('{name}'\\).*inference_form"):
        gather(tmp_path, "me/saes")


def test_a_training_checkpoint_of_saelens_that_would_load_as_another_function_is_refused(tmp_path):
    """SAELens' TopK has one name and the same tensors in training and inference."""
    TopKTrainingSAE(TopKTrainingSAEConfig(d_in=4, d_sae=16, k=2)).save_model(tmp_path / "training")
    SAE.load_from_disk(tmp_path / "training")  # SAELens takes it
    with pytest.raises(ValueError, match="training checkpoint"):
        gather(tmp_path / "training", "me/saes")


@pytest.mark.parametrize(
    "breakage, message",
    [
        (lambda path: (path / "sae_weights.safetensors").unlink(), "cfg.json but no sae_weights.safetensors"),
        (lambda path: (path / "sae_weights.safetensors").write_bytes(b"cut off"), "is damaged"),
        (lambda path: (path / "cfg.json").unlink(), "There is no saved SAE"),
        (lambda path: _edit(path / "cfg.json", d_sae=12), "does not fit the cfg.json"),
        (lambda path: _edit(path / "cfg.json", architecture="other"), "'other', which SAELens does not know"),
    ],
)
def test_what_cannot_be_loaded_is_not_published(tmp_path, logged_in, capsys, breakage, message):
    save_sae(tmp_path)
    breakage(tmp_path)
    assert share(tmp_path, "--repo", "me/saes") == 2
    assert message in capsys.readouterr().err
    assert logged_in.requests == []


def _edit(path: Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--repo", "saes"], "must be owner/name"),
        (["--repo", "me/saes", "--id", "../up"], "must be a relative path"),
        (["--repo", "me/saes", "--id", "/root"], "must be a relative path"),
        (["--repo", "me/saes", "--id", "layer_3"], "holds 2 SAEs"),
        ([], "Say where to"),
        (["--neuronpedia", "gpt2-small/set"], "holds 2 SAEs"),
        (["--neuronpedia", "gpt2-small"], "must be MODEL/SET"),
    ],
)
def test_options_that_make_no_sense_are_refused_before_anything_happens(
    tmp_path, logged_in, capsys, arguments, message
):
    save_comparison(tmp_path)
    assert share(tmp_path, *arguments) == 2
    assert message in capsys.readouterr().err
    assert logged_in.requests == []


def test_a_comparison_of_another_version_is_not_misread(tmp_path):
    save_comparison(tmp_path)
    _edit(tmp_path / "comparison.json", schema="saelens-cosine/comparison/99")
    with pytest.raises(
        ValueError, match="comparison/99.*reads saelens-cosine/comparison/1 and saelens-cosine/comparison/2"
    ):
        gather(tmp_path, "me/saes")

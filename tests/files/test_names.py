"""No name from outside leads out of a folder, and what is no file is not waited for."""

import json
import os
import socket

import pytest
from helpers import make_sae

from saelens_cosine.cli import main
from saelens_cosine.experiments.compare.grid import points
from saelens_cosine.experiments.compare.results import ArmResult, PointResult
from saelens_cosine.experiments.compare.settings import ComparisonSettings
from saelens_cosine.experiments.compare.state import ComparisonState
from saelens_cosine.experiments.evaluate.texts.tasks import load_tasks
from saelens_cosine.files.lock import LOCK
from saelens_cosine.files.manifest import MANIFEST, Manifest
from saelens_cosine.files.names import below, check_name, unused
from saelens_cosine.files.output import open_output
from saelens_cosine.loading import CheckpointError, from_pretrained
from saelens_cosine.loading.formats.saelens import SAELENS
from saelens_cosine.metrics.reconstruction.by_norm import NormBin, Reconstruction
from saelens_cosine.saebench import prepare, run
from saelens_cosine.saebench.results import SCHEMA, load_record
from saelens_cosine.saebench.runner import Runner
from saelens_cosine.sharing.hub import Bundle, gather, write
from saelens_cosine.training.resuming.checkpoints import OWN_FOLDER, BrokenCheckpointError, check

WRONG = [
    "../x",
    "/abs",
    "a/../../b",
    "",
    ".",
    "..",
    "a//b",
    "a/",
    "a\x00b",
    "a\\..\\b",
    "a\nb",
    "x" * 300,
    None,
    3,
    ["a"],
]


@pytest.mark.parametrize("name", WRONG, ids=repr)
def test_a_name_that_leads_elsewhere_is_refused(name, tmp_path):
    with pytest.raises(ValueError, match="The hook name .* must be a relative path"):
        below(tmp_path, name, "hook name")


@pytest.mark.parametrize("name", ["blocks.3.hook_resid_post", "layer_3/seed0", "model.layers.3", "...", "ä", ".hidden"])
def test_names_in_use_are_places_below(name, tmp_path):
    assert below(tmp_path, name, "hook name") == tmp_path / name
    assert check_name(name, "id") == name


@pytest.fixture
def sae(tmp_path):
    folder = tmp_path / "sae"
    make_sae("cosine_topk").save_inference_model(folder)
    return folder


def rename_hook(folder, name):
    config = json.loads((folder / "cfg.json").read_text())
    config["metadata"]["hook_name"] = name
    (folder / "cfg.json").write_text(json.dumps(config))


@pytest.mark.parametrize("name", ["../escaped", "/tmp/escaped-from-a-test", "a/../../escaped", "a\\b"])
def test_share_writes_nowhere_else(name, sae, tmp_path, capsys):
    rename_hook(sae, name)
    before = sorted(tmp_path.rglob("*"))
    command = ["share", str(sae), "--repo", "me/saes", "--dry-run", "--output", str(tmp_path / "out")]
    assert main(command) == 2
    assert "must be a relative path" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before
    assert not os.path.exists("/tmp/escaped-from-a-test")
    assert main([*command, "--id", "layer_3"]) == 0  # the way out


@pytest.mark.parametrize(
    "option", [("--id", "../x"), ("--id", "/x"), ("--repo", "../x"), ("--repo", "me/.."), ("--repo", "me/")]
)
def test_share_checks_what_it_is_told(option, sae, tmp_path, capsys):
    options = {"--repo": "me/saes", "--id": "a", option[0]: option[1]}
    arguments = [part for item in options.items() for part in item]
    assert main(["share", str(sae), *arguments, "--dry-run", "--output", str(tmp_path / "out")]) == 2
    assert option[1] in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_bundle_is_written_below_its_folder_whoever_made_it(tmp_path):
    with pytest.raises(ValueError, match="must be a relative path"):
        write(Bundle("me/saes", ("a",), {"../x": b"text"}), tmp_path / "out" / "hub")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize("name", ["../x", "/abs"])
def test_saebench_keeps_its_texts_below_its_caches(name, tmp_path):
    sae = make_sae("cosine_topk")
    sae.cfg.metadata.hook_name = name

    class Row:
        pools_tokens, name = True, "core"

    runner = object.__new__(Runner)
    runner.caches = lambda *_: tmp_path
    runner.max_norm_multiple = None
    with pytest.raises(ValueError, match="hook name"):
        runner.is_warm(Row, None, [sae])


@pytest.mark.parametrize("name", ["../x", "/abs", "a/../../b", "."])
def test_saebench_s_files_are_called_after_an_arm_without_its_slashes(name):
    sae = make_sae("cosine_topk")
    sae.cfg.metadata.model_name, sae.cfg.metadata.hook_name = "bundled", "blocks.3.hook_resid_post"
    called = prepare(sae, name).name
    assert called.startswith(name.replace("/", "_") + "-")
    assert "/" not in called


@pytest.mark.parametrize("name", ["a\x00b", "a\\b", "x" * 300])
def test_saebench_s_files_are_not_called_what_no_file_is(name):
    sae = make_sae("cosine_topk")
    sae.cfg.metadata.model_name, sae.cfg.metadata.hook_name = "bundled", "blocks.3.hook_resid_post"
    with pytest.raises(ValueError, match="name of the copy"):
        prepare(sae, name)


@pytest.mark.parametrize("file", ["cfg.json", "sae_weights.safetensors", "README.md"])
def test_a_pipe_is_not_waited_for(file, sae, tmp_path, capsys):
    (sae / file).unlink(missing_ok=True)
    os.mkfifo(sae / file)
    for command in (
        ["share", str(sae), "--repo", "me/saes", "--id", "a", "--dry-run", "--output", str(tmp_path / "out")],
        ["evaluate", str(sae), "--output", str(tmp_path / "evaluated"), "--quiet"],
        ["convert", str(sae), str(tmp_path / "converted")],
    ):
        fits = file == "README.md" and command[0] != "evaluate"  # no model is named
        assert main(command) == (0 if fits else 2), capsys.readouterr().err
    if file != "README.md":
        with pytest.raises(CheckpointError):
            from_pretrained(sae)
    else:
        assert gather(sae, "me/saes", "a").files["a/README.md"]


def test_what_is_no_file_is_not_published(sae, tmp_path, monkeypatch):
    monkeypatch.chdir(sae)  # the place of a socket has at most 107 bytes
    with socket.socket(socket.AF_UNIX) as one:
        one.bind("runner_cfg.json")
        (sae / "sparsity.safetensors").symlink_to("/dev/zero")
        assert set(gather(sae, "me/saes", "a").files) == {
            "a/cfg.json",
            "a/sae_weights.safetensors",
            "a/README.md",
            "README.md",
        }
        (sae / "cfg.json").unlink()
        (sae / "cfg.json").symlink_to("/dev/zero")
        assert main(["share", ".", "--repo", "me/saes", "--dry-run", "--output", str(tmp_path / "out")]) == 2


@pytest.mark.parametrize("name", [MANIFEST, LOCK, "evaluation.json", "report.html"])
def test_a_pipe_in_an_output_folder_is_not_waited_for(name, tmp_path, capsys):
    os.mkfifo(tmp_path / name)
    assert main(["evaluate", str(tmp_path / "no-sae"), "--output", str(tmp_path), "--quiet"]) == 2
    error = capsys.readouterr().err
    assert name in error
    assert "Move it away" in error


def test_a_pipe_in_a_checkpoint_is_not_waited_for(tmp_path):
    folder = tmp_path / "100"
    (folder / OWN_FOLDER).mkdir(parents=True)
    (folder / OWN_FOLDER / "checksums.json").write_text(json.dumps({"weights": "00"}))
    os.mkfifo(folder / "weights")
    with pytest.raises(BrokenCheckpointError, match="weights is not there, or is no file"):
        check(folder)
    (folder / OWN_FOLDER / "checksums.json").unlink()
    os.mkfifo(folder / OWN_FOLDER / "checksums.json")
    with pytest.raises(BrokenCheckpointError, match="checksums"):
        check(folder)


def test_a_pipe_with_labelled_texts_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "texts.csv")
    with pytest.raises(FileNotFoundError, match=r"texts\.csv"):
        load_tasks([str(tmp_path / "texts.csv")])


FILE_NAMES = [name for name in WRONG if isinstance(name, str)]


@pytest.mark.parametrize("name", FILE_NAMES, ids=repr)
def test_a_list_of_files_names_none_elsewhere(name, tmp_path):
    listed = {"files": {"comparison": {name: [{"size": 1, "sha256": "00"}]}}}
    (tmp_path / MANIFEST).write_text(json.dumps(listed))
    with pytest.raises(ValueError, match="is no list of this package's files"):
        Manifest(tmp_path, "comparison")
    (tmp_path / OWN_FOLDER).mkdir()
    (tmp_path / OWN_FOLDER / "checksums.json").write_text(json.dumps({name: "00"}))
    with pytest.raises(BrokenCheckpointError, match="checksums"):
        check(tmp_path)


@pytest.mark.parametrize("name", ["../../x", "a/../../b", "a\\..\\b", "a\x00b", "x" * 300])
def test_a_repository_names_no_file_elsewhere(name):
    with pytest.raises(CheckpointError, match="must be a relative path"):
        SAELENS.download("me/saes", name)


@pytest.mark.parametrize("place", ["../x", "a/../../b", "x" * 5000, "owner/" + "x" * 200, "a\x00b", "owner/a\x00b"])
def test_a_source_that_can_be_none_is_a_checkpoint_error(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="is no local folder"):
        from_pretrained(place)


@pytest.mark.parametrize("name", ["../x", "/abs"])
def test_saebench_calls_no_file_by_a_model_that_leads_elsewhere(name, tmp_path):
    sae = make_sae("cosine_topk")
    sae.cfg.metadata.model_name, sae.cfg.metadata.hook_name = name, "blocks.0.hook_resid_post"
    with pytest.raises(ValueError, match="model's name in the SAE's metadata"):
        run([sae], ["core"], tmp_path / "out")


def test_a_record_of_saebench_names_files_beside_it(tmp_path):
    record = tmp_path / "record.json"
    record.write_text(json.dumps({"schema": SCHEMA, "file": "/abs", "file_without_high_norm": None}))
    with pytest.raises(ValueError, match="must be a relative path"):
        load_record(record)


def test_a_record_of_a_seed_names_saes_below_the_comparison(tmp_path, capsys):
    (tmp_path / "elsewhere").mkdir()
    measured = Reconstruction(100, 0.5, 3.0, 0.1, (NormBin(0.0, 1.0, 25, 0.5),))
    arm = ArmResult("cosine_topk", 0, "../elsewhere", measured, 0.9, None, 1.0, ())
    with open_output(tmp_path / "out", "comparison") as output:
        output.begin(before=(), places=(), overwrite=False)
        state = ComparisonState(ComparisonSettings(), output, resume=True, overwrite=False, keep=1)
        (point,) = points(ComparisonSettings())
        state.note(point, PointResult((arm,), (), 0.0))
        assert state.finished(point) is None
    assert "is broken" in capsys.readouterr().err


def test_an_unused_name_is_no_link_either_wherever_it_leads(tmp_path):
    assert unused(tmp_path / "a") == tmp_path / "a"
    (tmp_path / "a").mkdir()
    (tmp_path / "a-2").symlink_to("nowhere")
    assert unused(tmp_path / "a") == tmp_path / "a-3"

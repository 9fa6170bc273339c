"""No name from outside leads out of a folder, and what is no file is not waited for."""

import json
import os

import pytest
from helpers import make_sae

from saelens_cosine.cli import main
from saelens_cosine.evaluation.saebench import prepare
from saelens_cosine.evaluation.saebench.runner import _Runner
from saelens_cosine.files.names import below, check_name
from saelens_cosine.loading import CheckpointError, from_pretrained
from saelens_cosine.sharing.hub import Bundle, gather, write

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

    runner = object.__new__(_Runner)
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

"""Hostile checkpoints end in `CheckpointError`: the file and its fault are named, nothing is run, nothing is written."""

import re

import pytest
from hostile_checkpoints import HOSTILE, WEIGHTS, write_good, write_hostile

from saelens_cosine.cli import main
from saelens_cosine.loading import CheckpointError, from_pretrained, inference_form


def load(layout, folder):
    return inference_form(folder) if layout == "training" else from_pretrained(folder)


def files(folder):
    return {path.relative_to(folder): path.is_file() and path.read_bytes() for path in folder.rglob("*")}


@pytest.mark.parametrize("layout", WEIGHTS)
def test_the_good_ones_load(layout, tmp_path):
    load(layout, write_good(layout, tmp_path))


@pytest.mark.parametrize("name", HOSTILE)
def test_each_is_a_checkpoint_error(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = write_hostile(name, tmp_path / "sae")
    before = files(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        load(HOSTILE[name].layout, folder)
    message = str(caught.value)
    assert re.search(HOSTILE[name].says, message, re.DOTALL), message
    assert str(folder) in message
    assert len(message) < 1500
    assert files(tmp_path) == before


SAMPLE = list(HOSTILE)[::9]
COMMANDS = {
    "convert": lambda folder: ["convert", folder, "out"],
    "evaluate": lambda folder: ["evaluate", folder, "--output", "out", "--quiet", "--tokens", "600"],
    "share": lambda folder: ["share", folder, "--repo", "me/saes", "--dry-run", "--output", "out", "--quiet"],
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("name", SAMPLE)
def test_commands_say_it_in_a_line(name, command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder = write_hostile(name, tmp_path / "sae")
    before = files(tmp_path)
    assert main(COMMANDS[command](str(folder))) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"saelens-cosine {command}: ")
    assert str(folder) in line
    assert files(tmp_path) == before

"""Checkpoints of a run: whole, verified, the newest few, and only ours are removed."""

import json
import os

import pytest
from small_runs import assert_bit_identical, flags, write_text

from saelens_cosine.cli import main
from saelens_cosine.training.resuming.checkpoints import BrokenCheckpointError, Checkpoints, check


def write(content):
    return lambda folder: (folder / "weights").write_text(content)


def saved(tmp_path, *tokens, keep=9):
    checkpoints = Checkpoints(tmp_path, keep)
    for n in tokens:
        checkpoints.add(n, write(f"of {n}"))
    return checkpoints


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_newest_are_kept_by_number_not_by_name(tmp_path):
    saved(tmp_path, 900, 1000, 1100, keep=2)
    assert names(tmp_path) == ["1000", "1100"]


def test_what_others_have_put_there_is_left(tmp_path):
    checkpoints = saved(tmp_path, 100, keep=1)
    (tmp_path / "100" / "notes.txt").write_text("mine")
    (tmp_path / "7").mkdir()
    (tmp_path / "7" / "weights").write_text("no checkpoint of ours")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "weights").write_text("linked")
    (tmp_path / "50").symlink_to(tmp_path / "elsewhere")
    checkpoints.add(200, write("of 200"))
    assert names(tmp_path) == ["100", "200", "50", "7", "elsewhere"]
    assert names(tmp_path / "100") == ["notes.txt"]
    assert (tmp_path / "elsewhere" / "weights").read_text() == "linked"


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "weights").write_text("of 30!"),
        lambda folder: (folder / "weights").write_text("of 3"),
        lambda folder: (folder / "weights").unlink(),
        lambda folder: (folder / "saelens_cosine" / "checksums.json").write_text("{"),
        lambda folder: (folder / "saelens_cosine" / "checksums.json").write_text("[]"),
        lambda folder: (folder / "saelens_cosine" / "checksums.json").write_text('{"../10/weights": "0"}'),
        lambda folder: (folder / "saelens_cosine" / "checksums.json").unlink(),
    ],
    ids=["changed", "shorter", "missing", "no JSON", "a list", "a path outside", "no checksums"],
)
def test_a_broken_one_is_named_and_the_one_before_taken(damage, tmp_path):
    checkpoints = saved(tmp_path, 10, 20, 30)
    damage(tmp_path / "30")
    with pytest.raises(BrokenCheckpointError, match="30 is broken"):
        check(tmp_path / "30")
    said = []
    assert checkpoints.newest(said.append) == tmp_path / "20"
    assert len(said) == 1
    assert "30 is broken" in said[0]
    checkpoints.add(30, write("of 30"))  # the run goes on from 20 and comes by again
    assert checkpoints.newest(said.append) == tmp_path / "30"
    assert len(said) == 1
    assert (tmp_path / "10" / "weights").read_text() == "of 10"


def test_a_checkpoint_that_cannot_be_written_leaves_those_before(tmp_path):
    checkpoints = saved(tmp_path, 10, keep=1)

    def full(folder):
        (folder / "weights").write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        checkpoints.add(20, full)
    assert names(tmp_path) == ["10"]
    check(tmp_path / "10")


def test_none_kept_is_refused(tmp_path):
    with pytest.raises(ValueError, match="keep=0"):
        Checkpoints(tmp_path, 0)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    text = write_text(folder / "text.jsonl")
    assert main(["train", *flags(text, folder / "sae")]) == 0
    return text, folder


def test_saved_checkpoints_stay_as_they_were_and_two_are_kept(trained):
    _, folder = trained
    assert sorted(path.name for path in (folder / "sae-checkpoints").iterdir()) == ["3072", "4096"]
    for path in (folder / "sae-checkpoints").iterdir():
        check(path)
        steps = json.loads((path / "saelens_cosine" / "state.json").read_text())["tokens"] // 256
        assert steps == int(path.name) // 256


def test_overwrite_replaces_what_is_ours_when_the_new_sae_is_there(trained, tmp_path):
    text, _ = trained
    out = tmp_path / "sae"
    assert main(["train", *flags(text, out)]) == 0
    (out / "notes.txt").write_text("mine")
    (tmp_path / "sae-checkpoints" / "4096" / "notes.txt").write_text("mine")
    before = (out / "sae_weights.safetensors").read_bytes()
    assert main(["train", *flags(text, out, seed=6)]) == 2
    assert main(["train", *flags(text, out, seed=6, d_in=191), "--overwrite"]) == 2  # fails before it trains
    assert (out / "sae_weights.safetensors").read_bytes() == before
    assert names(tmp_path / "sae-checkpoints") == ["3072", "4096"]
    assert main(["train", *flags(text, out, seed=6), "--overwrite"]) == 0
    assert (out / "sae_weights.safetensors").read_bytes() != before
    assert (out / "notes.txt").read_text() == "mine"
    assert [path.read_text() for path in (tmp_path / "sae-checkpoints").rglob("notes.txt")] == ["mine"]


def test_a_broken_newest_checkpoint_costs_an_interval_and_a_word(trained, tmp_path, capsys):
    text, folder = trained
    out = tmp_path / "sae"
    assert main(["train", *flags(text, out)]) == 0
    weights = tmp_path / "sae-checkpoints" / "4096" / "sae_weights.safetensors"
    os.truncate(weights, weights.stat().st_size - 1)
    capsys.readouterr()
    assert main(["train", *flags(text, out), "--resume"]) == 0
    said = capsys.readouterr().err
    assert "4096 is broken: sae_weights.safetensors" in said
    assert "Going on from" in said
    assert "3072" in said
    assert_bit_identical(folder / "sae", out)

"""A disk that is full, closed to writing or gone in the middle of a run: one line, and what was written before is as it was."""

import importlib
import shutil
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest
from foreign import write
from small_runs import flags, write_text

from saelens_cosine.cli import main
from saelens_cosine.training.recipe import RECIPES, paper

ARMS = ("cosine_batchtopk", "inner_product_topk")

MIDWAY = {
    "compare": "saelens_cosine.experiments.compare.training.weights_sha256",
    "train": "saelens_cosine.training.train.record_training",
    "evaluate": "saelens_cosine.experiments.evaluate.run.measure",
    "ground-truth": "saelens_cosine.experiments.ground_truth.command.ground_truth",
    "benchmark": "saelens_cosine.experiments.benchmark.command.benchmark",
    "convert": "saelens_cosine.loading.command.load",
    "share": "saelens_cosine.sharing.command.gather",
}
"""What each command calls after it has tested its folder and before it writes its results. `evaluate` and `share` take an SAE of
`compare`."""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A text, an authors' file, and what each command writes from them."""
    folder = tmp_path_factory.mktemp("world")
    text = write_text(folder / "text.jsonl")
    source = write("global-a", folder / "source")
    earlier = folder / "earlier"
    earlier.mkdir()
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(RECIPES, "paper", lambda tokens, batch=128: paper(tokens, batch))
        for name in MIDWAY:
            assert main(arguments(name, folder, text, source, earlier / name)) == 0
    return folder, text, source, earlier


def arguments(name, folder, text, source, output):
    small = {"layer": 0, "tokens": 1024, "k": 4, "d-sae": 24, "context-size": 32, "eval-tokens": 320}
    small = [part for option, value in small.items() for part in (f"--{option}", str(value))]
    sae = folder / "earlier" / "compare" / ARMS[0] / "seed0"
    to = ["--quiet", "--output", str(output)]
    return {
        "train": ["train", *flags(text, output / "sae", training_tokens=1024), "--overwrite"],
        "compare": ["compare", "--dataset", str(text), *small, *to, "--overwrite", "--arms", *ARMS],
        "evaluate": ["evaluate", str(sae), "--evals", "dictionary", "--tokens", "640", "--overwrite", *to],
        "ground-truth": [
            *("ground-truth", "--arms", ARMS[0], "--samples", "2k", "--eval-samples", "100", "--seeds", "1"),
            *("--norm-spreads", "0", "--overwrite", *to),
        ],
        "benchmark": [
            *("benchmark", "--quiet", "--arms", f"{ARMS[0]}/reference", "--d-in", "8", "--d-sae", "16", "--batch", "8"),
            *("--k", "2", "--repeats", "1", "--json", str(output / "benchmark.json")),
        ],
        "convert": ["convert", str(source), str(output), "--overwrite"],
        "share": ["share", str(sae), "--repo", "someone/sae", "--dry-run", *to],
    }[name]


def files(folder: Path):
    """What the user has: not the hidden records of runs, which may tell of one that failed."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    }


@pytest.fixture
def disk(tmp_path):
    """A disk of 16 MB of its own: a page takes 5."""
    place = tmp_path / "disk"
    place.mkdir()
    try:
        made = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(place)], capture_output=True, text=True
        )
    except FileNotFoundError:
        pytest.skip("needs a disk of its own, and there is no mount here")
    if made.returncode:
        pytest.skip(f"needs a disk of its own, which only root may mount: {made.stderr.strip()}")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def fill(output: Path) -> None:
    with suppress(OSError), (output.parent / "filler").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def close(output: Path) -> None:
    subprocess.run(["mount", "--bind", str(output), str(output)], check=True)
    subprocess.run(["mount", "-o", "remount,bind,ro", str(output)], check=True)


def replace_by_a_file(output: Path) -> None:
    output.rename(output.with_name("elsewhere"))
    output.write_text("not a folder")


def run_with(fault, name, world, output, monkeypatch, capsys):
    """The command's answer where the fault comes midway; what was there before is where it was, or elsewhere."""
    folder, text, source, earlier = world
    shutil.copytree(earlier / name, output)
    if name == "share":  # it replaces nothing
        (output / "hub").rename(output / "earlier")
    before = files(output)
    module, _, function = MIDWAY[name].rpartition(".")
    call = getattr(importlib.import_module(module), function)
    done = []

    def midway(*args, **kwargs):
        result = call(*args, **kwargs)
        if not done:
            done.append(fault(output))
        return result

    monkeypatch.setitem(RECIPES, "paper", lambda tokens, batch=128: paper(tokens, batch))
    monkeypatch.setattr(MIDWAY[name], midway)
    if name == "evaluate":  # else it finds all measured
        shutil.rmtree(output / "measured")
        before = {path: content for path, content in before.items() if not path.startswith("measured/")}
    capsys.readouterr()
    status = main(arguments(name, folder, text, source, output))
    assert done
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert status == 2, line
    assert line.startswith(f"saelens-cosine {name}: ")
    there = output.with_name("elsewhere") if output.with_name("elsewhere").exists() else output
    now = files(there)
    if name == "train":  # checkpoints of an earlier run are set aside under another name
        assert set(before.values()) <= set(now.values())
        before = {path: content for path, content in before.items() if path.startswith("sae/")}
    assert {path: now.get(path) for path in before} == before
    return line


@pytest.mark.parametrize("name", MIDWAY)
def test_a_full_disk(name, world, disk, monkeypatch, capsys):
    line = run_with(fill, name, world, disk / "out", monkeypatch, capsys)
    assert "Free some space, or choose another folder" in line
    assert str(disk / "out") in line or "Error while serializing" in line  # safetensors' errors have no name


@pytest.mark.parametrize("name", MIDWAY)
def test_a_disk_that_is_closed_to_writing(name, world, disk, monkeypatch, capsys):
    try:
        line = run_with(close, name, world, disk / "out", monkeypatch, capsys)
    finally:
        subprocess.run(["umount", "-l", str(disk / "out")], check=False)
    assert "Read-only file system" in line
    assert "Choose a folder that can be written" in line


@pytest.mark.parametrize("name", MIDWAY)
def test_a_folder_that_is_taken_away(name, world, tmp_path, monkeypatch, capsys):
    line = run_with(replace_by_a_file, name, world, tmp_path / "out", monkeypatch, capsys)
    assert str(tmp_path / "out") in line or "Not a directory" in line

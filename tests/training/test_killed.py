"""Runs that are killed at any moment, inside a save too, lose nothing but time.

The suite kills a seeded sample; `pytest -m kills` kills `train` 200 times, `compare` and `evaluate` 30 times each.
"""

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from helpers import make_sae
from killed_run import KilledRuns
from small_runs import HOOK, assert_bit_identical, compare_flags, flags, write_text
from variation import SEED_OFFSET


def same_comparison(one: Path, other: Path) -> None:
    found = [json.loads((folder / "comparison.json").read_text()) for folder in (one, other)]
    for comparison in found:
        for arm in comparison["arms"]:
            assert arm.pop("seconds") > 0
    assert found[0] == found[1]
    for arm in found[0]["arms"]:
        assert_bit_identical(one / arm["path"], other / arm["path"])


def same_evaluation(one: Path, other: Path) -> None:
    found = [json.loads((folder / "evaluation.json").read_text()) for folder in (one, other)]
    results = [[(sae["arm"], sae["results"]) for sae in document["saes"]] for document in found]
    assert results[0] == results[1]
    assert len(results[0]) == 2
    assert (other / "report.html").is_file()


@dataclass(frozen=True)
class Command:
    """How a command is run, gone on with, and compared with a run that was never killed; tokens of a step, and between checkpoints."""

    arguments: Callable[[Path, Path], list[str]]
    go_on: tuple[str, ...]
    same: Callable[[Path, Path], None]
    batch: int = 0
    interval: int = 0


def evaluation_of(inputs: Path, output: Path) -> list[str]:
    evals = ("--evals", "reconstruction", "dictionary", "afa", "--tokens", "640")
    return [
        "evaluate",
        str(inputs / "one"),
        str(inputs / "two"),
        *evals,
        "--dataset",
        "bundled",
        "--quiet",
        "--output",
        str(output),
    ]


COMMANDS = {
    "train": Command(
        lambda inputs, to: ["train", *flags(inputs / "text.jsonl", to)],
        ("--resume",),
        assert_bit_identical,
        batch=256,
        interval=1024,
    ),
    "compare": Command(
        lambda inputs, to: ["compare", *compare_flags(inputs / "text.jsonl", to)],
        ("--resume",),
        same_comparison,
        batch=128,
        interval=256,  # a sixth of 1024 tokens, in whole steps
    ),
    "evaluate": Command(evaluation_of, (), same_evaluation),
}


@pytest.fixture(scope="module")
def runs():
    server = KilledRuns()
    yield server
    server.close()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A text, and two SAEs."""
    folder = tmp_path_factory.mktemp("inputs")
    write_text(folder / "text.jsonl")
    for seed, name in enumerate(("one", "two")):
        sae = make_sae("batchtopk", d_in=192, d_sae=16, k=4, seed=seed)
        sae.cfg.metadata.hook_name, sae.cfg.metadata.model_name = HOOK, "bundled"
        sae.save_inference_model(folder / name)
    return folder


@pytest.fixture(scope="module")
def uninterrupted(runs, inputs, tmp_path_factory):
    """Each command's result where nothing is killed, and what the run answered; made when it is asked for."""
    made = {}

    def run(name: str):
        if name not in made:
            folder = tmp_path_factory.mktemp(name) / "run"
            folder.mkdir()
            answer = runs(COMMANDS[name].arguments(inputs, folder / "out"), folder)
            assert answer["status"] == 0, folder.with_name("run.log").read_text()
            made[name] = folder / "out", answer
        return made[name]

    return run


def kill(runs, inputs, uninterrupted, name: str, folder: Path, kills: int, seed: int) -> dict[str, int]:
    """Kill and go on, half between two writes; what was seen."""
    rng, command = random.Random(seed + SEED_OFFSET), COMMANDS[name]
    whole, usual = uninterrupted(name)
    seen = {"kills": 0, "between writes": 0, "runs": 0, "most tokens lost": 0}
    while seen["kills"] < kills:
        started = [*command.arguments(inputs, folder / "run" / "out"), *command.go_on]
        (folder / "run").mkdir()
        reached = 0
        for _ in range(rng.randint(1, 3)):  # a run may be killed more than once
            between = 2 * seen["between writes"] <= seen["kills"]
            event, seconds = rng.randint(1, usual["events"]), rng.uniform(0, usual["seconds"])
            answer = runs(started, folder / "run", **({"event": event} if between else {"seconds": seconds}))
            reached = check_start(command, answer, reached, seen)
            if answer["status"] != -9:
                break
            seen["kills"] += 1
            seen["between writes"] += between
        answer = runs(started, folder / "run")
        assert answer["status"] == 0, (folder / "run.log").read_text()
        check_start(command, answer, reached, seen)
        command.same(whole, folder / "run" / "out")
        assert not [path for path in (folder / "run").rglob("*") if ".unfinished" in path.name]
        seen["runs"] += 1
        shutil.rmtree(folder / "run")
    return seen


def check_start(command: Command, answer, reached: int, seen: dict[str, int]) -> int:
    """That a training began no more than an interval before the place where it was killed; the place that it has reached."""
    if answer["first"]:  # else it was killed before its first step, or had nothing left to train
        lost = reached - (answer["first"] - command.batch)
        assert lost <= command.interval
        seen["most tokens lost"] = max(seen["most tokens lost"], lost)
    return max(reached, answer["last"])


@pytest.mark.parametrize(("name", "kills"), [("train", 4), ("compare", 2), ("evaluate", 2)])
def test_killed_runs_end_with_the_uninterrupted_bits(name, kills, runs, inputs, uninterrupted, tmp_path):
    seen = kill(runs, inputs, uninterrupted, name, tmp_path, kills, seed=0)
    assert 2 * seen["between writes"] >= kills


@pytest.mark.kills
@pytest.mark.parametrize(("name", "kills"), [("train", 200), ("compare", 30), ("evaluate", 30)])
def test_many_killed_runs(name, kills, runs, inputs, uninterrupted, tmp_path):
    seen = kill(runs, inputs, uninterrupted, name, tmp_path, kills, seed=1)
    print(name, seen)
    assert 2 * seen["between writes"] >= kills

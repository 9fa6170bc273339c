"""Runs that are killed at any moment, inside a save too, lose nothing but time.

The suite kills a seeded sample; `pytest -m kills` kills `train` 200 times.
"""

import random
import shutil
from pathlib import Path

import pytest
from killed_run import KilledRuns
from small_runs import assert_bit_identical, flags, write_text
from variation import SEED_OFFSET

INTERVAL, BATCH = 1024, 256
"""Tokens between two checkpoints, and of a step, of the run in `small_runs`."""


@pytest.fixture(scope="module")
def runs():
    server = KilledRuns()
    yield server
    server.close()


@pytest.fixture(scope="module")
def reference(runs, tmp_path_factory):
    """The text, the uninterrupted run's SAE, and what the run answered."""
    folder = tmp_path_factory.mktemp("reference")
    text = write_text(folder / "text.jsonl")
    (folder / "run").mkdir()
    answer = runs(["train", *flags(text, folder / "run" / "sae")], folder / "run")
    assert answer["status"] == 0, (folder / "run.log").read_text()
    return text, folder / "run" / "sae", answer


def kill_train(runs, reference, folder: Path, kills: int, seed: int) -> dict[str, int]:
    """Kill and resume, half inside saves; what was seen."""
    rng = random.Random(seed + SEED_OFFSET)
    text, whole, usual = reference
    seen = {"kills": 0, "inside saves": 0, "most tokens lost": 0}
    while seen["kills"] < kills:
        command = ["train", *flags(text, folder / "run" / "sae"), "--resume"]
        (folder / "run").mkdir()
        reached = 0
        for _ in range(rng.randint(1, 3)):  # a run may be killed more than once
            inside = 2 * seen["inside saves"] <= seen["kills"]
            moment = (
                {"event": rng.randint(1, usual["events"])} if inside else {"seconds": rng.uniform(0, usual["seconds"])}
            )
            answer = runs(command, folder / "run", **moment)
            check_start(answer, reached, seen)
            reached = max(reached, answer["last"])
            if answer["status"] != -9:
                break
            seen["kills"] += 1
            seen["inside saves"] += inside
        answer = runs(command, folder / "run")
        assert answer["status"] == 0, (folder / "run.log").read_text()
        check_start(answer, reached, seen)
        assert_bit_identical(whole, folder / "run" / "sae")
        assert not [path for path in (folder / "run").rglob("*") if ".unfinished" in path.name]
        shutil.rmtree(folder / "run")
    return seen


def check_start(answer, reached: int, seen: dict[str, int]) -> None:
    if answer["first"]:  # else it was killed before its first step, or had nothing left to train
        lost = reached - (answer["first"] - BATCH)
        assert lost <= INTERVAL
        seen["most tokens lost"] = max(seen["most tokens lost"], lost)


def test_killed_trainings_end_with_the_uninterrupted_bits(runs, reference, tmp_path):
    seen = kill_train(runs, reference, tmp_path, kills=6, seed=0)
    assert seen["inside saves"] >= 3


@pytest.mark.kills
def test_200_killed_trainings(runs, reference, tmp_path):
    seen = kill_train(runs, reference, tmp_path, kills=200, seed=1)
    print(seen)
    assert seen["inside saves"] >= 100

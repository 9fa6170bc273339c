"""One rank over NCCL, where there is a GPU: the way of several, without a second one."""

import json
import os
import subprocess
import sys

import pytest
from small_runs import flags
from test_train import CHANGES, assert_same_run

from saelens_cosine.cli import main

pytestmark = pytest.mark.gpu


def one_rank(*arguments):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=1",
        "-m",
        "saelens_cosine",
    ]
    return subprocess.run(
        [*command, *map(str, arguments)], capture_output=True, text=True, timeout=600, env={**os.environ}
    )


def test_one_rank_trains_what_one_process_trains(text, tmp_path):
    def command(output):
        return ["train", *flags(text, output, **CHANGES, device="cuda"), "--quiet"]

    assert main(command(tmp_path / "alone")) == 0
    run = one_rank(*command(tmp_path / "ranks"))
    assert run.returncode == 0, run.stderr[-3000:]
    assert_same_run(tmp_path / "ranks", tmp_path / "alone", exact=1e-4)


def test_one_rank_moves_what_the_formula_says(tmp_path):
    file = tmp_path / "ranks.json"
    sizes = ["--d-in", 768, "--d-sae", 16384, "--batch", 2048, "--k", 32, "--device", "cuda"]
    run = one_rank("benchmark", "--distributed", "--arms", "cosine_topk/fast", *sizes, "--json", file)
    assert run.returncode == 0, run.stderr[-3000:]
    (row,) = json.loads(file.read_text())["rows"]
    print(f"one process {row['one_ms']:.2f} ms, one rank {row['step_ms']:.2f} ms")
    assert row["one_ms"] > 0

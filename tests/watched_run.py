"""Trains for a while under watch: memory, open files, threads, and CPU time per step.

As a script: `python watched_run.py SECONDS EVERY FOLDER`, which prints one line of JSON per sample. The run is stopped by SIGTERM, as a
cluster would, so that its last checkpoint is written too.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

SAMPLES, ENDED = "samples.jsonl", "ended"
"""Files in its folder."""


@dataclass
class Sample:
    """What the process holds at one moment; memory in MB, times in seconds since its first step."""

    wall: float
    cpu: float
    steps: int
    memory: float
    files: int
    threads: int


class WatchedRun:
    """A training of the small run in a process of its own, a checkpoint every 100,000 tokens.

    Args:
        seconds: how long it trains.
        every: seconds between two samples.
        folder: for the text, the SAE and its checkpoints, and for what it prints and how it ended.
    """

    def __init__(self, seconds: float, every: float, folder: Path):
        with (folder / SAMPLES).open("w") as samples:
            self.process = subprocess.Popen(
                [sys.executable, __file__, str(seconds), str(every), str(folder)],
                stdout=samples,
                stderr=subprocess.DEVNULL,
                env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
            )

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


def samples_in(folder: Path, seconds: float = 600) -> list[Sample]:
    """Those of a run in a folder, whichever process has begun it; waits for its end, so long at most."""
    until = time.monotonic() + seconds
    while not (folder / ENDED).is_file():
        assert time.monotonic() < until, "the run does not end"
        time.sleep(0.2)
    assert (folder / ENDED).read_text() == "143"
    return [Sample(**json.loads(line)) for line in (folder / SAMPLES).read_text().splitlines()]


def assert_steady(samples: list[Sample], warm_up: float, megabytes: float) -> None:
    """That memory grows by less than that after so many seconds, and files and threads do not."""
    steady = [sample for sample in samples if sample.wall >= warm_up]
    assert len(steady) > 2
    assert steady[-1].steps > steady[0].steps > 0
    assert steady[-1].memory - steady[0].memory < megabytes
    assert len({(sample.files, sample.threads) for sample in steady}) == 1


def _run(seconds: float, every: float, folder: Path) -> int:
    import torch
    from small_runs import flags, write_text
    from torch.optim.optimizer import register_optimizer_step_post_hook

    from saelens_cosine.cli import main

    torch.set_num_threads(1)
    steps, held = 0, (0, 0)
    finished, asked, answered = threading.Event(), threading.Event(), threading.Event()

    def count(*_):
        nonlocal steps, held
        steps += 1
        if asked.is_set():  # within a step, when no checkpoint is being written
            held = len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))
            asked.clear()
            answered.set()

    def sample():
        while not steps:
            time.sleep(0.01)
        wall, cpu = time.monotonic(), time.process_time()
        while not finished.wait(every):
            answered.clear()
            asked.set()
            answered.wait()
            now = Sample(
                time.monotonic() - wall,
                time.process_time() - cpu,
                steps,
                int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6,
                *held,
            )
            os.write(stdout, (json.dumps(asdict(now)) + "\n").encode())
            if now.wall >= seconds:
                os.kill(os.getpid(), signal.SIGTERM)
                return

    register_optimizer_step_post_hook(count)
    stdout = os.dup(1)
    os.dup2(2, 1)
    watcher = threading.Thread(target=sample, daemon=True)
    watcher.start()
    command = flags(
        write_text(folder / "text.jsonl"),
        folder / "sae",
        architecture=os.environ.get("WATCHED", "cosine_batchtopk"),
        d_sae=1024,
        training_tokens=int(1e10),
        n_checkpoints=int(1e10 / 100_000),
    )
    try:
        return main(["train", *command])
    finally:
        finished.set()


if __name__ == "__main__":
    status, place = 1, Path(sys.argv[3])
    try:
        status = _run(float(sys.argv[1]), float(sys.argv[2]), place)
    finally:
        (place / f"{ENDED}-").write_text(str(status))
        (place / f"{ENDED}-").rename(place / ENDED)
    sys.exit(status)

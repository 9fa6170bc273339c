"""Runs commands of the package in processes that are killed (SIGKILL) at a chosen moment.

As a script it imports everything once and forks a process for each request, a line of JSON: the command line, the folder that is
watched, and when to kill: at the nth time that something in that folder is opened, made, renamed or removed (between any two
writes), or after so many seconds. The answer is a line too: exit status (-9: killed), how many such times there were, seconds, and the
tokens trained on behind its first step and behind its last, those of earlier seeds among them.
"""

import json
import mmap
import os
import signal
import sys
import time
from pathlib import Path

from asked_process import AskedProcess

EVENTS = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir")


class KilledRuns(AskedProcess):
    """A process that runs commands and kills them."""

    def __init__(self):
        super().__init__(__file__)

    def __call__(self, command, watched: Path, event: int = 0, seconds: float = 0.0) -> dict:
        return self.ask(command=[*map(str, command)], watched=str(watched), event=event, seconds=seconds)


def _watch(folder: str, kill_at: int, count: mmap.mmap) -> None:
    def hook(event, arguments):
        if event not in EVENTS or not isinstance(arguments[0], str | bytes | os.PathLike):
            return
        if os.fsdecode(arguments[0]).startswith(folder):
            seen = int.from_bytes(count[:8], "little") + 1
            count[:8] = seen.to_bytes(8, "little")
            if seen == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def _note_steps(count: mmap.mmap) -> None:
    from saelens_cosine.training.resuming.run import ResumableRun

    after_step = ResumableRun._after_step

    def noted(run):
        trainer = run._trainer
        place = run.runner.cfg.seed * trainer.cfg.total_training_samples + trainer.n_training_samples
        if not any(count[8:16]):
            count[8:16] = place.to_bytes(8, "little")
        count[16:24] = place.to_bytes(8, "little")
        after_step(run)

    ResumableRun._after_step = noted


def _child(request: dict, count: mmap.mmap) -> int:
    from small_runs import small_batches

    from saelens_cosine.cli import main
    from saelens_cosine.training.recipe import RECIPES

    RECIPES["paper"] = small_batches
    _note_steps(count)
    _watch(request["watched"], request["event"], count)
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 1)
    log = os.open(request["watched"].rstrip("/") + ".log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 2)
    return main(request["command"])


def _serve() -> None:
    import sae_lens  # noqa: F401
    import torch

    import saelens_cosine.cli  # noqa: F401

    torch.set_num_threads(1)
    for line in sys.stdin:
        request = json.loads(line)
        count = mmap.mmap(-1, 24)
        start = time.monotonic()
        pid = os.fork()
        if pid == 0:
            status = 99
            try:
                status = _child(request, count)
            except SystemExit as stopped:
                status = stopped.code
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(status)
        if request["seconds"]:
            while time.monotonic() - start < request["seconds"]:
                if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
                    break
                time.sleep(0.002)
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        answer = {
            "status": os.waitstatus_to_exitcode(status),
            **{
                name: int.from_bytes(count[8 * i : 8 * i + 8], "little")
                for i, name in enumerate(("events", "first", "last"))
            },
            "seconds": time.monotonic() - start,
        }
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    _serve()

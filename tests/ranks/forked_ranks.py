"""Ranks of a command as forks of one process that has imported everything, ended as torchrun ends them: when one fails, so do all.

As a script it answers requests, a line of JSON each: the command line of each rank, and what goes wrong on which. The answer is a line too:
the exit status of each rank (negative: ended by that signal), the seconds until the last of them had ended, and what all wrote to stderr.
"""

import json
import os
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path

from asked_process import AskedProcess

GRACE_S = 20

HERE = [str(folder) for folder in Path(__file__).parents[:2]]
"""Folders of what this script imports."""


class ForkedRanks(AskedProcess):
    """A process that runs commands on several ranks."""

    def __init__(self):
        folders = filter(None, [*HERE, os.environ.get("PYTHONPATH")])
        super().__init__(__file__, PYTHONPATH=os.pathsep.join(folders), WANDB_MODE="disabled")

    def __call__(self, *commands, fault="", on=0) -> dict:
        """A command line for each rank; `fault` is a function of this file that is called on rank `on` before its command."""
        return self.ask(commands=[[*map(str, command)] for command in commands], fault=fault, on=on)


def at_step(step, number):
    """This process gets a signal in the middle of its training."""
    from saelens_cosine.training.resuming.run import ResumableRun

    before = ResumableRun._after_step

    def after_step(run):
        if run._trainer.n_training_steps == step - 1:
            os.kill(os.getpid(), number)
        before(run)

    ResumableRun._after_step = after_step


def die_at_step_9():
    at_step(9, signal.SIGKILL)


def die_at_step_3():
    at_step(3, signal.SIGKILL)


def stop_at_step_9():
    at_step(9, signal.SIGTERM)


def lose_an_activation():
    """The language model of this rank alone gives a NaN."""
    from sae_lens import ActivationsStore

    get = ActivationsStore.get_activations

    def broken(store, tokens):
        found = get(store, tokens)
        found[0, 0] = float("nan")
        return found

    ActivationsStore.get_activations = broken


def tell_weights():
    """What the language model's weights are on this rank."""
    from sae_lens import ActivationsStore

    get = ActivationsStore.get_activations

    def told(store, tokens):
        weight = next(p for name, p in store.model.named_parameters() if "up_proj" in name)
        sys.stderr.write(f"weights: {type(weight).__name__}\n")
        return get(store, tokens)

    ActivationsStore.get_activations = told


def _rank(request, rank, port, folder):
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(len(request["commands"])),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHELASTIC_RUN_ID="test",
    )
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{folder}/{name}{rank}", os.O_CREAT | os.O_WRONLY), number)
    from saelens_cosine.cli import main

    command = request["commands"][rank]
    if command[0] == "every-architecture":
        from rank_program import main as every_architecture

        return every_architecture(*command[1:])
    if request["fault"] and request["on"] == rank:
        globals()[request["fault"]]()
    status = main(command)
    sys.stderr.flush()
    return status


def _run(request):
    began = time.monotonic()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        children, statuses = {}, {}
        for rank in range(len(request["commands"])):
            Path(folder, f"stderr{rank}").touch()  # a rank that another's failure ends at once has said nothing
            child = os.fork()
            if child == 0:
                try:
                    status = _rank(request, rank, port, folder)
                except BaseException:
                    import traceback

                    traceback.print_exc()
                    status = 1
                sys.stderr.flush()
                os._exit(status)
            children[child] = rank
        failed = None
        while children:
            child, status = os.waitpid(-1, os.WNOHANG)
            if child:
                statuses[children.pop(child)] = os.waitstatus_to_exitcode(status)
                if status and failed is None:
                    failed = time.monotonic()
                    for other in children:
                        os.kill(other, signal.SIGTERM)
            elif failed and time.monotonic() > failed + GRACE_S:
                for other in children:
                    os.kill(other, signal.SIGKILL)
            time.sleep(0.02)
        told = [Path(folder, f"stderr{rank}").read_text() for rank in sorted(statuses)]
    return {"statuses": [statuses[r] for r in sorted(statuses)], "seconds": time.monotonic() - began, "told": told}


def _serve():
    answers = os.fdopen(os.dup(1), "w")
    import torch.distributed
    from small_runs import small_batches

    import saelens_cosine.cli
    import saelens_cosine.ranks.launch
    from saelens_cosine.training.recipe import RECIPES

    RECIPES["paper"] = small_batches  # of `compare`
    _ = torch.distributed, saelens_cosine.cli, saelens_cosine.ranks.launch
    for line in sys.stdin:
        answers.write(json.dumps(_run(json.loads(line))) + "\n")
        answers.flush()


if __name__ == "__main__":
    _serve()

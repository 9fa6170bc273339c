"""The start and the end of a command under torchrun: ranks are joined, one of them speaks, none is left waiting."""

from __future__ import annotations

import io
import os
import sys
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TextIO

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous
from typing_extensions import override

from saelens_cosine.console import tell
from saelens_cosine.experiments.compare.command import run_compare
from saelens_cosine.ranks.benchmark import run_benchmark
from saelens_cosine.ranks.team import Team
from saelens_cosine.training.resuming.stop import SignalError, exit_status

COMMANDS = ("train", "compare", "benchmark")
"""Commands that several ranks run together."""

PATIENCE_S = 5.0
"""How long a rank that fails waits for the first one to say so, which it does where all fail alike."""

TIMEOUT = timedelta(minutes=30)
"""How long a rank waits for the others in a collective, such as while the first one writes a checkpoint. torchrun ends those that wait for a dead one."""


class _Tail(io.TextIOBase):
    """The end of what is written."""

    text = ""

    @override
    def write(self, text: str, /) -> int:
        self.text = (self.text + text)[-4000:]
        return len(text)


def run_ranks(arguments: Sequence[str], run: Callable[..., int]) -> int:
    """Run a command on this rank, whose first one has the terminal; the exit status.

    Args:
        arguments: the command line.
        run: runs it, with the ranks.
    """
    rank = int(os.environ["RANK"])
    if {"-h", "--help"} & set(arguments):
        return run(list(arguments)) if rank == 0 else 0
    if not arguments or arguments[0] not in COMMANDS:
        if rank == 0:
            tell(
                f"torchrun starts saelens-cosine {' or '.join(COMMANDS)}, not {' '.join(arguments[:1]) or 'nothing'}; start it without torchrun."
            )
        return 2
    told = sys.stderr
    if rank > 0:
        os.environ["WANDB_MODE"] = "disabled"
        sys.stdout, sys.stderr = _Tail(), _Tail()
    device = _device()
    store = _joined("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")
    try:
        return _run(list(arguments), run, Team(device, store), store, told)
    except SignalError as stopped:  # by torchrun, since another rank has failed
        return exit_status(stopped)


def _joined(backend: str) -> Store:
    """Join the ranks; the store that they met at. Ranks that torchrun has started again do not meet at the addresses of the dead."""
    store, rank, size = next(rendezvous("env://"))
    again = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = PrefixStore(f"start{again}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT)
    return store


def _run(arguments: list[str], run: Callable[..., int], team: Team, store: Store, told: TextIO) -> int:
    try:
        instead = {
            "benchmark": lambda options: run_benchmark(options, team.device),
            "compare": lambda options: run_compare(options, team),
        }
        status = run(arguments, team, instead)
    except RuntimeError as error:
        if not _others_are_gone(error):
            sys.stderr = told  # a traceback of any rank is to be seen
            raise
        if team.first:
            tell("Another rank has stopped, see there; checkpoints written so far are kept.")
        return 2
    if status == 0:
        dist.destroy_process_group()
    elif team.first:
        store.set("first", "has spoken")
    else:
        _speak(store, told, team.world.rank)
    return status


def _device() -> str:
    if not torch.cuda.is_available():
        return "cpu"
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    return "cuda"


def _others_are_gone(error: RuntimeError) -> bool:
    """Whether a collective failed because a rank on the other side has ended."""
    return isinstance(error, dist.DistError) or "gloo" in str(error).lower() or "closed by peer" in str(error)


def _speak(store: Store, told: TextIO, rank: int) -> None:
    """Print this rank's last line, unless the first rank has said its own."""
    until = time.monotonic() + PATIENCE_S
    try:
        while time.monotonic() < until:
            if store.check(["first"]):
                return
            time.sleep(0.1)
        ours = store.compare_set("speaks", "", str(rank)).decode() == str(rank)
    except dist.DistError:  # the first one kept the store, and has spoken and gone
        return
    if ours:
        assert isinstance(sys.stderr, _Tail)
        lines = [line for line in sys.stderr.text.splitlines() if line.strip()]
        print(f"rank {rank}: {lines[-1] if lines else 'stopped without a word'}", file=told)

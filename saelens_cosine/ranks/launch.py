"""The start and the end of a command under torchrun: ranks are joined, one of them speaks, none is left waiting."""

from __future__ import annotations

import io
import os
import sys
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from saelens_cosine.console import tell
from saelens_cosine.ranks.team import Team

COMMANDS = ("train",)
"""Commands that several ranks run together."""

PATIENCE_S = 5.0
"""How long a rank that fails waits for the first one to say so, which it does where all fail alike."""

TIMEOUT = timedelta(minutes=30)
"""How long a rank waits for the others in a collective, such as while the first one writes a checkpoint. torchrun ends those that wait for a dead one."""


def run_ranks(arguments: Sequence[str], run: Callable[[list[str], Any], int]) -> int:
    """Run a command on this rank, whose first one has the terminal; the exit status.

    Args:
        arguments: the command line.
        run: runs it, with the ranks.
    """
    rank = int(os.environ["RANK"])
    if tuple(arguments[:1]) not in [(command,) for command in COMMANDS] or {"-h", "--help"} & set(arguments):
        if rank == 0:
            tell(
                f"torchrun starts saelens-cosine {' or '.join(COMMANDS)}, not {' '.join(arguments[:1]) or 'nothing'}; start it without torchrun."
            )
        return 2
    told = sys.stderr
    if rank > 0:
        os.environ["WANDB_MODE"] = "disabled"
        sys.stdout, sys.stderr = io.StringIO(), io.StringIO()
    device = _device()
    dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo", timeout=TIMEOUT)
    store: Any = dist.distributed_c10d._get_default_store()  # pyright: ignore[reportPrivateUsage]
    try:
        status = run(list(arguments), Team(device))
    except RuntimeError as error:
        if not _others_are_gone(error):
            _keep_for(told, rank)
            raise
        status = 2  # they say why
        if rank > 0:
            return status
        tell("Another rank has stopped, see above; checkpoints written so far are kept.")
    if status != 0 and rank > 0:
        _speak_for(store, told, rank)
    elif status != 0:
        store.set("first", "has spoken")
    if status == 0:
        dist.destroy_process_group()
    return status


def _device() -> str:
    if not torch.cuda.is_available():
        return "cpu"
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    return "cuda"


def _others_are_gone(error: RuntimeError) -> bool:
    """Whether a collective failed because a rank on the other side has ended."""
    return isinstance(error, dist.DistError) or "gloo" in str(error).lower() or "closed by peer" in str(error)


def _speak_for(store: Any, told: Any, rank: int) -> None:
    """Print this rank's last line, unless the first rank has said its own."""
    until = time.monotonic() + PATIENCE_S
    while time.monotonic() < until:
        if store.check(["first"]):
            return
        time.sleep(0.1)
    if store.compare_set("speaks", "", str(rank)).decode() == str(rank):
        lines = [line for line in sys.stderr.getvalue().splitlines() if line.strip()]  # pyright: ignore
        print(f"rank {rank}: {lines[-1] if lines else 'stopped without a word'}", file=told)


def _keep_for(told: Any, rank: int) -> None:
    """Let a traceback of another rank be seen."""
    if rank > 0:
        sys.stderr = told

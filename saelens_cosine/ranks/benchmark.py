"""`torchrun -m saelens_cosine benchmark`: a training step over ranks, what it moves between them, and how long it waits."""

from __future__ import annotations

import copy
import statistics
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.table import Table

from saelens_cosine.console import plain_table, print_tables
from saelens_cosine.experiments.benchmark.arm import Arm
from saelens_cosine.experiments.benchmark.clock import Clock
from saelens_cosine.experiments.benchmark.run import activations, matmul_precision
from saelens_cosine.experiments.benchmark.settings import DEFAULT_ARMS as ONE_PROCESS_ARMS
from saelens_cosine.experiments.benchmark.settings import BenchmarkSettings
from saelens_cosine.files.whole import write_json
from saelens_cosine.ranks.team import Team
from saelens_cosine.ranks.traffic import Moved, OfDTensors, Traffic, formula

DEFAULT_ARMS = ("cosine_batchtopk/fast", "cosine_topk/fast")
WARM_UP = 4
COLLECTIVES = ("all_reduce", "all_gather")


@dataclass(frozen=True)
class Row:
    """
    One architecture.

    Args:
        arm (str): What it is called.
        one_ms (float): A step in one process, on the first rank while the others wait; median.
        step_ms (float): A step over the ranks; median.
        waiting (float): Share of a step that ranks wait for each other, the mean over ranks.
        moving (float): Share of a step that collectives take once all are there, likewise.
        measured (Traffic): What the first rank has handed in per step, by collective; of most steps, if not of all.
        formula (Traffic | None): What it should; None where there is no formula.
    """

    arm: str
    one_ms: float
    step_ms: float
    waiting: float
    moving: float
    measured: Traffic
    formula: Traffic | None

    @property
    def as_it_should(self) -> bool | None:
        """Whether the two are equal; None where there is no formula."""
        return None if self.formula is None else self.measured == self.formula


def run_benchmark(options: Any, device: str) -> int:
    """Measure on this rank, and print on the first."""
    arms = DEFAULT_ARMS if tuple(options.arms) == ONE_PROCESS_ARMS else tuple(options.arms)
    settings = BenchmarkSettings(
        arms, options.d_in, options.d_sae, options.batch, options.k, device, options.dtype, options.repeats
    )
    with matmul_precision(settings):
        rows = [_measured(name, settings) for name in arms]
    if dist.get_rank() == 0:
        print_tables(tables(rows, settings), 140)
        if options.json:
            write(rows, settings, options.json)
    return 0


def _measured(name: str, settings: BenchmarkSettings) -> Row:
    batches = [activations(settings, seed) for seed in range(4)]
    clock = Clock(settings.device)
    arm = Arm(name, settings, clock)
    times = _alone(copy.deepcopy(arm), batches, settings) if dist.get_rank() == 0 else [0.0]
    dist.barrier()
    team = Team(settings.device, timed=True)
    parameters = sum(p.requires_grad for p in arm.sae.parameters())
    team.split(arm.trainer)
    steps: list[float] = []
    moved: list[tuple[Moved, ...]] = []
    world, waited, moving = team.world, 0.0, 0.0
    for repeat in range(WARM_UP + settings.repeats):
        world.forget()
        dist.barrier()
        start = time.perf_counter()
        arm.step(batches[repeat % 4])
        steps.append(clock.now() / 1e3 - start)
        if repeat >= WARM_UP:
            moved.append(tuple(Moved(world.calls[name], world.bytes[name]) for name in COLLECTIVES))
            waited, moving = waited + world.waited, moving + world.moving
    with OfDTensors() as of_dtensors:  # it takes time
        arm.step(batches[0])
    usual = statistics.mode(moved)  # a floor that is too high for its batch adds a count
    measured = {
        name: found.more(of_dtensors.moved[name], of_dtensors.bytes[name])
        for name, found in zip(COLLECTIVES, usual, strict=True)
    }
    mine = torch.tensor([waited, moving], device=settings.device) / sum(steps[WARM_UP:])
    shares = world.gather(mine).mean(dim=0).tolist()
    try:
        expected = formula(name.partition("/")[0], settings.batch, settings.d_in, settings.k, parameters)
    except ValueError:
        expected = None
    return Row(
        name,
        statistics.median(times),
        1e3 * statistics.median(steps[WARM_UP:]),
        shares[0],
        shares[1],
        measured,
        expected if name.endswith("/fast") else None,
    )


def _alone(arm: Arm, batches: list[torch.Tensor], settings: BenchmarkSettings) -> list[float]:
    """Milliseconds of steps in one process."""
    times = [arm.clock.time(partial(arm.step, batches[i % 4])) for i in range(WARM_UP + settings.repeats)]
    return times[WARM_UP:]


def tables(rows: list[Row], settings: BenchmarkSettings) -> list[Table]:
    """Time and traffic of a step."""
    size = dist.get_world_size()
    title = f"d_in {settings.d_in}, d_sae {settings.d_sae}, batch {settings.batch}, k {settings.k}, {settings.device}, {settings.dtype}"
    steps = plain_table(
        f"Training step over {size} ranks ({title})",
        ["arm"],
        ["one process ms", f"{size} ranks ms", "waiting", "moving"],
    )
    moved = plain_table(
        "What a rank hands in per step", ["arm", "collective"], ["calls", "bytes", "by the formula", "equal"]
    )
    for row in rows:
        steps.add_row(row.arm, f"{row.one_ms:.1f}", f"{row.step_ms:.1f}", f"{row.waiting:.1%}", f"{row.moving:.1%}")
        for name, found in row.measured.items():
            expected = None if row.formula is None else row.formula[name]
            told = f"{expected.calls} calls, {expected.bytes:,} bytes" if expected else "-"
            equal = "-" if expected is None else "yes" if expected == found else "NO"
            moved.add_row(row.arm, name.replace("_", "-"), str(found.calls), f"{found.bytes:,}", told, equal)
    steps.caption = "waiting: for the last rank to come to a collective; moving: in collectives once all are there"
    return [steps, moved]


def write(rows: list[Row], settings: BenchmarkSettings, path: Path) -> None:
    """Write the JSON."""
    found = [{**asdict(row), "equal": row.as_it_should} for row in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(
        {
            "schema": "saelens-cosine/benchmark-ranks/1",
            "ranks": dist.get_world_size(),
            "settings": asdict(settings),
            "rows": found,
        },
        path,
        indent=2,
    )

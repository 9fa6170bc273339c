"""How long a training step and an encoding take, against SAELens' own classes and against the hardware's floor.

Everything is measured in one run, arm after arm within each repeat, so that ratios are taken under like conditions. The
floor is what no step can do without: the encoder's product, into memory that is there already, and one fused Adam pass over
the two weight matrices.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import partial

import torch

from saelens_cosine.devices import check_device
from saelens_cosine.experiments.benchmark.arm import Arm
from saelens_cosine.experiments.benchmark.clock import Clock
from saelens_cosine.experiments.benchmark.results import Benchmark, Row
from saelens_cosine.experiments.benchmark.settings import SAELENS_ARMS, SELECTORS, BenchmarkSettings
from saelens_cosine.progress import Progress, shown

WARM_UP = 3
PART_REPEATS = 3


def benchmark(settings: BenchmarkSettings, on_progress: Progress | None = None) -> Benchmark:
    """Measure all arms in one run.

    Args:
        settings: what to measure.
        on_progress: called with what is being done, how much of it is done, and how much there is.
    """
    check_device(settings.device)
    report = shown(on_progress)
    clock = Clock(settings.device)
    batches = [activations(settings, seed) for seed in range(4)]
    with matmul_precision(settings):
        floor = Floor(settings)
        arms = {}
        for i, name in enumerate(settings.arms):
            arms[name] = Arm(name, settings, clock)
            report("setting up", i + 1, len(settings.arms))
        times: dict[str, list[float]] = {name: [] for name in (*arms, "product", "optimizer", "copy")}
        total = (WARM_UP + settings.repeats) * len(arms)
        for repeat in range(WARM_UP + settings.repeats):
            batch = batches[repeat % len(batches)]
            converted = batch.to(floor.dtype)
            timed: dict[str, Callable[[], float]] = {
                **{name: partial(clock.time, partial(arm.step, batch)) for name, arm in arms.items()},
                "product": partial(clock.on_device, partial(floor.product, converted), floor.copy),
                "optimizer": partial(clock.on_device, floor.optimizer.step, floor.copy),
                "copy": partial(clock.on_device, floor.copy, floor.copy),
            }
            for i, (name, measure) in enumerate(timed.items()):
                elapsed = measure()
                if repeat >= WARM_UP:
                    times[name].append(elapsed)
                report("steps", repeat * len(arms) + min(i + 1, len(arms)), total)
        rows = []
        for i, (name, arm) in enumerate(arms.items()):
            row = Row(name, *_size(settings))
            row.step_ms = statistics.median(times[name])
            row.step_spread_ms = _quartiles(times[name])
            row.parts_ms = arm.parts(batches, min(PART_REPEATS, settings.repeats))
            row.peak_bytes_over_state = arm.peak_over_state(batches[0])
            rows.append(row)
            report("parts and memory", i + 1, len(arms))
        _encode(rows, arms, batches, settings, clock, report)
    product, optimizer, copy_ms = (statistics.median(times[name]) for name in ("product", "optimizer", "copy"))
    bandwidth = floor.copied_bytes / copy_ms / 1e6
    result = Benchmark(rows, product, optimizer, bandwidth, floor.optimizer_bytes / bandwidth / 1e6)
    _compare(rows, result.floor_ms)
    return result


def _size(settings: BenchmarkSettings) -> tuple[int, int, int, int, str, str]:
    return settings.d_in, settings.d_sae, settings.batch, settings.k, settings.device, settings.dtype


def _quartiles(times: list[float]) -> tuple[float, float]:
    if len(times) < 2:
        return times[0], times[0]
    first, _, third = statistics.quantiles(times, n=4, method="inclusive")
    return first, third


def _compare(rows: list[Row], floor_ms: float) -> None:
    steps = {row.arm: row.step_ms for row in rows}
    for row in rows:
        row.ratio_to_floor = row.step_ms / floor_ms
        architecture = row.arm.partition("/")[0].removesuffix("_sparse")
        selector = next(s for s in SELECTORS if architecture.endswith(s))
        base = steps.get(f"saelens_{selector}", next((steps[a] for a in SAELENS_ARMS if a in steps), None))
        row.ratio_to_saelens = None if base is None else row.step_ms / base


def activations(settings: BenchmarkSettings, seed: int) -> torch.Tensor:
    """Random directions, the least sparse of all data, with norms around sqrt(d_in) that differ by a third or so."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(settings.batch, settings.d_in, generator=rng)
    norms = (0.3 * torch.randn(settings.batch, 1, generator=rng)).exp()
    return (x * norms).to(settings.device)


@contextmanager
def matmul_precision(settings: BenchmarkSettings) -> Generator[None]:
    """Products in TF32 where the settings ask for it, else in float32, in a with block."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if settings.dtype == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class Floor:
    """What no step can do without: the encoder's product, into memory that is there already, and one fused Adam pass."""

    def __init__(self, settings: BenchmarkSettings):
        dtype = torch.bfloat16 if settings.dtype == "bfloat16" else torch.float32
        shape = (settings.d_sae, settings.d_in)
        self.dtype, device = dtype, settings.device
        self.weight = torch.randn(shape, device=device).to(dtype)
        self.out = torch.empty(settings.batch, settings.d_sae, dtype=dtype, device=device)
        weights = [torch.nn.Parameter(torch.randn(shape, device=device)) for _ in range(2)]
        for weight in weights:
            weight.grad = torch.randn_like(weight)
        self.optimizer = torch.optim.Adam(weights, lr=1e-4, fused=True)
        self.optimizer_bytes = 28 * sum(weight.numel() for weight in weights)
        self.source = torch.ones(2**26, device=device)
        self.target = torch.ones_like(self.source)
        self.copied_bytes = 2 * self.source.nbytes

    def product(self, batch: torch.Tensor) -> None:
        torch.mm(batch, self.weight.T, out=self.out)

    def copy(self) -> None:
        self.target.copy_(self.source)


def _encode(
    rows: list[Row],
    arms: dict[str, Arm],
    batches: list[torch.Tensor],
    settings: BenchmarkSettings,
    clock: Clock,
    report: Progress,
) -> None:
    """Fill in the times of the saved forms, one per architecture, again arm after arm within each repeat."""
    saes = {name.partition("/")[0]: arm.saved() for name, arm in arms.items()}
    calls: dict[tuple[str, str], list[float]] = {
        (name, method): []
        for name, sae in saes.items()
        for method in ("encode", "encode_sparse")
        if hasattr(sae, method)
    }
    for repeat in range(WARM_UP + settings.repeats):
        for (name, method), times in calls.items():
            with torch.no_grad(), arms[rows[0].arm].trainer.autocast_if_enabled:
                elapsed = clock.time(lambda n=name, m=method, r=repeat: getattr(saes[n], m)(batches[r % len(batches)]))
            if repeat >= WARM_UP:
                times.append(elapsed)
        report("encoding", repeat + 1, WARM_UP + settings.repeats)
    for row in rows:
        name = row.arm.partition("/")[0]
        row.encode_ms = statistics.median(calls[name, "encode"])
        if (name, "encode_sparse") in calls:
            row.encode_sparse_ms = statistics.median(calls[name, "encode_sparse"])

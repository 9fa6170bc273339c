"""How long a training step and an encoding take, against SAELens' own classes and against the hardware's floor.

Everything is measured in one run, arm after arm within each repeat, so that ratios are taken under like conditions. The
floor is what no step can do without: the encoder's product, into memory that is there already, and one fused Adam pass over
the two weight matrices.
"""

from __future__ import annotations

import ctypes
import gc
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Generator, Iterable
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from rich.table import Table
from sae_lens import SAE, LoggingConfig
from sae_lens.config import SAETrainerConfig
from sae_lens.registry import get_sae_training_class
from sae_lens.training.sae_trainer import SAETrainer

from saelens_cosine.console import PlainTable
from saelens_cosine.devices import check_device
from saelens_cosine.files.whole import write_json
from saelens_cosine.kernels import selection
from saelens_cosine.progress import shown
from saelens_cosine.registry import check_training_architecture
from saelens_cosine.saes.recipe.training_sae import TopKRecipeConfig

SELECTORS = ("matryoshka_batchtopk", "batchtopk", "abstopk", "topk")
"""SAELens' selectors that have a fast path; an architecture's is the first that its name ends in."""

SAELENS_ARMS = (*(f"saelens_{selector}" for selector in SELECTORS), "saelens_topk_sparse")
"""SAELens' own classes; the last with `use_sparse_activations=True` and without rescaling by decoder norms."""

MATRYOSHKA_LEVELS = (1 / 8, 1 / 4, 1 / 2, 1)
"""Widths of the nested reconstructions, as shares of d_sae."""

FAST_ARCHITECTURES = (
    *(
        f"{score}_{selector}"
        for selector in ("batchtopk", "topk")
        for score in ("inner_product", "cosine", "per_feature_cosine")
    ),
    "cosine_abstopk",
    "cosine_matryoshka_batchtopk",
    "magnitude_bypass_batchtopk",
)

DEFAULT_ARMS = (
    *SAELENS_ARMS,
    *(f"{name}/{path}" for name in FAST_ARCHITECTURES for path in ("reference", "fast")),
)

DTYPES = ("float32", "tf32", "bfloat16")
"""float32 throughout, float32 with TF32 products (CUDA), or bfloat16 autocast; parameters are float32 in each."""

WARM_UP = 3
PART_REPEATS = 3

QUEUED = 16
"""Copies of 256 MiB ahead of what is timed on the device itself: 2 ms or more, longer than the host takes to launch it."""


@dataclass(frozen=True)
class BenchmarkSettings:
    """
    What to measure.

    Args:
        arms (tuple[str, ...]): `saelens_<selector>`, `saelens_topk_sparse`, or `<architecture>/<kernels>`.
        d_in (int): Size of the activations.
        d_sae (int): Number of features.
        batch (int): Tokens per step.
        k (int): Active features per token.
        device (str): Where to measure.
        dtype (str): `float32`, `tf32` or `bfloat16` (autocast).
        repeats (int): Timed steps of each arm, after warm-up.
    """

    arms: tuple[str, ...] = DEFAULT_ARMS
    d_in: int = 512
    d_sae: int = 8192
    batch: int = 1024
    k: int = 32
    device: str = "cpu"
    dtype: str = "float32"
    repeats: int = 7

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype={self.dtype!r} is none of {', '.join(DTYPES)}.")
        for name in ("d_in", "d_sae", "batch", "k", "repeats"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be positive.")
        if self.k > self.d_sae:
            raise ValueError(f"k={self.k} features cannot be active out of d_sae={self.d_sae}.")
        for arm in self.arms:
            architecture, _, kernels = arm.partition("/")
            if arm in SAELENS_ARMS:
                continue
            config = get_sae_training_class(check_training_architecture(architecture))[1]
            if kernels not in ("reference", "fast") or not issubclass(config, TopKRecipeConfig):
                raise ValueError(
                    f"Unknown arm {arm!r}. There are {', '.join(SAELENS_ARMS)}, and <architecture>/reference or "
                    f"<architecture>/fast for those of this package that end in {', '.join(SELECTORS)}."
                )


@dataclass
class Row:
    """
    One arm. Times in milliseconds, medians over the repeats; None where something does not apply.

    Args:
        step_ms (float): A whole step of SAELens' trainer.
        step_spread_ms (tuple[float, float]): Its first and third quartile.
        ratio_to_saelens (float | None): To SAELens' class with the same selector in this run, or to the other if it did not run.
        ratio_to_floor (float): To the floor of this run.
        peak_bytes_over_state (int | None): Peak memory of a step beyond parameters, gradients and optimizer state.
        encode_ms (float | None): `encode` of the saved SAE on one batch.
        encode_sparse_ms (float | None): `encode_sparse` of the saved SAE.
        parts_ms (dict[str, float]): Where a step spends its time: scores and selection (together the encoder), decode, rest_of_forward, the trainer's counters, backward, clip_and_optimizer.
    """

    arm: str
    d_in: int
    d_sae: int
    batch: int
    k: int
    device: str
    dtype: str
    step_ms: float = math.nan
    step_spread_ms: tuple[float, float] = (math.nan, math.nan)
    ratio_to_saelens: float | None = None
    ratio_to_floor: float = math.nan
    peak_bytes_over_state: int | None = None
    encode_ms: float | None = None
    encode_sparse_ms: float | None = None
    parts_ms: dict[str, float] = field(default_factory=dict)


@dataclass
class Benchmark:
    """
    One run.

    Args:
        rows (list[Row]): One per arm.
        product_ms (float): The encoder's product alone, into memory that is there already. This and the next two are the device's own time, on a GPU without the host's launches.
        optimizer_ms (float): One fused Adam pass over encoder and decoder.
        bandwidth_gb_s (float): Measured by copying 256 MiB; each byte counts once read and once written.
        optimizer_bytes_ms (float): What the optimizer's bytes (28 per parameter) take at that bandwidth.
    """

    rows: list[Row]
    product_ms: float
    optimizer_ms: float
    bandwidth_gb_s: float
    optimizer_bytes_ms: float

    @property
    def floor_ms(self) -> float:
        return self.product_ms + self.optimizer_ms

    def tables(self) -> list[Table]:
        """Steps with their ratios, where their time goes, and encoding."""
        size = "d_in {0.d_in}, d_sae {0.d_sae}, batch {0.batch}, k {0.k}, {0.device}, {0.dtype}".format(self.rows[0])
        floor = f"floor {self.floor_ms:.1f} ms: product {self.product_ms:.1f}, fused Adam {self.optimizer_ms:.1f}"
        bandwidth = f"{self.bandwidth_gb_s:.0f} GB/s, at which Adam's bytes take {self.optimizer_bytes_ms:.1f} ms"
        steps = _table(
            f"Training step ({size})\n{floor} ({bandwidth})",
            ("arm", "step ms", "quartiles", "/ SAELens", "/ floor", "peak over state MB"),
        )
        parts = _table("Where a step's time goes, ms", ("arm", *self.rows[0].parts_ms))
        encoding = _table("Encoding a batch with the saved SAE", ("arm", "encode ms", "encode_sparse ms", "/ product"))
        for row in self.rows:
            peak = "" if row.peak_bytes_over_state is None else f"{row.peak_bytes_over_state / 1e6:.0f}"
            to_saelens = "" if row.ratio_to_saelens is None else f"{row.ratio_to_saelens:.3f}"
            spread = "{:.1f} to {:.1f}".format(*row.step_spread_ms)
            steps.add_row(row.arm, f"{row.step_ms:.1f}", spread, to_saelens, f"{row.ratio_to_floor:.2f}", peak)
            parts.add_row(row.arm, *(f"{ms:.1f}" for ms in row.parts_ms.values()))
            if row.arm.endswith("/reference"):
                continue  # the saved SAE is the same
            best = min(ms for ms in (row.encode_ms, row.encode_sparse_ms) if ms is not None)
            sparse = "" if row.encode_sparse_ms is None else f"{row.encode_sparse_ms:.1f}"
            encoding.add_row(row.arm, f"{row.encode_ms:.1f}", sparse, f"{best / self.product_ms:.2f}")
        return [steps, parts, encoding]

    def write(self, path: Path) -> None:
        content = {"schema": "saelens-cosine/benchmark/1", "floor_ms": self.floor_ms, **asdict(self)}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(content, path, indent=2)


def _table(title: str, columns: Iterable[str]) -> Table:
    table = PlainTable(title=title, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column.replace("_", " "), justify="right" if i else "left", no_wrap=i == 0)
    return table


def benchmark(settings: BenchmarkSettings, on_progress: Callable[[str, int, int], None] | None = None) -> Benchmark:
    """Measure all arms in one run.

    Args:
        settings: what to measure.
        on_progress: called with what is being done, how much of it is done, and how much there is.
    """
    check_device(settings.device)
    report = shown(on_progress)
    clock = Clock(settings.device)
    batches = [_activations(settings, seed) for seed in range(4)]
    with _matmul_precision(settings):
        floor = _Floor(settings)
        arms = {}
        for i, name in enumerate(settings.arms):
            arms[name] = _Arm(name, settings, clock)
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


class Clock:
    """Time in milliseconds, with a device that may work on what the host has left behind."""

    def __init__(self, device: str):
        self.cuda = torch.device(device) if torch.device(device).type == "cuda" else None

    def wait(self) -> None:
        """Until the device has done all that it was given."""
        if self.cuda is not None:
            torch.cuda.synchronize(self.cuda)

    def now(self) -> float:
        self.wait()
        return time.perf_counter() * 1e3

    def time(self, run: Callable[[], object]) -> float:
        start = self.now()
        run()
        return self.now() - start

    def on_device(self, run: Callable[[], object], before: Callable[[], object]) -> float:
        """Of the device alone, where `time` counts the host's launches too.

        Args:
            run: what is timed.
            before: keeps the device busy, called a few times, until all of `run` is in its queue.
        """
        if self.cuda is None:
            return self.time(run)
        self.wait()
        for _ in range(QUEUED):
            before()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record(torch.cuda.current_stream(self.cuda))
        run()
        end.record(torch.cuda.current_stream(self.cuda))
        self.wait()
        return start.elapsed_time(end)


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


def _activations(settings: BenchmarkSettings, seed: int) -> torch.Tensor:
    """Random directions, the least sparse of all data, with norms around sqrt(d_in) that differ by a third or so."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(settings.batch, settings.d_in, generator=rng)
    norms = (0.3 * torch.randn(settings.batch, 1, generator=rng)).exp()
    return (x * norms).to(settings.device)


@contextmanager
def _matmul_precision(settings: BenchmarkSettings) -> Generator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if settings.dtype == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class _Floor:
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


class _Arm:
    def __init__(self, name: str, settings: BenchmarkSettings, clock: Clock):
        architecture, _, kernels = name.partition("/")
        options: dict[str, Any] = {"kernels": kernels} if kernels else {}
        if name in SAELENS_ARMS:
            architecture = name.removeprefix("saelens_").removesuffix("_sparse")
            if name.endswith(
                "sparse"
            ):  # with its default rescaling, the sparse product has no backward in PyTorch 2.13
                options = {"use_sparse_activations": True, "rescale_acts_by_decoder_norm": False}
        sae_class, config_class = get_sae_training_class(architecture)
        torch.manual_seed(0)
        options |= {"d_in": settings.d_in, "d_sae": settings.d_sae, "k": settings.k, "device": settings.device}
        if architecture.endswith("matryoshka_batchtopk"):
            options["matryoshka_widths"] = [max(1, round(share * settings.d_sae)) for share in MATRYOSHKA_LEVELS]
        self.sae: Any = sae_class(config_class(**options))
        self.clock = clock
        self.trainer = SAETrainer(_trainer_config(settings), self.sae, iter(()))

    def step(self, batch: torch.Tensor) -> None:
        self.trainer.step(batch)
        self.trainer.n_training_steps += 1

    def parts(self, batches: list[torch.Tensor], repeats: int) -> dict[str, float]:
        timings = [self._parts(batches[i % len(batches)]) for i in range(repeats)]
        return {name: statistics.median(t[name] for t in timings) for name in timings[0]}

    def _parts(self, batch: torch.Tensor) -> dict[str, float]:
        sae, now = self.sae, self.clock.now
        marks: dict[str, float] = {}
        spent: dict[str, float] = dict.fromkeys(("encode", "scores", "decode"), 0.0)

        def timed(part: str, method: Callable[..., Any]) -> Callable[..., Any]:
            def run(*args: Any, **kwargs: Any) -> Any:
                start = now()
                result = method(*args, **kwargs)
                spent[part] += now() - start
                return result

            return run

        def marked(part: str, method: Callable[..., Any]) -> Callable[..., Any]:
            def run(*args: Any, **kwargs: Any) -> Any:
                marks[part] = now()
                return method(*args, **kwargs)

            return run

        def forward(step_input: Any) -> Any:
            marks["start"] = now()
            output = type(sae).training_forward_pass(sae, step_input)
            marks["counters"] = now()
            output.loss.register_hook(marked("backward", lambda _gradient: None))
            return output

        wrapped = {
            "training_forward_pass": forward,
            "encode_with_hidden_pre": timed("encode", sae.encode_with_hidden_pre),
            "decode": timed("decode", sae.decode),
        }
        if hasattr(sae, "score"):
            wrapped["score"] = timed("scores", sae.score)
        with ExitStack() as stack:
            for name, method in wrapped.items():
                stack.callback(vars(sae).pop, name)
                vars(sae)[name] = method
            for name in ("candidates", "score_entries"):
                stack.enter_context(patch.object(selection, name, timed("scores", getattr(selection, name))))
            clip = marked("clip", torch.nn.utils.clip_grad_norm_)
            stack.enter_context(patch.object(torch.nn.utils, "clip_grad_norm_", clip))
            handle = self.trainer.optimizer.register_step_post_hook(marked("end", lambda *_: None))
            stack.callback(handle.remove)
            self.step(batch)
        if not hasattr(sae, "score"):
            with torch.no_grad(), self.trainer.autocast_if_enabled:
                spent["scores"] = self.clock.time(lambda: sae.process_sae_in(batch) @ sae.W_enc + sae.b_enc)
        return {
            "scores": spent["scores"],
            "selection": spent["encode"] - spent["scores"],
            "decode": spent["decode"],
            "rest_of_forward": marks["counters"] - marks["start"] - spent["encode"] - spent["decode"],
            "counters": marks["backward"] - marks["counters"],
            "backward": marks["clip"] - marks["backward"],
            "clip_and_optimizer": marks["end"] - marks["clip"],
        }

    def peak_over_state(self, batch: torch.Tensor) -> int | None:
        """Peak memory of a step beyond parameters, gradients and optimizer state, in bytes."""
        gradients = sum(p.nbytes for p in self.sae.parameters() if p.requires_grad)
        if batch.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(batch.device)
            before = torch.cuda.memory_allocated(batch.device)
            self.step(batch)
            return torch.cuda.max_memory_allocated(batch.device) - before - gradients
        before = _reset_peak_rss()
        self.step(batch)
        return None if before is None else max(0, _status("VmHWM") - before - gradients)

    def saved(self) -> SAE[Any]:
        """The inference form, as a user loads it."""
        with tempfile.TemporaryDirectory() as folder:
            self.sae.save_inference_model(folder)
            return SAE.load_from_disk(folder, device=str(self.sae.device))


def _trainer_config(settings: BenchmarkSettings) -> SAETrainerConfig:
    return SAETrainerConfig(
        n_checkpoints=0,
        checkpoint_path=None,
        save_final_checkpoint=False,
        total_training_samples=10**12,
        device=settings.device,
        autocast=settings.dtype == "bfloat16",
        lr=1e-4,
        lr_end=1e-5,
        lr_scheduler_name="constant",
        lr_warm_up_steps=0,
        adam_beta1=0.9,
        adam_beta2=0.999,
        lr_decay_steps=0,
        n_restart_cycles=1,
        train_batch_size_samples=settings.batch,
        dead_feature_window=1000,
        feature_sampling_window=2000,
        logger=LoggingConfig(log_to_wandb=False),
    )


def _reset_peak_rss() -> int | None:
    """Give freed memory back to the system and forget the peak so far; resident bytes, or None where that is unknown."""
    gc.collect()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        return None
    return _status("VmRSS")


def _status(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def _encode(
    rows: list[Row],
    arms: dict[str, _Arm],
    batches: list[torch.Tensor],
    settings: BenchmarkSettings,
    clock: Clock,
    report: Callable[[str, int, int], None],
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

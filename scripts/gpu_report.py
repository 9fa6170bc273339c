"""What `gpu_report.sh` has found, as Markdown: `python scripts/gpu_report.py FOLDER DEVICE D_IN,D_SAE,BATCH,K`."""

from __future__ import annotations

import json
import platform
import sys
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from saelens_cosine.experiments.benchmark.arm import Arm
from saelens_cosine.experiments.benchmark.clock import Clock
from saelens_cosine.experiments.benchmark.run import activations
from saelens_cosine.experiments.benchmark.settings import BenchmarkSettings
from saelens_cosine.plain import versions

GOALS = {"/ SAELens": 0.33, "/ floor": 1.6}
"""Of a fast step on an H200."""

PROFILED = "cosine_batchtopk/fast"
HEADS = ("d_in, d_sae, batch, k", "arm", "step ms", "quartiles", *GOALS, "peak over state, MB", "encode, sparse ms")


def report(folder: Path, device: str, largest: str) -> str:
    """All of it."""
    parts = [f"# A training step on {_device(device)}", ", ".join(f"{name} {of}" for name, of in versions().items())]
    tests = folder / "tests.txt"
    if tests.exists():
        parts += ["## Tests", *("    " + line for line in tests.read_text().splitlines()[-5:])]
    for dtype in sorted({path.name.partition("-")[0] for path in folder.glob("*.json")}):
        parts += [f"## {dtype}", table([json.loads(path.read_text()) for path in _by_size(folder, dtype)])]
    failed = folder / "failed.txt"
    if failed.exists():
        parts += ["## Not measured", ", ".join(failed.read_text().splitlines())]
    parts += [f"## Where a step of {PROFILED} goes, {largest}, bfloat16", "```", profiled(device, largest), "```"]
    return "\n\n".join(parts) + "\n"


def table(benchmarks: list[dict]) -> str:
    """Steps of every arm at every size; a fast step that misses a goal is marked."""
    lines = [HEADS, ("---",) * len(HEADS)]
    for found in benchmarks:
        for row in found["rows"]:
            ratios = []
            for ratio, goal in zip((row["ratio_to_saelens"], row["ratio_to_floor"]), GOALS.values(), strict=True):
                missed = row["arm"].endswith("/fast") and ratio is not None and ratio > goal
                ratios.append("" if ratio is None else f"{ratio:.3f}{f' (> {goal:g})' if missed else ''}")
            size = ", ".join(str(row[name]) for name in ("d_in", "d_sae", "batch", "k"))
            spread = "{:.1f} to {:.1f}".format(*row["step_spread_ms"])
            peak = "" if row["peak_bytes_over_state"] is None else f"{row['peak_bytes_over_state'] / 1e6:.0f}"
            encoding = [f"{row[name]:.1f}" for name in ("encode_ms", "encode_sparse_ms") if row[name] is not None]
            lines.append((size, f"`{row['arm']}`", f"{row['step_ms']:.1f}", spread, *ratios, peak, ", ".join(encoding)))
        lines.append((size, "floor", f"{found['floor_ms']:.1f}", *[""] * 5))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def profiled(device: str, size: str) -> str:
    """The operations that take longest, of three steps after as many to warm up; or why there are none, which costs the report nothing else."""
    try:
        return _profiled(device, size)
    except RuntimeError as error:  # out of memory, most likely
        return f"{type(error).__name__}: {error}"


def _profiled(device: str, size: str) -> str:
    d_in, d_sae, batch, k = map(int, size.split(","))
    settings = BenchmarkSettings((PROFILED,), d_in, d_sae, batch, k, device, "bfloat16")
    arm, x = Arm(PROFILED, settings, Clock(device)), activations(settings, 0)
    for _ in range(3):
        arm.step(x)
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device != "cpu" else [])]
    with profile(activities=kinds) as seen:
        for _ in range(3):
            arm.step(x)
    of = "self_cpu_time_total" if device == "cpu" else "self_device_time_total"
    return seen.key_averages().table(sort_by=of, row_limit=20, max_name_column_width=60)


def _by_size(folder: Path, dtype: str) -> list[Path]:
    return sorted(
        folder.glob(f"{dtype}-*.json"), key=lambda path: [int(n) for n in path.stem.partition("-")[2].split(",")]
    )


def _device(device: str) -> str:
    return platform.processor() or "a CPU" if device == "cpu" else torch.cuda.get_device_name(device)


if __name__ == "__main__":
    sys.stdout.write(report(Path(sys.argv[1]), *sys.argv[2:]))

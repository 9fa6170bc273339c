"""What a benchmark found, as tables and as JSON."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich.table import Table

from saelens_cosine.console import plain_table
from saelens_cosine.files.whole import write_json


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
        steps = plain_table(
            f"Training step ({size})\n{floor} ({bandwidth})",
            ["arm"],
            ("step ms", "quartiles", "/ SAELens", "/ floor", "peak over state MB"),
        )
        parts = plain_table(
            "Where a step's time goes, ms", ["arm"], [part.replace("_", " ") for part in self.rows[0].parts_ms]
        )
        encoding = plain_table(
            "Encoding a batch with the saved SAE", ["arm"], ("encode ms", "encode sparse ms", "/ product")
        )
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

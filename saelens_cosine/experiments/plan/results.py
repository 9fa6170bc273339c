"""A plan as tables and as JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from saelens_cosine.console import plain_table
from saelens_cosine.experiments.plan.arithmetic import ASSUMED, Plan, best
from saelens_cosine.experiments.plan.settings import Cluster, Training
from saelens_cosine.files.whole import write_json
from saelens_cosine.plain import plain

OFFERED = "features"
"""The split that `saelens-cosine train` makes; the others stand beside it to be compared."""

WHY = {
    "features": "moves the batch, not the weights: the least where a batch has fewer tokens than there are features",
    "nodes": "moves the batch within a node and a device's gradients between nodes",
    "parameters": "fits what does not fit otherwise, and moves all weights every step",
    "replicas": "splits tokens alone, and averages all gradients every step",
}
"""What each split is good for."""


@dataclass(frozen=True)
class Planned:
    """
    Plans for one training on several numbers of devices.

    Args:
        training (Training): What is trained.
        clusters (tuple[Cluster, ...]): Where.
        plans (tuple[tuple[Plan, ...], ...]): Every split on each of them.
        fewest (int | None): The smallest number of devices on which any split fits; None if none was found.
    """

    training: Training
    clusters: tuple[Cluster, ...]
    plans: tuple[tuple[Plan, ...], ...]
    fewest: int | None

    def tables(self) -> list[Table]:
        """Memory, time of a step, and what to use."""
        t = self.training
        title = (
            f"d_in {t.d_in:,}, d_sae {t.d_sae:,}, k {t.k}, {t.tokens:,} tokens in {t.steps:,} steps of {t.batch:,}, product in {t.dtype}, "
            f"language model of {t.model_parameters / 1e9:.2f} B parameters up to the hook in {t.model_dtype}"
        )
        parts = [name.replace("_", " ") for name in vars(self.plans[0][0].memory)]
        memory = plain_table(f"{title}\nMemory of a device, GB", ["GPUs", "split"], [*parts, "all", "fits"])
        names = [name.replace("_", " ") for name in vars(self.plans[0][0].times)]
        times = plain_table("A step, ms", ["GPUs", "split"], [*names, "all", "hours", ""])
        for found in self.plans:
            chosen = best(list(found))
            for one in found:
                sizes = [f"{value / 1e9:.2f}" for value in vars(one.memory).values()]
                memory.add_row(
                    str(one.gpus), one.split, *sizes, f"{one.memory.total / 1e9:.1f}", "yes" if one.fits else "no"
                )
                spent = [f"{1e3 * value:.2f}" for value in vars(one.times).values()]
                hours = f"{one.hours:,.1f}" if one.fits else "does not fit"
                times.add_row(
                    str(one.gpus),
                    one.split,
                    *spent,
                    f"{1e3 * one.times.total:.2f}",
                    hours,
                    "best" if one is chosen else "",
                )
        others = (
            f"`train` splits by {OFFERED!r}; the other splits are for comparison."
            if len(self.plans[0]) > 1 or len(self.plans) > 1
            else ""
        )
        times.caption = "\n".join([*self.advice(), others, "Assumed:", *(f"- {line}" for line in ASSUMED)])
        return [memory, times]

    def advice(self) -> list[str]:
        """A sentence for each number of devices."""
        lines: list[str] = []
        for cluster, found in zip(self.clusters, self.plans, strict=True):
            chosen = best(list(found))
            if chosen is None:
                where = (
                    "no number of them does"
                    if self.fewest is None
                    else f"{self.fewest} are the fewest on which it does"
                )
                lines.append(f"{cluster.gpus} GPUs: does not fit; {where}.")
            elif cluster.gpus == 1:
                lines.append(f"1 GPU: {chosen.hours:,.1f} h.")
            elif chosen.split != OFFERED:
                ours = next(one for one in found if one.split == OFFERED)
                told = f"{ours.hours:,.1f} h" if ours.fits else "does not fit"
                lines.append(
                    f"{cluster.gpus} GPUs: {chosen.split!r} would take {chosen.hours:,.1f} h; `train` splits by {OFFERED!r}: {told}. Fewer may do as well."
                )
            else:
                lines.append(
                    f"{cluster.gpus} GPUs: split {chosen.split!r}, {chosen.hours:,.1f} h. It {WHY[chosen.split]}."
                )
        return lines

    def document(self) -> dict[str, Any]:
        """The JSON."""
        found: list[dict[str, Any]] = []
        for cluster, of_cluster in zip(self.clusters, self.plans, strict=True):
            chosen = best(list(of_cluster))
            for one in of_cluster:
                totals = {
                    "memory_bytes": one.memory.total,
                    "step_s": one.times.total,
                    "communication_s": one.times.communication,
                }
                found.append({**asdict(one), **totals, "nodes": cluster.nodes, "best": one is chosen})
        return plain(
            {
                "schema": "saelens-cosine/plan/1",
                "training": asdict(self.training),
                "device": asdict(self.clusters[0].device),
                "plans": found,
                "fewest_gpus": self.fewest,
                "assumed": ASSUMED,
            }
        )

    def write(self, path: Path) -> None:
        """Write the JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.document(), path, indent=2)

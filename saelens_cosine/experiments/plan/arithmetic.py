"""Memory and time of a training step, part by part, on devices that share it in one of four ways.

- **features**: each device holds `d_sae / n` features and sees every token; the batch's activations are gathered and the partial
  reconstructions are summed, `O(B D)`. This is what `ranks` does.
- **nodes**: features are split so within a node, and nodes are replicas, which average gradients, `O(F D)` of a device's part.
- **parameters** (FSDP2): each holds a part of every tensor and gathers the others' for each step, `O(F D)`; tokens are split.
- **replicas**: each holds everything and a share of the tokens; gradients are averaged, `O(F D)`.

What is assumed stands in `ASSUMED`; every number below is bytes, seconds or operations counted once.
"""

from __future__ import annotations

from dataclasses import dataclass

from saelens_cosine.experiments.plan.settings import FLOAT, Cluster, Training

SPLITS = ("features", "nodes", "parameters", "replicas")

ASSUMED = (
    "parameters, gradients and Adam's moments are float32; Adam is fused and reads and writes 28 bytes per parameter",
    "a sparse step is the encoder's product, six passes over the scores, four over the active rows of D floats at half of the bandwidth, since they lie anywhere, and Adam; a dense one six products and twenty passes over the scores",
    "the host's launches take as long whatever they launch, and nothing runs meanwhile",
    "scores are made for 2,048 tokens at most at a time where they would take more than a tenth of the memory",
    "collectives are rings: an all-reduce moves 2 (n - 1) / n of its bytes over each link, a gather (n - 1) / n; nothing overlaps",
    "the language model runs at half of the product's rate, and every token passes it once",
    "each device holds the whole language model, and the mixing buffer of the tokens that it sees",
    "not counted: reading text, evaluation, writing checkpoints, and host memory, where a checkpoint takes weights and moments once per rank",
    "no auxiliary loss: with many dead features it can take as long as the rest",
)
"""What the arithmetic rests on."""

SMALL_COLLECTIVES = 14
"""Of a step with features split, besides the two that move activations: the selection's histograms and counts, the threshold, biases, clipping."""

LM_EFFICIENCY = 0.5
ROW_PASSES, SCORE_PASSES, DENSE_SCORE_PASSES, DENSE_PRODUCTS = 4, 6, 20, 6
ROW_EFFICIENCY = 0.5
ADAM_BYTES = 28
CHUNK_TOKENS = 2048


@dataclass(frozen=True)
class Memory:
    """
    Bytes on one device.

    Args:
        parameters (float): Encoder and decoder.
        gradients (float): Theirs.
        moments (float): Adam's two.
        checkpoint (float): Where features are split, a matrix and a copy on its way to the host's memory.
        scores (float): Of as many tokens as are made at a time.
        activations (float): The batch, its reconstruction and their gradients.
        buffer (float): The mixing buffer.
        language_model (float): Weights up to the hook.
    """

    parameters: float
    gradients: float
    moments: float
    checkpoint: float
    scores: float
    activations: float
    buffer: float
    language_model: float

    @property
    def total(self) -> float:
        return sum(vars(self).values())


@dataclass(frozen=True)
class Times:
    """
    Seconds of one step on one device.

    Args:
        language_model (float): Its forward pass on the tokens of a step.
        product (float): The encoder's product; of a dense step all six.
        selection (float): Passes over the scores.
        rows (float): Decoding and gradients of the active entries.
        optimizer (float): Adam.
        gather (float): Activations, or parameters, to where they are needed.
        reduce (float): Sums of reconstructions, or of gradients.
        small (float): Collectives that move next to nothing.
        launches (float): The host's.
    """

    language_model: float
    product: float
    selection: float
    rows: float
    optimizer: float
    gather: float
    reduce: float
    small: float
    launches: float

    @property
    def total(self) -> float:
        return sum(vars(self).values())

    @property
    def communication(self) -> float:
        return self.gather + self.reduce + self.small


@dataclass(frozen=True)
class Plan:
    """
    A training on a cluster with one split.

    Args:
        split (str): `features`, `nodes`, `parameters` or `replicas`.
        gpus (int): Devices.
        memory (Memory): Of the fullest device.
        times (Times): Of a step.
        hours (float): Of the whole training.
        fits (bool): Whether the memory is enough.
    """

    split: str
    gpus: int
    memory: Memory
    times: Times
    hours: float
    fits: bool


def plan(training: Training, cluster: Cluster, split: str) -> Plan:
    """Memory, time per step and hours of one split."""
    t, device, n = training, cluster.device, cluster.gpus
    inside = min(n, cluster.per_node)
    features = {"features": n, "nodes": inside}.get(split, 1)  # parts that the features are in
    parts = n if split == "parameters" else features  # that weights and moments are in
    replicas = n // features  # among which a step's tokens are split
    tokens = t.batch / replicas
    weights = 2 * t.d_sae * t.d_in * FLOAT / parts
    columns = t.d_sae / features
    active = tokens * t.k / features
    low = t.dtype == "bfloat16"
    score_bytes = 2 if low else FLOAT
    rate = (device.low_flops if low else device.flops) * 1e12
    model_rate = (device.low_flops if t.model_dtype == "bfloat16" else device.flops) * 1e12 * LM_EFFICIENCY
    bandwidth = device.bandwidth * 1e9
    scores = tokens * columns * score_bytes
    if scores > 0.1 * device.memory * 1e9:
        scores = min(tokens, CHUNK_TOKENS) * columns * score_bytes
    every_weight = 2 * t.d_sae * t.d_in * FLOAT
    memory = Memory(
        parameters=weights + (every_weight if split == "parameters" else 0),
        gradients=weights,
        moments=2 * weights,
        checkpoint=2 * t.d_sae * t.d_in * FLOAT if features > 1 else 0.0,
        scores=scores * (3 if t.step == "dense" else 1),
        activations=4 * tokens * t.d_in * FLOAT,
        buffer=t.buffer / replicas * t.d_in * FLOAT,
        language_model=t.model_parameters * (2 if t.model_dtype == "bfloat16" else FLOAT),
    )
    dense = t.step == "dense"
    activations = tokens * t.d_in * FLOAT
    gather, reduce, small = 0.0, 0.0, 0.0
    latency = device.latency * 1e-6
    across = (device.node_link if cluster.nodes > 1 else device.link) * 1e9
    if features > 1:
        link = across if features > inside else device.link * 1e9
        share = (features - 1) / features
        gather = share * activations / link + latency
        reduce = 2 * share * activations / link + latency
        small = SMALL_COLLECTIVES * latency
    if split == "nodes" and replicas > 1:  # each averages the gradients of its part
        reduce += 2 * (replicas - 1) / replicas * weights / across + latency
    if split == "replicas" and n > 1:
        reduce = 2 * (n - 1) / n * weights / across + latency
    if split == "parameters" and n > 1:
        gather = (n - 1) / n * 2 * every_weight / across + 2 * latency
        reduce = (n - 1) / n * every_weight / across + latency
    times = Times(
        language_model=2 * t.model_parameters * t.batch / n / model_rate,
        product=(DENSE_PRODUCTS if dense else 1) * 2 * tokens * t.d_in * columns / rate,
        selection=(DENSE_SCORE_PASSES if dense else SCORE_PASSES) * tokens * columns * score_bytes / bandwidth,
        rows=0.0 if dense else ROW_PASSES * active * t.d_in * FLOAT / (ROW_EFFICIENCY * bandwidth),
        optimizer=ADAM_BYTES / FLOAT * weights / bandwidth,
        gather=gather,
        reduce=reduce,
        small=small,
        launches=device.launches * 1e-3,
    )
    return Plan(split, n, memory, times, t.steps * times.total / 3600, memory.total <= device.memory * 1e9)


def plans(training: Training, cluster: Cluster) -> list[Plan]:
    """Every split; one device has one."""
    splits = SPLITS[:1] if cluster.gpus == 1 else [one for one in SPLITS if one != "nodes" or cluster.nodes > 1]
    return [plan(training, cluster, split) for split in splits]


def best(found: list[Plan]) -> Plan | None:
    """The fastest that fits."""
    return min((one for one in found if one.fits), key=lambda one: one.hours, default=None)


def fewest_gpus(training: Training, cluster: Cluster, most: int = 4096) -> int | None:
    """The smallest number of devices on which any split fits; None if none up to `most` do."""
    counts = [*range(1, cluster.per_node + 1), *range(2 * cluster.per_node, most + 1, cluster.per_node)]
    return next((n for n in counts if best(plans(training, cluster.of(n)))), None)

"""`saelens-cosine plan`: what a training needs and how long it takes, before anything is rented."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from saelens_cosine.console import print_tables
from saelens_cosine.experiments.plan.arithmetic import fewest_gpus, plans
from saelens_cosine.experiments.plan.model import model_size
from saelens_cosine.experiments.plan.results import Planned
from saelens_cosine.experiments.plan.settings import DEVICES, Cluster, Training
from saelens_cosine.terminal.options import add_command, count


def add_plan_command(commands: Any) -> None:
    """Add `plan` to the subcommands of `saelens-cosine`."""
    parser = add_command(
        commands,
        "plan",
        run_plan,
        description="Memory and time of a training step by part, for each way to split it over GPUs, by arithmetic whose assumptions are "
        "printed. Nothing is trained, and no GPU is needed.",
    )
    add = parser.add_argument
    add("--model", help="whose activations: bundled, smollm2, a Transformers name or folder, a .gguf file")
    add("--layer", type=int, help="block whose output is hooked; the middle one if not given")
    add("--d-in", type=int, help="size of the activations; the model's if not given")
    add("--model-parameters", type=count, help="weights up to the hook (3.5B); the model's if not given")
    add("--d-sae", type=count, required=True, help="number of features")
    add("--k", type=int, default=80, help="active features per token")
    add("--tokens", type=count, default=500_000_000, help="training tokens")
    add("--batch", type=count, default=2048, help="tokens per step")
    add("--buffer", type=count, default=1_000_000, help="tokens in the mixing buffer")
    add(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="of the encoder's product (bfloat16: autocast)",
    )
    add("--model-dtype", choices=("float32", "bfloat16"), default="bfloat16", help="of the language model")
    add("--step", choices=("sparse", "dense"), default="sparse", help="this package's step, or the dense formula")
    add("--gpus", type=int, nargs="+", default=[1], help="how many, or several numbers")
    add("--gpus-per-node", type=int, default=8, help="how many a node has")
    add("--gpu", choices=tuple(DEVICES), default="h100", help="which, for what is not given below")
    add("--gpu-memory", type=float, dest="memory", metavar="GB", help="of one GPU")
    add("--bandwidth", type=float, metavar="GB_S", help="of its memory")
    add("--flops", type=float, metavar="TFLOP_S", help="of its product in float32")
    add("--low-flops", type=float, metavar="TFLOP_S", help="of its product in bfloat16")
    add("--link", type=float, metavar="GB_S", help="to the others of its node, each way")
    add("--node-link", type=float, metavar="GB_S", help="to other nodes, each way, per GPU")
    add("--latency", type=float, metavar="US", help="microseconds of a collective")
    add("--launches", type=float, metavar="MS", help="milliseconds of the host's launches in a step")
    add("--json", type=Path, metavar="FILE", help="write the figures there")


def run_plan(options: Any) -> int:
    """Print the tables, and write the JSON if that was asked for."""
    planned = planned_from(options)
    print_tables(planned.tables(), 150)
    if options.json:
        planned.write(options.json)
    return 0


def planned_from(options: Any) -> Planned:
    """The plans that the options ask for.

    Raises:
        ValueError: neither a model nor its sizes are given, or a number is impossible.
    """
    d_in, parameters = options.d_in, options.model_parameters
    if options.model is None and d_in is None:
        raise ValueError(
            "Give --model, or the size of its activations with --d-in (and its weights up to the hook with --model-parameters)."
        )
    if options.model is not None:
        size = model_size(options.model)
        layer = size.layers // 2 if options.layer is None else options.layer
        if not 0 <= layer < size.layers:
            raise ValueError(f"layer={layer} is not there: {options.model} has layers 0 to {size.layers - 1}.")
        d_in = size.d_model if d_in is None else d_in
        parameters = (layer + 1) * size.per_layer if parameters is None else parameters
    training = Training(
        d_in=d_in,
        d_sae=options.d_sae,
        k=options.k,
        tokens=options.tokens,
        batch=options.batch,
        buffer=options.buffer,
        model_parameters=parameters or 0,
        dtype=options.dtype,
        model_dtype=options.model_dtype,
        step=options.step,
    )
    names = ("memory", "bandwidth", "flops", "low_flops", "link", "node_link", "latency", "launches")
    given = {name: value for name in names if (value := getattr(options, name)) is not None}
    device = replace(DEVICES[options.gpu], **given)
    clusters = tuple(Cluster(n, options.gpus_per_node, device) for n in options.gpus)
    found = tuple(tuple(plans(training, cluster)) for cluster in clusters)
    return Planned(training, clusters, found, fewest_gpus(training, clusters[0]))

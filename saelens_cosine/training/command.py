"""`saelens-cosine train`: SAELens' own flags, and those that say what happens to long tokens, checkpoints and signals."""

from __future__ import annotations

from typing import Any

from saelens_cosine.console import tell
from saelens_cosine.terminal.bar import progress_lines
from saelens_cosine.terminal.options import Parser, add_run_options, multiple
from saelens_cosine.training.alone import ALONE, Alone
from saelens_cosine.training.randomness import deterministic_algorithms
from saelens_cosine.training.resuming.stop import exit_status, raising_on_signals
from saelens_cosine.training.train import train
from saelens_cosine_command import COMMANDS

HELP = """\
saelens-cosine train takes the flags of SAELens' training runner, which follow, and these:

  --max-norm-multiple M  drop tokens whose norm is above M times their batch's median before they reach the SAE
                         (default 10; 'none' keeps them). The share dropped is stored in the SAE's metadata.
  --resume               go on from the newest checkpoint that is whole, exactly where it was; from the start if there is
                         none yet. Checkpoints are in --checkpoint_path, or in a folder beside --output_path.
  --overwrite            replace an earlier run in these folders
  --keep N               newest checkpoints that are kept (default 2)
  --stop-on SIGNAL       a signal that ends the run with a checkpoint, as SIGINT and SIGTERM do: USR1 for Slurm's --signal
  --device-map MAP       where Transformers puts the language model's layers, such as auto: over all GPUs that this process sees
  --tp-plan PLAN         split the language model over the ranks of torchrun as Transformers does it, such as auto; else each rank
                         has all of it and runs a share of the text. Both take --model_class_name AutoModelForCausalLM.
  --deterministic        the same bits every time on a GPU too; slower there
  --quiet                no progress: neither SAELens' bar nor, where there is no terminal, its lines

--model_name bundled and --dataset_path bundled name the language model and the corpus that ship with the package.
--model_name smollm2 or FILE.gguf reads a model in a GGUF file, --dataset_path sae-probes real text; see the guide.
--checkpoint_path none writes no checkpoints.

torchrun --nproc-per-node N -m saelens_cosine train ... trains the same SAE with N processes, each with a part of its features.
"""


def add_train_command(commands: Any) -> None:
    """Add `train` to the subcommands of `saelens-cosine`, for their list; `run_train` reads its flags."""
    commands.add_parser("train", add_help=False, help=COMMANDS["train"])


def run_train(arguments: list[str], processes: Alone = ALONE) -> int:
    """Train one SAE, and say where it is."""
    extra = Parser(prog="saelens-cosine train", add_help=False, allow_abbrev=False)
    extra.add_argument("--max-norm-multiple", "--max_norm_multiple", type=multiple, default=10.0)
    extra.add_argument("--device-map", "--device_map")
    extra.add_argument("--tp-plan", "--tp_plan")
    extra.add_argument("--overwrite", action="store_true")
    extra.add_argument("--quiet", action="store_true")
    add_run_options(extra)
    options, rest = extra.parse_known_args(arguments)
    if not rest or {"-h", "--help"} & set(rest):
        print(HELP)  # noqa: T201
    try:
        with (
            raising_on_signals(options.stop_on),
            deterministic_algorithms(options.deterministic),
            progress_lines(options.quiet) as progress,
        ):
            norm_filter = train(
                rest,
                options.max_norm_multiple,
                resume=options.resume,
                overwrite=options.overwrite,
                keep=options.keep,
                stop_signals=options.stop_on,
                on_progress=progress,
                placing={"device_map": options.device_map, "tp_plan": options.tp_plan},
                processes=processes,
            )
    except KeyboardInterrupt as stopped:
        tell("Interrupted outside of training. Run the same command with --resume to go on.")
        return exit_status(stopped)
    tell(f"High-norm tokens dropped: {norm_filter.dropped_share:.2%} of {norm_filter.tokens_seen:,}.")
    return 0

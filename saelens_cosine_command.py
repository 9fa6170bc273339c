"""The command `saelens-cosine`: what it says of itself before anything is loaded, then `saelens_cosine.cli`.

It stands beside the package, since whatever is imported from a package imports the package first, here SAELens and torch, for seconds.
"""

from __future__ import annotations

import argparse
import sys
from importlib.metadata import version
from typing import Any

COMMANDS = {
    "train": "train one SAE: SAELens' own flags, with our architectures in them",
    "compare": "train several architectures on one activation stream and compare them on held-out text",
    "benchmark": "time a training step against SAELens' classes and against the hardware's floor",
    "plan": "memory, time per step and hours of a training on any number of GPUs",
    "evaluate": "diagnostics of saved SAEs, with and without attention sinks",
    "ground-truth": "train SAEs on synthetic data and see how well they find its features",
    "convert": "write an SAE that others published in SAELens' format",
    "share": "publish saved SAEs on the Hugging Face Hub, and their features on Neuronpedia",
}
"""What there is, and a line of help on each."""


def main() -> int:
    """Run the process's command line; returns the exit status."""
    if sys.argv[1:2] in (["-h"], ["--help"], ["--version"]):
        parser, commands = outline()
        for name, line in COMMANDS.items():
            commands.add_parser(name, help=line)
        parser.parse_args()  # which ends the process
    from saelens_cosine.cli import main as run

    return run()


def outline(kind: type[argparse.ArgumentParser] = argparse.ArgumentParser) -> tuple[argparse.ArgumentParser, Any]:
    """A parser of the command line, and where its commands are added."""
    parser = kind(
        prog="saelens-cosine", description="Train, compare and load cosine-scored sparse autoencoders in SAELens."
    )
    parser.add_argument("--version", action="version", version=f"saelens-cosine {version('saelens-cosine')}")
    return parser, parser.add_subparsers(dest="command", required=True)

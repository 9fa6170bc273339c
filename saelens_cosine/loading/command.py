"""`saelens-cosine convert`: write what others published in SAELens' format."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from sae_lens.constants import SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME
from sae_lens.saes.sae import SAE
from safetensors.torch import load_file

from saelens_cosine.console import literal, plain_table, print_tables, say
from saelens_cosine.files.output import holds_anything, open_output
from saelens_cosine.files.secrets import scrubbed
from saelens_cosine.files.whole import scratch_folder
from saelens_cosine.loading.errors import CheckpointError
from saelens_cosine.loading.pretrained import SAELENS, load, locate
from saelens_cosine.loading.releases import RELEASES, Release
from saelens_cosine.loading.verify import Verification, verify
from saelens_cosine_command import COMMANDS

EXIT_DIFFERS = 1

FILES = (SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME)
"""What `convert` writes."""


class Conversion(NamedTuple):
    """
    What `convert` did.

    Args:
        path (Path): Folder of the SAE in SAELens' format; not written if the verification failed.
        architecture (str): Its architecture.
        verification (Verification | None): Against the source, if asked for.
    """

    path: Path
    architecture: str
    verification: Verification | None

    @property
    def written(self) -> bool:
        return self.verification is None or self.verification.agrees


def convert(
    source: str | Path,
    destination: str | Path,
    sae_id: str | None = None,
    *,
    device: str = "cpu",
    dtype: str | None = None,
    k: int | None = None,
    metadata: dict[str, Any] | None = None,
    check: bool = False,
    activations: torch.Tensor | None = None,
    overwrite: bool = False,
) -> Conversion:
    """Write an SAE in SAELens' format: `cfg.json` and `sae_weights.safetensors` in a folder.

    Args:
        source: and `sae_id`, `device`, `dtype`, `k`, `metadata` as in `from_pretrained`.
        destination: folder that appears complete or not at all.
        check: whether the written SAE is loaded again and compared with its source's formula; it is kept only if they agree.
        activations: `[..., d_in]` to compare on; None takes random ones.
        overwrite: whether an SAE that `convert` has written there before is replaced. Other files in the folder are left alone.

    Raises:
        FileExistsError: the destination exists and `overwrite` is not set, or a file of somebody else is in the way.
        OutputInUseError: another run writes to the destination.
        CheckpointError, ConnectionError: as in `from_pretrained`.
    """
    destination = Path(destination)
    if not overwrite and holds_anything(destination):
        raise FileExistsError(f"{destination} exists. Choose another folder, or overwrite it (--overwrite).")
    located = locate(source, sae_id, k=k)
    if located.path.resolve().is_relative_to(destination.resolve()):
        raise ValueError(f"{destination} holds the source {located.path}, which would be lost. Choose another folder.")
    if check and located.format is SAELENS:
        raise CheckpointError(
            f"{located.path} is in SAELens' own format: there is no other formula to verify it against."
        )
    with open_output(destination, "sae", keep_empty=False) as output:
        output.begin(before=_written_before(destination), places=FILES, overwrite=overwrite)
        sae = load(located, device=device, dtype=dtype, metadata=metadata)
        sae.cfg.device = "cpu"  # what the file says; whoever loads it chooses
        for name, value in scrubbed(sae.cfg.metadata.to_dict()).items():
            sae.cfg.metadata[name] = value
        with scratch_folder(destination) as written:
            sae.save_model(written)
            architecture = sae.cfg.architecture()
            del sae
            verification = None
            if check:
                verification = verify(located, SAE.load_from_disk(written, device=device), activations)
            conversion = Conversion(destination, architecture, verification)
            if conversion.written:
                output.add(written)
            return conversion


def _written_before(destination: Path) -> tuple[str, ...]:
    """Files of a version that kept no list of what it wrote: both or none."""
    return FILES if all((destination / name).exists() for name in FILES) else ()


def add_convert_command(commands: Any) -> None:
    """Add `convert` to the subcommands of `saelens-cosine`."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "convert",
        help=COMMANDS["convert"],
        description="Write an SAE in SAELens' format. Reads checkpoints of the paper's authors, of dictionary_learning and of "
        "sparsify; the files tell which.",
    )
    add = parser.add_argument
    add("source", nargs="?", help="a folder, a file, a release of --list, or a Hub repository")
    add("destination", nargs="?", help="folder to write")
    add("--sae-id", help="which SAE, where the source holds several")
    add("--list", action="store_true", help="list the known releases and stop")
    add(
        "--verify",
        action="store_true",
        help="compare with the source's formula in float64; nothing is written if they differ",
    )
    add("--activations", type=Path, metavar="FILE", help="compare on these ([..., d_in] in .pt, .safetensors or .npy)")
    add("--device", default="cpu", help="where to convert and compare: cpu, cuda")
    add(
        "--dtype", choices=("float32", "bfloat16", "float16", "float64"), help="of the weights; the file's if not given"
    )
    add("--k", type=int, help="features per token of the authors' TopK and AbsTopK files, which don't tell")
    add("--model-name", help="metadata: the model, where the files don't tell")
    add("--hook-name", help="metadata: the hook point, where the files don't tell")
    add("--overwrite", action="store_true", help="replace an SAE that convert has written there before")
    parser.set_defaults(run=_run)


def _run(options: Any) -> int:
    console = Console()
    if options.list:
        print_tables([_table(name, release) for name, release in RELEASES.items()], 150)  # names and checksums whole
        return 0
    if options.source is None or options.destination is None:
        raise ValueError("give a source and a destination, or --list")
    given = {"model_name": options.model_name, "hook_name": options.hook_name}
    with Console(stderr=True).status(literal(f"Converting {options.source}")):
        conversion = convert(
            options.source,
            options.destination,
            options.sae_id,
            device=options.device,
            dtype=options.dtype,
            k=options.k,
            metadata={key: value for key, value in given.items() if value is not None},
            check=options.verify or options.activations is not None,
            activations=_read_activations(options.activations) if options.activations is not None else None,
            overwrite=options.overwrite,
        )
    if conversion.verification is not None:
        say(console, str(conversion.verification), wrap=False)
    if not conversion.written:
        say(console, f"They do not agree; {conversion.path} was not written.", wrap=False)
        return EXIT_DIFFERS
    say(console, f'{conversion.architecture} written: SAE.load_from_disk("{conversion.path}")', wrap=False)
    return 0


def _table(name: str, release: Release) -> Table:
    title = f"{name}: {release.format} files of {release.repo_id}, for {release.metadata['model_name']}"
    table = plain_table(title, ["sae_id", "hook", "features", "k", "sha256"])
    for sae_id, sae in release.saes.items():
        table.add_row(sae_id, sae.hook_name, str(sae.d_sae), str(sae.k), sae.sha256 or "not seen")
    return table


def _read_activations(path: Path) -> torch.Tensor:
    """One floating tensor from a `.pt`, `.safetensors` or `.npy` file."""
    if path.suffix == ".npy":
        content: Any = torch.from_numpy(np.load(path, allow_pickle=False))
    elif path.suffix == ".safetensors":
        content = load_file(path)
    else:
        content = torch.load(path, map_location="cpu", weights_only=True)
    if isinstance(content, dict) and len(content) == 1:
        content = next(iter(content.values()))
    if not isinstance(content, torch.Tensor) or not content.is_floating_point() or content.ndim == 0:
        raise ValueError(f"{path} does not hold one tensor of activations, [..., d_in] of a floating dtype.")
    return content

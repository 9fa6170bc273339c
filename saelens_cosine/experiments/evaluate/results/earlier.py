"""Whether an evaluation keeps all that an earlier one has gathered in the same folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from saelens_cosine.experiments.evaluate.settings import EvaluationSettings
from saelens_cosine.experiments.evaluate.sources import Source
from saelens_cosine.files.output import Output, open_output
from saelens_cosine.files.secrets import without_secrets
from saelens_cosine.files.whole import read_json

PROFILE = "evaluation-profile.json"

FILES = ("evaluation.json", "report.html", PROFILE)
"""What an evaluation gathers its results in, the last where it was profiled. Those in `measured/` are named by their content, and never replaced."""

NEVER_LOST = ("evals", "device")
"""Settings of which another value loses nothing: evals are compared by name."""


def open_evaluation(output: str | Path | Output) -> AbstractContextManager[Output]:
    """The output folder of an evaluation, locked; see `open_output`."""
    return open_output(output, "evaluation", parts=("measured",), keep_empty=False)


def begin(
    output: Output, schema: str, sources: Sequence[Source], settings: EvaluationSettings, overwrite: bool
) -> None:
    """Go on with an earlier evaluation of the same SAEs, refuse to lose one of others, or replace it when this one has ended.

    Raises:
        FileExistsError: figures of an earlier evaluation would go and `overwrite` is off, or a file is not ours; names it.
    """
    file = output.folder / FILES[0]
    earlier = _read(file)
    lost = earlier and _lost(earlier, schema, sources, settings)
    if lost and not overwrite:
        raise FileExistsError(
            f"{file} is of an earlier evaluation: {lost}. Pass --overwrite (overwrite=True) to replace it, or choose another "
            "--output. What it measured stays in measured/ either way, and is not measured again."
        )
    output.begin(before=FILES[:2] if earlier else (), places=FILES, overwrite=overwrite, resume=not lost)


def _read(file: Path) -> dict[str, Any] | None:
    """A file that `evaluate` has written, of whatever version."""
    try:
        content: Any = read_json(file)
    except (OSError, ValueError):
        return None
    ours = isinstance(content, dict) and str(content.get("schema")).startswith("saelens-cosine-evaluation/")
    return content if ours else None


def _lost(
    earlier: Mapping[str, Any], schema: str, sources: Sequence[Source], settings: EvaluationSettings
) -> str | None:
    """What is there and not asked for, in words."""
    if earlier["schema"] != schema:
        return f"its schema is {earlier['schema']}, and this version writes {schema}"
    was, asked = earlier["settings"], settings.to_dict()
    saes = {f"{sae['arm']}={sae['place']}" for sae in earlier["saes"]}
    wanted = {f"{source.arm}={source.name}" for source in sources}
    differ = [
        f"{name} is {without_secrets(str(was.get(name)))} there and {without_secrets(str(asked[name]))} here"
        for name in asked
        if name not in NEVER_LOST and was.get(name) != asked[name]
    ]
    for what, there, here in (("SAEs", saes, wanted), ("evals", set(was["evals"]), set(asked["evals"]))):
        if not there <= here:
            differ.append(f"it has the {what} {', '.join(sorted(there))}, and asked for are {', '.join(sorted(here))}")
    return "; ".join(differ) or None

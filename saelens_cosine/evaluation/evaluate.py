"""`saelens-cosine evaluate`: diagnostics of saved SAEs on held-out text, with and without high-norm tokens.

What one evaluation of one SAE found is a file of its own, named by the SAE's weights and the settings, so that an interrupted
run goes on where it ended and a second run does nothing twice. `evaluation.json` gathers them.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from sae_lens import ActivationsStore
from sae_lens.saes.sae import SAE
from scipy import sparse

from saelens_cosine.data import load_text
from saelens_cosine.evaluation.afa import measure_afa, summarize_afa
from saelens_cosine.evaluation.codes import sparse_codes
from saelens_cosine.evaluation.cofiring import cofiring
from saelens_cosine.evaluation.exponents import exponent_distribution, norm_exponents
from saelens_cosine.evaluation.geometry import decoder_geometry
from saelens_cosine.evaluation.loss_recovered import loss_recovered
from saelens_cosine.evaluation.norm_detectors import norm_detectors
from saelens_cosine.evaluation.norm_response import norm_noise, norm_response
from saelens_cosine.evaluation.reconstruction import diagnose_reconstruction
from saelens_cosine.evaluation.sample import Sinks, TokenSample, sample_tokens, side_by_side
from saelens_cosine.evaluation.zf_plot import zf_points
from saelens_cosine.loading import from_pretrained
from saelens_cosine.models import load_hooked_model

SCHEMA = "saelens-cosine-evaluation/1"
"""Name and version of the layout of `evaluation.json`; the number grows when a field changes its meaning or goes."""

ZF_POINTS = 1000
"""Tokens in a ZF plot, the paper's."""

LOSS_TOKENS = 20_000
"""Tokens that `loss` takes: it runs the whole model twice on each."""

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class EvaluationSettings:
    """
    What to measure, and on what.

    Args:
        evals (tuple[str, ...]): Names in `EVALS`.
        tokens (int): Held-out tokens.
        sinks (Sinks): Whether high-norm tokens are measured, left out, or both.
        max_norm_multiple (float): Multiple of the sample's median norm above which a token is one.
        model (str | None): The language model; None for what each SAE's metadata name.
        dataset (str | None): Text; None for what each SAE's metadata name.
        context_size (int | None): Tokens per context; None for the SAE's own, or 128.
        device (str): Where everything runs.
    """

    evals: tuple[str, ...] = ("reconstruction", "loss", "norm_response", "dictionary", "afa")
    tokens: int = 50_000
    sinks: Sinks = "both"
    max_norm_multiple: float = 10.0
    model: str | None = None
    dataset: str | None = None
    context_size: int | None = None
    device: str = "cpu"

    def __post_init__(self) -> None:
        unknown = [name for name in self.evals if name not in EVALS]
        if unknown:
            raise ValueError(f"Unknown evaluation {unknown[0]!r}; there are {', '.join(EVALS)}.")
        if self.sinks not in ("keep", "drop", "both"):
            raise ValueError(f"sinks={self.sinks!r} is none of 'keep', 'drop', 'both'.")
        if self.tokens < 1:
            raise ValueError(f"tokens={self.tokens} must be positive.")
        if not self.max_norm_multiple > 1:
            raise ValueError(
                f"max_norm_multiple={self.max_norm_multiple} multiplies the median norm; use a number well above 1."
            )


@dataclass(frozen=True)
class Subject:
    """
    An SAE, its model, and the text that it is measured on.

    Args:
        name (str): What the report calls it.
        sae (SAE[Any]): Inference form.
        model (Any): Hooked model.
        token_batches (tuple[torch.Tensor, ...]): `[contexts, length]` each.
        sample (TokenSample): Their activations at the SAE's hook.
        settings (EvaluationSettings): What to measure.
    """

    name: str
    sae: SAE[Any]
    model: Any
    token_batches: tuple[torch.Tensor, ...]
    sample: TokenSample
    settings: EvaluationSettings

    @cached_property
    def codes(self) -> sparse.csr_array:
        """Codes of all tokens of the sample."""
        return sparse_codes(self.sae, self.sample.activations)

    def with_and_without_sinks(self, measure: Callable[[TokenSample], Any]) -> dict[str, Any]:
        """A measure as the settings' `sinks` says, in plain values."""
        return plain(side_by_side(measure, self.sample, self.settings.sinks))


def _reconstruction(subject: Subject) -> Any:
    return subject.with_and_without_sinks(lambda sample: diagnose_reconstruction(subject.sae, sample.activations))


def _loss(subject: Subject) -> Any:
    settings = subject.settings
    batches, tokens = [], 0
    for batch in subject.token_batches:
        if tokens >= LOSS_TOKENS:
            break
        batches.append(batch)
        tokens += batch.numel()
    bounds = {"with_sinks": None, "without_sinks": settings.max_norm_multiple}
    wanted = {"keep": ["with_sinks"], "drop": ["without_sinks"], "both": list(bounds)}[settings.sinks]
    return {name: plain(loss_recovered(subject.sae, subject.model, batches, bounds[name])) for name in wanted}


def _norm_response(subject: Subject) -> Any:
    return subject.with_and_without_sinks(
        lambda sample: {
            "response": norm_response(subject.sae, sample.activations),
            "noise": norm_noise(subject.sae, sample.activations),
        }
    )


def _dictionary(subject: Subject) -> Any:
    def of(sample: TokenSample) -> dict[str, Any]:
        whole = len(sample) == len(subject.sample)
        codes = subject.codes if whole else subject.codes[subject.sample.ordinary.numpy()]
        return {"norm_detectors": norm_detectors(codes, sample.norms), "cofiring": cofiring(codes, top=20)}

    exponents = norm_exponents(subject.sae)
    firing_rate = torch.from_numpy((subject.codes != 0).mean(axis=0)).flatten()
    return {
        **subject.with_and_without_sinks(of),
        "geometry": plain(decoder_geometry(subject.sae)),
        "exponents": plain(exponent_distribution(subject.sae, firing_rate)),
        "exponent_values": [] if exponents is None else exponents.double().flatten().tolist(),
    }


def _afa(subject: Subject) -> Any:
    def of(sample: TokenSample) -> dict[str, Any]:
        x = sample.activations
        return {
            "augment": summarize_afa(measure_afa(subject.sae, x, bias="augment")),
            "center": summarize_afa(measure_afa(subject.sae, x, bias="center")),
        }

    points = zf_points(measure_afa(subject.sae, subject.sample.activations), subject.name, ZF_POINTS)
    return {**subject.with_and_without_sinks(of), "zf_points": plain(points)}


EVALS: dict[str, Callable[[Subject], Any]] = {
    "reconstruction": _reconstruction,
    "loss": _loss,
    "norm_response": _norm_response,
    "dictionary": _dictionary,
    "afa": _afa,
}
"""What can be measured: a row here adds one. Each returns plain values for JSON."""


def evaluate(
    sources: Sequence[str],
    settings: EvaluationSettings,
    output: str | Path,
    on_progress: Progress | None = None,
) -> dict[str, Any]:
    """Evaluate SAEs, and write `evaluation.json`; what an earlier run with these settings has measured is not measured again.

    Args:
        sources: folders, Hub repositories or short names, `name#sae_id` where one holds several SAEs.
        settings: what to measure.
        output: folder for `evaluation.json` and, in `measured/`, a file per SAE and evaluation.
        on_progress: called with what is being done, how much of it is done, and how much there is.

    Returns:
        What `evaluation.json` holds.

    Raises:
        ValueError: an SAE whose model, hook or text nobody has named.
        CheckpointError, OSError: an SAE, a model or a text that cannot be loaded.
    """
    folder = Path(output)
    (folder / "measured").mkdir(parents=True, exist_ok=True)
    progress = on_progress or (lambda _what, _done, _total: None)
    texts = _Texts(settings)
    saes: list[dict[str, Any]] = []
    total = len(sources) * len(settings.evals)
    for i, source in enumerate(sources):
        place, _, sae_id = source.partition("#")
        sae = from_pretrained(place, sae_id or None, device=settings.device)
        sae.turn_off_forward_pass_hook_z_reshaping()  # samples have flattened heads
        entry: dict[str, Any] = {"name": source, "sha256": fingerprint(sae), "architecture": sae.cfg.architecture()}
        key = _key(entry["sha256"], settings, sae)
        results: dict[str, Any] = {}
        for j, name in enumerate(settings.evals):
            progress(f"{source}: {name}", i * len(settings.evals) + j, total)
            file = folder / "measured" / f"{key}-{name}.json"
            if not file.exists():
                write_json(EVALS[name](texts.subject(source, sae)), file)
            results[name] = json.loads(file.read_text())
        entry |= {"metadata": plain(sae.cfg.metadata.to_dict()), "results": results}
        saes.append(entry)
        document = {"schema": SCHEMA, "settings": plain(settings), "versions": versions(), "saes": saes}
        write_json(document, folder / "evaluation.json")  # after each SAE
    progress("Evaluated", total, total)
    return document  # pyright: ignore[reportPossiblyUnboundVariable]  (there is at least one source)


class _Texts:
    """Models, tokens and activations, each made once for all SAEs that share them."""

    def __init__(self, settings: EvaluationSettings):
        self.settings = settings
        self._models: dict[tuple[str, str], Any] = {}
        self._tokens: dict[tuple[Any, ...], tuple[torch.Tensor, ...]] = {}
        self._samples: dict[tuple[Any, ...], TokenSample] = {}
        self._last: Subject | None = None

    def subject(self, name: str, sae: SAE[Any]) -> Subject:
        if self._last is not None and self._last.sae is sae:
            return self._last  # with its codes
        settings, metadata = self.settings, sae.cfg.metadata
        model_name, hook = settings.model or metadata.model_name, metadata.hook_name
        dataset = settings.dataset or metadata.dataset_path
        if not (model_name and hook and dataset):
            raise ValueError(
                f"{name} names model={metadata.model_name}, hook={hook}, dataset={metadata.dataset_path} in its metadata. Pass "
                "--model and --dataset, and load and save it with metadata={'hook_name': ...} if the hook is missing."
            )
        if (model_name, hook) not in self._models:
            self._models[model_name, hook] = load_hooked_model(model_name, settings.device, hook=hook)
        hooked = self._models[model_name, hook]
        context = settings.context_size or metadata.context_size or 128
        context = min(context, hooked.context_size or context)
        text = (model_name, hook, dataset, context)
        if text not in self._tokens:
            self._tokens[text] = _token_batches(hooked, hook, dataset, context, settings)
            self._samples[text] = sample_tokens(hooked.model, hook, self._tokens[text], settings.max_norm_multiple)
        self._last = Subject(name, sae, hooked.model, self._tokens[text], self._samples[text], settings)
        return self._last


def _token_batches(
    hooked: Any, hook: str, dataset: str, context: int, settings: EvaluationSettings
) -> tuple[torch.Tensor, ...]:
    store = ActivationsStore.from_config_multi_hook(
        hooked.model,
        dataset=load_text(dataset).heldout,
        hook_names=[hook],
        hook_d_ins={hook: hooked.d_in},
        context_size=context,
        store_batch_size_prompts=16,
        device=settings.device,
    )
    batches: list[torch.Tensor] = []
    while sum(batch.numel() for batch in batches) < settings.tokens:
        try:
            batches.append(store.get_batch_tokens(raise_at_epoch_end=True))
        except StopIteration:
            break
    if not batches:
        raise ValueError(f"Dataset {dataset!r} holds out less than 16 contexts of {context} tokens; name another.")
    return tuple(batches)


def fingerprint(sae: SAE[Any]) -> str:
    """A hash of an SAE's architecture and tensors, so that results are never taken for those of another."""
    digest = hashlib.sha256(sae.cfg.architecture().encode())
    for name, tensor in sorted(sae.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _key(sha256: str, settings: EvaluationSettings, sae: SAE[Any]) -> str:
    fixed = {name: value for name, value in plain(settings).items() if name != "evals"}
    where = [sae.cfg.metadata.model_name, sae.cfg.metadata.hook_name, sae.cfg.metadata.dataset_path]
    said = json.dumps([fixed, where, sae.cfg.metadata.context_size], sort_keys=True)
    return f"{sha256[:16]}-{hashlib.sha256(said.encode()).hexdigest()[:12]}"


def plain(value: Any) -> Any:
    """Dataclasses, tuples and mappings as what JSON holds; numbers that are not finite become None."""
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if isinstance(value, Mapping):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(value: Any, path: Path) -> None:
    """Write whole or not at all."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    unfinished.write_text(json.dumps(value, indent=1, allow_nan=False))
    unfinished.replace(path)


def versions() -> dict[str, str]:
    """Versions of what computed the figures."""
    packages = ("saelens-cosine", "sae-lens", "transformer-lens", "torch")
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in packages}}


def rows(document: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """A line per SAE and treatment of sinks of an `evaluation.json`: name, sinks, and the figures that one looks at first."""
    for sae in document["saes"]:
        results = sae["results"]
        for sinks in ("with_sinks", "without_sinks"):
            fit = (results.get("reconstruction") or {}).get(sinks)
            loss = (results.get("loss") or {}).get(sinks)
            if fit is None and loss is None:
                continue
            overall = fit["by_norm"]["all_norms"]["overall"] if fit else {}
            predicted = loss["by_norm"]["all_norms"]["overall"] if loss else {}
            yield {
                "name": sae["name"],
                "sinks": "in" if sinks == "with_sinks" else "out",
                "tokens": overall.get("tokens"),
                "fve": overall.get("fve"),
                "l0": overall.get("l0"),
                "never_fired": overall.get("never_fired"),
                "ce_loss_score": predicted.get("ce_loss_score"),
            }

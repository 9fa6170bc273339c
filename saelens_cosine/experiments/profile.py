"""`--profile`: where the time of a comparison or an evaluation went, as a table and as JSON."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime, timezone
from typing import Any

import torch
from rich.table import Table
from sae_lens import SAE, TrainingSAE
from sae_lens.load_model import HookedProxyLM
from sae_lens.training.activations_store import ActivationsStore
from sae_lens.training.mixing_buffer import mixing_buffer
from sae_lens.training.sae_trainer import SAETrainer
from transformer_lens.model_bridge import TransformerBridge

from saelens_cosine.activations.cache.cache import ActivationCache, open_cache
from saelens_cosine.activations.cache.contexts import training_contexts
from saelens_cosine.activations.contexts import sample_contexts
from saelens_cosine.activations.models import load_hooked_model
from saelens_cosine.activations.norm_filter import HighNormFilter
from saelens_cosine.activations.text import load_text
from saelens_cosine.console import plain_table
from saelens_cosine.experiments.compare.summary.page import write_page as write_comparison
from saelens_cosine.experiments.compare.summary.picture import draw
from saelens_cosine.experiments.evaluate.page import evaluation_page
from saelens_cosine.experiments.evaluate.run import measure
from saelens_cosine.experiments.evaluate.texts.tasks import load_tasks
from saelens_cosine.files.output import Output
from saelens_cosine.files.whole import write_json
from saelens_cosine.hooked_transformer import hooked_transformer
from saelens_cosine.metrics.causal.resumed import ResumedModel
from saelens_cosine.metrics.codes import entry_codes, reconstruct, sparse_codes
from saelens_cosine.metrics.reconstruction.by_norm import diagnose_reconstruction
from saelens_cosine.metrics.reconstruction.clean_losses import token_losses
from saelens_cosine.metrics.reconstruction.loss_recovered import loss_recovered
from saelens_cosine.plain import versions
from saelens_cosine.report.page import write_page
from saelens_cosine.stopwatch import Of, Part, Stopwatch
from saelens_cosine.training.monitor import TrainingMonitor
from saelens_cosine.training.resuming.checkpoints import Checkpoints

SCHEMA = "saelens-cosine/profile/1"


def _rows(name: str) -> Callable[[Of], int]:
    return lambda of: len(of.get(name, ()))


def _input_tokens(of: Of) -> int:
    """Of a forward pass, whatever the model calls its first argument."""
    first: Any = next((of[name] for name in ("tokens", "input") if name in of), None)
    if first is None:
        first = next(iter(of.get("args") or of.get("model_args") or ()), None)
    return first.numel() if isinstance(first, torch.Tensor) else 0


MODELS = tuple(filter(None, (HookedProxyLM, TransformerBridge, hooked_transformer())))

PARTS = (
    Part("loading the model", (load_hooked_model,)),
    Part(
        "reading and tokenising text",
        (load_text, load_tasks, training_contexts, sample_contexts, ActivationsStore.get_batch_tokens),
    ),
    Part(
        "language model",
        (
            *(model.run_with_cache for model in MODELS),
            ResumedModel.run,
            ResumedModel.forward,
            ResumedModel.logits,
            ResumedModel.unembed,
        ),
        _input_tokens,
    ),
    Part("losses of predictions", (token_losses,)),
    Part(
        "kept activations",
        (open_cache, ActivationCache.missing, ActivationCache.read, ActivationCache.add, ActivationCache.flush),
    ),
    Part("norm filter", (HighNormFilter.keep,), _rows("activations")),
    Part("mixing buffer", (mixing_buffer, ActivationsStore.get_multi_hook_data_loader)),
    Part(lambda of: f"steps of {of['self'].sae.cfg.architecture()}", (SAETrainer.step,), _rows("batch")),
    Part("training monitor", (TrainingMonitor.record,)),
    Part("checkpoints", (Checkpoints.add, Checkpoints.add_final)),
    Part("saving and loading SAEs", (TrainingSAE.save_inference_model, SAE.load_from_disk)),
    Part("codes", (sparse_codes, entry_codes, reconstruct)),
    Part("figures of reconstruction", (diagnose_reconstruction, loss_recovered)),
    Part(lambda of: f"eval {of['row'].name}", (measure,)),
    Part("pictures and pages", (draw, write_comparison, evaluation_page, write_page)),
)
"""What is told apart. A function's time is without that of the others that it calls."""


@contextmanager
def profiled(output: Output | None, name: str, on: bool) -> Generator[Stopwatch | None]:
    """Time the parts of what runs in a with block and write them beside its results, to the file of this name, if that was asked for."""
    if not on or output is None:
        yield None
        return
    with Stopwatch(PARTS) as watch:
        yield watch
    with output.file(name) as path:
        write_json(as_json(watch), path)


def as_json(watch: Stopwatch) -> Mapping[str, Any]:
    """What was timed, when that ended, and of which versions."""
    return {
        "schema": SCHEMA,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "seconds": watch.seconds,
        "threads": torch.get_num_threads(),
        "parts": {name: asdict(spent) for name, spent in watch.spent.items()},
        "versions": versions(),
    }


def where_time_went(watch: Stopwatch | None) -> list[Table]:
    """The table, the longest part first, of what was profiled."""
    return [] if watch is None else [_table(watch)]


def _table(watch: Stopwatch) -> Table:
    whole = watch.seconds
    table = plain_table(
        f"Where {whole:.1f} s went",
        ["part"],
        ("seconds", "share", "calls", "tokens", "tokens/s", "peak of memory, MB"),
    )
    for name, spent in sorted(watch.spent.items(), key=lambda item: -item[1].seconds):
        tokens, rate = f"{spent.tokens:,}", f"{spent.tokens / spent.seconds:,.0f}" if spent.seconds else ""
        table.add_row(
            name,
            f"{spent.seconds:.1f}",
            f"{spent.seconds / whole:.1%}",
            f"{spent.calls:,}",
            *((tokens, rate) if spent.tokens else ("", "")),
            f"+{spent.peak_growth_bytes / 1e6:,.0f}",
        )
    return table

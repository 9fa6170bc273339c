"""What `saelens-cosine evaluate` measures, and on what."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from saelens_cosine.activations.contexts import check_context_size
from saelens_cosine.activations.norm_filter import check_max_norm_multiple
from saelens_cosine.activations.sample import Sinks
from saelens_cosine.bundled import BUNDLED
from saelens_cosine.files.secrets import scrubbed, without_secrets
from saelens_cosine.plain import plain
from saelens_cosine.saebench.evals import Judge


@dataclass(frozen=True)
class EvaluationSettings:
    """
    What to measure, and on what.

    Args:
        evals (tuple[str, ...]): Names in `evals.EVALS`.
        tokens (int): Tokens, in whole contexts at even steps through all held-out documents.
        sinks (Sinks): Whether high-norm tokens are measured, left out, or both.
        max_norm_multiple (float): Multiple of the sample's median norm above which a token is one.
        plant_sinks (bool | None): Give the first token of each context 30 to 300 times the median norm (see `planted.plant_sinks`); None: where the SAE's metadata say that it was trained so.
        model (str | None): The language model; None for what each SAE's metadata name.
        hook (str | None): Hook point; None for what each SAE's metadata name.
        dataset (str | None): Text; None for what each SAE's metadata name.
        context_size (int | None): Tokens per context; None for the SAE's own, or 128.
        device (str): Where everything runs.
        activations (Path | None): Folder of a cache of activations (see `activations.cache`): held-out contexts are read from there, and added where it lacks them. They are rounded to bfloat16. None: no cache.
        loss_tokens (int): Tokens that `loss` takes, at most: the model runs on each twice, and from the hook on again for every SAE.
        tasks (tuple[str, ...] | None): What `probing` and `decomposition` probe for, see `tasks.load_tasks`; None: the bundled corpus' tasks on the bundled corpus, sae-probes' data sets on any other text.
        task_texts (int): Texts of each task, at most.
        causal_contexts (int): Contexts that `causal` and `patching` edit; the paper's 200.
        causal_features (int): Features whose direction `causal` removes, at most; the paper's 100.
        concept_texts (int): Texts of each concept whose features `causal` ablates, at most.
        browser_features (int): Features that the page's browser shows of each arm.
        saebench (Mapping[str, Mapping[str, Any]]): Changes to the configurations of SAEBench's evals, by eval.
        judge (Judge): The language model that SAEBench's `autointerp` asks.
    """

    evals: tuple[str, ...] = ("tokens", "reconstruction", "loss", "norm_response", "dictionary", "afa", "matching")
    tokens: int = 50_000
    sinks: Sinks = "both"
    max_norm_multiple: float = 10.0
    plant_sinks: bool | None = None
    model: str | None = None
    hook: str | None = None
    dataset: str | None = None
    context_size: int | None = None
    device: str = "cpu"
    activations: Path | None = None
    loss_tokens: int = 20_000
    tasks: tuple[str, ...] | None = None
    task_texts: int = 400
    causal_contexts: int = 200
    causal_features: int = 100
    concept_texts: int = 40
    browser_features: int = 300
    saebench: Mapping[str, Mapping[str, Any]] = field(default_factory=dict[str, Mapping[str, Any]])
    judge: Judge = field(default_factory=Judge)

    def __post_init__(self) -> None:
        if self.sinks not in ("keep", "drop", "both"):
            raise ValueError(f"sinks={self.sinks!r} is none of 'keep', 'drop', 'both'.")
        for name in (
            "tokens",
            "loss_tokens",
            "task_texts",
            "causal_contexts",
            "causal_features",
            "concept_texts",
            "browser_features",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be positive.")
        if self.context_size is not None:
            check_context_size(self.context_size)
        check_max_norm_multiple(self.max_norm_multiple, "sinks='keep' (--sinks keep) to measure every token")

    @property
    def treatments(self) -> tuple[str, ...]:
        """`with_sinks`, `without_sinks`, or both."""
        names = ("with_sinks", "without_sinks")
        return {"keep": names[:1], "drop": names[1:], "both": names}[self.sinks]

    def to_dict(self) -> dict[str, Any]:
        """Plain values of all fields, for files: without secrets."""
        url = self.judge.base_url and without_secrets(self.judge.base_url)
        activations = None if self.activations is None else str(self.activations)
        judge = {"model": self.judge.model, "base_url": url}
        return scrubbed(plain({**vars(self), "activations": activations, "judge": judge}))

    def tasks_for(self, dataset: str) -> tuple[str, ...]:
        """Names of tasks for an SAE of this text."""
        if self.tasks is not None:
            return self.tasks
        return (BUNDLED,) if dataset == BUNDLED else ("sae_probes",)

"""What an evaluation measures: an SAE, its model and the text, each loaded once for all SAEs that share them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from sae_lens.saes.sae import SAE
from scipy import sparse

from saelens_cosine.activations.contexts import ContextForm, Contexts
from saelens_cosine.activations.sae_probes_text import tasks_trained_on
from saelens_cosine.activations.sample import TokenSample
from saelens_cosine.bundled import BUNDLED
from saelens_cosine.experiments.evaluate.settings import EvaluationSettings
from saelens_cosine.experiments.evaluate.sources import Source
from saelens_cosine.experiments.evaluate.texts.concepts import bundled_concepts, token_concepts
from saelens_cosine.experiments.evaluate.texts.contexts import Concepts, LabelledSample, concept_run, sample_tasks
from saelens_cosine.experiments.evaluate.texts.tasks import Task, load_tasks
from saelens_cosine.metrics.causal.forward import CleanRun, clean_run
from saelens_cosine.metrics.codes import canonical_codes, sparse_codes
from saelens_cosine.metrics.dictionary.matching import FeatureMatching, match_codes
from saelens_cosine.metrics.probing.probing import KProbe, Units, pool, probe_in_units
from saelens_cosine.metrics.reconstruction.clean_losses import CleanLosses, clean_losses
from saelens_cosine.plain import digest, fingerprint
from saelens_cosine.progress import Progress
from saelens_cosine.saebench.model import again_for_saebench


@dataclass(frozen=True, eq=False)
class Text:
    """
    Held-out text as one model sees it at one hook.

    Args:
        model_name (str): As the SAEs' metadata or the settings call it.
        model (Any): Hooked model.
        model_sha256 (str): Hash of its weights and config.
        hook (str): Hook point.
        dataset (str): Where the text is from.
        planted (bool): Whether sinks were planted.
        form (ContextForm): What its contexts are like: as the SAE was trained.
        rule (str): Which documents are held out, see `activations.text.TextSplits`.
        contexts (Contexts): From all held-out documents.
        sample (TokenSample): Activations at the hook of those of their tokens that the SAE sees.
        settings (EvaluationSettings): What to measure.
        head (int | None): The attention head whose activations they are; None for all of the hook.
        progress (Progress | None): Called while the model runs over labelled texts.
        rounded (bool): Whether the sample's activations are bfloat16's, as a cache keeps them.
        model_kwargs (Mapping[str, Any]): What the model's loader was told.
    """

    model_name: str
    model: Any
    model_sha256: str
    hook: str
    dataset: str
    planted: bool
    form: ContextForm
    rule: str
    contexts: Contexts
    sample: TokenSample
    settings: EvaluationSettings
    head: int | None = None
    rounded: bool = False
    model_kwargs: Mapping[str, Any] = field(default_factory=dict[str, Any])
    progress: Progress | None = None

    @cached_property
    def identity(self) -> str:
        """A hash of what is read and how, not of what it is called: the tokens, their documents and places, the model."""
        objects = ("model", "settings", "contexts", "sample", "progress")
        names = ("model_name", "dataset", "rule", *objects, "rounded", "model_kwargs")
        how = {part.name: getattr(self, part.name) for part in fields(self) if part.name not in names}
        sample = self.sample
        tensors = {name: getattr(sample, name) for name in ("tokens", "contexts", "documents", "positions")}
        tensors |= {f"whole {name}": tensor for name, tensor in self.contexts._asdict().items()}
        return digest([how, sample.max_norm_multiple, *(["bfloat16"] if self.rounded else [])], tensors)

    @cached_property
    def labelled(self) -> tuple[Task, ...]:
        """Labelled texts."""
        names, trained_on = self.settings.tasks_for(self.dataset), tasks_trained_on(self.dataset)
        return load_tasks(names, self.settings.task_texts, trained_on=trained_on)

    @cached_property
    def tasks(self) -> LabelledSample:
        """Labelled texts with their activations."""
        bound = self.settings.max_norm_multiple
        return sample_tasks(self.model, self.hook, self.labelled, 128, bound, self.head, self.form, self.progress)

    @cached_property
    def run(self) -> CleanRun:
        """The contexts from which causal diagnostics start, from all documents, each read at the last token that the SAE sees."""
        tokens = self.contexts.at_even_steps(self.settings.causal_contexts).tokens
        last = (self.form.seen(self.model, tokens) * torch.arange(1, tokens.shape[1] + 1)).amax(dim=-1) - 1
        return clean_run(self.model, self.hook, tokens, last.clamp_min(0), head=self.head)

    @cached_property
    def clean_losses(self) -> CleanLosses:
        """The predictions that reconstructions are held against, of contexts from all documents."""
        contexts = max(1, self.settings.loss_tokens // self.form.context_size)
        return clean_losses(self.model, self.hook, self.contexts.at_even_steps(contexts).batches, self.head)

    @cached_property
    def hooked_transformer(self) -> Any:
        """The model as SAEBench runs it, with the sinks that are planted in it."""
        device = self.settings.device
        return again_for_saebench(self.model, self.model_name, self.hook, self.model_kwargs, self.planted, device)

    @cached_property
    def concepts(self) -> Concepts:
        """What ablation precision is measured on: constructs of code in the bundled corpus, frequent tokens in any other."""
        if self.dataset == BUNDLED:
            texts, labels, names = bundled_concepts(self.settings.concept_texts)
            run = concept_run(self.model, self.hook, texts, head=self.head, form=self.form)
            return Concepts(run, labels, names)
        tokens = self.contexts.tokens
        found = token_concepts(tokens, per_token=self.settings.concept_texts)
        run = clean_run(self.model, self.hook, tokens[found.contexts], found.positions, head=self.head)
        return Concepts(run, found.labels, [self.model.tokenizer.decode(token) for token in found.tokens])

    def forget(self) -> None:
        """Free what can be made again, which is most of its memory: no more SAEs come that share it."""
        for name in ("tasks", "run", "clean_losses", "hooked_transformer", "concepts"):
            vars(self).pop(name, None)

    def sample_of(self, run: CleanRun) -> TokenSample:
        """The tokens of a clean run that the SAE sees."""
        sample = run.sample(self.settings.max_norm_multiple)
        return sample.where(self.form.seen(self.model, run.tokens)[sample.contexts, sample.positions])

    def treated(self, sample: TokenSample, treatment: str) -> TokenSample:
        """A sample with or without its sinks."""
        return sample if treatment == "with_sinks" else sample.without_sinks()


@dataclass(frozen=True, eq=False)
class Subject:
    """
    One SAE.

    Args:
        source (Source): Where it is from, and what it is called.
        sae (SAE[Any]): Inference form.
        text (Text): What it is measured on.
        folder (Path): Output folder, for evals that keep files of their own.
        baseline (Subject | None): What it is compared with: the first arm's SAE of the same seed; of the first arm's own seeds, the first. None for that one, and for seeds that the first arm lacks.
    """

    source: Source
    sae: SAE[Any]
    text: Text
    folder: Path
    baseline: Subject | None = None

    @property
    def settings(self) -> EvaluationSettings:
        return self.text.settings

    @cached_property
    def sha256(self) -> str:
        return fingerprint(self.sae)

    @property
    def held_out(self) -> bool:
        """Whether it is known that the SAE was not trained on the text."""
        metadata = self.sae.cfg.metadata
        return (metadata.dataset_path, metadata.heldout_rule) == (self.text.dataset, self.text.rule)

    @property
    def identity(self) -> list[str]:
        """Hashes of what it is and of what it is measured on."""
        return [self.sha256, self.text.identity]

    @cached_property
    def codes(self) -> sparse.csr_array:
        """Codes of all tokens of the sample."""
        return sparse_codes(self.sae, self.text.sample.activations)

    @cached_property
    def _task_codes(self) -> sparse.csr_array:
        """Of the texts of all tasks."""
        return canonical_codes(self.sae, self.text.tasks.sample.activations)

    def pooled(self, task: int, treatment: str) -> sparse.csr_array:
        """Mean canonical codes of each text of a task, `[texts, d_sae]`."""
        tasks, codes = self.text.tasks, cast("Any", self._task_codes)
        rows, contexts = tasks.tokens[task].treated(treatment)
        return pool(codes[rows.numpy()], contexts.numpy(), len(tasks.tasks[task].labels))

    @cached_property
    def _probes(self) -> dict[Any, tuple[KProbe, ...]]:
        return {}

    def probed(
        self, task: int, treatment: str, ks: tuple[int | None, ...], splits: int, *units: Units
    ) -> dict[Units, tuple[KProbe, ...]]:
        """Probes of `pooled` codes, by units of the codes, k by k; made once for all evals that read them."""
        missing: list[Units] = [name for name in units if (task, treatment, ks, splits, name) not in self._probes]
        if missing:
            codes, labels = self.pooled(task, treatment), self.text.labelled[task].labels
            found = probe_in_units(codes, labels, ks, missing, splits)
            self._probes.update({(task, treatment, ks, splits, name): probes for name, probes in found.items()})
        return {name: self._probes[task, treatment, ks, splits, name] for name in units}

    def codes_of(self, treatment: str) -> sparse.csr_array:
        """`codes` of all tokens or of the ordinary ones."""
        codes: Any = self.codes
        return codes if treatment == "with_sinks" else codes[self.text.sample.ordinary.numpy()]

    @cached_property
    def matchings(self) -> dict[str, FeatureMatching]:
        """By treatment, all features that have a partner in the baseline, which there must be."""
        other = self.baseline
        assert other is not None
        return {
            name: match_codes(self.codes_of(name), other.codes_of(name), self.sae.W_dec, other.sae.W_dec, pairs="all")
            for name in self.settings.treatments
        }

    def by_treatment(self, measure: Callable[[TokenSample], Any]) -> dict[str, Any]:
        """A measure of the sample as the settings' `sinks` says."""
        return {name: measure(self.text.treated(self.text.sample, name)) for name in self.settings.treatments}

"""What an evaluation measures: an SAE, its model and the text, each loaded once for all SAEs that share them."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from sae_lens.saes.sae import SAE
from scipy import sparse

from saelens_cosine.activations.cache.cache import open_cache
from saelens_cosine.activations.cache.identity import CacheIdentity
from saelens_cosine.activations.cache.standing_in import standing_in
from saelens_cosine.activations.contexts import ContextForm, Contexts, sample_contexts, told
from saelens_cosine.activations.hook_points import size_at_hook
from saelens_cosine.activations.models import HookedModel, choose_model, load_hooked_model
from saelens_cosine.activations.planted_sinks import plant_sinks
from saelens_cosine.activations.sae_probes_text import tasks_trained_on
from saelens_cosine.activations.sample import TokenSample, sample_tokens
from saelens_cosine.activations.text import TextSplits, load_text
from saelens_cosine.bundled import BUNDLED
from saelens_cosine.experiments.evaluate.settings import EvaluationSettings
from saelens_cosine.experiments.evaluate.sources import Source
from saelens_cosine.experiments.evaluate.texts.concepts import bundled_concepts, token_concepts
from saelens_cosine.experiments.evaluate.texts.contexts import Concepts, LabelledSample, concept_run, sample_tasks
from saelens_cosine.experiments.evaluate.texts.tasks import Task, load_tasks
from saelens_cosine.loading import from_pretrained
from saelens_cosine.metrics.causal.forward import CleanRun, clean_run
from saelens_cosine.metrics.codes import canonical_codes, sparse_codes
from saelens_cosine.metrics.dictionary.matching import FeatureMatching, match_codes
from saelens_cosine.metrics.probing.probing import KProbe, Units, pool, probe_in_units
from saelens_cosine.metrics.reconstruction.clean_losses import CleanLosses, clean_losses
from saelens_cosine.plain import digest, fingerprint, model_fingerprint
from saelens_cosine.progress import Progress, shown
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


class Loader(ExitStack):
    """Loads SAEs, and their models and texts once for all that share them. Takes planted sinks out of the models at the end.

    A cache of activations that it begins is of all `hooks`, those of the SAEs that will be loaded as far as they are known."""

    def __init__(
        self, settings: EvaluationSettings, folder: Path, progress: Progress | None = None, hooks: Iterable[str] = ()
    ):
        super().__init__()
        self.settings, self.folder, self.progress, self.hooks = settings, folder, shown(progress), list(hooks)
        self._texts: dict[tuple[Any, ...], Text] = {}
        self._models: dict[tuple[Any, ...], HookedModel] = {}
        self._hashes: dict[int, str] = {}

    def subject(self, source: Source, baseline: Subject | None = None) -> Subject:
        """An SAE ready to be measured.

        Raises:
            ValueError: its model, hook or text nobody has named.
            CheckpointError, OSError: it, its model or its text cannot be loaded.
        """
        sae = from_pretrained(source.place, source.sae_id, device=self.settings.device)
        return Subject(source, sae, self.text(source, sae), self.folder, baseline)

    def text(self, source: Source, sae: SAE[Any]) -> Text:
        """The text that an SAE is measured on."""
        settings, metadata = self.settings, sae.cfg.metadata
        model_name, hook = settings.model or metadata.model_name, settings.hook or metadata.hook_name
        dataset = settings.dataset or metadata.dataset_path
        if not (model_name and hook and dataset):
            raise ValueError(
                f"{source.name} names model={metadata.model_name}, hook={hook}, dataset={metadata.dataset_path} in its metadata. "
                "Pass those that are missing with --model, --hook and --dataset."
            )
        planted = bool(metadata.planted_sinks) if settings.plant_sinks is None else settings.plant_sinks
        hooked = self._model(model_name, hook, planted, metadata)
        hook = metadata.hook_name = hooked.hook_name  # as this model calls it
        head = metadata.hook_head_index
        _check_size(source.name, sae, hooked, head)
        form = ContextForm.of(metadata, settings.context_size, hooked.context_size)
        key = (id(hooked.model), hook, head, dataset, planted, form)
        if key not in self._texts:
            self.progress("Reading held-out text", 0, 1)
            splits = load_text(dataset)
            store = form.store(hooked.model, splits.heldout, hook, hooked.d_in, settings.device)
            contexts = sample_contexts(store, settings.tokens)
            seen = form.seen(hooked.model, contexts.tokens)
            batches = told(contexts.batches, self.progress, "Gathering held-out activations")
            with self._cached(hooked, planted, form, dataset, splits):
                sample = sample_tokens(
                    hooked.model, hook, batches, settings.max_norm_multiple, contexts.documents, seen, head
                )
            if not len(sample):
                raise ValueError(
                    f"{source.name} was trained on positions seqpos_slice={form.seqpos_slice} without the tokens "
                    f"exclude_special_tokens={form.exclude_special_tokens}: none of these is in contexts of "
                    f"{form.context_size} tokens. Pass a larger --context-size."
                )
            self._texts[key] = Text(
                model_name,
                hooked.model,
                self._model_sha256(hooked.model),
                hook,
                dataset,
                planted,
                form,
                splits.rule,
                contexts,
                sample,
                settings,
                head,
                progress=self.progress,
                rounded=settings.activations is not None,
                model_kwargs=hooked.kwargs,
            )
        return self._texts[key]

    @contextmanager
    def _cached(
        self, hooked: HookedModel, planted: bool, form: ContextForm, dataset: str, splits: TextSplits
    ) -> Generator[None]:
        """The settings' cache of activations in the model's place, if they name one."""
        folder, hook = self.settings.activations, hooked.hook_name
        if folder is None:
            yield
            return
        sinks, sha256 = [hook] if planted else [], self._model_sha256(hooked.model)
        others = [] if planted or self.settings.hook else [hooked.at(hook=other).hook_name for other in self.hooks]
        identity = CacheIdentity.of(hooked, [hook, *others], form, dataset, splits, sinks, sha256)
        with open_cache(folder, identity) as cache, standing_in(hooked.model, cache):
            yield

    def _model(self, name: str, hook: str, planted: bool, metadata: Any) -> HookedModel:
        """The model as the SAE's metadata say that it was loaded, once for all hooks that nothing is planted at."""
        class_name, kwargs = metadata.model_class_name, metadata.model_from_pretrained_kwargs
        choice = choose_model(name, hook, class_name, kwargs)
        key = (name, hook if planted else None, choice.class_name, json.dumps(choice.kwargs, sort_keys=True))
        if key not in self._models:
            self.progress("Loading the model", 0, 1)
            hooked = load_hooked_model(name, self.settings.device, None, hook, class_name, kwargs)
            if planted:
                self.callback(plant_sinks(hooked.model, hooked.hook_name))
            self._models[key] = hooked
        return self._models[key].at(hook=hook)

    def _model_sha256(self, model: Any) -> str:
        """Of a model that is kept, once."""
        if id(model) not in self._hashes:
            self._hashes[id(model)] = model_fingerprint(model)
        return self._hashes[id(model)]


def _check_size(name: str, sae: SAE[Any], hooked: HookedModel, head: int | None) -> None:
    size = hooked.d_in if head is None else size_at_hook(hooked.model, hooked.hook_name, head)
    if size != sae.cfg.d_in:
        of = "" if head is None else f", head {head},"
        raise ValueError(
            f"{name} has d_in={sae.cfg.d_in}, and the activations of {hooked.name} at {hooked.hook_name}{of} have size {size}. "
            "Name the hook point that it was trained on with --hook, or its model with --model."
        )

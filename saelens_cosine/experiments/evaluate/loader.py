"""Loads what is measured: SAEs, and their models and texts once for all SAEs that share them."""

from __future__ import annotations

import json
from collections.abc import Generator, Iterable
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from sae_lens.saes.sae import SAE

from saelens_cosine.activations.cache.cache import open_cache
from saelens_cosine.activations.cache.identity import CacheIdentity
from saelens_cosine.activations.cache.standing_in import standing_in
from saelens_cosine.activations.contexts import ContextForm, sample_contexts, told
from saelens_cosine.activations.hook_points import size_at_hook
from saelens_cosine.activations.models import HookedModel, choose_model, load_hooked_model
from saelens_cosine.activations.planted_sinks import plant_sinks
from saelens_cosine.activations.sample import sample_tokens
from saelens_cosine.activations.text import TextSplits, load_text
from saelens_cosine.experiments.evaluate.settings import EvaluationSettings
from saelens_cosine.experiments.evaluate.sources import Source
from saelens_cosine.experiments.evaluate.subject import Subject, Text
from saelens_cosine.loading import from_pretrained
from saelens_cosine.plain import model_fingerprint
from saelens_cosine.progress import Progress, shown


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

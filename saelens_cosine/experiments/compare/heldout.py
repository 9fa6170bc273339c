"""Held-out activations and prompts at a hook, the same for every arm, k and seed."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from sae_lens import SAE

from saelens_cosine.activations.contexts import ContextForm, Contexts, sample_contexts, told
from saelens_cosine.activations.models import HookedModel
from saelens_cosine.activations.sample import TokenSample, sample_tokens
from saelens_cosine.activations.site import describe_site
from saelens_cosine.experiments.compare.settings import ComparisonSettings
from saelens_cosine.metrics.reconstruction.by_norm import Reconstruction, evaluate_reconstruction
from saelens_cosine.metrics.reconstruction.clean_losses import CleanLosses, clean_losses
from saelens_cosine.metrics.reconstruction.loss_recovered import ce_loss_recovered
from saelens_cosine.progress import Progress, shown

SET_APART = 5
"""Where learning rates are chosen, one held-out document in so many serves the choice, and no figure."""


def context_size(settings: ComparisonSettings, model: HookedModel) -> int:
    """As far as the model allows."""
    return min(settings.context_size, model.context_size or settings.context_size)


def heldout_contexts(settings: ComparisonSettings, model: HookedModel, text: Any) -> Contexts:
    """Contexts from all held-out documents, the same at every hook.

    Raises:
        ValueError: the text is shorter than one of them.
    """
    form = ContextForm(context_size(settings, model))
    store = form.store(model.model, text, model.hook_name, model.d_in, settings.device)
    return sample_contexts(store, settings.eval_tokens)


class HeldOut:
    """
    Held-out text at one hook.

    Args:
        settings: of the comparison.
        model: hooked there.
        contexts: from all held-out documents.
        progress: told of their tokens.

    Raises:
        ValueError: the text is of one document where a learning rate is chosen, or activations are nothing but zeros.
    """

    def __init__(
        self, settings: ComparisonSettings, model: HookedModel, contexts: Contexts, progress: Progress | None = None
    ):
        self.settings, self.model, self.progress = settings, model, shown(progress)
        apart = torch.zeros(len(contexts.tokens), dtype=torch.bool)
        if len(settings.rates) > 1:
            apart = contexts.documents % SET_APART == 0
            if apart.all() or not apart.any():
                raise ValueError(
                    f"The held-out text gives {len(contexts.tokens)} contexts, of which {int(apart.sum())} would serve the choice of a "
                    "learning rate and the others be measured; it takes some of both. Use more --eval-tokens or a larger dataset, or one --lr."
                )
        measured = Contexts(contexts.tokens[~apart], contexts.documents[~apart])
        sample = self._sample(measured)
        decode = getattr(getattr(model.model, "tokenizer", None), "decode", None)
        self.site, self.dropped_share = describe_site(sample, model.hook_name, decode), sample.high_norm_share
        self.activations = sample.without_sinks().activations
        self.for_choice: torch.Tensor | None = None
        if apart.any():
            chosen_on = Contexts(contexts.tokens[apart], contexts.documents[apart])
            self.for_choice = self._sample(chosen_on).without_sinks().activations
        self.prompts = measured.at_even_steps(settings.eval_prompts).batches

    def _sample(self, contexts: Contexts) -> TokenSample:
        return sample_tokens(
            self.model.model,
            self.model.hook_name,
            told(contexts.batches, self.progress, "Gathering held-out activations"),
            self.settings.max_norm_multiple,
            contexts.documents,
        )

    @cached_property
    def _clean_losses(self) -> CleanLosses:
        return clean_losses(self.model.model, self.model.hook_name, self.prompts, compute_kl=False)

    def evaluate(self, sae: SAE[Any]) -> tuple[Reconstruction, float]:
        """An SAE in its inference form: reconstruction, and cross-entropy recovered."""
        ce = ce_loss_recovered(sae, self._clean_losses, self.settings.max_norm_multiple)
        return evaluate_reconstruction(sae, self.activations), ce

    def judge(self, sae: SAE[Any]) -> Reconstruction | None:
        """On documents that serve the choice of a learning rate and nothing else; None where there is no choice."""
        return None if self.for_choice is None else evaluate_reconstruction(sae, self.for_choice)

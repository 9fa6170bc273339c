"""What can be measured, one row each: of a text, of an SAE, or of an SAE against the one that it is compared with."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from transformer_lens import HookedTransformer

from saelens_cosine import saebench
from saelens_cosine.activations.models import TRANSFORMER_LENS, choose_model
from saelens_cosine.activations.sample import TokenSample
from saelens_cosine.bundled import BUNDLED
from saelens_cosine.experiments.evaluate.results.training_log import training_log
from saelens_cosine.experiments.evaluate.score_swap import score_swap
from saelens_cosine.experiments.evaluate.subject import Subject, Text
from saelens_cosine.experiments.evaluate.texts.tasks import bundled_concepts
from saelens_cosine.metrics.causal import (
    PROTOCOLS,
    ablation_precision,
    direction_norm_patching,
    reconstruct,
    steering,
    win_rate,
)
from saelens_cosine.metrics.dictionary.cofiring import cofiring
from saelens_cosine.metrics.dictionary.geometry import decoder_geometry
from saelens_cosine.metrics.dictionary.matching import FeatureMatching, Matches
from saelens_cosine.metrics.norms.encoder_gradients import encoder_gradients
from saelens_cosine.metrics.norms.exponents import exponent_distribution, norm_exponents
from saelens_cosine.metrics.norms.norm_detectors import norm_detectors
from saelens_cosine.metrics.norms.norm_noise import norm_noise
from saelens_cosine.metrics.norms.norm_response import norm_response, scores_about
from saelens_cosine.metrics.probing.decomposition import decompose, over_tasks
from saelens_cosine.metrics.probing.probing import K_VALUES, probe, probe_activations
from saelens_cosine.metrics.reconstruction.afa import measure_afa, summarize_afa
from saelens_cosine.metrics.reconstruction.by_norm import diagnose_reconstruction
from saelens_cosine.metrics.reconstruction.documents import fve_by_document
from saelens_cosine.metrics.reconstruction.loss_recovered import loss_recovered
from saelens_cosine.metrics.reconstruction.zf_plot import POINTS, zf_points
from saelens_cosine.metrics.token_gram import firings
from saelens_cosine.plain import digest
from saelens_cosine.report.html import features_for_report

PAIRS_LISTED = 2000
"""Features whose partners `matching` lists, at even steps through those that have one."""

SPLITS = 5


class NotApplicable(Exception):
    """An eval that says nothing of an SAE, with the reason."""


@dataclass(frozen=True)
class Eval:
    """
    Args:
        measure (Callable): Its result, of plain values and dataclasses.
        of (Literal["text", "sae", "arm", "pair"]): A text alone, an SAE, the first SAE of an arm, or an SAE and its baseline.
        about (str): One line for `--help`.
        uses (tuple[str, ...]): Settings that change its result, beyond those that say what the tokens are.
        reads (Callable): The content of what else its result depends on, such as files that settings name.
    """

    measure: Callable[[Any], Any]
    of: Literal["text", "sae", "arm", "pair"]
    about: str
    uses: tuple[str, ...] = ()
    reads: Callable[[Any], Any] = lambda _: ()


def _task_texts(of: Text | Subject) -> Any:
    return (of if isinstance(of, Text) else of.text).labelled


def _concept_texts(subject: Subject) -> Any:
    """Of other corpora they are the tokens measured."""
    return bundled_concepts(subject.settings.concept_texts) if subject.text.dataset == BUNDLED else None


def _tokens(text: Text) -> Any:
    sample = text.sample
    norms, high = sample.norms, ~sample.ordinary
    positions = torch.bincount(sample.positions[high], minlength=1)
    common = positions.argsort(descending=True, stable=True)[:5]
    quantiles = (0.01, 0.25, 0.5, 0.75, 0.99, 1.0)
    return {
        "tokens": len(sample),
        "high_norm_share": sample.high_norm_share,
        "high_norm_multiple": (norms[high].median() / norms[norms > 0].median()).item() if high.any() else None,
        "high_norm_positions": [[int(p), int(positions[p])] for p in common if positions[p]],
        "norm_quantiles": [[q, float(np.quantile(norms.numpy(), q))] for q in quantiles],
    }


def _patching(text: Text) -> Any:
    sample = text.sample_of(text.run)
    return {
        name: {
            context: direction_norm_patching(text.run, text.treated(sample, name), context=context)
            for context in ("alone", "text")
        }
        for name in text.settings.treatments
    }


def _probing_baseline(text: Text) -> Any:
    return {
        name: [probe_activations(text.treated(sample, name), task.labels, splits=SPLITS) for task, sample in text.tasks]
        for name in text.settings.treatments
    }


def _training_metrics(subject: Subject) -> dict[str, float] | None:
    log = training_log(subject.source, subject.sae)
    return log[-1].get("metrics") if log else None


def _reconstruction(subject: Subject) -> Any:
    metrics = _training_metrics(subject)
    found = subject.by_treatment(
        lambda sample: diagnose_reconstruction(subject.sae, sample.activations, training_metrics=metrics)
    )
    sample, treatments = subject.text.sample, subject.settings.treatments
    return {**found, "fve_by_document": fve_by_document(reconstruct(subject.sae), sample, treatments)}


def _loss(subject: Subject) -> Any:
    settings, text = subject.settings, subject.text
    if text.head is not None and not re.search("hook_[qkvz]", text.hook):  # SAELens would give all heads to the SAE
        raise NotApplicable(
            f"SAELens' loss replaces one head at hook_q, hook_k, hook_v and hook_z, not at {text.hook}."
        )
    batches = text.contexts.at_even_steps(max(1, settings.loss_tokens // text.form.context_size)).batches
    bounds = {"with_sinks": None, "without_sinks": settings.max_norm_multiple}
    return {name: loss_recovered(subject.sae, text.model, batches, bounds[name]) for name in settings.treatments}


def _norm_response(subject: Subject) -> Any:
    sae = subject.sae

    def of(sample: TokenSample) -> dict[str, Any]:
        found: dict[str, Any] = {
            "response": norm_response(sae, sample.activations),
            "noise": norm_noise(sae, sample.activations),
        }
        if scores_about(sae) is not None:
            found["response_about_b_dec"] = norm_response(sae, sample.activations, about="b_dec")
            found["noise_about_b_dec"] = norm_noise(sae, sample.activations, about="b_dec")
        return found

    return subject.by_treatment(of)


def _dictionary(subject: Subject) -> Any:
    def of(name: str) -> dict[str, Any]:
        codes, sample = subject.codes_of(name), subject.text.treated(subject.text.sample, name)
        return {"norm_detectors": norm_detectors(codes, sample.norms), "cofiring": cofiring(codes, top=20)}

    exponents = norm_exponents(subject.sae)
    firing_rate = torch.from_numpy(firings(subject.codes) / len(subject.text.sample))
    return {
        **{name: of(name) for name in subject.settings.treatments},
        "geometry": decoder_geometry(subject.sae),
        "exponents": exponent_distribution(subject.sae, firing_rate),
        "exponent_values": [] if exponents is None else exponents.double().flatten().tolist(),
    }


def _gradients(subject: Subject) -> Any:
    def of(sample: TokenSample) -> Any:
        mixed = torch.randperm(len(sample), generator=torch.Generator().manual_seed(0))
        return encoder_gradients(subject.sae, sample.activations[mixed])

    return subject.by_treatment(of)


def _afa(subject: Subject) -> Any:
    def of(sample: TokenSample) -> dict[str, Any]:
        tokens = {
            f"{bias}, to the {reference}": measure_afa(subject.sae, sample.activations, reference=reference, bias=bias)
            for bias in ("augment", "center")
            for reference in ("input", "reconstruction")
        }
        points = {
            name: zf_points(tokens[f"{bias}, to the input"], subject.source.name, POINTS)
            for name, bias in (("zf_points", "augment"), ("zf_points_centred", "center"))
        }
        return {**{kind: summarize_afa(found) for kind, found in tokens.items()}, **points}

    found = subject.by_treatment(of)
    papers = [of_treatment.pop("zf_points") for of_treatment in found.values()]
    return {**found, "zf_points": papers[0]}


def _probing(subject: Subject) -> Any:
    tasks = subject.text.tasks
    ks = _ks(subject.sae.cfg.d_sae)

    def of(name: str) -> dict[str, Any]:
        return {
            units: [probe(subject.pooled(i, name), task.labels, ks, units, SPLITS) for i, (task, _) in enumerate(tasks)]
            for units in ("canonical", "scale_free")
        }

    texts = [len(task.labels) for task, _ in tasks]
    return {
        "tasks": [task.name for task, _ in tasks],
        "texts": texts,
        **{name: of(name) for name in subject.settings.treatments},
    }


def _score_swap(subject: Subject) -> Any:
    def of(sample: TokenSample) -> Any:
        fit_on = sample.contexts % 2 == 0
        return score_swap(subject.sae, sample.where(fit_on), sample.where(~fit_on), progress=False)

    return subject.by_treatment(of)


def _causal(subject: Subject) -> Any:
    run, sae, settings = subject.text.run, subject.sae, subject.settings
    sample = subject.text.sample_of(run)

    def of(name: str) -> dict[str, Any]:
        tokens = subject.text.treated(sample, name)
        rates = {
            protocol: win_rate(run, sae, tokens, replace(row, features=min(row.features, settings.causal_features)))
            for protocol, row in PROTOCOLS.items()
        }
        concepts = subject.text.concepts
        texts = subject.text.treated(subject.text.sample_of(concepts.run), name)
        return {
            "win_rate": rates,
            "steering": steering(run, sae, tokens),
            "concepts": concepts.names,
            "ablation": ablation_precision(concepts.run, sae, texts, torch.tensor(concepts.labels)),
        }

    return {name: of(name) for name in settings.treatments}


def _features(subject: Subject) -> Any:
    text = subject.text
    found = features_for_report(
        subject.sae,
        text.model,
        text.contexts.batches,
        subject.source.arm,
        max_features=subject.settings.browser_features,
    )
    return {"features": found}


def _matching(subject: Subject) -> Any:
    matchings = _matchings(subject)

    def of(name: str) -> dict[str, Any]:
        found, codes = matchings[name], subject.codes_of(name)
        norms = subject.text.treated(subject.text.sample, name).norms
        in_top = firings(codes[(norms >= torch.quantile(norms, 0.75)).numpy()]) / np.maximum(firings(codes), 1)
        steps = _steps(len(found.a.pairs.features), PAIRS_LISTED)
        listed = {field: [column[i] for i in steps] for field, column in asdict(found.a.pairs).items()}
        return {
            **{field: value for field, value in asdict(found).items() if field not in ("a", "b")},
            "features": {**_counts(found.a), "paired": len(found.a.pairs.features)},
            "baseline_features": _counts(found.b),
            "pairs": listed,
            "top_quartile_share": [float(in_top[feature]) for feature in listed["features"]],
            "matched_norms": norm_detectors(codes, norms, found.a.matched_features),
            "unique_norms": norm_detectors(codes, norms, found.a.unique_features),
        }

    return {name: of(name) for name in subject.settings.treatments}


def _decomposition(subject: Subject) -> Any:
    matchings, baseline, tasks = _matchings(subject), subject.baseline, subject.text.tasks
    assert baseline is not None

    def of(name: str) -> list[Any]:
        pairs = matchings[name].a.pairs
        # as `Matches` counts them
        matched = [
            (feature, partner)
            for feature, partner, correlation, cosine, mutual in zip(
                pairs.features, pairs.partners, pairs.correlations, pairs.decoder_cosines, pairs.mutual, strict=True
            )
            if mutual and correlation >= 0.7 and cosine > 0.7
        ]
        if not matched:
            raise NotApplicable("No feature has a mutual match in the SAE that it is compared with.")
        ours, theirs = zip(*matched, strict=True)
        parts = [
            decompose(
                subject.pooled(i, name),
                baseline.pooled(i, name),
                task.labels,
                ours,
                theirs,
                _ks(len(matched)),
                splits=SPLITS,
            )
            for i, (task, _) in enumerate(tasks)
        ]
        by_k = (list(by_task) for by_task in zip(*parts, strict=True))
        return [over_tasks(by_task) if len(by_task) > 1 else by_task[0] for by_task in by_k]

    return {name: of(name) for name in subject.settings.treatments}


def _saebench(name: str) -> Callable[[Subject], Any]:
    def measure(subject: Subject) -> Any:
        settings, model, name_of_model = subject.settings, subject.text.model, subject.sae.cfg.metadata.model_name
        lens = isinstance(model, HookedTransformer)
        if not lens and choose_model(name_of_model or "", class_name=TRANSFORMER_LENS).class_name != TRANSFORMER_LENS:
            raise NotApplicable(f"SAEBench runs HookedTransformers, and TransformerLens knows no {name_of_model}.")
        configured = saebench_settings(name, subject.text.dataset, settings.saebench)
        prepared = saebench.prepare(subject.sae, subject.source.arm)
        report = saebench.run(
            [prepared],
            [name],
            subject.folder / "saebench",
            model=model if lens else None,
            device=settings.device,
            settings={name: configured} if configured else None,
            max_norm_multiple=None if settings.sinks == "keep" else settings.max_norm_multiple,
            judge=settings.judge,
            quiet=True,
            model_identity=_hooked_model(subject),
        )
        (result,) = report.results
        return {**asdict(result), "file": None, "file_without_high_norm": None}

    return measure


def _hooked_model(subject: Subject) -> str:
    """The model with the sinks that are planted in it."""
    text = subject.text
    return digest([text.model_sha256, text.hook if text.planted else None])


def _saebench_data(name: str) -> Callable[[Subject], Any]:
    def reads(subject: Subject) -> Any:
        configured = saebench_settings(name, subject.text.dataset, subject.settings.saebench)
        config = saebench.EVALS[name].make_config(subject.text.model_name, "float32", 1, configured)
        return [configured, saebench.data_contents(name, config), saebench.versions()]

    return reads


def saebench_settings(name: str, dataset: str, given: Any) -> dict[str, Any]:
    """Changes to an eval's configuration: on the bundled corpus, its text instead of a data set on the Hub."""
    bundled = {"core": {"dataset": BUNDLED}, "autointerp": {"dataset_name": BUNDLED}}
    return {**(bundled.get(name, {}) if dataset == BUNDLED else {}), **given.get(name, {})}


def _matchings(subject: Subject) -> dict[str, FeatureMatching]:
    if subject.baseline is None or subject.baseline.text is not subject.text:
        raise NotApplicable("The SAE that it is compared with was not measured on the same activations.")
    return subject.matchings


def _counts(matches: Matches) -> dict[str, Any]:
    return {name: value for name, value in asdict(matches).items() if not isinstance(value, dict | tuple)}


def _steps(n: int, most: int) -> list[int]:
    return np.linspace(0, n - 1, min(n, most)).round().astype(int).tolist()


def _ks(most: int) -> tuple[int | None, ...]:
    return tuple(k for k in K_VALUES if k is None or k <= most)


EVALS: dict[str, Eval] = {
    "tokens": Eval(_tokens, "text", "how long activations are, and where the high-norm tokens stand"),
    "patching": Eval(
        _patching, "text", "direction against norm of activations in the model's predictions", ("causal_contexts",)
    ),
    "probing_baseline": Eval(_probing_baseline, "text", "probes on the activations", reads=_task_texts),
    "reconstruction": Eval(
        _reconstruction,
        "sae",
        "FVE in three definitions, L0, four kinds of dead features, by norm",
        reads=_training_metrics,
    ),
    "loss": Eval(_loss, "sae", "cross-entropy and KL recovered, by norm", ("loss_tokens",)),
    "norm_response": Eval(_norm_response, "sae", "codes as the input is scaled; FVE under norm noise"),
    "dictionary": Eval(_dictionary, "sae", "norm detectors, co-firing, decoder geometry, exponents"),
    "gradients": Eval(_gradients, "sae", "which tokens' norms train the encoder"),
    "afa": Eval(_afa, "sae", "AFA, epsilon-LBO and the ZF plot"),
    "probing": Eval(_probing, "sae", "k-sparse probing, canonical and scale-free", reads=_task_texts),
    "score_swap": Eval(_score_swap, "sae", "the same dictionary read by the other score"),
    "causal": Eval(
        _causal,
        "sae",
        "win rate of the cosine, ablation precision, steering",
        ("causal_contexts", "causal_features", "concept_texts"),
        reads=_concept_texts,
    ),
    "features": Eval(
        _features, "arm", "best contexts of an arm's first seed, for the page's browser", ("browser_features",)
    ),
    "matching": Eval(_matching, "pair", "features shared with the first arm"),
    "decomposition": Eval(
        _decomposition, "pair", "probing gap to the first arm: discovery, separability", reads=_task_texts
    ),
    **{
        name: Eval(
            _saebench(name),
            "sae",
            f"SAEBench's {name}",
            ("saebench", "judge") if name == "autointerp" else ("saebench",),
            reads=_saebench_data(name),
        )
        for name in saebench.EVALS
    },
}
"""By name, in the order in which they are listed. A row here adds one."""

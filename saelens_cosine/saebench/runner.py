"""One eval of SAEBench on one SAE: where its results and caches are, what fills these, and that it ends with a result."""

from __future__ import annotations

import contextlib
import copy
import importlib
import io
import json
import logging
import time
from collections.abc import Generator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from sae_lens import ActivationsStore
from sae_lens.saes.sae import SAEMetadata
from sae_lens.saes.standard_sae import StandardSAE, StandardSAEConfig

from saelens_cosine.activations.sample import sample_tokens
from saelens_cosine.files.names import below
from saelens_cosine.files.secrets import scrubbed, without_secrets
from saelens_cosine.files.whole import scratch_folder, whole_file, whole_folder, write_json
from saelens_cosine.metrics.reconstruction.fve import explained_variance
from saelens_cosine.plain import digest, model_fingerprint
from saelens_cosine.saebench.evals import EVALS, BenchEval, Call, Judge, text_folder
from saelens_cosine.saebench.preflight import data_contents, versions
from saelens_cosine.saebench.prepare import PreparedSAE, prepare
from saelens_cosine.saebench.results import EvalResult, VarianceExplained, headline_metrics, load_record, save_record
from saelens_cosine.saebench.scopes import (
    HighNormMask,
    LogWithoutSecrets,
    remembering,
    seeded,
    serving,
    without_shape_checks,
)

FVE_TOKENS = 100_000
"""Tokens that our own fraction of variance explained is measured on, at most."""


class Runner:
    """Where one run's things are, and how one eval of one SAE is done."""

    def __init__(
        self,
        output: Path,
        model: Any,
        device: str,
        judge: Judge,
        max_norm_multiple: float | None,
        quiet: bool,
        model_identity: str | None = None,
    ):
        self.output, self.model, self.device, self.judge = output, model, device, judge
        self.max_norm_multiple, self.quiet = max_norm_multiple, quiet
        self.model_identity = model_identity or (model and model_fingerprint(model))
        self.data: dict[str, dict[str, str]] = {}
        self.log = output / "saebench.log"

    def key(self, row: BenchEval, config: Any) -> str:
        """Stands for all but the SAE that decides a score."""
        judge = (
            [self.judge.model, self.judge.base_url and without_secrets(self.judge.base_url)]
            if row.name == "autointerp"
            else None
        )
        if row.name not in self.data:
            self.data[row.name] = data_contents(row.name, config)
        return digest([row.name, _plain(config), self.model_identity, judge, self.data[row.name], versions()])[:12]

    def caches(self, row: BenchEval, config: Any, multiple: float | None = None) -> Path:
        suffix = "" if multiple is None else f"-without-{multiple:g}"
        return self.output / "caches" / row.name / (self.key(row, config) + suffix)

    def is_warm(self, row: BenchEval, config: Any, saes: Sequence[PreparedSAE]) -> bool:
        """Whether an eval needs no more texts."""
        caches = [self.caches(row, config, multiple) for multiple in {None, self.max_norm_multiple}]
        hooks = {sae.cfg.metadata.hook_name for sae in saes}
        return row.pools_tokens and all(
            below(folder, hook, "hook name").exists() for folder in caches for hook in hooks
        )

    def score(self, row: BenchEval, config: Any, sae: PreparedSAE) -> EvalResult:
        multiple = self.max_norm_multiple if row.pools_tokens or row.name == "core" else None
        key = self.key(row, config)
        folder = self.output / row.name / (key if multiple is None else f"{key}-{multiple:g}")
        record = folder / f"{sae.name}.json"
        if (found := load_record(record)) is not None:
            return found
        folder.mkdir(parents=True, exist_ok=True)
        caches = self.caches(row, config)
        file, seconds = self._run(row, config, sae, caches, folder / f"{sae.name}.saebench.json", None)
        without: Path | None = None
        share = None
        if row.pools_tokens and multiple is not None:
            masked = self.caches(row, config, multiple)
            target = folder / f"{sae.name}.without_high_norm.saebench.json"
            without, more = self._run(row, config, sae, masked, target, multiple)
            seconds += more
            share = json.loads((below(masked, sae.cfg.metadata.hook_name, "hook name") / "sinks.json").read_text())[
                "high_norm_share"
            ]
        result = EvalResult(
            eval=row.name,
            sae=sae.name,
            metrics=headline_metrics(file),
            metrics_without_high_norm=without and headline_metrics(without),
            high_norm_share=share,
            max_norm_multiple=multiple,
            variance_explained=self._variance_explained(config, sae, caches) if row.name == "core" else None,
            config=_plain(config),
            versions=versions(),
            seconds=seconds,
            silence_padding=sae.silence_padding,
            file=str(file),
            file_without_high_norm=without and str(without),
        )
        save_record(result, record)
        return result

    def _run(
        self, row: BenchEval, config: Any, sae: PreparedSAE, caches: Path, target: Path, multiple: float | None
    ) -> tuple[Path, float]:
        """Score one SAE from warm caches; its result file, and the seconds that took."""
        with self._scopes(), self._remembering(row):
            caches = self._warm(row, config, sae, caches, multiple)
            start = time.perf_counter()
            self._call(row, config, sae, caches, target)
        return target, time.perf_counter() - start

    def _warm(self, row: BenchEval, config: Any, sae: PreparedSAE, caches: Path, multiple: float | None) -> Path:
        """Fill an eval's caches with an SAE that is nobody's: the first to be scored would see other random numbers."""
        folder = below(caches, sae.cfg.metadata.hook_name, "hook name")
        if folder.exists() or not (row.pools_tokens or row.name == "absorption"):
            folder.mkdir(parents=True, exist_ok=True)
            return folder
        folder.parent.mkdir(parents=True, exist_ok=True)
        with whole_folder(folder) as unfinished:
            if row.name == "absorption":
                self._train_letter_probes(row, config, sae, unfinished)
            else:
                mask = None if multiple is None else HighNormMask(multiple)
                with contextlib.nullcontext() if mask is None else mask.on(row.module), seeded(0):
                    self._call(row, config, _throwaway(sae, config), unfinished, unfinished / "throwaway.json")
                if mask is not None:
                    counts = {"tokens": mask.tokens_seen, "high_norm_share": mask.tokens_dropped / mask.tokens_seen}
                    write_json(counts, unfinished / "sinks.json")
        return folder

    def _train_letter_probes(self, row: BenchEval, config: Any, sae: PreparedSAE, caches: Path) -> None:
        common = importlib.import_module("sae_bench.evals.absorption.common")
        with seeded(config.random_seed):
            common.load_or_train_probe(
                model=self.model,
                base_template=config.prompt_template,
                pos_idx=config.prompt_token_pos,
                layer=int(sae.cfg.metadata.hook_name.split(".")[1]),
                probes_dir=caches / "probes",
                device=self.device,
            )

    def _call(self, row: BenchEval, config: Any, sae: PreparedSAE, caches: Path, target: Path) -> None:
        with scratch_folder(target.parent) as scratch, whole_file(target) as unfinished:
            # SAEBench casts the SAE that it gets, and changes the configuration
            call = Call(_of_loaded_model(sae).to(self.device), self.device, scratch, caches, self.judge)
            errors = io.StringIO()
            handler = logging.StreamHandler(errors)
            handler.setLevel(logging.ERROR)
            logger = logging.getLogger("sae_bench")
            logger.addHandler(handler)
            try:
                with seeded(getattr(config, "random_seed", 42)):
                    row.call(row.module, copy.deepcopy(config), call)
            finally:
                logger.removeHandler(handler)
            written = [path for path in scratch.rglob("*_eval_results.json") if "sae_probes" not in path.parts]
            if len(written) != 1:
                raise RuntimeError(
                    f"SAEBench's {row.name} ended without a result file. "
                    + (errors.getvalue().strip() or f"The end of its output: {_tail(self.log)}")
                )
            # with the SAE's config, whose metadata may say anything
            unfinished.write_text(json.dumps(scrubbed(json.loads(written[0].read_text())), indent=2))

    @contextlib.contextmanager
    def _scopes(self) -> Generator[None, None, None]:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as scopes:
            log = LogWithoutSecrets(scopes.enter_context(self.log.open("a")))
            scopes.enter_context(contextlib.redirect_stdout(log))
            if self.quiet:
                scopes.enter_context(contextlib.redirect_stderr(log))
            scopes.enter_context(without_shape_checks())
            if self.model is not None:
                scopes.enter_context(serving(self.model))
            yield

    def _remembering(self, row: BenchEval) -> contextlib.AbstractContextManager[None]:
        if row.name != "core" or self.model is None or self.model_identity is None:
            return contextlib.nullcontext()
        return remembering(self.model, self.model_identity)

    @torch.no_grad()
    def _variance_explained(self, config: dict[str, Any], sae: PreparedSAE, caches: Path) -> VarianceExplained:
        """Our own, on the first of the tokens that core reads."""
        sae = copy.deepcopy(sae).to(self.device)
        model, context, prompts = self.model, config["context_size"], config["eval_batch_size_prompts"]
        dataset = text_folder(config["dataset"], below(caches, sae.cfg.metadata.hook_name, "hook name"))
        source: Any = sae
        store = ActivationsStore.from_sae(model, source, context_size=context, dataset=dataset)
        store.shuffle_input_dataset(seed=42)  # as core does
        batches = min(config["n_eval_sparsity_variance_batches"], -(-FVE_TOKENS // (context * prompts)))
        tokens = [store.get_batch_tokens(prompts) for _ in range(batches)]
        metadata = sae.cfg.metadata
        with self._remembering(EVALS["core"]):
            sample = sample_tokens(
                model, metadata.hook_name, tokens, self.max_norm_multiple, head=metadata.hook_head_index
            )
        tokenizer = model.tokenizer
        special = {tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id} - {None}
        sample = sample.where(~torch.isin(sample.tokens, torch.tensor(sorted(special))))
        x_hat = torch.cat([sae(x.to(self.device)).cpu() for x in sample.activations.split(4096)])
        ordinary = sample.ordinary
        filtered = self.max_norm_multiple is not None
        return VarianceExplained(
            tokens=len(sample),
            fve=explained_variance(sample.activations, x_hat),
            high_norm_share=sample.high_norm_share if filtered else None,
            fve_without_high_norm=explained_variance(sample.activations[ordinary], x_hat[ordinary])
            if filtered
            else None,
        )


def _of_loaded_model(sae: PreparedSAE) -> PreparedSAE:
    """A copy that asks for nothing where its model is loaded, which it is: core would give a dtype twice."""
    sae = copy.deepcopy(sae)
    sae.cfg.model_from_pretrained_kwargs = sae.cfg.metadata.model_from_pretrained_kwargs = {}
    return sae


def _throwaway(sae: PreparedSAE, config: Any) -> PreparedSAE:
    """A small SAE for the same hook, with as many latents as the configuration asks probes for."""
    wanted = [*getattr(config, "k_values", []), *getattr(config, "n_values", []), 8]
    keys = ("model_name", "model_from_pretrained_kwargs", "hook_name", "prepend_bos")
    metadata = {key: sae.cfg.metadata.get(key) for key in keys}
    made = StandardSAEConfig(d_in=sae.cfg.d_in, d_sae=max(wanted), metadata=SAEMetadata(**metadata))
    return prepare(StandardSAE(made))


def _plain(config: Any) -> dict[str, Any]:
    return dict(config) if isinstance(config, dict) else asdict(config)


def _tail(log: Path, characters: int = 400) -> str:
    return log.read_text()[-characters:].strip()

"""`saelens-cosine evaluate`: diagnostics of saved SAEs on held-out text, with and without high-norm tokens.

What one evaluation of one SAE found is a file of its own, so that an interrupted run goes on where it ended and a second run
does nothing twice. It is named by a hash of what it is a result of: the content of tokens, labelled texts, language model and
SAE (weights and config) whatever they are called, the settings that it uses, and the versions of the packages. `evaluation.json`
gathers them.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

from sae_lens.saes.sae import SAE

from saelens_cosine import saebench
from saelens_cosine.devices import check_device
from saelens_cosine.experiments.evaluate.evals import EVALS, Eval, NotApplicable, NotMeasured
from saelens_cosine.experiments.evaluate.evals.of_sae.saebench import saebench_settings
from saelens_cosine.experiments.evaluate.loader import Loader
from saelens_cosine.experiments.evaluate.results.earlier import begin, open_evaluation
from saelens_cosine.experiments.evaluate.results.evaluation import SCHEMA, Evaluation, MeasuredSAE, MeasuredText
from saelens_cosine.experiments.evaluate.results.kept import Kept, keep, read_kept
from saelens_cosine.experiments.evaluate.settings import EvaluationSettings
from saelens_cosine.experiments.evaluate.sources import Source, controls, pair_seeds, parse_sources
from saelens_cosine.experiments.evaluate.subject import Subject, Text
from saelens_cosine.experiments.evaluate.texts.tasks import check_tasks
from saelens_cosine.experiments.evaluate.training_log import COURSE, training_log
from saelens_cosine.files.output import Output
from saelens_cosine.files.secrets import as_typed, scrubbed, without_secrets
from saelens_cosine.files.whole import write_json
from saelens_cosine.metrics.not_finite import NotFiniteError
from saelens_cosine.plain import digest, plain, versions
from saelens_cosine.progress import Progress, shown
from saelens_cosine.training.recorded import trained

ALWAYS_USED = ("sinks", "max_norm_multiple")
"""Settings that every result depends on. What else the settings say of the tokens, the tokens themselves say."""


def evaluate(
    sources: Sequence[str],
    settings: EvaluationSettings,
    output: str | Path | Output,
    on_progress: Progress | None = None,
    baseline: str | None = None,
    command: Sequence[str] = (),
    overwrite: bool = True,
) -> Evaluation:
    """Evaluate SAEs, and write `evaluation.json`; what an earlier run with these settings has measured is not measured again.

    Args:
        sources: `[arm=]place[#sae_id]`, see `parse_sources`.
        settings: what to measure.
        output: folder for `evaluation.json` and, in `measured/`, a file per SAE and evaluation; or what `open_evaluation` gives,
            for a caller who writes files of the evaluation too.
        on_progress: called with what is being done, how much of it is done, and how much there is.
        baseline: the arm that others are compared with; chosen by `parse_sources` if None.
        command: the command line that asked for it, if one did; kept as `as_typed` gives it.
        overwrite: replace the `evaluation.json` of other SAEs or settings when this one has ended; files in `measured/` stay. The
            command refuses unless told to.

    Returns:
        What was found; its `document()` is what `evaluation.json` holds.

    Raises:
        ValueError: unknown evaluations or tasks, a baseline that is no arm, or an SAE whose model, hook or text nobody has named.
        CheckpointError, OSError: an SAE, a model or a text that cannot be loaded.
        FileExistsError: figures of an earlier evaluation would go and `overwrite` is off, or a file there is not ours.
        OutputInUseError: another run writes to the folder.
        SAEBenchError: an eval of SAEBench that cannot run here; said before anything is measured.
    """
    unknown = [name for name in settings.evals if name not in EVALS]
    if unknown:
        raise ValueError(f"Unknown evaluation {unknown[0]!r}; there are {', '.join(EVALS)}.")
    check_tasks(settings.tasks or ())
    check_device(settings.device)
    parsed = parse_sources(sources, baseline)
    with open_evaluation(output) as opened:
        begin(opened, SCHEMA, parsed, settings, overwrite)
        return _evaluate(parsed, settings, opened, on_progress, command)


def _evaluate(
    parsed: Sequence[Source],
    settings: EvaluationSettings,
    output: Output,
    on_progress: Progress | None,
    command: Sequence[str],
) -> Evaluation:
    folder = output.folder
    measured = _Measured(folder, settings, shown(on_progress), parsed)
    began, typed = datetime.now(timezone.utc).isoformat(timespec="seconds"), as_typed(command) or None
    texts: dict[Text, MeasuredText] = {}
    saes: dict[Source, MeasuredSAE] = {}
    found = Evaluation(settings, began, typed, versions(), (), (), parsed[0].arm)
    against = {source: _baseline(parsed, source) for source in parsed}
    kept: dict[Source, Subject] = {}
    order = in_turn(parsed)
    due = 0.0  # when what is there is gathered: after each SAE, or later where that takes long
    hooks = dict.fromkeys(source.hook for source in parsed if source.hook)
    with Loader(settings, folder.resolve(), measured.progress, hooks) as loader:
        for i, source in enumerate(order):
            later = order[i + 1 :]
            other = against[source]
            partner = (kept.get(other) or loader.subject(other)) if other else None
            subject = loader.subject(source, partner)
            if i == 0:
                _check_saebench(subject)
            if subject.text not in texts:
                texts[subject.text] = measured.text(subject.text)
            saes[source] = measured.sae(subject, list(texts).index(subject.text))
            found = replace(
                found, texts=tuple(texts.values()), saes=tuple(saes[source] for source in parsed if source in saes)
            )
            needed = {against[one] for one in later}
            kept = {one.source: one for one in (partner, *kept.values(), subject) if one and one.source in needed}
            if not any(one.hook in (None, source.hook) for one in later):
                subject.text.forget()
            if not later or time.perf_counter() >= due:
                start = time.perf_counter()
                with output.file("evaluation.json") as path:
                    write_json(found.document(), path)
                due = time.perf_counter() + 10 * (time.perf_counter() - start)
    measured.end()
    return found


def in_turn(sources: Sequence[Source]) -> list[Source]:
    """The order in which SAEs are measured: hook by hook, so that what is kept of one text goes before the next; then seed by
    seed within a condition, so that the baseline's SAE is loaded once for all that are compared with it."""
    hooks, conditions = (list(dict.fromkeys(of)) for of in zip(*((s.hook, s.condition) for s in sources), strict=True))
    return sorted(sources, key=lambda s: (hooks.index(s.hook), conditions.index(s.condition), s.seed))


def _baseline(sources: Sequence[Source], source: Source) -> Source | None:
    """The first arm's SAE of its condition that is paired with this one, None if there is none; of the first arm's own seeds, the first."""
    first = controls(sources, sources[0].arm, source.condition)
    if source in first:
        return None if source == first[0] else first[0]
    seeds = [other.seed for other in sources if (other.arm, other.condition) == (source.arm, source.condition)]
    partner = pair_seeds(seeds, [other.seed for other in first]).get(source.seed)
    return next((other for other in first if other.seed == partner), None)


class _Measured:
    """Measures what no file has yet."""

    def __init__(self, folder: Path, settings: EvaluationSettings, progress: Progress, sources: Sequence[Source]):
        self.folder, self.settings, self.progress = folder, settings, progress
        self.saes, self.done, self.total = 0, 0, len(sources) * len(settings.evals)
        self.firsts = {(source.arm, source.condition): source for source in reversed(sources)}

    def text(self, text: Text) -> MeasuredText:
        """What is true of the text, whatever the SAE."""
        return MeasuredText(
            **self._results(text, "text", f"{text.model_name} at {text.hook}", [text.identity])._asdict(),
            model=text.model_name,
            hook=text.hook,
            head=text.head,
            dataset=text.dataset,
            planted_sinks=text.planted,
            form=plain(text.form),
        )

    def sae(self, subject: Subject, text: int) -> MeasuredSAE:
        """One SAE, measured on one of the texts."""
        source, identity = subject.source, subject.identity
        found = self._results(subject, "sae", source.name, identity)
        if source == self.firsts[source.arm, source.condition]:
            found = found.and_of(self._results(subject, "arm", source.name, identity))
        if (baseline := subject.baseline) is not None:
            found = found.and_of(self._results(subject, "pair", source.name, identity + baseline.identity))
        self.saes += 1
        self.done = self.saes * len(self.settings.evals)  # those that are not of this SAE too
        return MeasuredSAE(
            **found._asdict(),
            arm=source.arm,
            seed=source.seed,
            condition=source.condition,
            k=source.k,
            place=source.name,
            sha256=subject.sha256,
            architecture=subject.sae.cfg.architecture(),
            held_out=subject.held_out,
            baseline=subject.baseline and subject.baseline.source.name,
            metadata=scrubbed(plain(subject.sae.cfg.metadata.to_dict())),
            trained=trained(subject.sae),
            training=_training_log(source, subject.sae),
            text=text,
        )

    def end(self) -> None:
        self.progress("Evaluated", self.total, self.total)

    def _results(self, of: Text | Subject, kind: str, name: str, identity: list[str]) -> _Results:
        found = _Results({}, {})
        settings = self.settings.to_dict()
        for chosen in self.settings.evals:
            row = EVALS[chosen]
            if row.of != kind:
                continue
            self.progress(f"{name}: {chosen}", self.done, self.total)
            self.done += 1
            used = {field: settings[field] for field in (*ALWAYS_USED, *row.uses)}
            content = digest([identity, used, row.reads(of), versions(), *filter(None, [row.code])])
            file = self.folder / "measured" / f"{chosen}-{content[:16]}.json"
            kept = read_kept(file, row)
            if kept is None:
                start = time.perf_counter()
                try:
                    result = measure(row, of)
                except saebench.SAEBenchError as error:  # not kept: the next run tries again
                    found.results[chosen] = NotMeasured(without_secrets(str(error)))
                    continue
                kept = Kept(result, time.perf_counter() - start)
                keep(kept, file)
            found.results[chosen], found.seconds[chosen] = kept
        return found


class _Results(NamedTuple):
    results: dict[str, Any]
    seconds: dict[str, float]

    def and_of(self, others: _Results) -> _Results:
        return _Results(self.results | others.results, self.seconds | others.seconds)


def measure(row: Eval[Any], of: Any) -> Any:
    """What a measure finds, or why it refuses this SAE or this text; the other evals go on."""
    try:
        return row.read(plain(row.measure(of)))  # in the form that a later run reads
    except NotFiniteError as reason:
        return NotMeasured(without_secrets(str(reason)), reason.bad)
    except (NotApplicable, ValueError) as reason:
        return NotMeasured(without_secrets(str(reason)))


def _check_saebench(subject: Subject) -> None:
    """Say what cannot run before anything is measured."""
    settings = subject.settings
    chosen = [name for name in settings.evals if name in saebench.EVALS]
    if not chosen:
        return
    model_name = saebench.prepare(subject.sae).cfg.metadata.model_name
    problems = saebench.check_environment(chosen, model_name, judge=settings.judge)
    if not problems:
        dtype = "float32"
        configs = {
            name: saebench.EVALS[name].make_config(
                model_name, dtype, 1, saebench_settings(name, subject.text.dataset, settings.saebench)
            )
            for name in chosen
        }
        problems = saebench.check_environment(chosen, model_name, configs, settings.judge)
        problems += saebench.check_data(chosen, configs)
    if problems:
        raise saebench.SAEBenchError(problems)


def _training_log(source: Source, sae: SAE[Any]) -> dict[str, list[float]] | None:
    """The course of its training, of an SAE that `saelens-cosine compare` has trained."""
    log = training_log(source, sae)
    if log is None:
        return None
    return {name: [entry[name] for entry in log] for name in COURSE}

"""Runs of SAELens that are stopped anywhere and go on as if they had not been.

SAELens' checkpoint has weights, optimizer, schedules and scales. `ResumableRun` writes the rest beside it, in a folder of its own:
the place in the data (`training.resuming.stream`), random number generators, what the norm filter has counted, what a monitor has logged, and
the settings, which a run that goes on must share. SAELens reads such a checkpoint as any other.

Wrapped, for want of a seam, are the runner's method that calls `fit` and the trainer's that is called after each step.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from safetensors.torch import load_file, save_file

from saelens_cosine.files.whole import read_json, write_text
from saelens_cosine.training.alone import ALONE, Alone
from saelens_cosine.training.randomness import generator_states, restore_generators
from saelens_cosine.training.resuming.checkpoints import OWN_FOLDER, Checkpoints
from saelens_cosine.training.resuming.settings import check_same
from saelens_cosine.training.resuming.stop import StopError, StopRequests, handled
from saelens_cosine.training.resuming.stream import ResumableStream, StreamState

SCHEMA = "saelens-cosine-checkpoint/1"
"""Name and version of the layout of what is beside SAELens' files."""

FILLING = "Filling the mixing buffer"
"""What `on_fill` tells of."""

_STATE, _TENSORS = Path(OWN_FOLDER) / "state.json", Path(OWN_FOLDER) / "state.safetensors"


class HasState(Protocol):
    """What a checkpoint keeps as JSON: the norm filter, the monitor."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class SavedState:
    """
    What stands beside SAELens' files in a checkpoint.

    Args:
        path (Path): The checkpoint.
        plain (dict[str, Any]): What JSON holds.
        stream (StreamState): The place in the data.
        generators (dict[str, torch.Tensor]): Those of random numbers.
    """

    path: Path
    plain: dict[str, Any]
    stream: StreamState
    generators: dict[str, Any]

    @classmethod
    def load(cls, path: Path) -> SavedState:
        """Read a checkpoint that `Checkpoints.newest` has found.

        Raises:
            ValueError: another version of this package has written it.
        """
        plain = read_json(path / _STATE)
        if plain.get("schema") != SCHEMA:
            raise ValueError(
                f"Checkpoint {path} has layout {plain.get('schema')!r}, this version of saelens-cosine reads {SCHEMA!r}; "
                "go on with the version that wrote it."
            )
        groups: dict[str, dict[str, Any]] = {"stream": {}, "generators": {}}
        for name, tensor in load_file(path / _TENSORS).items():
            group, _, own = name.partition(".")
            groups[group][own] = tensor
        return cls(path, plain, StreamState(plain["place"], groups["stream"]), groups["generators"])

    def check(self, settings: Mapping[str, Any]) -> None:
        """Compare the run that wrote it with the one that is to go on.

        Raises:
            ValueError: they differ in what decides the weights; names each setting with both values.
        """
        check_same(self.plain["settings"], settings, self.path)
        before, budget = self.plain["settings"]["training_tokens"], settings["training_tokens"]
        if budget < before:
            raise ValueError(
                f"Cannot go on from {self.path}: training_tokens is {before} there and {budget} here; a budget can grow, not shrink."
            )
        if budget > self.schedule_tokens and settings.get("lr_scheduler_name") == "cosineannealing":
            raise ValueError(
                f"Cannot go on from {self.path} for {budget} instead of {before} tokens: its learning rate follows a cosine made for "
                f"{before}, and would rise again. Start another run."
            )

    @property
    def schedule_tokens(self) -> int:
        """The budget that the learning rate's schedule was made for: that of the run's first process."""
        return self.plain["schedule_tokens"]

    def about_budget(self, settings: Mapping[str, Any]) -> str | None:
        """What a larger budget does to the schedule; None if it is that of the run's first process."""
        first, budget = self.schedule_tokens, settings["training_tokens"]
        if budget == first:
            return None
        steps = settings["lr_decay_steps"]
        then = (
            f"which ends with a decay to 0 over {steps:,} steps: what is trained after it changes nothing"
            if steps
            else "which does not decay"
        )
        return (
            f"The budget is {budget:,} tokens, {first:,} when this run began. The learning rate keeps the schedule of "
            f"{first:,} tokens, {then}."
        )


@dataclass
class ResumableRun:
    """
    A SAELens runner, single or multi-SAE, with checkpoints that it goes on from exactly.

    Args:
        runner (Any): Built but not run; everything else that wraps its store is attached already.
        checkpoints (Checkpoints | None): Where they go; None writes none.
        every (int): Tokens between two of them.
        settings (dict[str, Any]): What a run that goes on must share, SAELens' config among it.
        parts (dict[str, HasState]): What else has a state.
        go_on (str): How to go on, told when a signal has stopped the run.
        stop (StopRequests): Signals that stop it.
        on_step (Callable[[int, int], None] | None): Called before the first step and after each with the tokens trained on, and all there are.
        on_fill (Callable[[int, int], None] | None): Called before that with the tokens that wait in the mixing buffer, and those it takes.
        processes (Alone): Those that train together.
    """

    runner: Any
    checkpoints: Checkpoints | None
    every: int
    settings: dict[str, Any]
    parts: dict[str, HasState] = field(default_factory=dict[str, HasState])
    go_on: str = "Resume it."
    stop: StopRequests = field(default_factory=StopRequests)
    on_step: Callable[[int, int], None] | None = None
    on_fill: Callable[[int, int], None] | None = None
    processes: Alone = ALONE
    _generators: tuple[dict[str, Any], dict[str, Any]] | None = field(default=None, init=False, repr=False)
    _trainer: Any = field(default=None, init=False, repr=False)
    _due: int = field(default=0, init=False, repr=False)
    _schedule_tokens: int | None = field(default=None, init=False, repr=False)
    _batches_before: int = field(default=0, init=False, repr=False)
    _fills: bool = field(default=False, init=False, repr=False)

    def __post_init__(self) -> None:
        prefetched = self.runner.cfg.prefetch_llm_batches
        self._stream = ResumableStream(self.runner.activations_store, int(prefetched) if prefetched else None)
        self._stream.on_fill = self._filling
        self.stop.begun = lambda: self._stream.begun
        multiple = hasattr(self.runner, "saes")
        self._multiple = multiple
        vars(self.runner)[
            "_run_with_interruption_handling" if multiple else "run_trainer_with_interruption_handling"
        ] = self._fit

    def resume(self, state: SavedState) -> None:
        """Go on from a checkpoint when the runner runs.

        Raises:
            ValueError: the checkpoint is of another run, see `SavedState.check`.
        """
        state.check(self.settings)
        self.runner.cfg.resume_from_checkpoint = str(state.path)
        for name, part in self.parts.items():
            part.load_state_dict(state.plain["parts"][name])
        self._stream.restore(state.stream)
        self._generators = state.plain["generators"], state.generators
        self._schedule_tokens = state.schedule_tokens

    def _fit(self, trainer: Any) -> Any:
        """SAELens' `fit`, with our saving after each step."""
        self._trainer = trainer
        self._due = self._next_due()
        vars(trainer)["_checkpoint_if_needed"] = self._after_step
        self._batches_before = self._estimating(trainer) - trainer.n_training_steps
        final, trainer.cfg.save_final_checkpoint = trainer.cfg.save_final_checkpoint, False
        if self._generators is not None and not self.runner.cfg.prefetch_llm_batches:
            restore_generators(*self._generators)
        self.processes.split(trainer)
        if self._stream.begun or trainer.n_training_samples >= trainer.cfg.total_training_samples:
            self._tell(trainer.n_training_samples, trainer.cfg.total_training_samples)
        with handled(dict.fromkeys(self.stop.signals, self.stop)):
            result = trainer.fit()
        if final and self.checkpoints is not None:  # the trainer is whole again
            self.checkpoints.add_final(trainer.n_training_samples, lambda folder: self._save(trainer, folder))
        return result

    def _estimating(self, trainer: Any) -> int:
        """Batches that `fit` takes before its first step."""
        for one in self._trainers(trainer):
            scaler, kind = one.activation_scaler, one.sae.cfg.normalize_activations
            if kind == "expected_average_only_in" and scaler.scaling_factor is None:
                return trainer.cfg.n_batches_for_norm_estimate
            if kind == "covariance_whitening" and scaler.whitening is None:
                return trainer.cfg.n_batches_for_norm_estimate
        return 0

    def _trainers(self, trainer: Any) -> list[Any]:
        return list(trainer.trainers.values()) if self._multiple else [trainer]

    def _next_due(self) -> int:
        return (self._trainer.n_training_samples // self.every + 1) * self.every

    def _after_step(self) -> None:
        tokens, total = self._trainer.n_training_samples, self._trainer.cfg.total_training_samples
        self._tell(tokens, total)
        received = self.processes.signal(self.stop.received)
        stopped = received is not None and tokens < total
        if not (stopped or tokens >= self._due or tokens >= total):
            return
        self._due = self._next_due()
        where = "nothing of it is saved, for this run has no checkpoints."
        whole = self.processes.whole(self._trainer)
        if self.checkpoints is not None:
            saved = self.checkpoints.add(tokens, lambda folder: self._write(whole, folder))
            where = f"all of it is in {saved}. {self.go_on}"
        if stopped:
            where = self.processes.from_first(where)  # nobody goes before the checkpoint is written
            assert received is not None
            raise StopError(received, f"Stopped after {tokens:,} of {total:,} tokens; {where}")

    def _filling(self, tokens: int, size: int) -> None:
        if tokens < size or self._fills:  # else a checkpoint holds the first batch already
            self._fills = True
            if self.on_fill is not None:
                self.on_fill(tokens, size)
        if tokens >= size and self._trainer is not None:
            self._tell(self._trainer.n_training_samples, self._trainer.cfg.total_training_samples)

    def _tell(self, tokens: int, total: int) -> None:
        if self.on_step is not None:
            self.on_step(min(tokens, total), total)

    def _write(self, trainer: Any, folder: Path) -> None:
        counted = [trainer, *self._trainers(trainer)] if self._multiple else [trainer]
        for one in counted:
            one.n_training_steps += 1  # SAELens counts the step after it has saved
        try:
            state = self._stream.state(self._batches_before + trainer.n_training_steps)
            self._save(trainer, folder)
        finally:
            for one in counted:
                one.n_training_steps -= 1
        plain, generators = generator_states()
        content = {
            "schema": SCHEMA,
            "tokens": trainer.n_training_samples,
            "place": state.place,
            "generators": plain,
            "parts": {name: part.state_dict() for name, part in self.parts.items()},
            "settings": self.settings,
            "schedule_tokens": self._schedule_tokens or self.settings["training_tokens"],
        }
        write_text(
            json.dumps(content), folder / _STATE
        )  # with NaN as Python has it: what a monitor has measured may be
        groups = {"stream": state.tensors, "generators": generators}
        tensors = {f"{group}.{name}": t.cpu().clone() for group, found in groups.items() for name, t in found.items()}
        save_file(tensors, folder / _TENSORS)

    def _save(self, trainer: Any, folder: Path) -> None:
        """SAELens' own files."""
        cfg = trainer.cfg
        before, cfg.checkpoint_path = cfg.checkpoint_path, str(folder.parent)
        try:
            trainer.save_checkpoint(checkpoint_name=folder.name)
        finally:
            cfg.checkpoint_path = before


def settings_of(checkpoint: Path) -> dict[str, Any]:
    """What the run that wrote a checkpoint was given.

    Raises:
        OSError, ValueError, KeyError: there is nothing of ours.
    """
    return read_json(checkpoint / _STATE)["settings"]

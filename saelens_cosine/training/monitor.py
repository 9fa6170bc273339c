"""Watch SAEs train under SAELens' multi-SAE runner, without a W&B account and without touching its loop."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from sae_lens.saes.sae import TrainingSAE, TrainStepInput, TrainStepOutput

from saelens_cosine.metrics.reconstruction.fve import explained_variance
from saelens_cosine.saes.encoding import fast_encode
from saelens_cosine.saes.path import use_fast_path
from saelens_cosine.saes.recipe.training_sae import not_finite
from saelens_cosine.saes.scored_sae import ScoredTrainingSAE


@dataclass(frozen=True)
class TrainingLogEntry:
    """
    One SAE at one moment of its training, measured on a batch that it has not been trained on yet, scaled as it trains on it.

    Args:
        training_tokens (int): Tokens trained on so far; those that a scale is estimated from before training don't count.
        fve (float): Fraction of variance explained on up to 1024 tokens of the coming batch.
        l0 (float): Active features per token there.
        metrics (dict[str, float]): What the architecture logs: exponents, scale, threshold, dead features in tokens.
    """

    training_tokens: int
    fve: float
    l0: float
    metrics: dict[str, float]


@dataclass(frozen=True)
class Failure:
    """
    Why an SAE is trained no more.

    Args:
        training_tokens (int): Tokens trained on before.
        reason (str): What is not finite, and since when.
    """

    training_tokens: int
    reason: str


@dataclass
class TrainingMonitor:
    """
    Measures every SAE of a multi-SAE run at regular intervals and times each one's share of the steps.

    An SAE whose loss is no longer finite stops there, with a warning, and the others go on. SAELens' trainer steps through all of
    them; a stopped one is given a step that does nothing, and weights of 1, so that checkpoints of the others can be written.

    Args:
        saes (dict[str, TrainingSAE[Any]]): The runner's SAEs, in its order.
        hook_names (dict[str, str]): Hook point of each.
        every_steps (int): Steps between two entries.
        log (dict[str, list[TrainingLogEntry]]): The entries of each SAE.
        seconds (dict[str, float]): Time spent training each SAE: forward, backward and optimizer.
        failed (dict[str, Failure]): Those that have stopped.
    """

    saes: dict[str, TrainingSAE[Any]]
    hook_names: dict[str, str]
    every_steps: int = 20
    log: dict[str, list[TrainingLogEntry]] = field(default_factory=dict[str, list[TrainingLogEntry]])
    seconds: dict[str, float] = field(default_factory=dict[str, float])
    failed: dict[str, Failure] = field(default_factory=dict[str, Failure])
    _current: str | None = field(default=None, init=False, repr=False)
    _lap_start: float = field(default=0.0, init=False, repr=False)
    _source: Iterator[dict[str, torch.Tensor]] | None = field(default=None, init=False, repr=False)
    _steps: dict[str, int] = field(default_factory=dict[str, int], init=False, repr=False)
    _tokens: dict[str, int] = field(default_factory=dict[str, int], init=False, repr=False)

    def attach(self, runner: Any) -> None:
        """Watch a `MultiSAETrainingRunner` that has been built but not run.

        Its batches come from its store's `get_multi_hook_data_loader`, which is wrapped. SAEs are trained one after the
        other on each batch, so the time from one's forward pass to the next one's is its step. What a forward pass gets is
        the batch as the trainer has scaled it.
        """
        store = runner.activations_store
        batches = store.get_multi_hook_data_loader

        def watched() -> Iterator[dict[str, torch.Tensor]]:
            source = self._source = batches()  # known before a first batch: a run that goes on may have none left
            return self._watch(source)

        store.get_multi_hook_data_loader = watched
        for name, sae in self.saes.items():
            self.log[name], self.seconds[name] = [], 0.0
            self._steps[name] = self._tokens[name] = 0
            vars(sae)["training_forward_pass"] = self._timed(name, sae.training_forward_pass)

    def finish(self) -> None:
        """Add the entry of the end of training, and give each SAE its own `training_forward_pass` back.

        Raises:
            FloatingPointError: the last step has left no SAE whose weights are finite.
        """
        self._lap(None)
        for name, sae in self.saes.items():
            try:
                check_finite(sae)
            except FloatingPointError as error:
                if name not in self.failed:
                    self._fail(name, self._tokens[name], str(error))
        if self._source is not None:
            batch = next(self._source)
            for name in self.saes:  # the trainer has folded its scale into them
                if name not in self.failed:
                    self.record(name, batch[self.hook_names[name]], self._tokens[name])
        for sae in self.saes.values():
            vars(sae).pop("training_forward_pass", None)

    def state_dict(self) -> dict[str, Any]:
        """What it has measured, and where it stands."""
        return {
            name: {
                "log": [asdict(entry) for entry in self.log[name]],
                "seconds": self.seconds[name],
                "steps": self._steps[name],
                "tokens": self._tokens[name],
                "failed": asdict(self.failed[name]) if name in self.failed else None,
            }
            for name in self.saes
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there, once attached."""
        for name, found in state.items():
            self.log[name] = [TrainingLogEntry(**entry) for entry in found["log"]]
            self.seconds[name] = found["seconds"]
            self._steps[name], self._tokens[name] = found["steps"], found["tokens"]
            if found["failed"] is not None:
                self.failed[name] = Failure(**found["failed"])

    def _timed(self, name: str, forward: Callable[..., TrainStepOutput]) -> Callable[[TrainStepInput], TrainStepOutput]:
        def timed(step_input: TrainStepInput) -> TrainStepOutput:
            if self._current == name:  # a forward pass within its own
                return forward(step_input=step_input)
            self._lap(None)
            tokens = self._tokens[name]
            self._before_step(name, step_input.sae_in)
            if name in self.failed:
                return _no_step(self.saes[name], step_input)
            self._lap(name)
            try:
                output = forward(step_input=step_input)
                if not bool(output.loss.isfinite()):
                    raise FloatingPointError(
                        f"Loss is {output.loss.item()} at training step {step_input.n_training_steps}."
                    )
            except FloatingPointError as error:
                self._fail(name, tokens, str(error))
                return _no_step(self.saes[name], step_input)
            return output

        return timed

    @torch.no_grad()
    def _fail(self, name: str, training_tokens: int, reason: str) -> None:
        """Stop an SAE, or the run if it was the last one."""
        self.failed[name] = Failure(training_tokens, reason)
        if len(self.failed) == len(self.saes):
            reasons = "; ".join(
                f"{arm}, after {end.training_tokens:,} tokens: {end.reason}" for arm, end in self.failed.items()
            )
            raise FloatingPointError(reasons if len(self.saes) == 1 else f"No SAE is left to train. {reasons}")
        warnings.warn(f"{name} stops after {training_tokens:,} tokens, and the others go on: {reason}", stacklevel=2)
        sae = self.saes[name]
        for parameter in sae.parameters():
            parameter.fill_(1)
        for buffer in sae.buffers():
            if buffer.is_floating_point():
                buffer.nan_to_num_(0, 0, 0)

    def _before_step(self, name: str, x: torch.Tensor) -> None:
        if self._steps[name] % self.every_steps == 0 and name not in self.failed:
            self.record(name, x, self._tokens[name])
        self._steps[name] += 1
        self._tokens[name] += len(x)

    def _lap(self, name: str | None) -> None:
        if next(iter(self.saes.values())).device.type == "cuda":
            torch.cuda.synchronize()  # else one SAE's work is billed to the next
        now = time.perf_counter()
        if self._current is not None:
            self.seconds[self._current] += now - self._lap_start
        self._current, self._lap_start = name, now

    def _watch(self, batches: Iterator[dict[str, torch.Tensor]]) -> Iterator[dict[str, torch.Tensor]]:
        for batch in batches:
            yield batch
            self._lap(None)

    @torch.no_grad()
    def record(self, name: str, x: torch.Tensor, training_tokens: int) -> None:
        """Add an entry for an SAE, measured on activations `[tokens, d_in]` as it takes them."""
        sae = self.saes[name]
        x = x[:1024].to(sae.device)
        with torch.autocast(x.device.type, enabled=False):
            codes, active = _codes(sae, x)
            fve = explained_variance(x, sae.decode(codes))
        metrics: dict[str, torch.Tensor] = getattr(sae, "training_metrics", dict)()
        self.log[name].append(
            TrainingLogEntry(
                training_tokens=training_tokens,
                fve=fve,
                l0=active / len(x),
                metrics={key: value.item() for key, value in metrics.items()},
            )
        )


def _codes(sae: TrainingSAE[Any], x: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Codes of `x [tokens, d_in]`, by entries where the SAE trains so, and how many are active. What speeds up its next step stays as it is."""
    finite = bool(x.norm(dim=-1).isfinite().all()) and not not_finite(sae.state_dict().items())  # NaN is no entry
    if not finite or not isinstance(sae, ScoredTrainingSAE) or not use_fast_path(sae, x):
        codes = sae.encode(x)
        return codes, int((codes.to_dense() != 0).sum())
    hint = sae.floor_hint
    codes, _ = fast_encode(sae, x)
    sae.floor_hint = hint
    return codes, int((codes.values != 0).sum())


def _no_step(sae: TrainingSAE[Any], step_input: TrainStepInput) -> TrainStepOutput:
    """What a forward pass gives that no feature is active in and no weight learns from."""
    x = step_input.sae_in
    codes = x.new_zeros((len(x), sae.cfg.d_sae))
    loss = torch.zeros((), device=x.device, requires_grad=True)
    return TrainStepOutput(
        sae_in=x, sae_out=torch.zeros_like(x), feature_acts=codes, hidden_pre=codes, loss=loss, losses={}
    )


def check_finite(sae: TrainingSAE[Any]) -> None:
    """That training has left weights that can be used.

    Raises:
        FloatingPointError: names those that are not finite.
    """
    broken = not_finite(sae.state_dict().items())
    if broken:
        raise FloatingPointError(f"{', '.join(broken)} hold non-finite values after the last step.")

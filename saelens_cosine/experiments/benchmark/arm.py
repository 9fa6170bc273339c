"""One arm of a benchmark: a training SAE under SAELens' trainer, and where its steps spend their time."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from sae_lens import SAE, LoggingConfig
from sae_lens.config import SAETrainerConfig
from sae_lens.registry import get_sae_training_class
from sae_lens.training.sae_trainer import SAETrainer

from saelens_cosine.experiments.benchmark.clock import Clock, reset_peak_rss, resident_bytes
from saelens_cosine.experiments.benchmark.settings import MATRYOSHKA_LEVELS, SAELENS_ARMS, BenchmarkSettings
from saelens_cosine.kernels import selection


class Arm:
    """A training SAE of an arm's class, and SAELens' trainer that steps it."""

    def __init__(self, name: str, settings: BenchmarkSettings, clock: Clock):
        architecture, _, kernels = name.partition("/")
        options: dict[str, Any] = {"kernels": kernels} if kernels else {}
        if name in SAELENS_ARMS:
            architecture = name.removeprefix("saelens_").removesuffix("_sparse")
            if name.endswith(
                "sparse"
            ):  # with its default rescaling, the sparse product has no backward in PyTorch 2.13
                options = {"use_sparse_activations": True, "rescale_acts_by_decoder_norm": False}
        sae_class, config_class = get_sae_training_class(architecture)
        torch.manual_seed(0)
        options |= {"d_in": settings.d_in, "d_sae": settings.d_sae, "k": settings.k, "device": settings.device}
        if architecture.endswith("matryoshka_batchtopk"):
            options["matryoshka_widths"] = [max(1, round(share * settings.d_sae)) for share in MATRYOSHKA_LEVELS]
        self.sae: Any = sae_class(config_class(**options))
        self.clock = clock
        self.trainer = SAETrainer(trainer_config(settings), self.sae, iter(()))

    def step(self, batch: torch.Tensor) -> None:
        self.trainer.step(batch)
        self.trainer.n_training_steps += 1

    def parts(self, batches: list[torch.Tensor], repeats: int) -> dict[str, float]:
        timings = [self._parts(batches[i % len(batches)]) for i in range(repeats)]
        return {name: statistics.median(t[name] for t in timings) for name in timings[0]}

    def _parts(self, batch: torch.Tensor) -> dict[str, float]:
        sae, now = self.sae, self.clock.now
        marks: dict[str, float] = {}
        spent: dict[str, float] = dict.fromkeys(("encode", "scores", "decode"), 0.0)

        def timed(part: str, method: Callable[..., Any]) -> Callable[..., Any]:
            def run(*args: Any, **kwargs: Any) -> Any:
                start = now()
                result = method(*args, **kwargs)
                spent[part] += now() - start
                return result

            return run

        def marked(part: str, method: Callable[..., Any]) -> Callable[..., Any]:
            def run(*args: Any, **kwargs: Any) -> Any:
                marks[part] = now()
                return method(*args, **kwargs)

            return run

        def forward(step_input: Any) -> Any:
            marks["start"] = now()
            output = type(sae).training_forward_pass(sae, step_input)
            marks["counters"] = now()
            output.loss.register_hook(marked("backward", lambda _gradient: None))
            return output

        wrapped = {
            "training_forward_pass": forward,
            "encode_with_hidden_pre": timed("encode", sae.encode_with_hidden_pre),
            "decode": timed("decode", sae.decode),
        }
        if hasattr(sae, "score"):
            wrapped["score"] = timed("scores", sae.score)
        with ExitStack() as stack:
            for name, method in wrapped.items():
                stack.callback(vars(sae).pop, name)
                vars(sae)[name] = method
            for name in ("candidates", "score_entries"):
                _replace(stack, selection, name, timed("scores", getattr(selection, name)))
            clip = marked("clip", torch.nn.utils.clip_grad_norm_)
            _replace(stack, torch.nn.utils, "clip_grad_norm_", clip)
            handle = self.trainer.optimizer.register_step_post_hook(marked("end", lambda *_: None))
            stack.callback(handle.remove)
            self.step(batch)
        if not hasattr(sae, "score"):
            with torch.no_grad(), self.trainer.autocast_if_enabled:
                spent["scores"] = self.clock.time(lambda: sae.process_sae_in(batch) @ sae.W_enc + sae.b_enc)
        return {
            "scores": spent["scores"],
            "selection": spent["encode"] - spent["scores"],
            "decode": spent["decode"],
            "rest_of_forward": marks["counters"] - marks["start"] - spent["encode"] - spent["decode"],
            "counters": marks["backward"] - marks["counters"],
            "backward": marks["clip"] - marks["backward"],
            "clip_and_optimizer": marks["end"] - marks["clip"],
        }

    def peak_over_state(self, batch: torch.Tensor) -> int | None:
        """Peak memory of a step beyond parameters, gradients and optimizer state, in bytes."""
        gradients = sum(p.nbytes for p in self.sae.parameters() if p.requires_grad)
        if batch.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(batch.device)
            before = torch.cuda.memory_allocated(batch.device)
            self.step(batch)
            return torch.cuda.max_memory_allocated(batch.device) - before - gradients
        before = reset_peak_rss()
        self.step(batch)
        return None if before is None else max(0, resident_bytes("VmHWM") - before - gradients)

    def saved(self) -> SAE[Any]:
        """The inference form, as a user loads it."""
        with tempfile.TemporaryDirectory() as folder:
            self.sae.save_inference_model(folder)
            return SAE.load_from_disk(folder, device=str(self.sae.device))


def trainer_config(settings: BenchmarkSettings) -> SAETrainerConfig:
    """Of SAELens' trainer, for steps that are timed."""
    return SAETrainerConfig(
        n_checkpoints=0,
        checkpoint_path=None,
        save_final_checkpoint=False,
        total_training_samples=10**12,
        device=settings.device,
        autocast=settings.dtype == "bfloat16",
        lr=1e-4,
        lr_end=1e-5,
        lr_scheduler_name="constant",
        lr_warm_up_steps=0,
        adam_beta1=0.9,
        adam_beta2=0.999,
        lr_decay_steps=0,
        n_restart_cycles=1,
        train_batch_size_samples=settings.batch,
        dead_feature_window=1000,
        feature_sampling_window=2000,
        logger=LoggingConfig(log_to_wandb=False),
    )


def _replace(until: ExitStack, owner: Any, name: str, value: Any) -> None:
    until.callback(setattr, owner, name, getattr(owner, name))
    setattr(owner, name, value)

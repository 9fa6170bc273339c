"""Several processes that train one SAE: `training.alone.Alone`'s questions, answered by all of them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.distributed_c10d import Store
from typing_extensions import override

from saelens_cosine.ranks.leaves import Leaves
from saelens_cosine.ranks.split import block, join, joined, split
from saelens_cosine.ranks.world import Processes
from saelens_cosine.training.alone import Alone
from saelens_cosine.training.resuming.settings import differing

Value = TypeVar("Value")

COUNTS = ("act_freq_scores", "n_forward_passes_since_fired")
"""What SAELens' trainer keeps of each feature."""

LONGEST = timedelta(days=30)
"""That a rank waits for work of the others, for the last training may take days. torchrun ends those that wait for a dead one."""

PLACES = ("device", "llm_device", "act_store_device", "checkpoint_path")
"""Settings in which ranks may differ: where each computes, and where the first one alone writes."""


class Team(Alone):
    """The processes that `torch.distributed` has joined, each with a block of the features and a share of the text, or of the work.

    Args:
        device: where they compute.
        store: where they have met, for sharing work.
        timed: see `Processes`.
    """

    def __init__(self, device: str, store: Store | None = None, timed: bool = False) -> None:
        self.world = Processes(timed)
        self._store, self._waits = store, 0
        self.device = device
        self.first = self.world.rank == 0
        self._leaves: dict[int, Leaves] = {}

    @override
    def from_first(self, value: Value) -> Value:
        told = [value]
        dist.broadcast_object_list(told, src=0)
        return told[0]

    @override
    def check_alike(self, settings: Mapping[str, Any]) -> None:
        every: list[Any] = [None] * self.world.size
        dist.all_gather_object(every, {name: value for name, value in settings.items() if name not in PLACES})
        for rank, theirs in enumerate(every):
            if found := differing(every[0], theirs):
                told = "; ".join(
                    f"{name} is {here} on rank 0 and {there} on rank {rank}" for name, here, there in found
                )
                raise ValueError(f"The ranks of one run need the same flags: {told}.")

    @override
    def share(self, store: Any) -> None:
        get, world = store.get_activations, self.world

        @torch.no_grad()
        def shared(batch_tokens: torch.Tensor) -> Any:
            n = -(-len(batch_tokens) // world.size)
            rows = batch_tokens[world.rank * n :][:n]
            missing = n - len(rows)
            if missing:  # ranks gather tensors of one shape
                rows = torch.cat([rows, batch_tokens[:1].expand(missing, *batch_tokens.shape[1:])])
            found = get(rows)
            if isinstance(found, Mapping):
                return {hook: world.gather(x).flatten(0, 1)[: len(batch_tokens)] for hook, x in found.items()}
            return world.gather(found).flatten(0, 1)[: len(batch_tokens)]

        store.get_activations = shared

    @override
    def split(self, trainer: Any) -> None:
        sae, optimizer = trainer.sae, trainer.optimizer
        of_parameter = {parameter: name for name, parameter in sae.named_parameters()}
        cfg, state, groups = sae.cfg, optimizer.state, optimizer.param_groups
        names = [[of_parameter[p] for p in group["params"]] for group in groups]
        moments = {of_parameter[p]: found for p, found in state.items()}
        split(sae, self.world)
        edges, rank = sae.whole.edges, self.world.rank
        mine = slice(edges[rank], edges[rank + 1])
        mesh = init_device_mesh(torch.device(self.device).type, (self.world.size,))
        leaves = self._leaves[id(trainer)] = Leaves(sae, mesh)
        for group, of_group in zip(groups, names, strict=True):
            group["params"] = [leaves.by_name[name] for name in of_group]
        state.clear()
        for name, found in moments.items():
            state[leaves.by_name[name]] = {
                key: leaves.of(name, block(name, value, cfg, mine)) if value.ndim or key != "step" else value
                for key, value in found.items()
            }
        for name in COUNTS:
            setattr(trainer, name, getattr(trainer, name)[mine].clone())
        self._log_whole(trainer)
        at_end = trainer.set_final_sae_metadata

        def join_first() -> None:
            vars(trainer).update(self._whole(trainer, host=True))
            at_end()

        vars(trainer)["set_final_sae_metadata"] = join_first

    @override
    def whole(self, trainer: Any) -> Any:
        result = copy.copy(trainer)
        vars(result).update(self._whole(trainer, host=True))
        return result

    @override
    def claim(self, name: str) -> bool:
        assert self._store is not None
        return self._store.add(f"claim {name}", 1) == 1

    @override
    def wait(self) -> None:
        assert self._store is not None
        self._waits += 1
        name = f"wait {self._waits}"
        if self._store.add(name, 1) == self.world.size:
            self._store.set(f"{name} is over", "")
        self._store.wait([f"{name} is over"], LONGEST)

    @override
    def signal(self, received: int | None) -> int | None:
        largest = -self.world.smallest(torch.tensor(-(received or 0), device=self.device))
        return int(largest) or None

    def _whole(self, trainer: Any, host: bool) -> dict[str, Any]:
        """SAE, optimizer and counts of all features, in the host's memory or on the device; nothing where they have been joined."""
        sae = trainer.sae
        if "parameters" not in vars(sae):
            return {}
        whole = self._joined(sae, host)
        return {"sae": whole, "optimizer": self._optimizer(trainer, whole, host), **self._counts(trainer, host)}

    def _joined(self, sae: Any, host: bool) -> Any:
        whole: Any = joined(sae, host)
        del vars(whole)["parameters"]
        return whole

    def _counts(self, trainer: Any, host: bool) -> dict[str, torch.Tensor]:
        return {name: join("tokens_since_fired", getattr(trainer, name), trainer.sae, host) for name in COUNTS}

    def _optimizer(self, trainer: Any, whole: Any, host: bool) -> Any:
        """The optimizer as one process has it, of the whole SAE's parameters."""
        parameters = dict(whole.named_parameters())
        name_of = {leaf: name for name, leaf in self._leaves[id(trainer)].by_name.items()}
        optimizer = copy.copy(trainer.optimizer)
        optimizer.param_groups = [
            {**group, "params": [parameters[name_of[leaf]] for leaf in group["params"]]}
            for group in trainer.optimizer.param_groups
        ]
        optimizer.state = {
            parameters[name_of[leaf]]: {
                key: join(name_of[leaf], value.to_local(), trainer.sae, host) if hasattr(value, "to_local") else value
                for key, value in found.items()
            }
            for leaf, found in trainer.optimizer.state.items()
        }
        return optimizer

    def _log_whole(self, trainer: Any) -> None:
        """What SAELens logs of a step is of all features; it evaluates and draws histograms of the whole SAE."""
        build, evaluate, sparsity = (
            trainer.build_train_step_log_dict,
            trainer._run_and_log_evals,
            trainer._build_sparsity_log_dict,
        )

        @torch.no_grad()
        def log_dict(output: Any, n_training_samples: int) -> dict[str, Any]:
            found = build(output, n_training_samples)
            n = len(trainer.n_forward_passes_since_fired)
            of_part = [
                found["metrics/l0"],
                found["sparsity/dead_features"],
                n * found["sparsity/mean_passes_since_fired"] if n else 0.0,
            ]
            l0, dead, passes = self.world.sum(torch.tensor(of_part, dtype=torch.float64, device=self.device)).tolist()
            features = trainer.sae.whole.size(n)
            return found | {
                "metrics/l0": l0,
                "sparsity/dead_features": int(dead),
                "sparsity/mean_passes_since_fired": passes / features,
            }

        def of_whole(method: Any) -> Any:
            def called() -> Any:
                before = {name: getattr(trainer, name) for name in ("sae", *COUNTS)}
                vars(trainer).update({"sae": self._joined(trainer.sae, False), **self._counts(trainer, False)})
                try:
                    return method()
                finally:
                    vars(trainer).update(before)

            return called

        every = trainer.cfg.logger.wandb_log_frequency * trainer.cfg.logger.eval_every_n_wandb_logs
        evaluated = of_whole(evaluate)
        vars(trainer)["build_train_step_log_dict"] = log_dict
        vars(trainer)["_run_and_log_evals"] = lambda: (
            evaluated() if (trainer.n_training_steps + 1) % every == 0 else None
        )
        vars(trainer)["_build_sparsity_log_dict"] = of_whole(sparsity)

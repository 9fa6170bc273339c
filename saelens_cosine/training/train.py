"""Train one SAE by SAELens' flags, with our architectures, the token filter and the bundled model."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any

from sae_lens.constants import RUNNER_CFG_FILENAME, SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME, SPARSITY_FILENAME
from sae_lens.llm_sae_training_runner import LanguageModelSAETrainingRunner

from saelens_cosine.activations.gguf import is_gguf
from saelens_cosine.activations.hook_points import size_at_hook
from saelens_cosine.activations.models import context_size, load_hooked_model, refused_kwargs
from saelens_cosine.activations.norm_filter import HighNormFilter, check_max_norm_multiple, filter_high_norm_tokens
from saelens_cosine.activations.text import load_text
from saelens_cosine.bundled import BUNDLED
from saelens_cosine.console import tell
from saelens_cosine.files.output import Output, open_output
from saelens_cosine.files.secrets import scrubbed, without_secrets
from saelens_cosine.files.whole import read_json, scratch_folder
from saelens_cosine.progress import Progress, shown
from saelens_cosine.training.alone import ALONE, Alone
from saelens_cosine.training.check import N_CHECKPOINTS, check_run, parse_flags
from saelens_cosine.training.next_norm import take_next_norms
from saelens_cosine.training.randomness import seed_everything
from saelens_cosine.training.recorded import record_training
from saelens_cosine.training.resuming.checkpoints import Checkpoints
from saelens_cosine.training.resuming.run import FILLING, ResumableRun, SavedState
from saelens_cosine.training.resuming.settings import check_same
from saelens_cosine.training.resuming.stop import StopRequests
from saelens_cosine.training.short_text import name_sizes_of_short_text
from saelens_cosine.training.wandb_log import wandb_never_stops

SAVED_FILES = (SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME, SPARSITY_FILENAME, RUNNER_CFG_FILENAME)
"""What SAELens writes as a trained SAE."""


def train(
    arguments: Sequence[str],
    max_norm_multiple: float | None = 10.0,
    *,
    resume: bool = False,
    overwrite: bool = False,
    keep: int = 2,
    stop_signals: Sequence[int] = (),
    on_progress: Progress | None = None,
    placing: Mapping[str, str | None] | None = None,
    processes: Alone = ALONE,
) -> HighNormFilter:
    """Parse SAELens' flags, train one SAE with SAELens' runner, and return the filter with its counts.

    The SAE is written to SAELens' `--output_path`, checkpoints to `--checkpoint_path`, or beside the SAE.

    Args:
        arguments: SAELens' flags.
        max_norm_multiple: drop tokens above this multiple of their batch's median norm; None keeps them.
        resume: go on from the newest valid checkpoint; from the start if there is none yet.
        overwrite: replace an earlier run's SAE and checkpoints.
        keep: checkpoints that are kept, the newest.
        stop_signals: signals beside SIGINT and SIGTERM that end the run with a checkpoint, such as Slurm's.
        on_progress: called with what is being done, how much of it is done, and how much there is. SAELens has its own bar.
        placing: `device_map` and `tp_plan` of Transformers' `from_pretrained`, which say where the language model's weights are; they go into no
            metadata. With a `tp_plan` the ranks of `processes` share the model, else the text.
        processes: those that train one SAE together (`ranks`); the first writes the files.

    Raises:
        ValueError: `max_norm_multiple` is no bound, `d_in` is not the size of the activations at the hook, contexts are longer than the model takes, there is no
            such hook or head, the dataset is empty, or the checkpoint to go on from is of another run.
        FileExistsError: the folders hold an earlier run, and neither `resume` nor `overwrite` is on.
        argparse.ArgumentError: SAELens' parser does not accept the flags.
        StopError: a signal has stopped the run, which is saved.
    """
    check_max_norm_multiple(max_norm_multiple)
    cfg = parse_flags(arguments)
    check_run(cfg)
    places = _places(cfg, placing or {}, processes)
    seed_everything(cfg.seed)
    with ExitStack() as open_folders:
        output = checkpoints = state = None
        if processes.first:
            output = _open_output(cfg, open_folders)
            checkpoints = _open_checkpoints(cfg, resume, overwrite, keep, open_folders)
            state = _newest(checkpoints) if checkpoints is not None and resume else None
            if output is not None:
                _begin(output, overwrite, state)
        state = _seen_by_all(state, processes)
        norm_filter = _train(
            cfg,
            max_norm_multiple,
            output,
            checkpoints,
            state,
            tuple(stop_signals),
            shown(on_progress),
            places,
            processes,
        )
        if checkpoints is not None:
            checkpoints.remove_set_aside()
    if state is not None and state.plain["tokens"] >= cfg.training_tokens:
        tell(f"{state.path} is the end of the run: nothing was left to train.")
    if output is not None:
        tell(f'Written: SAE.load_from_disk("{cfg.output_path}")')
    return norm_filter


def _train(
    cfg: Any,
    max_norm_multiple: float | None,
    output: Output | None,
    checkpoints: Checkpoints | None,
    state: SavedState | None,
    stop_signals: tuple[int, ...],
    progress: Progress,
    places: Mapping[str, str],
    processes: Alone,
) -> HighNormFilter:
    progress("Loading the model and the text", 0, 1)
    model = _loaded(cfg) if cfg.model_name == BUNDLED or is_gguf(cfg.model_name) else None
    text = load_text(cfg.dataset_path, cfg.seed, cfg.streaming)
    try:
        with refused_kwargs(cfg.model_name, cfg.model_from_pretrained_kwargs), warnings.catch_warnings():
            # what is passed in is what the configuration names, and its run is reproducible
            warnings.filterwarnings("ignore", message="You just passed in a (dataset|model)")
            cfg.model_from_pretrained_kwargs = {**cfg.model_from_pretrained_kwargs, **places}
            runner = LanguageModelSAETrainingRunner(cfg, override_model=model, override_dataset=text.train)
    except StopIteration:
        raise ValueError(f"Dataset {cfg.dataset_path!r} is empty; there is nothing to train on.") from None
    cfg.model_from_pretrained_kwargs = {
        name: value for name, value in cfg.model_from_pretrained_kwargs.items() if name not in places
    }
    _forget_secrets(cfg, runner.sae.cfg.metadata)
    _check_fit(cfg, runner.model)
    # cached activations are of a text that was chosen when they were made, and an SAE that goes on has read another
    elsewhere = cfg.use_cached_activations or cfg.from_pretrained_path is not None
    runner.sae.cfg.metadata.heldout_rule = None if elsewhere else text.rule
    take_next_norms(runner)
    norm_filter = filter_high_norm_tokens(runner, max_norm_multiple)
    name_sizes_of_short_text(runner.activations_store)
    record_training(runner.sae, cfg)
    run = ResumableRun(
        runner,
        checkpoints,
        every=math.ceil(cfg.training_tokens / ((cfg.n_checkpoints or N_CHECKPOINTS) + 1)),
        settings={
            **cfg.to_dict(),
            "max_norm_multiple": max_norm_multiple,
            "heldout_rule": text.rule,
            "text": text.fingerprint,
            "wandb_evaluation": _evaluation_during_training(cfg),
        },
        parts={"norm_filter": norm_filter},
        go_on="Run the same command with --resume to go on.",
        stop=StopRequests(stop_signals),
        on_step=partial(progress, "Training"),
        on_fill=partial(progress, FILLING),
        processes=processes,
    )
    processes.check_alike(run.settings)
    if "tp_plan" not in places:
        processes.share(runner.activations_store)
    if state is not None:
        run.resume(state)
        tell(f"Going on from {state.path}.")
        about = state.about_budget(run.settings)
        if about:
            tell(about)
    vars(runner)["save_final_sae"] = _nowhere if output is None else _saving_to(output, runner.save_final_sae)
    if checkpoints is not None and state is None:
        checkpoints.set_aside()
    with wandb_never_stops(cfg.logger):
        runner.run()
    return norm_filter


def _places(cfg: Any, placing: Mapping[str, str | None], processes: Alone) -> dict[str, str]:
    """Where the language model's weights shall be, of those that say so.

    Raises:
        ValueError: the model is not Transformers', or there are no ranks to split it over.
    """
    if processes is not ALONE and cfg.prefetch_llm_batches:
        raise ValueError(
            "--prefetch_llm_batches reads ahead in a thread of its own, which ranks of one run cannot: leave it out, or start it without torchrun."
        )
    places = {name: value for name, value in placing.items() if value is not None}
    for name in places:
        flag = f"--{name.replace('_', '-')}"
        if cfg.model_class_name != "AutoModelForCausalLM" or is_gguf(cfg.model_name):
            raise ValueError(
                f"{flag} says where Transformers puts a model's weights, and {cfg.model_name} is loaded as {cfg.model_class_name}; pass "
                "--model_class_name AutoModelForCausalLM, and hooks as module paths (model.layers.15)."
            )
        if name == "tp_plan" and processes is ALONE:
            raise ValueError(f"{flag} splits the language model over the ranks of torchrun; start it with torchrun.")
    return places


def _evaluation_during_training(cfg: Any) -> list[int] | None:
    """How SAELens evaluates while it logs to W&B, which takes text from the stream that is trained on."""
    if not cfg.logger.log_to_wandb:
        return None
    every = cfg.logger.wandb_log_frequency * cfg.logger.eval_every_n_wandb_logs
    return [every, cfg.n_eval_batches, cfg.eval_batch_size_prompts or 0]


def _forget_secrets(cfg: Any, metadata: Any) -> None:
    """What the model and the text were loaded with is not saved, nor sent to W&B; whoever loads them has a token of their own."""
    cfg.model_from_pretrained_kwargs = scrubbed(cfg.model_from_pretrained_kwargs)
    cfg.dataset_path = without_secrets(cfg.dataset_path)
    metadata.model_from_pretrained_kwargs, metadata.dataset_path = cfg.model_from_pretrained_kwargs, cfg.dataset_path


def _open_output(cfg: Any, open_folders: ExitStack) -> Output | None:
    """The trained SAE's folder, locked."""
    if cfg.output_path is None:
        return None
    return open_folders.enter_context(open_output(cfg.output_path, "training", keep_empty=False))


def _begin(output: Output, overwrite: bool, state: SavedState | None) -> None:
    """Refuse an earlier SAE, unless it is of the run that is gone on with or shall be replaced."""
    ours, earlier = False, None
    with suppress(OSError, ValueError, KeyError, TypeError):  # damaged, or none of this package's
        ours = "heldout_rule" in read_json(output.folder / SAE_CFG_FILENAME)["metadata"]
        earlier = dict(read_json(output.folder / RUNNER_CFG_FILENAME))
    if state is not None and earlier is not None and not overwrite:
        check_same(earlier, {name: state.plain["settings"].get(name) for name in earlier}, output.folder)
    before = SAVED_FILES if ours else ()
    output.begin(before=before, places=SAVED_FILES, overwrite=overwrite, resume=state is not None)


def _open_checkpoints(
    cfg: Any, resume: bool, overwrite: bool, keep: int, open_folders: ExitStack
) -> Checkpoints | None:
    """The checkpoints' folder, locked, without an earlier run's unless they are gone on with or replaced."""
    folder = _checkpoint_folder(cfg)
    cfg.checkpoint_path = None if folder is None else str(folder)
    if folder is None:
        if resume:
            raise ValueError("--resume goes on from a checkpoint, and --checkpoint_path none writes none.")
        return None
    checkpoints = Checkpoints(folder, keep)
    if cfg.output_path is not None and folder.resolve() == Path(cfg.output_path).resolve():
        raise ValueError(f"{folder} cannot hold both the SAE and the checkpoints; pass another --checkpoint_path.")
    open_folders.enter_context(open_output(folder, "checkpoints", keep_empty=False))
    checkpoints.check_places()
    if checkpoints.all() and not (resume or overwrite):
        raise FileExistsError(
            f"{folder} holds checkpoints of an earlier run. Pass --resume to go on with it, --overwrite to replace it, or "
            "another --checkpoint_path."
        )
    return checkpoints


def _checkpoint_folder(cfg: Any) -> Path | None:
    """SAELens adds a random name to --checkpoint_path, under which no second run would find it."""
    if cfg.checkpoint_path is None or cfg.checkpoint_path.partition("/")[0].lower() == "none":
        return None
    given = Path(cfg.checkpoint_path).parent
    if given == Path("checkpoints") and cfg.output_path is not None:  # SAELens' default
        output = Path(cfg.output_path)
        if output.is_symlink() or output.name in ("", ".."):
            output = output.resolve()
        return output.with_name(f"{output.name}-checkpoints")
    return given


def _seen_by_all(state: SavedState | None, processes: Alone) -> SavedState | None:
    """The checkpoint that the first process goes on from."""
    path = processes.from_first(None if state is None else str(state.path))
    return state if path is None or state is not None else SavedState.load(Path(path))


def _newest(checkpoints: Checkpoints) -> SavedState | None:
    newest = checkpoints.newest(tell)
    if newest is None:
        tell(f"There is no checkpoint in {checkpoints.folder} to go on from; training from the start.")
        return None
    return SavedState.load(newest)


def _nowhere(*_: Any, **__: Any) -> None:
    """Another process saves the SAE, or nobody shall."""


def _saving_to(output: Output, save: Any) -> Any:
    """SAELens' saving of the trained SAE, of which every file takes its place whole."""

    def save_final_sae(sae: Any, output_path: str, log_feature_sparsity: Any = None) -> None:  # noqa: ARG001
        with scratch_folder(output.folder) as folder:
            save(sae, str(folder), log_feature_sparsity)
            output.add(folder)

    return save_final_sae


def _loaded(cfg: Any) -> Any:
    """A model that SAELens does not load, whose name, class, hook and settings go into the SAE's metadata as they are."""
    hooked = load_hooked_model(
        cfg.model_name,
        cfg.llm_device or cfg.device,
        hook=cfg.hook_name,
        class_name=cfg.model_class_name,
        kwargs=cfg.model_from_pretrained_kwargs,
    )
    cfg.model_name, cfg.model_class_name, cfg.hook_name, cfg.model_from_pretrained_kwargs = (
        hooked.name,
        hooked.class_name,
        hooked.hook_name,
        hooked.kwargs,
    )
    _check_fit(cfg, hooked.model)  # before any text is read
    return hooked.model


def _check_fit(cfg: Any, model: Any) -> None:
    longest = context_size(model)
    if longest is not None and cfg.context_size > longest:
        raise ValueError(
            f"context_size={cfg.context_size} is more than the {longest} tokens that {cfg.model_name} takes; "
            f"pass --context_size {longest} or less."
        )
    size = size_at_hook(model, cfg.hook_name, cfg.hook_head_index)
    if size != cfg.sae.d_in:
        head = "" if cfg.hook_head_index is None else f", head {cfg.hook_head_index},"
        raise ValueError(
            f"d_in={cfg.sae.d_in} but the activations of {cfg.model_name} at {cfg.hook_name}{head} have size {size}; "
            f"pass --d_in {size}."
        )

"""Training from a cache: SAELens' store takes its contexts, each seed in an order of its own, and a stopped run goes on exactly."""

from dataclasses import replace

import pytest
import torch
from sae_lens import LoggingConfig, MultiSAETrainingRunner
from sae_lens.registry import get_sae_training_class
from small_runs import stop_after, write_text

from saelens_cosine.activations.cache.cache import open_cache
from saelens_cosine.activations.cache.contexts import as_dataset, training_contexts
from saelens_cosine.activations.cache.identity import CacheIdentity
from saelens_cosine.activations.cache.standing_in import fill, standing_in
from saelens_cosine.activations.contexts import ContextForm
from saelens_cosine.activations.models import load_hooked_model
from saelens_cosine.activations.norm_filter import filter_high_norm_tokens
from saelens_cosine.activations.planted_sinks import plant_sinks
from saelens_cosine.activations.text import load_text
from saelens_cosine.training.recipe import multi_runner_config
from saelens_cosine.training.resuming.checkpoints import Checkpoints
from saelens_cosine.training.resuming.run import ResumableRun, SavedState
from saelens_cosine.training.resuming.stop import StopError

HOOKS = {"low": "blocks.0.hook_resid_post", "high": "blocks.1.attn.hook_z"}
FORM = ContextForm(32)
TOKENS = 2048


def quiet(*_):
    pass


@pytest.fixture(scope="module")
def bundled():
    return load_hooked_model("bundled", hook=HOOKS["low"])


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return str(write_text(tmp_path_factory.mktemp("text") / "text.jsonl"))


@pytest.fixture(scope="module")
def contexts(bundled, text):
    return training_contexts(bundled, load_text(text).train, FORM, TOKENS, quiet)


@pytest.fixture(scope="module")
def identity(bundled, text):
    return CacheIdentity.of(bundled, HOOKS.values(), FORM, text, load_text(text))


def test_contexts_for_the_training_and_some_more(bundled, text, contexts):
    # 1.02 * 2048 = 2088 tokens are 65.25 contexts, in batches of 16: 80
    assert contexts.shape == (80, 32)
    assert contexts.dtype == torch.int64
    read = load_text(text).train
    more = training_contexts(bundled, read, FORM, TOKENS, quiet, buffer_tokens=1000)
    assert len(more) == 112  # 3088 tokens, 96.5 contexts
    assert torch.equal(more[:80], contexts)
    every = training_contexts(bundled, read, FORM, 10**9, quiet)
    assert 112 < len(every) < 10_000  # all there are
    with pytest.raises(ValueError, match="shorter than 16 contexts of 256 tokens"):
        training_contexts(bundled, read.take(1), ContextForm(256), TOKENS, quiet)


def test_each_seed_has_an_order_of_its_own(bundled, contexts):
    orders = []
    for seed in (0, 0, 1):
        rows = FORM.store(bundled.model, as_dataset(contexts, seed), HOOKS["low"], 192, "cpu").iterable_sequences
        orders.append(torch.stack(list(rows)))
    assert torch.equal(orders[0], orders[1])
    assert not torch.equal(orders[0], orders[2])
    for order in orders:
        assert sorted(order.tolist()) == sorted(contexts.tolist())


def run(bundled, contexts, folder, resume=False):
    """Two SAEs at two hooks, 16 steps of 128 tokens, a checkpoint every 512; their weights and the norm filter."""
    config = multi_runner_config(
        dict.fromkeys(HOOKS, "cosine_batchtopk"),
        d_in=192,
        d_sae=24,
        k=4,
        training_tokens=TOKENS,
        sae={"device": "cpu"},
        hook_names=HOOKS,
        model_name="bundled",
        dataset_path="text",
        context_size=32,
        train_batch_size_tokens=128,
        n_batches_in_buffer=16,
        store_batch_size_prompts=16,
        device="cpu",
        seed=3,
        logger=LoggingConfig(log_to_wandb=False),
        checkpoint_path=None,
        output_path=None,
    )
    saes = {}
    for name, sae in config.saes.items():
        torch.manual_seed(3)
        saes[name] = get_sae_training_class(sae.architecture())[0](sae)
    dataset = as_dataset(contexts, 3)
    runner = MultiSAETrainingRunner(config, override_dataset=dataset, override_model=bundled.model, override_saes=saes)
    norm_filter = filter_high_norm_tokens(runner)
    checkpoints = Checkpoints(folder, 2)
    settings = {"training_tokens": TOKENS}
    training = ResumableRun(runner, checkpoints, every=512, settings=settings, parts={"norm_filter": norm_filter})
    if resume:
        training.resume(SavedState.load(checkpoints.newest(pytest.fail)))
    torch.manual_seed(3)
    runner.run()
    return {f"{name} {key}": t for name, sae in saes.items() for key, t in sae.state_dict().items()}, norm_filter


def test_a_stopped_run_on_a_cache_ends_with_the_bits_of_one_that_was_not(
    bundled, contexts, identity, tmp_path, monkeypatch
):
    passes = []
    counting = bundled.model.blocks[0].register_forward_pre_hook(lambda *_: passes.append(1))
    with open_cache(tmp_path / "cache", identity) as cache:
        fill(cache, bundled.model, contexts, quiet)
    passes.clear()
    with open_cache(tmp_path / "cache", identity) as cache, standing_in(bundled.model, cache):
        whole, _ = run(bundled, contexts, tmp_path / "whole")
        with monkeypatch.context() as patched:
            stop_after(patched, 9)
            with pytest.raises(StopError):
                run(bundled, contexts, tmp_path / "stopped")
    with open_cache(tmp_path / "cache", identity) as cache, standing_in(bundled.model, cache):
        resumed, _ = run(bundled, contexts, tmp_path / "stopped", resume=True)
    counting.remove()
    assert passes == []  # every context was there
    assert whole.keys() == resumed.keys()
    for name, tensor in whole.items():
        assert torch.equal(tensor, resumed[name]), name


def test_the_norm_filter_drops_what_it_drops_without_a_cache(bundled, contexts, identity, tmp_path):
    remove = plant_sinks(bundled.model, HOOKS["low"])  # the first of 32 tokens, 30 to 300 times the median
    planted = replace(identity, planted_sinks=(HOOKS["low"],))
    with open_cache(tmp_path / "cache", planted) as cache, standing_in(bundled.model, cache):
        _, cached = run(bundled, contexts, tmp_path / "one")
        assert len(cache) > 60  # added by the training itself
    _, direct = run(bundled, contexts, tmp_path / "other")
    remove()
    assert cached.dropped_share == direct.dropped_share == 1 / 32
    assert cached.tokens_seen == direct.tokens_seen

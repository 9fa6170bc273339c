"""The language model runs for long before the first step, on a mixing buffer of text: that is seen."""

import pytest
import torch
from sae_lens.training.mixing_buffer import mixing_buffer
from small_runs import compare_flags, flags, small_batches, stop_after, write_text

from saelens_cosine.cli import main
from saelens_cosine.experiments.compare.run import compare
from saelens_cosine.experiments.compare.settings import ComparisonSettings
from saelens_cosine.training.recipe import RECIPES
from saelens_cosine.training.resuming.run import FILLING
from saelens_cosine.training.resuming.stop import StopError
from saelens_cosine.training.resuming.stream import MixedBatches
from saelens_cosine.training.train import train

BUFFER = 40 * 32


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "text.jsonl")


def told_by(run):
    """What a run tells, without the stages before: `(what, done, total)`."""
    told = []
    run(lambda *progress: told.append(progress))
    return [progress for progress in told if progress[0].startswith((FILLING, "Training"))]


@pytest.mark.parametrize("prefetched", [0, 3])
def test_train_tells_of_the_buffer_and_then_of_its_steps(text, tmp_path, prefetched):
    arguments = flags(text, tmp_path / "sae", training_tokens=1024, prefetch_llm_batches=prefetched)
    told = told_by(lambda progress: train(arguments, on_progress=progress))
    filling = [progress for progress in told if progress[0] == FILLING]
    assert told[: len(filling)] == filling
    assert len(filling) == 14  # 96 tokens at a time, 13 times below 1280, and at last all of it
    assert [done for _, done, _ in filling] == sorted({done for _, done, _ in filling})
    assert {total for *_, total in filling} == {BUFFER}
    assert filling[-1][1] == BUFFER
    steps = [done for what, done, _ in told if what == "Training"]
    assert steps[-4:] == [256, 512, 768, 1024]
    assert set(steps[:-4]) == {0}


def test_a_run_that_goes_on_fills_no_buffer_that_it_has(text, tmp_path, monkeypatch):
    arguments = flags(text, tmp_path / "sae")
    with monkeypatch.context() as patched:
        stop_after(patched, 3)
        with pytest.raises(StopError):
            train(arguments)
    # 1280 tokens were in the buffer, of which it serves half and a bit, two batches of 256 and the third: then it fills up
    told = told_by(lambda progress: train(arguments, resume=True, on_progress=progress))
    training = [progress for progress in told if progress[0] == "Training"]
    assert training[0] == ("Training", 768, 4096)
    filling = [progress for progress in told if progress[0] == FILLING]
    assert told[: len(filling)] == filling
    assert all(done >= 512 for _, done, _ in filling)  # with what waited in it


def test_a_buffer_that_one_batch_of_contexts_fills_is_no_stage(text, tmp_path):
    arguments = flags(text, tmp_path / "sae", training_tokens=512, store_batch_size_prompts=64)
    told = told_by(lambda progress: train(arguments, on_progress=progress))
    assert told == [("Training", done, 512) for done in (0, 256, 512)]


def test_compare_tells_of_the_buffer_and_of_every_step_that_is_done(text, tmp_path, monkeypatch):
    monkeypatch.setitem(RECIPES, "paper", small_batches)
    settings = ComparisonSettings(
        model="bundled",
        dataset=str(text),
        arms=("cosine_batchtopk", "inner_product_topk"),
        layer=0,
        tokens=1024,
        k=4,
        d_sae=24,
        context_size=32,
        eval_tokens=320,
        seeds=2,
    )
    told = told_by(lambda progress: compare(settings, tmp_path / "out", on_progress=progress))
    for seed in ("seed 1 of 2", "seed 2 of 2"):
        of_seed = [progress for progress in told if progress[0].endswith(seed)]
        filling = [progress for progress in of_seed if progress[0] == f"{FILLING}, {seed}"]
        assert len(filling) > 1
        assert of_seed[: len(filling)] == filling
        assert of_seed[len(filling) :] == [(f"Training, {seed}", done, 1024) for done in range(0, 1025, 128)]


def test_lines_of_compare_without_a_terminal(text, tmp_path, monkeypatch, capsys):
    """Those that a stage of some seconds has: one at its start and one at its end."""
    monkeypatch.setitem(RECIPES, "paper", small_batches)
    arguments = [part for part in compare_flags(text, tmp_path / "out", seeds=1) if part != "--quiet"]
    assert main(["compare", *arguments]) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if ": " in line]
    stages = [line.partition(": ")[0] for line in said]
    for stage in ("Loading the model", "Gathering held-out activations", FILLING, "Training"):
        assert 1 <= stages.count(stage) <= 2, said
    assert said[stages.index("Training")] == "Training: 0 of 1,024 (0 %)"


@pytest.mark.parametrize("mix_fraction", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("stopped_after", [None, 1, 7])
def test_a_buffer_that_is_filled_in_few_pieces_gives_saelens_batches(mix_fraction, stopped_after, monkeypatch):
    settings = {"buffer_size": 160, "batch_size": 32, "mix_fraction": mix_fraction}
    activations = torch.arange(600.0).view(-1, 1)
    sizes = [3, 5, 2, 7, 1] * 34  # 612 tokens, of which there are 600; a buffer is full in the middle of any of them

    def source(begin=0):
        parts = activations.split([*sizes[:166], 600 - sum(sizes[:166])])
        return iter([part for part in parts if part[0, 0] >= begin])

    torch.manual_seed(0)
    expected = list(mixing_buffer(activations_loader=source(), **settings))
    assert len(expected) == 18
    given, pieces = [], []

    def counted(activations_loader, **settings):
        return mixing_buffer(
            activations_loader=(pieces.append(len(part)) or part for part in activations_loader), **settings
        )

    monkeypatch.setattr("saelens_cosine.training.resuming.stream.mixing_buffer", counted)
    torch.manual_seed(0)
    batches = MixedBatches(settings, source())
    for batch in batches:
        given.append(batch)
        if len(given) == stopped_after:  # and goes on in another process
            state, read = batches.state(), sum(pieces)
            batches = MixedBatches(settings, source(read), **state)
            break
    given += batches
    assert all(torch.equal(one, other) for one, other in zip(given, expected, strict=True))
    assert sum(pieces) >= 600
    assert len(pieces) < 45  # of 20 tokens or what the buffer lacks, and not 167

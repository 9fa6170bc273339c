"""An arm whose training becomes non-finite stops; the others end as they would without it."""

import json

import pytest
import torch
from helpers import HOOK, TRAINING, make_config, tiny_dataset
from sae_lens import LoggingConfig, MultiSAETrainingRunner, MultiSAETrainingRunnerConfig
from sae_lens.registry import get_sae_training_class
from small_runs import stop_after, write_text

from saelens_cosine.cli import main
from saelens_cosine.experiments.compare.run import compare
from saelens_cosine.experiments.compare.settings import ComparisonSettings
from saelens_cosine.experiments.compare.summary.picture import draw
from saelens_cosine.experiments.compare.tables import as_tables
from saelens_cosine.training.monitor import TrainingMonitor
from saelens_cosine.training.recipe import RECIPES, paper

STEPS, BATCH = 6, 64


def train(model, arms, poisoned=(), at_step=3, output=None):
    """A run in which the weights of some arms become NaN at a step; gives the monitor and the SAEs."""
    configs = {arm: config_of(arm) for arm in arms}
    saes = {}
    for arm, config in configs.items():
        torch.manual_seed(0)
        saes[arm] = get_sae_training_class(config.architecture())[0](config)
    config = MultiSAETrainingRunnerConfig(
        saes=configs,
        hook_names=HOOK,
        model_name="tiny",
        dataset_path="tiny",
        context_size=8,
        training_tokens=STEPS * BATCH,
        train_batch_size_tokens=BATCH,
        store_batch_size_prompts=16,
        n_batches_in_buffer=16,
        lr=1e-3,
        n_checkpoints=2 if output else 0,
        checkpoint_path=None if output is None else str(output),
        output_path=None,
        logger=LoggingConfig(log_to_wandb=False),
    )
    runner = MultiSAETrainingRunner(config, override_dataset=tiny_dataset(), override_model=model, override_saes=saes)

    monitor = TrainingMonitor(saes, config.hook_names_per_sae, every_steps=2)
    poison(monitor, poisoned, (at_step + 1) * BATCH)
    monitor.attach(runner)
    torch.manual_seed(0)
    runner.run()
    return monitor, saes


def poison(monitor, arms, tokens):
    """NaN in the weights of some arms before the step that begins with this many tokens seen, the coming batch's among them."""
    before_step = monitor._before_step

    def before(name, x):
        before_step(name, x)
        if name == next(iter(monitor.saes)) and monitor._tokens[name] == tokens:
            for arm in arms:
                monitor.saes[arm].W_enc.data[0, 0] = float("nan")

    monitor._before_step = before


def config_of(arm):
    if arm.startswith("saelens/"):
        return get_sae_training_class(arm.removeprefix("saelens/"))[1](d_in=16, d_sae=24, k=4)
    return make_config(arm, d_in=16, d_sae=24, k=4)


def test_the_others_are_what_they_are_without_it_and_checkpoints_are_written(model, tmp_path):
    arms = ["cosine_topk", "saelens/topk", "inner_product_batchtopk"]
    with pytest.warns(UserWarning, match="saelens/topk stops after 192 tokens, and the others go on: Loss is nan"):
        monitor, saes = train(model, arms, ["saelens/topk"], output=tmp_path)
    monitor.finish()
    assert set(monitor.failed) == {"saelens/topk"}
    assert monitor.failed["saelens/topk"].training_tokens == 3 * BATCH
    assert [entry.training_tokens for entry in monitor.log["saelens/topk"]] == [0, 2 * BATCH]
    alone, expected = train(model, [arms[0], arms[2]])
    alone.finish()
    for arm in expected:
        ours = saes[arm].state_dict()
        assert all(torch.equal(ours[name], tensor) for name, tensor in expected[arm].state_dict().items())
        assert monitor.log[arm] == alone.log[arm]
    again = TrainingMonitor(saes, monitor.hook_names)
    again.load_state_dict(json.loads(json.dumps(monitor.state_dict())))
    assert again.failed == monitor.failed


@pytest.mark.parametrize("arm", TRAINING)
def test_every_architecture_can_stop_and_be_in_a_checkpoint(arm, model, tmp_path):
    other = "inner_product_topk" if arm != "inner_product_topk" else "inner_product_batchtopk"
    with pytest.warns(UserWarning, match=f"{arm} stops after 64 tokens"):
        monitor, saes = train(model, [arm, other], [arm], at_step=1)
    saes[arm].save_model(tmp_path)
    monitor.finish()
    assert list(monitor.failed) == [arm]
    assert saes[other].W_enc.isfinite().all()


def test_weights_that_the_last_step_breaks_are_an_end_too_and_no_arm_left_is_an_error(model):
    monitor, saes = train(model, ["cosine_topk", "inner_product_topk"])
    saes["cosine_topk"].W_dec.data[0, 0] = float("inf")
    with pytest.warns(UserWarning, match="W_dec hold non-finite values after the last step"):
        monitor.finish()
    assert monitor.failed["cosine_topk"].training_tokens == STEPS * BATCH
    with (
        pytest.warns(UserWarning, match="cosine_topk stops"),
        pytest.raises(
            FloatingPointError, match="No SAE is left to train. cosine_topk, after 128 tokens: .*inner_product"
        ),
    ):
        train(model, ["cosine_topk", "inner_product_topk"], ["cosine_topk", "inner_product_topk"], at_step=2)


ARMS = ("inner_product_topk", "cosine_topk", "cosine_batchtopk")
STEP = 128


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "text.jsonl")


@pytest.fixture(autouse=True)
def small_steps(monkeypatch):
    monkeypatch.setitem(RECIPES, "paper", lambda tokens, batch=STEP: paper(tokens, batch))


@pytest.fixture
def poisoned(monkeypatch):
    """Has arms of `compare` fail for real: NaN in their weights before the third step, by name and seed."""

    def of_compare(*fatal):
        begin = TrainingMonitor.attach

        def attach(monitor, runner):
            poison(monitor, [arm for arm, fails in fatal if fails == runner.cfg.seed], 3 * STEP)
            begin(monitor, runner)

        monkeypatch.setattr(TrainingMonitor, "attach", attach)

    return of_compare


def arguments(text, output, seeds=1):
    """8 steps of 128 tokens."""
    given = {"layer": 0, "tokens": 1024, "k": 4, "d-sae": 24, "context-size": 32, "eval-tokens": 320, "seeds": seeds}
    options = [part for name, value in given.items() for part in (f"--{name}", str(value))]
    return ["compare", "--quiet", "--dataset", str(text), "--output", str(output), *options, "--arms", *ARMS]


def result(folder):
    found = json.loads((folder / "comparison.json").read_text())
    for arm in found["arms"]:
        assert arm.pop("seconds") > 0
    return found


def test_compare_names_the_arm_keeps_the_others_and_can_be_gone_on_with(poisoned, text, tmp_path, capsys, monkeypatch):
    poisoned(("cosine_topk", 0))
    assert main(arguments(text, tmp_path / "out")) == 0
    found = result(tmp_path / "out")
    assert [arm["architecture"] for arm in found["arms"]] == ["inner_product_topk", "cosine_batchtopk"]
    (failed,) = found["failed"]
    assert (failed["architecture"], failed["seed"], failed["training_tokens"]) == ("cosine_topk", 0, 2 * STEP)
    assert "Loss is nan" in failed["reason"]
    assert not (tmp_path / "out" / "cosine_topk").exists()
    assert (tmp_path / "out" / "cosine_batchtopk" / "seed0" / "sae_weights.safetensors").exists()
    printed = capsys.readouterr()
    assert "Stopped, neither saved nor measured" in printed.out
    assert "cosine_topk stops after 256 tokens" in printed.err
    with monkeypatch.context() as patched:
        stop_after(patched, 5)
        assert main(arguments(text, tmp_path / "stopped")) == 143
    for _ in range(2):  # from a checkpoint, and with a seed that is finished
        assert main([*arguments(text, tmp_path / "stopped"), "--resume"]) == 0
        assert result(tmp_path / "stopped") == found


def test_compare_where_no_arm_is_left_is_an_error_and_earlier_seeds_stay(poisoned, text, tmp_path, capsys):
    poisoned(*((arm, 1) for arm in ARMS))
    assert main(arguments(text, tmp_path / "out", seeds=2)) == 2
    assert "No SAE is left to train. " in capsys.readouterr().err
    found = result(tmp_path / "out")
    assert [(arm["architecture"], arm["seed"]) for arm in found["arms"]] == [(arm, 0) for arm in ARMS]


def test_tables_and_picture_of_seeds_that_are_not_all_there(poisoned, text, tmp_path):
    poisoned(("inner_product_topk", 0), ("cosine_topk", 0), ("cosine_topk", 1))
    settings = ComparisonSettings(
        arms=ARMS,
        dataset=str(text),
        layer=0,
        tokens=1024,
        d_sae=24,
        k=4,
        seeds=2,
        context_size=32,
        eval_tokens=320,
        eval_prompts=4,
    )
    comparison = compare(settings, tmp_path / "out")
    tables = as_tables(comparison)
    assert list(tables[0].columns[0].cells) == ["inner_product_topk", "cosine_topk", "cosine_topk"]
    assert list(tables[1].columns[0].cells) == ["inner_product_topk (1 of 2 seeds)", "cosine_batchtopk"]
    assert list(tables[-1].columns[1].cells) == ["seeds in common: 0", "seeds in common: 1"]
    draw(comparison, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000

"""`compare` over several hooks, ks, learning rates and seeds."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_runs import compare_flags, small_batches, stop_after, write_text
from small_runs import comparison_without_times as result

from saelens_cosine.activations.cache import standing_in
from saelens_cosine.activations.models import load_hooked_model
from saelens_cosine.activations.text import load_text
from saelens_cosine.cli import main
from saelens_cosine.experiments.compare.grid import points, trainings
from saelens_cosine.experiments.compare.heldout import HeldOut, heldout_contexts
from saelens_cosine.experiments.compare.results import Trained, TrainedArm, about_edges, chosen_rates, rates_tried
from saelens_cosine.experiments.compare.settings import ComparisonSettings
from saelens_cosine.experiments.compare.training import Setting
from saelens_cosine.metrics.reconstruction.by_norm import Reconstruction
from saelens_cosine.training.recipe import RECIPES
from saelens_cosine.training.resuming.checkpoints import Checkpoints
from saelens_cosine.training.resuming.run import ResumableRun

ARMS = ["cosine_batchtopk", "inner_product_topk"]
HOOKS = [f"blocks.{layer}.hook_resid_post" for layer in (2, 0)]
RATES = [1e-4, 5e-3]


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.jsonl")


@pytest.fixture(autouse=True)
def small_steps(monkeypatch):
    monkeypatch.setitem(RECIPES, "paper", small_batches)


def command(text, output, *more, **changes) -> list[str]:
    flags = ["compare", *compare_flags(text, output, **{"eval-tokens": 640, "seeds": 1, **changes})]
    grid = ["--layer", "2", "0", "--k", "8", "2", "--lr", "5e-3", "1e-4"]
    return [*flags, *grid, *more]


def weights(folder: Path):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("sae_weights.safetensors")}


@pytest.fixture(scope="module")
def whole(text, tmp_path_factory):
    """Two hooks, two ks, two learning rates, two arms; and what was trained, and the contexts that the model ran."""
    folder = tmp_path_factory.mktemp("whole")
    trained, ran = [], []
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(RECIPES, "paper", small_batches)
        train, run = Setting.train, standing_in._run
        patched.setattr(Setting, "train", lambda *args: (trained.append(args[1]), train(*args))[1])
        patched.setattr(
            standing_in, "_run", lambda own, tokens, cache: (ran.append(tokens.cpu()), run(own, tokens, cache))[1]
        )
        assert main(command(text, folder)) == 0
    return folder, trained, torch.cat(ran)


def test_every_point_of_the_grid_is_there_in_order_and_in_a_folder_of_its_own(whole):
    folder, _, _ = whole
    found = result(folder)
    assert found["schema"] == "saelens-cosine/comparison/2"
    assert [hook["hook_name"] for hook in found["hooks"]] == HOOKS
    expected = [(hook, k, 0, arm) for hook in HOOKS for k in (2, 8) for arm in ARMS]
    assert [(arm["hook_name"], arm["k"], arm["seed"], arm["architecture"]) for arm in found["arms"]] == expected
    for arm in found["arms"]:
        layer = arm["hook_name"].split(".")[1]
        assert arm["path"] == f"{arm['architecture']}/layer{layer}/k{arm['k']}/seed{arm['seed']}"
        config = json.loads((folder / arm["path"] / "cfg.json").read_text())
        assert config["metadata"]["hook_name"] == arm["hook_name"]
        assert config["metadata"]["lr"] == arm["lr"]
    names = sorted(path.name for path in (folder / ".comparison-run").iterdir())
    assert names == sorted(f"layer{layer}-k{k}-seed0.json" for layer in (2, 0) for k in (2, 8))


def test_each_arm_has_its_best_rate_at_each_hook(whole):
    folder, trained, _ = whole
    found = result(folder)
    best = {}
    for hook in HOOKS:
        for arm in ARMS:
            tried = [one for one in found["learning_rates"] if (one["hook_name"], one["architecture"]) == (hook, arm)]
            assert [one["lr"] for one in tried] == RATES
            assert {one["k"] for one in tried} == {2}  # the lower of the two in the middle
            (chosen,) = (one for one in tried if one["chosen"])
            assert chosen["fve"] == max(one["fve"] for one in tried)
            best[hook, arm] = chosen["lr"]
    assert {(arm["hook_name"], arm["architecture"]): arm["lr"] for arm in found["arms"]} == best
    at_k_2 = [(one.point.hook, one.lr, one.arms) for one in trained if one.point.k == 2]
    assert at_k_2 == [(hook, lr, tuple(ARMS)) for hook in (0, 1) for lr in RATES]
    others = [(one.point.parts, arm) for one in trained for arm in one.arms if one.point.k != 2]
    assert len(set(others)) == len(others) == 2 * 2


def test_the_model_runs_each_context_once(whole):
    _, _, ran = whole
    assert len(ran.unique(dim=0)) == len(ran)


def test_kept_activations_serve_another_comparison(text, tmp_path, monkeypatch):
    kept = ["--activations", str(tmp_path / "kept")]
    assert main(command(text, tmp_path / "one", *kept)) == 0
    monkeypatch.setattr(standing_in, "_run", lambda *_: pytest.fail("the model ran"))
    assert main(["compare", *compare_flags(text, tmp_path / "two", **{"eval-tokens": 640}), *kept]) == 0
    assert (tmp_path / "kept" / "activations.json").exists()
    assert not (tmp_path / "two" / ".comparison-run" / "activations").exists()
    one, other = (load_file(tmp_path / "two" / ARMS[0] / f"seed{seed}" / "sae_weights.safetensors") for seed in (0, 1))
    assert not torch.equal(one["W_enc"], other["W_enc"])


@pytest.mark.parametrize("steps", [5, 16, 35])  # 16: the last step of the second training
def test_stopped_and_resumed_it_ends_with_the_same(steps, whole, text, tmp_path, monkeypatch, capsys):
    seen = []
    after = Setting.train
    with monkeypatch.context() as patched:
        stop_in(patched, steps)
        assert main(command(text, tmp_path)) == 143
    assert "--resume" in capsys.readouterr().err
    monkeypatch.setattr(Setting, "train", lambda *args: (seen.append(args[1].name), after(*args))[1])
    assert main(command(text, tmp_path, "--resume")) == 0
    assert result(tmp_path) == result(whole[0])
    assert weights(tmp_path) == weights(whole[0])
    assert len(seen) == len(whole[1]) - (steps - 1) // 8  # a training has eight steps; those that were finished stay
    assert sorted(path.name for path in (tmp_path / ".comparison-run").iterdir()) == sorted(
        path.name for path in (whole[0] / ".comparison-run").iterdir()
    )


def stop_in(monkeypatch, steps):
    """After so many steps of all trainings together."""
    before, done = ResumableRun._after_step, []

    def after_step(run):
        done.append(1)
        if len(done) == steps:
            os.kill(os.getpid(), signal.SIGTERM)
        before(run)

    monkeypatch.setattr(ResumableRun, "_after_step", after_step)


def test_other_rates_are_refused(text, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patched:
        stop_after(patched, 3)
        assert main(command(text, tmp_path)) == 143
    shutil.rmtree(tmp_path / ".comparison-run" / "activations")
    monkeypatch.setattr(standing_in, "_run", lambda *_: pytest.fail("the model ran"))
    assert main(command(text, tmp_path, "--resume", "--lr", "1e-3")) == 2
    assert "lr is [" in capsys.readouterr().err


def test_a_grid_that_is_finished_does_not_run_its_text_again_and_loses_what_a_killed_process_left(
    whole, text, tmp_path, monkeypatch
):
    shutil.copytree(whole[0], tmp_path, dirs_exist_ok=True)
    run = tmp_path / ".comparison-run"
    before = sorted(path.name for path in run.iterdir())
    for aside in (False, True):  # as a process leaves them that is killed before they go
        left = Checkpoints(run / f"layer2-k2-seed0-lr0.00{int(aside)}")
        left.add(128, lambda folder: (folder / "weights").write_text("0"))
        if aside:
            left.set_aside()
    (run / "layer2-k2-seed0-lr0.001-saes" / ARMS[0]).mkdir(parents=True)
    monkeypatch.setattr("saelens_cosine.experiments.compare.run.fill", lambda *_: pytest.fail("nothing is trained"))
    assert main(command(text, tmp_path, "--resume")) == 0
    assert result(tmp_path) == result(whole[0])
    assert sorted(path.name for path in run.iterdir()) == before


def test_a_rate_that_breaks_training_is_passed_over(text, tmp_path):
    flags = ["compare", *compare_flags(text, tmp_path, seeds=1, **{"eval-tokens": 640})]
    assert main([*flags, "--lr", "1e-3", "1e30"]) == 0
    found = result(tmp_path)
    failed = [one for one in found["learning_rates"] if one["lr"] == 1e30]
    assert [(one["fve"], one["chosen"]) for one in failed] == [(None, False)] * 2
    assert [arm["lr"] for arm in found["arms"]] == [1e-3] * 2
    assert found["failed"] == []


def test_a_stop_just_before_training_breaks_is_not_lost(text, tmp_path, monkeypatch):
    flags = ["compare", *compare_flags(text, tmp_path, seeds=1, **{"eval-tokens": 640}), "--lr", "1e-3", "1e30"]
    before, done = ResumableRun._after_step, []

    def after_step(run):
        before(run)
        done.append(1)
        if len(done) == 9:  # the first of the second rate, whose next one breaks every arm
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(ResumableRun, "_after_step", after_step)
        assert main(flags) == 143
    assert main([*flags, "--resume"]) == 0
    assert [arm["lr"] for arm in result(tmp_path)["arms"]] == [1e-3] * 2


def test_no_rate_that_trains_is_an_error(text, tmp_path, capsys):
    flags = ["compare", *compare_flags(text, tmp_path, seeds=1, **{"eval-tokens": 640})]
    assert main([*flags, "--lr", "1e29", "1e30"]) != 0
    assert "cosine_batchtopk" in capsys.readouterr().err


def test_records_of_an_earlier_version_are_gone_on_with(text, tmp_path):
    flags = ["compare", *compare_flags(text, tmp_path)]
    assert main(flags) == 0
    before = result(tmp_path)
    record = tmp_path / ".comparison-run" / "seed0.json"
    content = json.loads(record.read_text())
    content["share"] = content.pop("dropped_share")
    content.pop("rates")
    content["settings"].pop("lr")
    for arm in content["arms"]:
        for new in ("hook_name", "k", "lr"):
            arm.pop(new)
    record.write_text(json.dumps(content))
    shutil.rmtree(tmp_path / "cosine_batchtopk" / "seed1")  # is trained again
    assert main([*flags, "--resume"]) == 0
    after = result(tmp_path)
    assert [arm.pop("lr") for arm in after["arms"] if arm["seed"] == 0] == [None, None]
    for arm in before["arms"]:
        if arm["seed"] == 0:
            arm.pop("lr")
    assert after == before


def judged(fve):
    return Reconstruction(100, fve, 4.0, 0.25, ())


def trained(lr, **fves):
    arms = tuple(TrainedArm(arm, None, 1.0, (), judged(fve)) for arm, fve in fves.items())
    return Trained(arms, (), 0.0, lr)


def test_rates_are_chosen_arm_by_arm_and_a_tie_goes_to_the_lower():
    runs = [trained(1e-2, a=0.5, b=0.75, c=float("nan")), trained(1e-3, a=0.625, b=0.75), trained(1e-4, a=0.25, b=0.5)]
    tried = rates_tried(runs, ["b", "a", "c"], "hook", 4)
    assert [(one.architecture, one.lr, one.fve, one.chosen) for one in tried] == [
        ("b", 1e-4, 0.5, False),
        ("b", 1e-3, 0.75, True),
        ("b", 1e-2, 0.75, False),
        ("a", 1e-4, 0.25, False),
        ("a", 1e-3, 0.625, True),
        ("a", 1e-2, 0.5, False),
        ("c", 1e-4, None, False),
        ("c", 1e-3, None, False),
        ("c", 1e-2, None, False),
    ]
    assert chosen_rates(tried, "hook") == {"a": 1e-3, "b": 1e-3}
    assert chosen_rates(tried, "other") == {}


def test_a_best_rate_at_an_end_of_those_that_were_tried_is_told():
    tried = rates_tried(
        [trained(1e-4, a=0.7, b=0.5, c=0.5), trained(1e-3, a=0.6, b=0.7, c=0.5), trained(1e-2, a=0.5, b=0.6, c=0.8)],
        "abc",
        "hook",
        4,
    )
    assert about_edges(tried) == "A smaller rate may be better for a. A larger rate may be better for c."
    assert about_edges(tried[3:6]) == ""


def test_arms_of_one_rate_share_a_run():
    arms = ("inner_product_topk", "cosine_topk", "cosine_batchtopk")
    settings = ComparisonSettings(arms, k=(64, 16, 32), lr=(1e-3, 1e-4), layer=(3,), seeds=2)
    assert (settings.layer, settings.ks, settings.rates) == (3, (16, 32, 64), (1e-4, 1e-3))
    found = points(settings)
    assert [(point.k, point.seed) for point in found] == [(32, 0), (16, 0), (64, 0), (32, 1), (16, 1), (64, 1)]
    chosen = {"inner_product_topk": 1e-3, "cosine_batchtopk": 1e-3, "cosine_topk": 1e-4}
    runs = trainings(found[1], settings, chosen)
    assert [(run.name, run.arms) for run in runs] == [
        ("k16-seed0-lr0.0001", ("cosine_topk",)),
        ("k16-seed0-lr0.001", ("inner_product_topk", "cosine_batchtopk")),
    ]
    assert found[1].path("cosine_topk") == "cosine_topk/k16/seed0"


def test_what_a_rate_is_chosen_on_is_not_measured(text):
    model = load_hooked_model("bundled", layer=0)
    splits = load_text(str(text))
    one = ComparisonSettings(d_sae=64, context_size=32, eval_tokens=100_000, max_norm_multiple=None)
    several = ComparisonSettings(
        d_sae=64, lr=(1e-3, 1e-4), context_size=32, eval_tokens=100_000, max_norm_multiple=None
    )
    contexts = heldout_contexts(one, model, splits.heldout)
    every, parted = HeldOut(one, model, contexts), HeldOut(several, model, contexts)
    assert every.for_choice is None
    assert len(parted.for_choice) + len(parted.activations) == len(every.activations)
    rows = {row.numpy().tobytes() for row in parted.for_choice}
    last = [row.numpy().tobytes() in rows for row in parted.activations[31::32]]
    assert not any(last)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--k", "8", "8"], "k=(8, 8) names one twice"),
        (["--layer", "1", "1"], "layer=(1, 1) names one twice"),
        (["--lr", "1e-3", "1.0000001e-3"], "lr=(0.001, 0.001) names one twice"),
        (["--lr", "0"], "lr=0.0 must be a positive number"),
        (["--lr", "1e-3", "nan"], "lr=nan must be"),
        (["--k", "8", "100"], "k=100 features cannot be active out of d_sae=24"),
        (["--layer", "1", "--hook", "blocks.0.hook_resid_post"], "both say where to hook"),
        (["--layer", "1", "17"], "layer=17 is not a layer"),
        (["--layer", "1", "0", "--plant-sinks"], "name one"),
        (["--lr", "1e-3", "1e-4", "--eval-tokens", "32"], "Use more --eval-tokens"),
    ],
)
def test_a_grid_that_cannot_be_run_is_named(arguments, message, text, tmp_path, capsys):
    assert main(["compare", *compare_flags(text, tmp_path / "out"), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_one_hook_by_two_names_is_refused(text, tmp_path, capsys):
    flags = compare_flags(text, tmp_path / "out")
    place = flags.index("--layer")
    hooks = ["--hook", "blocks.0.hook_resid_post", "model.layers.0"]
    assert main(["compare", *flags[:place], *flags[place + 2 :], *hooks]) == 2
    assert "name one twice: this model has" in capsys.readouterr().err

from dataclasses import replace

import pytest
import torch
from sae_lens.training.optim import get_lr_scheduler

from saelens_cosine.cli import _parser
from saelens_cosine.registry import TRAINING_ARCHITECTURES
from saelens_cosine.training.recipe import RECIPES, get_recipe, multi_runner_config, paper, runner_config, sae_config

QUIET = {"checkpoint_path": None, "output_path": None}


def test_paper_at_the_authors_budget_has_the_authors_numbers():
    recipe = get_recipe("paper", 500_000_000)
    assert recipe.sae == {
        "unit_decoder": True,
        "decoder_init_norm": 1.0,
        "rescale_acts_by_decoder_norm": False,
        "b_dec_init": "geometric_median",
        "normalize_aux_loss": True,
        "aux_loss_coefficient": 1 / 32,
        "dead_feature_window_tokens": 10_000_000,
        "log_scale_from_data": False,
        "topk_threshold_start_step": 1000,
        "topk_threshold_lr": 0.001,
    }
    assert recipe.runner == {
        "lr": 5e-5,
        "lr_scheduler_name": "constant",
        "lr_warm_up_steps": 1000,
        "lr_decay_steps": 48_828,  # the last 20 % of 244,140 steps
        "train_batch_size_tokens": 2048,
        "adam_beta1": 0.9,
        "adam_beta2": 0.999,
    }


def test_paper_scaled_to_a_small_budget():
    recipe = get_recipe("paper", 2_048_000)  # 1000 steps
    assert recipe.runner["lr_warm_up_steps"] == recipe.sae["topk_threshold_start_step"] == 50
    assert recipe.sae["topk_threshold_lr"] == 1 / 50
    assert recipe.runner["lr_decay_steps"] == 200
    assert recipe.sae["dead_feature_window_tokens"] == 409_600
    assert recipe.runner["lr"] == pytest.approx(5e-5 * 50e6 / 2_048_000)
    assert get_recipe("paper", 100_000).runner["lr"] == 5e-3
    assert recipe.sae["log_scale_from_data"]
    # 25 million tokens: the sum of the steps' rates is that of 50 million at 5e-5
    assert get_recipe("paper", 25_000_000).runner["lr"] == pytest.approx(1e-4)


def test_the_schedule_that_saelens_makes_of_it():
    # steps 100, warm-up 5, decay 20: (s + 1) / 5, then 1, then linear to 0 at step 100
    runner = get_recipe("paper", 100 * 2048).runner
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = get_lr_scheduler(
        "constant",
        optimizer,
        training_steps=100,
        lr=1.0,
        warm_up_steps=runner["lr_warm_up_steps"],
        decay_steps=runner["lr_decay_steps"],
        lr_end=0.1,
        num_cycles=1,
    )
    rates = []
    for _ in range(100):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[:6] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])
    assert rates[79:82] == pytest.approx([1.0, 1.0, 0.95])
    assert rates[99] == pytest.approx(0.05)


@pytest.mark.parametrize("recipe", ["paper", "saelens"])
@pytest.mark.parametrize("architecture", TRAINING_ARCHITECTURES)
def test_every_architecture_gets_a_runner_config(architecture, recipe):
    config = runner_config(
        architecture, d_in=8, d_sae=32, k=4, training_tokens=100_000, recipe=recipe, hook_name="blocks.0.x", **QUIET
    )
    assert config.sae.architecture() == architecture
    assert (config.sae.d_in, config.sae.d_sae) == (8, 32)
    wanted = getattr(config.sae, "k", None) or getattr(config.sae, "target_l0", None)
    assert wanted == (None if architecture.endswith(("standard", "gated", "afa")) else 4)
    # the second paper's architecture keeps its own settings, and ReLU the auxiliary loss that cannot reach it
    assert config.sae.unit_decoder == (recipe == "paper" and architecture != "top_afa")
    if architecture.endswith("standard"):
        assert config.sae.aux_loss_coefficient == 0
    if architecture.endswith("matryoshka_batchtopk"):
        assert config.sae.matryoshka_widths == [4, 8, 16, 32]
    assert config.hook_name == "blocks.0.x"


def test_saelens_recipe_is_saelens_own_but_the_score():
    from sae_lens import BatchTopKTrainingSAEConfig

    stock = BatchTopKTrainingSAEConfig(d_in=8, d_sae=128)
    ours = sae_config("cosine_batchtopk", get_recipe("saelens", 100_000), d_in=8, d_sae=128)
    for name in ("decoder_init_norm", "aux_loss_coefficient", "rescale_acts_by_decoder_norm", "k"):
        assert getattr(ours, name) == getattr(stock, name), name
    assert not ours.unit_decoder
    assert not ours.normalize_aux_loss
    assert ours.b_dec_init == "zeros"
    assert set(get_recipe("saelens", 100_000).runner) == {"train_batch_size_tokens"}


def test_a_stock_architecture_keeps_its_own_defaults_beside_ours():
    config = multi_runner_config(
        {"stock": "batchtopk", "dense": "standard", "ours": "cosine_topk"},
        d_in=8,
        d_sae=32,
        k=4,
        training_tokens=100_000,
        hook_names="blocks.0.x",
        **QUIET,
    )
    assert config.saes["stock"].aux_loss_coefficient == 1.0
    assert config.saes["stock"].decoder_init_norm == 0.1
    assert config.saes["stock"].k == config.saes["ours"].k == 4
    assert not hasattr(config.saes["dense"], "k")
    assert config.saes["ours"].aux_loss_coefficient == 1 / 32


@pytest.mark.parametrize("command", ["compare", "ground-truth"])
def test_a_recipe_of_ones_own_is_named_like_the_others(command, monkeypatch):
    def from_the_mean(training_tokens, batch=2048):
        recipe = paper(training_tokens, batch)
        return replace(recipe, sae=recipe.sae | {"b_dec_init": "mean"})

    monkeypatch.setitem(RECIPES, "from the mean", from_the_mean)
    name = _parser().parse_args([command, "--recipe", "from the mean"]).recipe
    assert get_recipe(name, 100_000).sae["b_dec_init"] == "mean"
    assert sae_config("cosine_batchtopk", get_recipe(name, 100_000), d_in=4, d_sae=8, k=2).b_dec_init == "mean"


def test_settings_override_the_recipe():
    config = runner_config(
        "cosine_topk", d_in=8, d_sae=32, k=4, training_tokens=100_000, lr=0.5, sae={"unit_decoder": False}, **QUIET
    )
    assert config.lr == 0.5
    assert not config.sae.unit_decoder


def test_unknown_names_and_budgets_are_refused():
    with pytest.raises(ValueError, match="'nature'.*'paper', 'saelens'"):
        get_recipe("nature", 1000)
    with pytest.raises(ValueError, match="training_tokens=0"):
        get_recipe("paper", 0)
    with pytest.raises(ValueError, match="'cosine_magic'.*cosine_batchtopk"):
        sae_config("cosine_magic", get_recipe("paper", 1000), d_in=8, d_sae=32)

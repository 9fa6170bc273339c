"""SAELens' own machinery, unchanged, with every training architecture at toy size."""

import pytest
import torch
from helpers import (
    CONTEXT,
    COSINE,
    HOOK,
    SELECTORS,
    TOPK,
    TRAINING,
    Batches,
    assert_same_function,
    make_activations,
    make_config,
    make_sae,
    make_trainer,
    randomize,
    selector_of,
    tiny_dataset,
)
from machinery_cases import SOME, D, F, model_activations, run_tiny, small, state
from sae_lens import SAE, LoggingConfig
from sae_lens.llm_sae_training_runner import _parse_cfg_args
from sae_lens.multi_sae_training_runner import MultiSAETrainingRunner, MultiSAETrainingRunnerConfig
from sae_lens.training.sae_trainer import SAETrainer
from safetensors.torch import load_file

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")


@pytest.mark.parametrize("name", TRAINING)
def test_language_model_runner(name, model, tmp_path):
    sae, start = run_tiny(model, small(name), tmp_path)
    moved = [key for key, parameter in sae.named_parameters() if parameter.requires_grad]
    assert {"W_enc", "W_dec", "b_dec"} | ({"norm_exponent", "log_scale"} if name in COSINE else set()) <= set(moved)
    for key in moved:
        assert not torch.equal(sae.state_dict()[key], start[key]), key
    saved = SAE.load_from_disk(tmp_path / "output")
    assert saved.cfg.metadata.hook_name == HOOK
    assert saved.cfg.metadata.training_architecture == name
    assert_same_function(saved, sae.eval(), model_activations(model)[:, 1:].reshape(-1, D))


@pytest.mark.parametrize("name", SOME)
def test_language_model_runner_learns(name, model, tmp_path):
    x = model_activations(model)[:, 1:].reshape(-1, D)
    errors = []
    for steps in (2, 80):
        sae, _ = run_tiny(model, small(name), tmp_path / str(steps), steps=steps, lr=3e-3)
        with torch.no_grad():
            errors.append((sae.train()(x) - x).square().sum().item())
    assert errors[1] < 0.7 * errors[0]


@pytest.mark.parametrize("name", SOME)
def test_language_model_runner_with_autocast(name, model, tmp_path):
    sae, start = run_tiny(model, small(name), tmp_path, autocast=True, steps=4)
    for key, tensor in sae.state_dict().items():
        assert tensor.dtype == start[key].dtype, key
        assert tensor.isfinite().all(), key
    SAE.load_from_disk(tmp_path / "output")


@pytest.mark.parametrize("name", TRAINING)
def test_language_model_runner_folds_the_norm(name, model, tmp_path):
    # SAELens scales activations to a mean norm of sqrt(16) = 4; tokens here have about 18, so s is about 0.23
    unit = {"unit_decoder": True, "rescale_acts_by_decoder_norm": False}
    config = small(name, normalize_activations="expected_average_only_in", **unit)
    sae, _ = run_tiny(model, config, tmp_path, steps=4)
    saved = SAE.load_from_disk(tmp_path / "output")
    assert saved.cfg.normalize_activations == "none"
    x = model_activations(model)[:, 1:].reshape(-1, D)
    scale = 4 / x.norm(dim=-1).mean().item()
    assert scale < 0.3
    assert 1 / saved.W_dec.norm(dim=-1).mean().item() == pytest.approx(scale, rel=0.2)
    assert_same_function(saved, sae.eval(), x)


def multi_runner_config(path, **overrides):
    return MultiSAETrainingRunnerConfig(
        saes={name: small(name) for name in TRAINING},
        hook_names=HOOK,
        model_name="tiny",
        dataset_path="tiny",
        context_size=CONTEXT,
        training_tokens=10 * 64,
        train_batch_size_tokens=64,
        store_batch_size_prompts=16,
        n_batches_in_buffer=32,
        lr=1e-3,
        checkpoint_path=None,
        output_path=str(path / "output"),
        logger=LoggingConfig(log_to_wandb=False),
        **overrides,
    )


def test_multi_sae_runner_trains_all_at_once(model, tmp_path):
    config = multi_runner_config(tmp_path)
    saes = MultiSAETrainingRunner(config, override_dataset=tiny_dataset(), override_model=model).run()
    assert set(saes) == set(TRAINING)
    x = model_activations(model)[:, 1:].reshape(-1, D)
    for name, sae in saes.items():
        assert sae.initialized_from_data
        saved = SAE.load_from_disk(tmp_path / "output" / name)
        assert saved.cfg.metadata.training_architecture == name
        assert_same_function(saved, sae.eval(), x)


@pytest.mark.parametrize("name", TRAINING)
def test_synthetic_runner(name, tmp_path):
    from sae_lens.synthetic import SyntheticModelConfig, SyntheticSAERunner, SyntheticSAERunnerConfig

    config = SyntheticSAERunnerConfig(
        synthetic_model=SyntheticModelConfig(num_features=24, hidden_dim=D, orthogonalization=None, seed=0),
        sae=make_config(name, d_in=99, d_sae=F, k=4),  # SAELens corrects d_in after the config was made
        training_samples=10 * 64,
        batch_size=64,
        eval_samples=128,
        checkpoint_path=None,
        output_path=str(tmp_path),
        logger=LoggingConfig(log_to_wandb=False),
    )
    runner = SyntheticSAERunner(config)
    if name in COSINE:
        # log sqrt(16) = 1.3863, not log sqrt(99) = 2.2976
        assert runner.sae.log_scale.mean().item() == pytest.approx(1.3863, abs=1e-4)
    result = runner.run()
    assert 0 < result.final_eval.sae_l0 <= (4 if name in TOPK else F)
    assert_same_function(SAE.load_from_disk(tmp_path), result.sae.eval(), result.synthetic_model.sample(50))


def test_command_line_builds_our_config():
    flags = (
        "--architecture cosine_batchtopk --norm_exponent_init 0.25 --learn_norm_exponent false --log_scale_init 1.5 "
        f"--k 7 --d_in 16 --d_sae 64 --unit_decoder false --b_dec_init zeros --hook_name {HOOK} --lr 0.002"
    )
    config = _parse_cfg_args(flags.split())
    sae = config.sae
    assert sae.architecture() == "cosine_batchtopk"
    assert (sae.norm_exponent_init, sae.learn_norm_exponent, sae.log_scale_init) == (0.25, False, 1.5)
    assert (sae.k, sae.d_in, sae.d_sae, sae.unit_decoder, sae.b_dec_init) == (7, 16, 64, False, "zeros")
    assert (config.hook_name, config.lr) == (HOOK, 0.002)


@pytest.mark.parametrize("name", TRAINING)
def test_command_line_knows_every_architecture_and_its_defaults(name):
    flags = ["--architecture", name, "--d_in", str(D), "--d_sae", str(F)]
    for key, value in SELECTORS[selector_of(name)].settings(F, 4).items():
        flags += [f"--{key}", *map(str, value if isinstance(value, list) else [value])]
    parsed = _parse_cfg_args(flags).sae
    assert type(parsed) is type(small(name))
    assert parsed.to_dict() == small(name).to_dict()


FIELDS = {
    "per_feature_cosine_gated": {"exponent_sharing": "groups", "n_exponent_groups": 5, "l1_coefficient": 0.25},
    "per_feature_cosine_topk": {"norm_exponent_dropout": 0.5, "norm_exponent_lr_multiplier": 3.0},
    "cosine_jumprelu": {
        "jumprelu_sparsity_loss_mode": "tanh",
        "relative_l0_loss": False,
        "threshold_lr_multiplier": 2.0,
    },
    "cosine_matryoshka_batchtopk": {"use_matryoshka_aux_loss": True, "topk_threshold_lr": 0.5, "norm_exponent_l2": 0.1},
    "magnitude_bypass_batchtopk": {"unit_encoder": False, "restore_output_norm": False},
    "top_afa": {"afa_coefficient": 0.125, "match": "first_exceed"},
}
"""A selector's or a score's own fields."""


@pytest.mark.parametrize("name", FIELDS)
def test_command_line_knows_the_fields_of(name):
    flags = ["--architecture", name, "--d_in", str(D), "--d_sae", str(F)]
    for key, value in {**SELECTORS[selector_of(name)].settings(F, 4), **FIELDS[name]}.items():
        flags += [f"--{key}", *map(str, value if isinstance(value, list) else [value])]
    parsed = _parse_cfg_args(flags).sae
    assert {key: getattr(parsed, key) for key in FIELDS[name]} == FIELDS[name]


@pytest.mark.parametrize("name", TRAINING)
@pytest.mark.parametrize("scaled", ["none", "expected_average_only_in"])
@pytest.mark.parametrize("saved_after", [1, 7])
def test_resumed_equals_uninterrupted(name, scaled, saved_after, tmp_path):
    # resuming after step 1 repeats step number 0, because SAELens saves before it counts: b_dec must not start again
    def trainer(start=0):
        sae = make_sae(name, seed=None, d_in=D, d_sae=F, k=4, normalize_activations=scaled)
        data = Batches(lambda i: make_activations(64, D, seed=i), start)
        return make_trainer(sae, data, steps=12, batch=64, lr=1e-3)

    whole = trainer()
    whole.fit()

    first = trainer()
    first.checkpoint_thresholds = [saved_after * 64 - 1]
    first.cfg.checkpoint_path = str(tmp_path)
    first.fit()
    checkpoint = tmp_path / str(saved_after * 64)

    # estimating a scale takes the first 5 batches
    second = trainer(start=saved_after + (0 if scaled == "none" else 5))
    randomize(second.sae, seed=4)  # whatever is not restored shows
    second.load_trainer_state(checkpoint)
    second.sae.load_weights_from_checkpoint(checkpoint)
    second.fit()
    for key, tensor in whole.sae.state_dict().items():
        assert torch.equal(second.sae.state_dict()[key], tensor), key


@pytest.mark.parametrize("name", SOME)
def test_runner_resumes_from_its_checkpoint(name, model, tmp_path, monkeypatch):
    run_tiny(model, small(name), tmp_path, checkpoint_path=str(tmp_path / "checkpoints"), n_checkpoints=1)
    (checkpoint,) = (tmp_path / "checkpoints").glob("*/*")
    assert checkpoint.name == str(7 * 64)  # the first of 12 steps beyond half of the tokens
    entered = []
    step = SAETrainer.step

    def spy(self, batch):
        entered.append(state(self.sae))
        return step(self, batch)

    monkeypatch.setattr(SAETrainer, "step", spy)
    run_tiny(model, small(name), tmp_path, resume_from_checkpoint=str(checkpoint))
    assert len(entered) == 5
    for key, tensor in load_file(checkpoint / "sae_weights.safetensors").items():
        assert torch.equal(entered[0][key], tensor), key


@pytest.mark.parametrize("name", SOME)
def test_fine_tuning_does_not_start_b_dec_again(name, model, tmp_path):
    # two steps at lr 1e-3: Adam moves nothing by more than 2e-3
    run_tiny(model, small(name), tmp_path, checkpoint_path=str(tmp_path / "checkpoints"), n_checkpoints=1)
    (checkpoint,) = (tmp_path / "checkpoints").glob("*/*")
    sae, start = run_tiny(model, small(name), tmp_path, from_pretrained_path=str(checkpoint), steps=2)
    assert torch.equal(start["b_dec"], load_file(checkpoint / "sae_weights.safetensors")["b_dec"])
    assert 0 < (sae.b_dec - start["b_dec"]).abs().max() <= 2 * 1e-3 * 1.01

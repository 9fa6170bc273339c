"""SAELens' own machinery, unchanged, with every training architecture at toy size."""

import copy

import pytest
import torch
from helpers import (
    CONTEXT,
    COSINE,
    HOOK,
    ONE_PER_SELECTOR,
    SELECTORS,
    TOPK,
    TRAINING,
    VOCABULARY,
    Batches,
    assert_same_function,
    make_activations,
    make_config,
    make_sae,
    make_trainer,
    planted_batches,
    randomize,
    save_inference,
    selector_of,
    tiny_dataset,
    tiny_runner_config,
    tiny_tokenizer,
    train_step,
)
from sae_lens import SAE, LanguageModelSAETrainingRunner, LoggingConfig
from sae_lens.cache_activations_runner import CacheActivationsRunner
from sae_lens.config import CacheActivationsRunnerConfig
from sae_lens.evals import get_eval_everything_config, run_evals
from sae_lens.llm_sae_training_runner import _parse_cfg_args
from sae_lens.multi_sae_training_runner import MultiSAETrainingRunner, MultiSAETrainingRunnerConfig
from sae_lens.training.activation_scaler import ActivationScaler
from sae_lens.training.activations_store import ActivationsStore
from sae_lens.training.sae_trainer import SAETrainer
from safetensors.torch import load_file

D, F = 16, 32
SOME = [*ONE_PER_SELECTOR, "cosine_batchtopk", "inner_product_topk", "magnitude_bypass_batchtopk"]
"""Every selector and every score, for what SAELens does without asking which."""

TOKENS = torch.randint(1, len(VOCABULARY), (4, CONTEXT), generator=torch.Generator().manual_seed(5))

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")


def small(name, **overrides):
    return make_config(name, d_in=D, d_sae=F, k=4, **overrides)


def state(sae):
    return {key: tensor.detach().clone() for key, tensor in sae.state_dict().items()}


def run_tiny(model, sae_config, path, **overrides):
    runner = LanguageModelSAETrainingRunner(
        tiny_runner_config(sae_config, path, **overrides), override_dataset=tiny_dataset(), override_model=model
    )
    start = state(runner.sae)
    return runner.run(), start


def saved_sae(name, path):
    """Inference form for `HOOK`, parameters far from their starts."""
    sae = make_sae(name, d_in=D, d_sae=F, k=4)
    sae.cfg.metadata.hook_name = HOOK
    return save_inference(sae, path)


def model_activations(model, hook=HOOK):
    with torch.no_grad():
        return model.run_with_cache(TOKENS)[1][hook]


# --- runners ---


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


# --- checkpoints and resuming ---


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


# --- evaluation and attaching to models ---


@pytest.mark.parametrize("name", TRAINING)
@pytest.mark.parametrize("form", ["training", "inference"])
def test_run_evals(name, form, model, tmp_path):
    sae = make_sae(name, d_in=D, d_sae=F, k=4)
    sae.cfg.metadata.hook_name = HOOK
    sae.cfg.metadata.context_size = CONTEXT
    sae.cfg.metadata.prepend_bos = True
    if form == "inference":
        sae = save_inference(sae, tmp_path)
    store = ActivationsStore.from_sae(model, sae, tiny_dataset(), store_batch_size_prompts=4, n_batches_in_buffer=8)
    metrics, features = run_evals(
        sae, store, model, ActivationScaler(), get_eval_everything_config(4, 1, 1), exclude_special_tokens=False
    )
    assert metrics["sparsity"]["l0"] > 0
    for group in metrics.values():
        for key, value in group.items():
            assert torch.tensor(float(value)).isfinite(), key
    assert len(features["feature_density"]) == len(features["encoder_norm"]) == F


@pytest.mark.parametrize("name", TRAINING)
def test_hooked_sae_transformer(name, model, tmp_path):
    sae = saved_sae(name, tmp_path)
    with torch.no_grad():
        clean = model(TOKENS)
        replaced = model.run_with_hooks(TOKENS, fwd_hooks=[(HOOK, lambda x, **_: sae(x))])
        logits, cache = model.run_with_cache_with_saes(TOKENS, saes=[sae])
        torch.testing.assert_close(logits, replaced)
        assert not torch.allclose(logits, clean, atol=1e-3)
        assert torch.equal(cache[f"{HOOK}.hook_sae_acts_post"], sae.encode(cache[f"{HOOK}.hook_sae_input"]))
        with_error = model.run_with_saes(TOKENS, saes=[sae], use_error_term=True)
        torch.testing.assert_close(with_error, clean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model(TOKENS), clean)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_attached_sae_of_another_dtype_gives_the_model_its_own(dtype, model, tmp_path):
    sae = saved_sae("per_feature_cosine_batchtopk", tmp_path)
    sae.to(dtype)
    with torch.no_grad():
        out = model.run_with_hooks(TOKENS, fwd_hooks=[(HOOK, lambda x, **_: sae(x))])
    assert out.dtype == torch.float32


@pytest.fixture(scope="module")
def bridge(tmp_path_factory):
    """`SAETransformerBridge` on a random GPT-2 of 2 layers, loaded from a local folder."""
    from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = tmp_path_factory.mktemp("gpt2")
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(VOCABULARY), n_positions=CONTEXT, n_embd=D, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return SAETransformerBridge.boot_transformers(str(folder), device="cpu")


@pytest.mark.parametrize("name", SOME)
def test_sae_transformer_bridge(name, bridge, tmp_path):
    sae = saved_sae(name, tmp_path)
    with torch.no_grad():
        clean = bridge(TOKENS)
        logits, cache = bridge.run_with_cache_with_saes(TOKENS, saes=[sae])
        post, entry = (bridge.get_sae_hook_name(sae, part) for part in ("hook_sae_acts_post", "hook_sae_input"))
        assert not torch.allclose(logits, clean, atol=1e-3)
        assert torch.equal(cache[post], sae.encode(cache[entry]))
        with_error = bridge.run_with_saes(TOKENS, saes=[sae], use_error_term=True)
        torch.testing.assert_close(with_error, clean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(bridge(TOKENS), clean)


def test_training_through_the_bridge(bridge, tmp_path):
    # SAELens' store reads a bridge's cache by canonical names only
    hook = "blocks.1.hook_in"
    sae, _ = run_tiny(bridge, small("per_feature_cosine_batchtopk"), tmp_path, hook_name=hook, steps=4)
    assert all(tensor.isfinite().all() for tensor in sae.state_dict().values())
    assert SAE.load_from_disk(tmp_path / "output").cfg.metadata.hook_name == hook


@pytest.mark.parametrize("name", SOME)
def test_attention_heads(name, model, tmp_path):
    # hook_z is [batch, position, 2 heads, 8]: the SAE sees 16, and the norm is of all heads together
    hook = "blocks.1.attn.hook_z"
    config = small(name, reshape_activations="hook_z")
    sae, _ = run_tiny(model, config, tmp_path, hook_name=hook, steps=6)
    saved = SAE.load_from_disk(tmp_path / "output")
    z = model_activations(model, hook)
    assert z.shape == (4, CONTEXT, 2, 8)
    codes = saved.encode(z)
    assert codes.shape == (4, CONTEXT, F)
    torch.testing.assert_close(codes, sae.eval().encode(z.reshape(4, CONTEXT, D)))
    assert saved.decode(codes).shape == z.shape
    with torch.no_grad():
        clean = model(TOKENS)
        with_error = model.run_with_saes(TOKENS, saes=[saved], use_error_term=True)
        torch.testing.assert_close(with_error, clean, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(model.run_with_saes(TOKENS, saes=[saved]), clean, atol=1e-6)


# --- activations cached on disk ---


@pytest.fixture(scope="module")
def cached_activations(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("cached") / "activations"
    config = CacheActivationsRunnerConfig(
        dataset_path="tiny",
        model_name="tiny",
        model_batch_size=16,
        hook_name=HOOK,
        d_in=D,
        training_tokens=320 * CONTEXT,
        context_size=CONTEXT,
        new_cached_activations_path=str(path),
        device="cpu",
        buffer_size_gb=160 * CONTEXT * D * 4 / 1e9,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sae_lens.cache_activations_runner.load_model", lambda **_: model)
        cached = CacheActivationsRunner(config, override_dataset=tiny_dataset()).run()
    assert len(cached) == 320
    return path


@pytest.mark.parametrize("name", SOME)
def test_training_from_cached_activations(name, model, cached_activations, tmp_path, monkeypatch):
    monkeypatch.delattr(ActivationsStore, "get_activations")  # the model is not asked again
    sae, start = run_tiny(
        model,
        small(name),
        tmp_path,
        use_cached_activations=True,
        cached_activations_path=str(cached_activations),
    )
    assert not torch.equal(sae.state_dict()["W_enc"], start["W_enc"])
    SAE.load_from_disk(tmp_path / "output")


# --- options of SAELens' training classes ---


@pytest.mark.parametrize("name", [name for name in TOPK if "bypass" not in name])
def test_sparse_activations_train_like_dense_ones(name):
    saes = [make_sae(name, d_in=D, d_sae=F, k=4, use_sparse_activations=sparse).train() for sparse in (False, True)]
    x = make_activations(32, D)
    outputs = [train_step(sae, x) for sae in saes]
    assert outputs[1].feature_acts.is_sparse
    torch.testing.assert_close(outputs[1].loss, outputs[0].loss)
    for output in outputs:
        output.loss.backward()
    for (key, dense), sparse in zip(saes[0].named_parameters(), saes[1].parameters(), strict=True):
        torch.testing.assert_close(sparse.grad, dense.grad, rtol=1e-4, atol=1e-5, msg=lambda m, key=key: f"{key}: {m}")
    assert torch.equal(saes[0].tokens_since_fired, saes[1].tokens_since_fired)


@pytest.mark.parametrize("name", [name for name in TOPK if "bypass" not in name])
def test_sparse_activations_in_saelens_trainer(name, tmp_path):
    sae = make_sae(name, seed=None, d_in=D, d_sae=F, k=4, use_sparse_activations=True)
    data = Batches(lambda i: make_activations(64, D, seed=i))
    make_trainer(sae, data, steps=3, batch=64).fit()
    saved = save_inference(sae, tmp_path)
    x = data.sample(50)
    torch.testing.assert_close(saved(x), sae.eval()(x))


@pytest.mark.parametrize("name", ["cosine_batchtopk", "per_feature_cosine_topk"])
def test_compiled_training(name):
    # steps 0, 1, 2 and 10: data-dependent start, plain steps, and the step that looks for non-finite losses
    eager = make_sae(name, seed=None, d_in=D, d_sae=F, k=4).train()
    compiled = copy.deepcopy(eager)
    compiled.training_forward_pass = torch.compile(compiled.training_forward_pass, backend="inductor")
    data = planted_batches(d_in=D, n_features=24, active=3, batch=64)
    optimizers = [torch.optim.Adam(sae.parameters(), lr=1e-3) for sae in (eager, compiled)]
    for step in (0, 1, 2, 10):
        losses = []
        for sae, optimizer in zip((eager, compiled), optimizers, strict=True):
            loss = train_step(sae, data.sample(step), step=step).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
        torch.testing.assert_close(losses[1], losses[0], rtol=1e-4, atol=1e-5)
    for key, tensor in eager.state_dict().items():
        torch.testing.assert_close(
            compiled.state_dict()[key], tensor, rtol=1e-3, atol=1e-4, msg=lambda m, key=key: f"{key}: {m}"
        )


def test_runner_with_compile_sae(model, tmp_path):
    sae, start = run_tiny(model, small("cosine_batchtopk"), tmp_path, compile_sae=True, steps=3)
    assert not torch.equal(sae.norm_exponent, start["norm_exponent"])
    torch.testing.assert_close(sae.eval().W_dec.norm(dim=-1), torch.ones(F))


@pytest.mark.parametrize("name", COSINE)
def test_exponents_that_are_not_learned_stay(name):
    sae = make_sae(
        name, seed=None, d_in=D, d_sae=F, k=4,
        norm_exponent_init=0.3, learn_norm_exponent=False, log_scale_init=0.8, learn_log_scale=False,
    )  # fmt: skip
    make_trainer(sae, Batches(lambda i: make_activations(64, D, seed=i)), steps=3, batch=64).fit()
    assert sae.norm_exponent.unique().tolist() == pytest.approx([0.3])
    assert sae.log_scale.unique().tolist() == pytest.approx([0.8])


@pytest.mark.parametrize("name", SOME)
def test_names_tell_two_arms_at_one_hook_apart(name, model, tmp_path):
    sae, _ = run_tiny(model, small(name), tmp_path, steps=1)
    assert sae.get_name() == f"sae_tiny_{HOOK}_{F}_{name}"

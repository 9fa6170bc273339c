"""SAELens' evaluation, hooked models, cached activations and compilation, with our SAEs."""

import copy

import pytest
import torch
from helpers import (
    CONTEXT,
    COSINE,
    HOOK,
    TOPK,
    TRAINING,
    VOCABULARY,
    Batches,
    make_activations,
    make_sae,
    make_trainer,
    planted_batches,
    save_inference,
    tiny_dataset,
    tiny_tokenizer,
    train_step,
)
from machinery_cases import SOME, TOKENS, D, F, model_activations, run_tiny, small
from sae_lens import SAE
from sae_lens.cache_activations_runner import CacheActivationsRunner
from sae_lens.config import CacheActivationsRunnerConfig
from sae_lens.evals import get_eval_everything_config, run_evals
from sae_lens.training.activation_scaler import ActivationScaler
from sae_lens.training.activations_store import ActivationsStore

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")


def saved_sae(name, path):
    """Inference form for `HOOK`, parameters far from their starts."""
    sae = make_sae(name, d_in=D, d_sae=F, k=4)
    sae.cfg.metadata.hook_name = HOOK
    return save_inference(sae, path)


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

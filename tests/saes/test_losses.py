"""Reconstruction losses against numbers worked out by hand, and the next norm read from models of several families."""

import math

import pytest
import torch
from helpers import make_activations, make_sae, train_step
from sae_lens.load_model import HookedProxyLM
from sae_lens.saes.sae import mse_loss
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    Olmo2Config,
)

from saelens_cosine.bundled import load_bundled_bridge, load_bundled_model, model_folder
from saelens_cosine.saes.recipe.losses import (
    ReconstructionLoss,
    cosine_loss,
    post_norm_loss,
    rms_norm,
    squared_error,
    token_weights,
)
from saelens_cosine.training.next_norm import next_norm

X = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
X_HAT = torch.tensor([[3.0, 3.0], [2.0, 0.0]])
B_DEC = torch.tensor([0.0, 1.0])
GAIN = torch.tensor([1.0, 2.0])


def total(loss, x_hat=X_HAT, x=X, b_dec=B_DEC, gain=None):
    """The number that SAELens' trainer minimises: summed over dimensions, averaged over tokens."""
    return loss(x_hat, x, b_dec, gain).sum(dim=-1).mean()


# --- by hand ---


def test_squared_error():
    # (3-3)^2 + (4-3)^2 = 1;  2^2 + 2^2 = 8
    assert squared_error(X_HAT, X).tolist() == [1.0, 8.0]


def test_cosine_loss():
    # cos((3,4), (3,3)) = 21 / (5 * 3 sqrt 2) = 7 / (5 sqrt 2); orthogonal: 0
    torch.testing.assert_close(cosine_loss(X_HAT, X), torch.tensor([1 - 7 / (5 * math.sqrt(2)), 1.0]))
    # nothing is learnt from a zero vector, which has no direction
    assert cosine_loss(torch.zeros(1, 2), X[:1]).tolist() == [1.0]


def test_cosine_loss_is_not_centred():
    shifted = cosine_loss(X_HAT + 5, X + 5)
    # cos((8,9), (8,8)) = 17 / sqrt(145 * 2)
    assert shifted[0].item() == pytest.approx(1 - 17 / math.sqrt(290), rel=1e-4)


def test_rms_norm():
    # mean square of (3,4) is 12.5, plus eps 3.5 is 16: (3, 4) / 4 * (1, 2)
    assert rms_norm(X[0], GAIN, 3.5).tolist() == [0.75, 2.0]


def test_post_norm_loss():
    # eps 3.5: R(x) = (0.75, 2); mean square of (3,3) is 9, plus 3.5 is 12.5: R = (3, 6) / sqrt 12.5
    expected = (0.75 - 3 / math.sqrt(12.5)) ** 2 + (2 - 6 / math.sqrt(12.5)) ** 2
    # second token: mean squares 2, plus 3.5 is 5.5: R(x) = (0, 4), R(x_hat) = (2, 0), both / sqrt 5.5
    torch.testing.assert_close(post_norm_loss(X_HAT, X, GAIN, 3.5), torch.tensor([expected, 20 / 5.5]))


def test_token_weights():
    # centred: (3, 3) and (0, 1), norms sqrt 18 and 1
    mild = torch.tensor([18**-0.5, 1.0])
    torch.testing.assert_close(token_weights(X, B_DEC, "inverse_norm"), mild / mild.mean())
    # 1/18 and 1, mean 19/36
    strong = torch.tensor([2 / 19, 36 / 19])
    torch.testing.assert_close(token_weights(X, B_DEC, "inverse_squared_norm"), strong)
    assert token_weights(X, B_DEC, "none").tolist() == [1.0, 1.0]


def test_token_at_the_centre_has_a_finite_weight():
    # norms 1e-8 and 1: weights 1e8 and 1, mean about 5e7
    weights = token_weights(torch.tensor([[0.0, 1.0], [1.0, 1.0]]), B_DEC, "inverse_norm")
    torch.testing.assert_close(weights, torch.tensor([2.0, 2e-8]))


def test_mixture():
    # 0.5 * weighted error + 2 * cosine + 3 * post-norm, each mean over the two tokens by hand
    error = (2 / 19 * 1 + 36 / 19 * 8) / 2
    cosine = (1 - 7 / (5 * math.sqrt(2)) + 1) / 2
    post_norm = ((0.75 - 3 / math.sqrt(12.5)) ** 2 + (2 - 6 / math.sqrt(12.5)) ** 2 + 20 / 5.5) / 2
    loss = ReconstructionLoss(0.5, 2.0, 3.0, "inverse_squared_norm", post_norm_eps=3.5)
    assert total(loss, gain=GAIN).item() == pytest.approx(0.5 * error + 2 * cosine + 3 * post_norm, rel=1e-6)
    assert loss(X_HAT, X, B_DEC, GAIN).shape == X.shape


def test_squared_error_alone_is_saelens():
    x, x_hat = make_activations(50, 7), make_activations(50, 7, seed=1)
    for dtype in (torch.float32, torch.bfloat16):
        ours = ReconstructionLoss()(x_hat.to(dtype), x.to(dtype), torch.zeros(7), None)
        assert ours.dtype == dtype
        assert torch.equal(ours, mse_loss(x_hat.to(dtype), x.to(dtype)))
    assert not ReconstructionLoss(mse_weight=2.0).is_mse
    assert total(ReconstructionLoss(mse_weight=2.0)).item() == 9.0  # 2 * (1 + 8) / 2


@pytest.mark.parametrize(
    ("loss", "gain"),
    [
        (ReconstructionLoss(token_weighting="inverse_norm"), None),
        (ReconstructionLoss(mse_weight=0, cosine_weight=1), None),
        (ReconstructionLoss(mse_weight=0, post_norm_weight=1), GAIN),
    ],
)
def test_bfloat16_is_computed_in_float32(loss, gain):
    # all exact in bfloat16, so only the arithmetic could round; 256 - 0.5 needs nine bits
    x, x_hat = torch.tensor([[256.0, 1.0], [2.0, 8.0]]), torch.tensor([[254.0, 0.5], [3.0, 8.0]])
    b_dec = torch.tensor([0.5, 0.5])
    half = total(loss, x_hat.bfloat16(), x.bfloat16(), b_dec.bfloat16(), gain)
    assert half.dtype == torch.float32
    assert half.item() == total(loss, x_hat, x, b_dec, gain).item()


def test_float64_stays():
    loss = ReconstructionLoss(1, 1, 1, "inverse_norm")
    assert loss(X_HAT.double(), X.double(), B_DEC.double(), GAIN).dtype == torch.float64


# --- gradients ---


def gradient(loss, x_hat, x, b_dec=B_DEC, gain=None):
    x_hat = x_hat.clone().requires_grad_()
    total(loss, x_hat, x, b_dec, gain).backward()
    return x_hat.grad


def test_token_weights_carry_no_gradient():
    x, b_dec = X.clone().requires_grad_(), B_DEC.clone().requires_grad_()
    assert not token_weights(x, b_dec, "inverse_norm").requires_grad
    # through the reconstruction b_dec has one: x_hat = b_dec here, d/db of mean w |x - b|^2 = mean -2 w (x - b)
    total(ReconstructionLoss(token_weighting="inverse_squared_norm"), b_dec.expand(2, 2), x.detach(), b_dec).backward()
    # w = 2/19, 36/19; x - b = (3, 3), (0, 1)
    expected = -(2 / 19 * torch.tensor([3.0, 3.0]) + 36 / 19 * torch.tensor([0.0, 1.0]))
    torch.testing.assert_close(b_dec.grad, expected)


@pytest.mark.parametrize(
    ("loss", "eps"),
    [(ReconstructionLoss(0, 1, 0), 0.0), (ReconstructionLoss(0, 0, 1, post_norm_eps=1e-12), 1e-12)],
)
def test_length_of_the_reconstruction_is_not_seen(loss, eps):
    x, x_hat = make_activations(20, 7, dtype=torch.float64), make_activations(20, 7, seed=1, dtype=torch.float64)
    gain = torch.linspace(0.5, 2, 7, dtype=torch.float64)
    radial = (gradient(loss, x_hat, x, torch.zeros(7), gain) * x_hat).sum(dim=-1)
    sideways = gradient(loss, x_hat, x, torch.zeros(7), gain).norm(dim=-1) * x_hat.norm(dim=-1)
    assert (radial.abs() < 1e-9 * sideways).all()
    one, longer = (total(loss, scale * x_hat, x, torch.zeros(7), gain) for scale in (1, 1000))
    assert longer.item() == pytest.approx(one.item(), rel=1e-9)


def test_cosine_gradient():
    # d/dx_hat of -cos: -(u - cos * v) / |x_hat| with u, v the unit vectors, over 2 tokens
    u, v = torch.tensor([0.6, 0.8]), torch.tensor([1.0, 1.0]) / math.sqrt(2)
    expected = -(u - (u @ v) * v) / (3 * math.sqrt(2)) / 2
    torch.testing.assert_close(gradient(ReconstructionLoss(0, 1), X_HAT, X)[0], expected)


def test_as_the_loss_of_an_sae():
    sae = make_sae("cosine_topk", aux_loss_coefficient=0).train()
    x = make_activations(40, 7)
    loss = ReconstructionLoss(mse_weight=0, cosine_weight=1)
    sae.mse_loss_fn = lambda sae_out, sae_in: loss(sae_out, sae_in, sae.b_dec)
    output = train_step(sae, x)
    output.loss.backward()
    x_hat = output.sae_out.detach().double()
    cosine = (x * x_hat).sum(-1) / (x.double().norm(dim=-1) * x_hat.norm(dim=-1))
    assert output.loss.item() == pytest.approx(1 - cosine.mean().item(), rel=1e-5)
    assert sae.W_enc.grad.abs().sum() > 0


# --- errors ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mse_weight": -1}, "mse_weight=-1"),
        ({"cosine_weight": math.inf}, "cosine_weight=inf"),
        ({"mse_weight": 0}, "all 0"),
        ({"token_weighting": "strong"}, "'strong' is none of 'none', 'inverse_norm', 'inverse_squared_norm'"),
        ({"mse_weight": 0, "cosine_weight": 1, "token_weighting": "inverse_norm"}, "which mse_weight=0 leaves out"),
        ({"post_norm_eps": 0}, "post_norm_eps=0"),
    ],
)
def test_impossible_losses(options, message):
    with pytest.raises(ValueError, match=message):
        ReconstructionLoss(**options)


def test_post_norm_loss_without_a_gain():
    with pytest.raises(ValueError, match="next_norm"):
        total(ReconstructionLoss(post_norm_weight=1))


# --- the next norm ---

SIZES = {
    "vocab_size": 11,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-5,
}


def tiny(config):
    """A Hugging Face model with random weights, every gain and bias of a norm far from its start."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for module in model.modules():
        if "Norm" in type(module).__name__:
            for parameter in module.parameters():
                torch.nn.init.normal_(parameter)
    return HookedProxyLM(model, None)


def assert_gain(model, hook_name, expected, eps=1e-5, tolerance=1e-6):
    found = next_norm(model, hook_name)
    assert found.gain.dtype == torch.float32
    assert not found.gain.requires_grad
    assert found.eps == pytest.approx(eps)
    torch.testing.assert_close(found.gain, expected.detach().float(), rtol=0, atol=tolerance)


def test_llama():
    proxy = tiny(LlamaConfig(**SIZES))
    layers = proxy.model.model.layers
    assert_gain(proxy, "model.layers.0", layers[1].input_layernorm.weight)
    assert_gain(proxy, "model.layers.1", layers[2].input_layernorm.weight)
    assert_gain(proxy, "model.layers.2", proxy.model.model.norm.weight)
    assert_gain(proxy, "model.embed_tokens", layers[0].input_layernorm.weight)


def test_llama_in_bfloat16():
    proxy = tiny(LlamaConfig(**SIZES))
    proxy.model.bfloat16()
    assert_gain(proxy, "model.layers.1", proxy.model.model.layers[2].input_layernorm.weight, tolerance=2e-5)


@pytest.mark.parametrize("config", [GemmaConfig, Gemma2Config])
def test_gemma_counts_its_weight_from_one(config):
    proxy = tiny(config(**SIZES))
    layers = proxy.model.model.layers
    assert_gain(proxy, "model.layers.0", 1 + layers[1].input_layernorm.weight)
    assert_gain(proxy, "model.layers.2", 1 + proxy.model.model.norm.weight)


@pytest.mark.parametrize("load", [load_bundled_model, load_bundled_bridge])
def test_transformer_lens(load):
    model = load()
    weights = AutoModelForCausalLM.from_pretrained(model_folder()).model
    for hook, norm in {
        "blocks.2.hook_resid_post": weights.layers[3].input_layernorm,
        "blocks.3.hook_resid_pre": weights.layers[3].input_layernorm,
        "blocks.3.hook_resid_mid": weights.layers[3].post_attention_layernorm,
        "blocks.5.hook_resid_post": weights.norm,
    }.items():
        assert_gain(model, hook, norm.weight, eps=1e-6)


def test_gradients_and_hooks_are_left_alone():
    proxy = tiny(LlamaConfig(**SIZES))
    hooks = sum(len(module._forward_pre_hooks) for module in proxy.modules())
    next_norm(proxy, "model.layers.0")
    assert sum(len(module._forward_pre_hooks) for module in proxy.modules()) == hooks
    assert not proxy.hook_dict["model.layers.0"].fwd_hooks
    assert torch.is_grad_enabled()


def tiny_transformer(normalization, **overrides):
    config = HookedTransformerConfig(
        n_layers=2, d_model=16, n_ctx=8, d_head=8, n_heads=2, d_vocab=11, act_fn="gelu", normalization_type=normalization,
        seed=0, device="cpu", eps=1e-5,
    )  # fmt: skip
    for name, value in overrides.items():
        setattr(config, name, value)
    return HookedTransformer(config)


def test_hooked_transformer():
    model = tiny_transformer("RMS")
    torch.nn.init.normal_(model.blocks[1].ln1.w)
    assert_gain(model, "blocks.0.hook_resid_post", model.blocks[1].ln1.w)


@pytest.mark.parametrize("normalization", ["RMS", "RMSPre"])
def test_a_gain_that_is_gone(normalization):
    # RMSPre is what fold_ln leaves; ones are what it leaves in a bridge
    with pytest.raises(ValueError, match="from_pretrained_no_processing"):
        next_norm(tiny_transformer(normalization), "blocks.0.hook_resid_post")


@pytest.mark.parametrize("hook", ["blocks.0.hook_mlp_out", "blocks.0.hook_attn_out", "blocks.0.ln1.hook_normalized"])
def test_hooks_off_the_residual_stream(hook):
    with pytest.raises(ValueError, match=f"'{hook}'.*hook_resid_post.*model.layers.L"):
        next_norm(tiny_transformer("RMS"), hook)


def test_the_first_norm_after_the_hook_is_the_next():
    # attention writes nothing, so ln1 and ln2 read the same numbers
    model = tiny_transformer("RMS")
    torch.nn.init.normal_(model.blocks[1].ln1.w)
    model.blocks[1].attn.W_O.data.zero_()
    model.blocks[1].attn.b_O.data.zero_()
    torch.nn.init.normal_(model.blocks[1].ln2.w)
    assert_gain(model, "blocks.1.hook_resid_pre", model.blocks[1].ln1.w)
    assert_gain(model, "blocks.1.hook_resid_mid", model.blocks[1].ln2.w)


def test_layer_norm_is_refused():
    model = tiny_transformer("LN")
    torch.nn.init.normal_(model.blocks[1].ln1.w)
    with pytest.raises(ValueError, match="not an RMS norm.*subtracts a mean"):
        next_norm(model, "blocks.0.hook_resid_post")
    gpt2 = tiny(GPT2Config(vocab_size=11, n_embd=16, n_layer=2, n_head=2, n_positions=8))
    with pytest.raises(ValueError, match="LayerNorm after 'transformer.h.0'"):
        next_norm(gpt2, "transformer.h.0")


def test_layer_norm_is_refused_in_low_precision():
    # a random vector of 512 numbers has hardly a mean to subtract, and no bias gives it away
    model = tiny_transformer("LN", d_model=512, dtype=torch.bfloat16)
    torch.nn.init.normal_(model.blocks[1].ln1.w)
    with pytest.raises(ValueError, match="not an RMS norm"):
        next_norm(model, "blocks.0.hook_resid_post")


def test_an_eps_that_is_not_the_norms():
    proxy = tiny(LlamaConfig(**SIZES))
    proxy.model.bfloat16()
    proxy.model.model.layers[1].input_layernorm.eps = 0.01  # it computes with variance_epsilon
    with pytest.raises(ValueError, match="eps=0.01"):
        next_norm(proxy, "model.layers.0")


def test_blocks_that_normalise_only_their_outputs():
    proxy = tiny(Olmo2Config(**SIZES))
    with pytest.raises(ValueError, match="'model.layers.0'.*OLMo 2"):
        next_norm(proxy, "model.layers.0")
    assert_gain(proxy, "model.layers.2", proxy.model.model.norm.weight)


def test_no_such_hook():
    with pytest.raises(ValueError, match=r"'blocks\.9\.hook_resid_post'"):
        next_norm(tiny_transformer("RMS"), "blocks.9.hook_resid_post")


def test_gain_and_eps_make_the_norm():
    """The loss sees what the model sees: R of an activation is what the model's own norm makes of it."""
    proxy = tiny(Gemma2Config(**SIZES))
    found = next_norm(proxy, "model.layers.0")
    x = make_activations(30, 16, spread=3.0)
    norm = proxy.model.model.layers[1].input_layernorm
    torch.testing.assert_close(rms_norm(x, found.gain, found.eps), norm(x).detach(), rtol=1e-5, atol=1e-6)

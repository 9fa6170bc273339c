"""Losses of reconstructions, of which what no SAE decides is made once, against SAELens' own measure."""

import pytest
import torch
from causal_models import bundled_of_hugging_face
from helpers import HOOK, tiny_model
from sae_lens import StandardSAE, StandardSAEConfig
from sae_lens.evals import get_recons_loss
from sae_lens.load_model import HookedProxyLM
from sae_lens.training.activation_scaler import ActivationScaler
from transformers import BloomConfig, BloomForCausalLM, Gemma2Config, Gemma2ForCausalLM, GPT2Config, GPT2LMHeadModel

from saelens_cosine.activations.bridges import name_in_bridge
from saelens_cosine.bundled import load_bundled_bridge, load_bundled_model
from saelens_cosine.metrics.causal.resumed import ResumedModel
from saelens_cosine.metrics.reconstruction.clean_losses import clean_losses
from saelens_cosine.metrics.reconstruction.loss_recovered import ce_loss_recovered, loss_recovered

BATCHES = torch.randint(0, 30, (5, 8), generator=torch.Generator().manual_seed(0)).split([3, 2])


def an_sae(d_in, hook, head=None):
    sae = StandardSAE(StandardSAEConfig(d_in=d_in, d_sae=2 * d_in))
    sae.W_enc.data = 0.5 * torch.randn(sae.W_enc.shape, generator=torch.Generator().manual_seed(1))
    sae.cfg.metadata.hook_name, sae.cfg.metadata.hook_head_index = hook, head
    return sae


@pytest.mark.parametrize(
    "load, d_in, hook, head",
    [
        (tiny_model, 16, "blocks.0.hook_mlp_out", None),
        (tiny_model, 16, "blocks.1.attn.hook_z", None),
        (tiny_model, 4, "blocks.1.attn.hook_z", 1),
        (load_bundled_model, 192, "blocks.3.hook_resid_post", None),
        (load_bundled_bridge, 192, "blocks.3.hook_resid_post", None),
        (bundled_of_hugging_face, 192, "model.layers.3", None),
    ],
)
def test_saelens_own_measure_to_the_bit(load, d_in, hook, head):
    model = load()
    d_in = model.cfg.d_head if head is not None else d_in
    sae = an_sae(d_in, hook, head)
    clean = clean_losses(model, hook, BATCHES, head)
    for tokens, batch in zip(BATCHES, clean.batches, strict=True):
        at = name_in_bridge(hook, model) or hook
        with torch.no_grad():
            theirs = get_recons_loss(sae, model, ActivationScaler(), tokens, True, True, hook_name=at)
            ours = clean.losses(sae.decode(sae.encode(batch.hidden)), batch)
        assert torch.equal(ours.ce, theirs["ce_loss_with_sae"])
        assert torch.equal(ours.kl, theirs["kl_div_with_sae"])
        assert torch.equal(batch.clean.ce, theirs["ce_loss_without_sae"])
        assert torch.equal(batch.ablated.ce, theirs["ce_loss_with_ablation"])
        assert torch.equal(batch.ablated.kl, theirs["kl_div_with_ablation"])


def test_the_model_runs_as_it_is_once_for_all_saes(model):
    ran = []
    handle = model.blocks[0].register_forward_hook(lambda *_: ran.append(1))
    try:
        clean = clean_losses(model, HOOK, BATCHES)
        for sae in (an_sae(16, HOOK), an_sae(16, HOOK)):
            loss_recovered(sae, clean, None)
            loss_recovered(sae, clean, 1.3)
    finally:
        handle.remove()
    assert len(ran) == len(BATCHES)  # whatever comes after starts behind the hook, and not at the first block


SIZES = {"vocab_size": 40, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}


def gpt2():
    return HookedProxyLM(
        GPT2LMHeadModel(GPT2Config(n_layer=3, n_embd=16, n_head=2, n_positions=16, **SIZES)).eval(), None
    )


def gemma():
    """Its logits are capped after the unembedding."""
    config = Gemma2Config(
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        intermediate_size=20,
        final_logit_softcapping=0.05,
        **SIZES,
    )
    return HookedProxyLM(Gemma2ForCausalLM(config).eval(), None)


def bloom():
    """Its blocks return more than one thing."""
    return HookedProxyLM(BloomForCausalLM(BloomConfig(hidden_size=16, n_layer=3, n_head=2, **SIZES)).eval(), None)


@pytest.mark.parametrize(
    "load, hook, skips, capped",
    [
        (gpt2, "transformer.h.1", True, False),
        (gemma, "model.layers.1", True, True),
        (bloom, "transformer.h.1", False, False),
        (gpt2, "transformer.h.1.mlp", False, False),
    ],
)
def test_models_of_hugging_face(load, hook, skips, capped):
    torch.manual_seed(0)
    model = load()
    blocks, ran = model.model.get_submodule(hook.split(".1")[0]), []
    clean = clean_losses(model, hook, BATCHES)
    assert [batch.unembedded is None for batch in clean.batches] == [capped] * 2
    assert (clean.resumed.passed_over is not None) == skips
    handle = blocks[0].register_forward_hook(lambda _module, inputs, out: ran.append(out is inputs[0]))
    hidden = clean.batches[0].hidden
    found = clean.losses(1.5 * hidden + 0.25, clean.batches[0])
    handle.remove()
    assert ran[0] == skips
    with torch.no_grad():
        own = model(BATCHES[0]).double().log_softmax(-1)
        logits = model.run_with_hooks(BATCHES[0], fwd_hooks=[(hook, lambda x, hook: 1.5 * x + 0.25)])
    log_q = logits.double().log_softmax(-1)
    torch.testing.assert_close(found.kl.double(), (own.exp() * (own - log_q)).sum(-1), atol=1e-6, rtol=1e-4)
    ce = -log_q[:, :-1].gather(-1, BATCHES[0][:, 1:, None]).squeeze(-1)
    torch.testing.assert_close(found.ce.double(), ce, atol=1e-5, rtol=1e-5)
    assert not [block for block in blocks if "forward" in vars(block)]


def test_a_block_that_reads_more_than_the_one_before_is_not_passed_over(monkeypatch):
    model = gpt2()
    first, last = model.model.transformer.h[0], model.model.transformer.h[2]
    seen, plain = [], last.forward
    first.register_forward_hook(lambda _module, _inputs, out: seen.append(out))
    monkeypatch.setattr(last, "forward", lambda x, *args, **kwargs: plain(x + seen[-1], *args, **kwargs))
    assert ResumedModel(model, "transformer.h.1").passed_over is None


def test_an_sae_of_another_place_is_refused(model):
    clean = clean_losses(model, HOOK, BATCHES)
    with pytest.raises(ValueError, match=rf"hook blocks.0.hook_mlp_out, head None, and these losses are at {HOOK}"):
        loss_recovered(an_sae(16, "blocks.0.hook_mlp_out"), clean, None)
    with pytest.raises(ValueError, match=r"head 1, and these"):
        loss_recovered(an_sae(16, HOOK, 1), clean, None)


def test_the_score_alone(model):
    sae = an_sae(16, HOOK)
    found = loss_recovered(sae, clean_losses(model, HOOK, BATCHES), 1.3).by_norm.all_norms.overall.ce_loss_score
    assert ce_loss_recovered(sae, clean_losses(model, HOOK, BATCHES, compute_kl=False), 1.3) == found

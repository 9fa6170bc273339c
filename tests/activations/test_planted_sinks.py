import copy
import math

import pytest
import torch
from causal_models import FormulaModel, normal
from helpers import HOOK, tiny_dataset, tiny_model
from sae_lens import ActivationsStore, StandardSAE, StandardSAEConfig
from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge
from sae_lens.load_model import HookedProxyLM
from torch.nn.modules import module as torch_module
from transformers import AutoModelForCausalLM, AutoTokenizer

from saelens_cosine.activations.norm_filter import HighNormFilter
from saelens_cosine.activations.planted_sinks import PlantedSinks, plant_sinks
from saelens_cosine.activations.sample import sample_tokens
from saelens_cosine.bundled import load_bundled_bridge, load_bundled_model, model_folder
from saelens_cosine.metrics.causal.forward import clean_run
from saelens_cosine.metrics.reconstruction.clean_losses import clean_losses
from saelens_cosine.metrics.reconstruction.loss_recovered import loss_recovered


def proxy():
    return HookedProxyLM(
        AutoModelForCausalLM.from_pretrained(model_folder(), dtype=torch.float32),
        AutoTokenizer.from_pretrained(model_folder()),
    )


def sae_bridge():
    return SAETransformerBridge.boot_transformers(str(model_folder()), device="cpu")


MODELS = [
    (tiny_model, "blocks.1.hook_resid_pre"),
    (tiny_model, "blocks.0.hook_mlp_out"),
    (load_bundled_model, "blocks.3.hook_resid_post"),
    (load_bundled_bridge, "blocks.3.hook_resid_post"),
    (load_bundled_bridge, "blocks.0.hook_resid_pre"),
    (proxy, "model.layers.3"),
]
TOKENS = torch.randint(1, 30, (40, 8), generator=torch.Generator().manual_seed(1))
TOKENS[:, 0] = 0


@pytest.fixture(autouse=True)
def nothing_is_left_behind():
    yield
    torch_module._global_module_registration_hooks.clear()


@torch.no_grad()
def at_hook(model, hook, tokens=TOKENS):
    return model.run_with_cache(tokens, names_filter=[hook], prepend_bos=False)[1][hook]


@torch.no_grad()
def logits(model, tokens=TOKENS):
    return model(tokens, return_type="logits", prepend_bos=False)


def unit(x):
    return x / x.norm(dim=-1, keepdim=True)


@pytest.mark.parametrize("load, hook", MODELS)
def test_one_position_becomes_a_sink_and_nothing_else_changes(load, hook):
    model = load()
    before, predicted = at_hook(model, hook), logits(model)
    remove = plant_sinks(model, hook, seed=3)
    after, planted = at_hook(model, hook), logits(model)
    assert torch.equal(after[:, 1:], before[:, 1:])
    x, sinks = before[:, 1:].double(), after[:, 0].double()
    multiples = sinks.norm(dim=-1) / x.norm(dim=-1).sort(dim=-1).values[:, 3]  # of 7
    assert 29.99 < multiples.min() < 60
    assert 150 < multiples.max() < 300.1
    assert multiples.log().mean().item() == pytest.approx(math.log(30 * 300) / 2, abs=0.4)  # sd 0.66 / sqrt(40) = 0.1
    # halfway: as near to what they share as to their context, at cos^2 = (1 + shared @ context) / 2
    context = unit(unit(x).mean(dim=1))
    shared = unit(torch.randn(2, x.shape[-1], generator=torch.Generator().manual_seed(3))[0].double())
    expected = ((1 + context @ shared) / 2).sqrt()
    torch.testing.assert_close((unit(sinks) * context).sum(dim=-1), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(unit(sinks) @ shared, expected, atol=1e-5, rtol=0)
    assert (planted - predicted).abs().max() > 0.1  # downstream goes on from the sink
    remove()
    assert torch.equal(at_hook(model, hook), before)
    assert torch.equal(logits(model), predicted)
    assert not torch_module._global_module_registration_hooks


@pytest.mark.parametrize("load, hook", MODELS)
def test_downstream_goes_on_from_the_sink(load, hook):
    model = load()
    plain = at_hook(model, hook)
    remove = plant_sinks(model, hook)
    sinks, planted = at_hook(model, hook), logits(model)
    remove()
    with torch.no_grad():
        replaced = model.run_with_hooks(TOKENS, fwd_hooks=[(hook, lambda x, hook: sinks)], prepend_bos=False)
    assert not torch.equal(plain, sinks)
    torch.testing.assert_close(planted, replaced, atol=1e-4, rtol=1e-4)


def test_a_context_has_the_same_sink_in_any_batch_and_any_run():
    model, again = load_bundled_model(), load_bundled_model()
    hook = "blocks.3.hook_resid_post"
    plant_sinks(model, hook)
    together = at_hook(model, hook)[:, 0]
    alone = at_hook(model, hook, TOKENS[17:18])[:, 0]
    torch.testing.assert_close(alone, together[17:18], rtol=2e-3, atol=1e-3 * together[17].norm().item())
    plant_sinks(again, hook)
    assert torch.equal(at_hook(again, hook)[:, 0], together)
    other = load_bundled_model()
    plant_sinks(other, hook, seed=1)
    cosine = torch.cosine_similarity(at_hook(other, hook)[:, 0], together, dim=-1)
    assert cosine.max() < 0.9


def test_the_norm_of_a_sink_is_log_uniform_and_moves_little_with_its_context():
    torch.manual_seed(0)
    table = torch.randn(2000, 8, 32) + 2  # a common direction, as in language models
    model = FormulaModel(table.reshape(-1, 32), torch.eye(32))
    plant_sinks(model, "hook")
    tokens = torch.arange(16_000).reshape(2000, 8)
    x = at_hook(model, "hook", tokens).double()
    share = (x[:, 0].norm(dim=-1) / x[:, 1:].norm(dim=-1).median(dim=-1).values / 30).log() / math.log(10)
    counts = torch.histc(share, 5, 0, 1)
    assert counts.sum() >= 1998  # all but rounding lie inside
    assert ((counts - 400).abs() < 100).all()
    model.embed.weight.data *= 1 + 1e-6 * torch.randn(16_000, 32)
    torch.testing.assert_close(at_hook(model, "hook", tokens).double()[:, 0], x[:, 0], rtol=0.01, atol=1)


def test_another_position_and_contexts_without_it_or_with_nothing_else():
    model = tiny_model()
    before = at_hook(model, HOOK)
    plant_sinks(model, HOOK, position=5)
    after = at_hook(model, HOOK)
    changed = (after != before).any(dim=-1)
    assert changed.nonzero()[:, 1].unique().tolist() == [5]
    torch.testing.assert_close(at_hook(model, HOOK, TOKENS[:, :5]), before[:, :5], atol=1e-5, rtol=1e-5)
    single = tiny_model()
    expected = at_hook(single, HOOK, TOKENS[:, :1])
    plant_sinks(single, HOOK)
    assert torch.equal(at_hook(single, HOOK, TOKENS[:, :1]), expected)


def test_the_filter_drops_exactly_the_sinks_from_a_sample_and_from_saelens_store():
    model = load_bundled_model()
    hook = "blocks.3.hook_resid_post"
    plant_sinks(model, hook)
    sample = sample_tokens(model, hook, TOKENS.split(16))
    assert torch.equal(~sample.ordinary, sample.positions == 0)
    tiny = tiny_model()
    plant_sinks(tiny, HOOK)
    for max_norm_multiple, share in ((10.0, 1 / 8), (None, 0.0)):
        store = ActivationsStore.from_config_multi_hook(
            tiny, dataset=tiny_dataset(), hook_names=[HOOK], hook_d_ins={HOOK: 16}, context_size=8,
            store_batch_size_prompts=16, n_batches_in_buffer=16, train_batch_size_tokens=64,
        )  # fmt: skip
        norm_filter = HighNormFilter(max_norm_multiple).attach(store)
        x = next(store.get_multi_hook_data_loader())[HOOK]
        assert norm_filter.dropped_share == share
        norms = x.norm(dim=-1)
        assert (norms.max() > 30 * norms.median()) == (max_norm_multiple is None)


@pytest.mark.parametrize("load, hook", MODELS)
def test_an_edited_activation_is_not_planted_again(load, hook):
    model = load()
    plant_sinks(model, hook)
    sinks = at_hook(model, hook, TOKENS[:4])
    run = clean_run(model, hook, TOKENS[:4])
    torch.testing.assert_close(run.hidden, sinks)
    torch.testing.assert_close(
        run.resumed.log_probs(run.hidden, run.tokens, run.read), run.log_probs, atol=2e-4, rtol=0
    )

    def edit(hidden, rows):
        edited = hidden.clone()
        edited[:, 0] = 0.5 * hidden[:, 1]  # takes the sink away
        edited[:, 3] += hidden[:, 2]
        return edited

    edited = edit(sinks, None)
    unplanted = load()
    with torch.no_grad():
        changed = unplanted.run_with_hooks(TOKENS[:4], fwd_hooks=[(hook, lambda x, hook: edited)], prepend_bos=False)
    q = changed.log_softmax(-1)
    torch.testing.assert_close(run.resumed.log_probs(edit(run.hidden, None), run.tokens), q, atol=2e-4, rtol=0)
    assert (q[:, 0] - logits(model, TOKENS[:4])[:, 0].log_softmax(-1)).abs().amax(dim=-1).min() > 0.1
    p, q = run.log_probs.double(), q[:, -1].double()
    torch.testing.assert_close(run.kl(torch.arange(4), edit), (p.exp() * (p - q)).sum(-1), atol=1e-6, rtol=1e-2)


@pytest.mark.parametrize(
    "load, hook",
    [
        (load_bundled_model, "blocks.3.hook_resid_post"),
        (load_bundled_model, "blocks.3.hook_resid_pre"),
        (sae_bridge, "blocks.3.hook_out"),
        (sae_bridge, "blocks.3.hook_in"),
    ],
)
def test_attached_saes_read_the_sink_and_leave_it_when_they_go(load, hook):
    model = load()
    plain = at_hook(model, hook)
    remove = plant_sinks(model, hook)
    sinks = at_hook(model, hook)
    config = StandardSAEConfig(d_in=192, d_sae=5)
    config.metadata.hook_name = hook
    sae = StandardSAE(config)
    seen = []
    sae.hook_sae_input.add_hook(lambda x, hook: seen.append(x), is_permanent=True)
    with torch.no_grad():
        for _ in range(2):
            model.run_with_saes(TOKENS, saes=[sae], prepend_bos=False)
    assert all(torch.equal(x, sinks) for x in seen)
    assert len(seen) == 2
    assert torch.equal(at_hook(model, hook), sinks)
    remove()
    assert torch.equal(at_hook(model, hook), plain)
    model.add_sae(sae)
    with torch.no_grad():
        model(TOKENS, prepend_bos=False)
    assert torch.equal(seen[-1], plain)


def test_an_sae_at_another_hook_of_the_block_reads_no_sink():
    model = load_bundled_model()
    mlp_out = "blocks.3.hook_mlp_out"
    plain = at_hook(model, mlp_out)
    plant_sinks(model, "blocks.3.hook_resid_post")
    config = StandardSAEConfig(d_in=192, d_sae=5)
    config.metadata.hook_name = mlp_out
    sae = StandardSAE(config)
    name = f"{mlp_out}.hook_sae_input"
    _, cache = model.run_with_cache_with_saes(TOKENS, saes=[sae], names_filter=[name], prepend_bos=False)
    assert torch.equal(cache[name], plain)


def test_what_is_upstream_of_the_hook_keeps_its_activations():
    x = normal(4, 8, 16)
    before = x.clone()
    (planted,) = PlantedSinks(16, seed=0, position=0)(torch.nn.Identity(), (x,))
    assert torch.equal(x, before)
    assert not torch.equal(planted, before)


def test_predictions_from_reconstructions_start_from_the_planted_model():
    model = tiny_model()
    plant_sinks(model, HOOK)
    config = StandardSAEConfig(d_in=16, d_sae=5)
    config.metadata.hook_name = HOOK
    sae = StandardSAE(config)
    sae.W_dec.data.zero_()
    sae.b_dec.data = normal(16)
    found = loss_recovered(sae, clean_losses(model, HOOK, [TOKENS], compute_kl=False), 10.0)
    planted = logits(model)
    expected = torch.nn.functional.cross_entropy(planted[:, :-1].flatten(0, 1).double(), TOKENS[:, 1:].flatten())
    assert found.by_norm.all_norms.overall.ce_loss_without_sae == pytest.approx(expected.item(), rel=1e-5)
    assert found.replaced_share == 7 / 8
    # sinks are passed through and every other activation becomes b_dec
    sinks = at_hook(model, HOOK)
    sinks[:, 1:] = sae.b_dec.data
    with torch.no_grad():
        changed = tiny_model().run_with_hooks(TOKENS, fwd_hooks=[(HOOK, lambda x, hook: sinks)], prepend_bos=False)
    expected = torch.nn.functional.cross_entropy(changed[:, :-1].flatten(0, 1).double(), TOKENS[:, 1:].flatten())
    assert found.by_norm.all_norms.overall.ce_loss_with_sae == pytest.approx(expected.item(), rel=1e-5)


def test_models_in_half_precision_keep_their_dtype():
    model = FormulaModel(normal(30, 16).bfloat16(), torch.eye(16))
    model.unembed.bfloat16()
    plant_sinks(model, "hook")
    x = at_hook(model, "hook")
    assert x.dtype == torch.bfloat16
    assert x[:, 0].float().norm(dim=-1).min() > 29 * x[:, 1:].float().norm(dim=-1).min()


def test_a_copy_of_the_model_has_sinks_of_its_own():
    model = tiny_model()
    remove = plant_sinks(model, HOOK)
    twin = copy.deepcopy(model)
    sinks = at_hook(model, HOOK)
    remove()
    assert torch.equal(at_hook(twin, HOOK), sinks)


@pytest.mark.parametrize(
    "hook, position, message",
    [
        ("blocks.9.hook_resid_pre", 0, "no hook point 'blocks.9.hook_resid_pre'"),
        (HOOK, -1, "position=-1"),
        ("blocks.1.attn.hook_z", 0, r"have shape \(1, 2, 2, 8\) for one context"),
        ("blocks.0.hook_resid_pre", 0, "Plant at blocks.0.hook_resid_post or later"),
    ],
)
def test_what_is_refused_leaves_the_model_as_it_was(model, hook, position, message):
    with pytest.raises(ValueError, match=message):
        plant_sinks(model, hook, position=position)
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert not torch_module._global_module_registration_hooks


def test_rows_of_zeros_do_not_count_for_a_planted_sinks_norm():
    # two of three other positions are zeros: their median would be 0, and so would the sink
    x = torch.zeros(2, 4, 6)
    x[0, 3] = torch.tensor([3.0, 4.0, 0, 0, 0, 0])
    (planted,) = PlantedSinks(6, seed=0, position=0)(None, (x,))
    assert 30 * 5 <= planted[0, 0].norm() <= 300 * 5
    assert torch.equal(planted[0, 1:], x[0, 1:])
    assert not planted[1].any()

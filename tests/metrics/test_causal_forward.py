import math

import pytest
import torch
from causal_models import FormulaModel, bundled_of_hugging_face, kl, normal, relu_sae
from helpers import assert_close, tiny_model
from sae_lens import StandardSAE, StandardSAEConfig

from saelens_cosine.bundled import load_bundled_bridge, load_bundled_model
from saelens_cosine.metrics.causal.code_edits import decoded_change, reconstruct
from saelens_cosine.metrics.causal.forward import clean_run, kl_divergence
from saelens_cosine.metrics.codes import code_units

MODELS = [
    (tiny_model, "blocks.0.hook_resid_pre", 0),
    (tiny_model, "blocks.1.hook_resid_pre", 1),
    (tiny_model, "blocks.1.hook_resid_post", 2),
    (tiny_model, "blocks.0.hook_mlp_out", None),
    (tiny_model, "blocks.1.attn.hook_z", None),
    (load_bundled_model, "blocks.3.hook_resid_post", 4),
    (load_bundled_bridge, "blocks.3.hook_resid_post", None),
    (bundled_of_hugging_face, "model.layers.3", None),
]


@pytest.mark.parametrize("load, hook, start", MODELS)
def test_a_resumed_pass_is_the_full_one(load, hook, start, monkeypatch):
    model = load()
    tokens = torch.randint(0, 30, (5, 8))
    read = torch.tensor([7, 3, 0, 5, 7])
    monkeypatch.setattr("saelens_cosine.metrics.causal.forward.TOKENS_AT_ONCE", 16)  # batches of 2, 2, 1
    run = clean_run(model, hook, tokens, read)
    assert run.resumed.start_at_layer == start
    each = torch.arange(5)
    with torch.no_grad():
        clean, cache = model.run_with_cache(tokens, names_filter=[hook], prepend_bos=False)
        changed = model.run_with_hooks(tokens, fwd_hooks=[(hook, lambda x, hook: 1.5 * x + 0.25)], prepend_bos=False)
    hidden = cache[hook].flatten(2)
    assert_close(run.hidden, hidden, 1e-5)
    torch.testing.assert_close(run.log_probs, clean.log_softmax(-1)[each, read], atol=2e-4, rtol=0)
    resumed = run.resumed.log_probs(1.5 * run.hidden + 0.25, tokens)
    torch.testing.assert_close(resumed, changed.log_softmax(-1), atol=2e-4, rtol=0)
    torch.testing.assert_close(
        run.resumed.log_probs(1.5 * run.hidden + 0.25, tokens, read), resumed[each, read], atol=2e-4, rtol=0
    )

    p, q = (logits.double().log_softmax(-1)[each, read] for logits in (clean, changed))
    expected = (p.exp() * (p - q)).sum(-1)
    order = torch.tensor([4, 0, 1, 2, 3, 4])
    found = run.kl(order, lambda h, rows: 1.5 * h + 0.25)
    torch.testing.assert_close(found, expected[order], atol=2e-6, rtol=1e-3)


@pytest.mark.parametrize("load, hook, start", [MODELS[1], MODELS[6]])
def test_resuming_from_clean_activations_gives_the_clean_prediction_to_the_bit(load, hook, start):
    run = clean_run(load(), hook, torch.randint(0, 30, (4, 8)))
    again = run.resumed.log_probs(run.hidden, run.tokens, run.read)
    assert torch.equal(again, run.log_probs)


def test_left_padding_tokenizers_are_not_resumed():
    # their attention mask is made from the tokens, which a pass that starts later does not see
    model = tiny_model()
    model.tokenizer.padding_side = "left"
    assert clean_run(model, "blocks.1.hook_resid_pre", torch.ones(1, 3).long()).resumed.start_at_layer is None


def test_only_the_tokens_read_are_unembedded(model):
    seen = []
    handle = model.unembed.register_forward_hook(lambda module, inputs, out: seen.append(out.shape[:2]))
    try:
        run = clean_run(model, "blocks.1.hook_resid_pre", torch.ones(3, 8).long())
        run.kl(torch.arange(3), lambda h, rows: 2 * h)
    finally:
        handle.remove()
    assert seen == [(3, 1), (3, 1)]
    assert not model.unembed._forward_pre_hooks


def test_edits_that_change_nothing_are_not_run_and_cost_exactly_nothing(model, monkeypatch):
    run = clean_run(model, "blocks.1.hook_resid_pre", torch.randint(0, 30, (3, 8)))
    resumed, ran = run.resumed.log_probs, []
    monkeypatch.setattr(
        run.resumed,
        "log_probs",
        lambda hidden, tokens, read=None: ran.append(len(hidden)) or resumed(hidden, tokens, read),
    )

    def edit(hidden, rows):
        hidden[rows == 1] *= 2  # in place, which must not reach the clean run
        return hidden

    kl = run.kl(torch.arange(3), edit)
    assert ran == [1]
    assert kl[0] == kl[2] == 0
    assert kl[1] > 0
    assert torch.equal(run.kl(torch.arange(3), edit), kl)
    assert run.kl(torch.arange(3), lambda hidden, rows: hidden).tolist() == [0, 0, 0]
    assert ran == [1, 1]


def test_padding_after_the_token_read_does_not_matter(model):
    long, short = torch.randint(0, 30, (1, 8)), torch.randint(0, 30, (1, 5))
    padded = torch.cat([short, torch.full((1, 3), 9)], dim=1)
    hook = "blocks.1.hook_resid_pre"
    both = clean_run(model, hook, torch.cat([long, padded]), read=torch.tensor([7, 4]))
    alone = clean_run(model, hook, short)
    torch.testing.assert_close(both.log_probs[1:], alone.log_probs, atol=1e-6, rtol=0)
    sample = both.sample(None)
    assert sample.contexts.tolist() == [0] * 8 + [1] * 5
    assert sample.positions.tolist() == [*range(8), *range(5)]
    assert torch.equal(sample.tokens, torch.cat([long[0], short[0]]))
    torch.testing.assert_close(sample.activations[8:], alone.hidden[0], atol=1e-6, rtol=0)
    assert both.read_rows(sample).tolist() == [7, 12]
    assert both.read_rows(sample.where(torch.arange(13) != 7)).tolist() == [11]
    assert both.holds(sample.where(sample.positions == 2)).nonzero().tolist() == [[0, 2], [1, 2]]


def test_reading_elsewhere_and_alone():
    table, W_U = normal(6, 4), normal(4, 5, seed=1)
    run = clean_run(FormulaModel(table, W_U, "sum"), "hook", torch.tensor([[0, 1, 2], [3, 4, 5]]))
    twice = [lambda h, rows: 2 * h]
    at = run.at(torch.tensor([1, 0, 1]), torch.tensor([0, 1, 2]))
    sums = torch.stack([table[3], table[0] + table[1], table[3:].sum(0)])
    assert at.kl(torch.arange(3), *twice).tolist() == pytest.approx(kl(sums, 2 * sums, W_U).tolist(), rel=1e-5)
    alone = run.alone(table[1:3])
    assert alone.kl(torch.arange(2), *twice).tolist() == pytest.approx(
        kl(table[1:3], 2 * table[1:3], W_U).tolist(), rel=1e-5
    )


def test_sinks_are_marked():
    table = torch.eye(4)[[0, 1, 2, 3, 0]] * torch.tensor([1.0, 1, 1, 1, 50])[:, None]
    run = clean_run(FormulaModel(table, normal(4, 3)), "hook", torch.tensor([[4, 0, 1], [4, 2, 3]]))
    assert run.sample().ordinary.tolist() == [False, True, True] * 2
    assert run.sample(None).ordinary.all()


def test_what_is_refused(model):
    hook = "blocks.1.hook_resid_pre"
    with pytest.raises(ValueError, match="no hook point 'blocks.9'"):
        clean_run(model, "blocks.9", torch.ones(2, 3).long())
    with pytest.raises(ValueError, match=r"\(6,\) are not \[contexts, length\]"):
        clean_run(model, hook, torch.ones(6).long())
    with pytest.raises(ValueError, match="2 positions from 0 to 2"):
        clean_run(model, hook, torch.ones(2, 3).long(), read=torch.tensor([1, 3]))
    run = clean_run(model, hook, torch.ones(2, 3).long())
    other = clean_run(model, hook, torch.full((2, 3), 2)).sample(None)
    with pytest.raises(ValueError, match="not those of these contexts"):
        run.holds(other)
    with pytest.raises(ValueError, match="beyond these 2 contexts"):
        run.holds(clean_run(model, hook, torch.ones(3, 3).long()).sample(None))
    with pytest.raises(ValueError, match="no tokens"):
        run.holds(other.where(torch.zeros(6, dtype=torch.bool)))


def test_kl_divergence_by_hand():
    half, skewed = (torch.tensor(p, dtype=torch.float64).log() for p in ([0.5, 0.5], [0.9, 0.1]))
    # 0.5 ln(0.5/0.9) + 0.5 ln(0.5/0.1), and 0.9 ln(0.9/0.5) + 0.1 ln(0.1/0.5)
    assert kl_divergence(half, skewed).item() == pytest.approx(0.5 * math.log(5 / 9) + 0.5 * math.log(5), rel=1e-12)
    assert kl_divergence(skewed, half).item() == pytest.approx(0.9 * math.log(1.8) + 0.1 * math.log(0.2), rel=1e-12)


def test_kl_divergence_at_the_ends():
    certain = torch.tensor([0.0, -torch.inf, -torch.inf]).double()
    thirds = torch.full((3,), 1 / 3, dtype=torch.float64).log()
    assert kl_divergence(certain, certain).item() == 0
    assert kl_divergence(certain, thirds).item() == pytest.approx(math.log(3))
    assert kl_divergence(thirds, certain).item() == math.inf
    # probability exp(-2000) against almost 1: exp(2000) must not appear
    one, other = torch.tensor([0.0, -2000.0]).double(), torch.tensor([-2000.0, 0.0]).double()
    assert kl_divergence(one, other).item() == pytest.approx(2000)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_small_kl_divergences_are_right_and_never_negative(dtype):
    logits = normal(200, 500).to(dtype)
    p = logits.double().softmax(-1)
    change = 1e-3 * normal(200, 500, seed=1)
    found = kl_divergence(logits.log_softmax(-1), (logits + change.to(dtype)).log_softmax(-1))
    # to second order the KL of logits that change by c is half the variance of c under p
    second_order = ((p * change**2).sum(-1) - (p * change).sum(-1) ** 2) / 2
    torch.testing.assert_close(found.double(), second_order, atol=0, rtol=5e-3)
    noise = 1e-7 * normal(200, 500, seed=2)
    tiny = kl_divergence(logits.log_softmax(-1), (logits + noise.to(dtype)).log_softmax(-1))
    assert (tiny >= 0).all()
    assert tiny.max() < 1e-12


def test_a_change_of_codes_in_units_of_activations():
    W_enc, W_dec, x = normal(5, 7), 3 * normal(7, 5, seed=1), normal(40, 5, seed=2)
    sae = relu_sae(W_enc, W_dec)
    sae.b_dec.data = normal(5, seed=3)
    codes = ((x - sae.b_dec.data) @ W_enc).relu()

    def doubled(codes, rows):
        assert len(rows) == len(codes)
        return torch.where(torch.arange(7) == 2, 2 * codes, codes)

    moved = decoded_change(sae, x, doubled)
    torch.testing.assert_close(moved, codes[:, [2]] * W_dec[2], atol=1e-4, rtol=1e-4)
    assert (moved[codes[:, 2] == 0] == 0).all()
    torch.testing.assert_close(reconstruct(sae)(x), codes @ W_dec + sae.b_dec.data, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(code_units(sae), W_dec.norm(dim=-1))


def test_a_change_of_codes_passes_through_output_normalisation(monkeypatch):
    # SAELens' layer norm forgets the statistics of its input after one decode
    monkeypatch.setattr("saelens_cosine.metrics.causal.code_edits.most_at_once", lambda sae: 4)
    sae = StandardSAE(StandardSAEConfig(d_in=5, d_sae=7, normalize_activations="layer_norm"))
    sae.W_enc.data, sae.W_dec.data = normal(5, 7), normal(7, 5, seed=1)
    x = 9 * normal(10, 5, seed=2) + 1
    std = x.std(dim=-1, keepdim=True) + 1e-5
    codes = (((x - x.mean(dim=-1, keepdim=True)) / std) @ sae.W_enc.data).relu()
    moved = decoded_change(sae, x, lambda codes, rows: 0 * codes)
    torch.testing.assert_close(moved, -std * (codes @ sae.W_dec.data), atol=1e-3, rtol=1e-4)


def test_heads_are_flat_while_an_sae_on_them_is_used():
    config = StandardSAEConfig(d_in=6, d_sae=7, reshape_activations="hook_z")
    config.metadata.hook_name = "blocks.0.attn.hook_z"
    sae = StandardSAE(config)
    assert reconstruct(sae)(normal(3, 6)).shape == (3, 6)
    assert decoded_change(sae, normal(3, 6), lambda codes, rows: 2 * codes).shape == (3, 6)
    assert sae.hook_z_reshaping_mode

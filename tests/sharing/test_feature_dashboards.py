"""Best contexts, densities and logits of features against plain loops and by hand."""

from types import SimpleNamespace

import pytest
import torch
from helpers import CONTEXT, HOOK, VOCABULARY, make_sae
from sae_lens import SAE, TopKSAE, TopKSAEConfig

from saelens_cosine.metrics.dictionary import features
from saelens_cosine.metrics.dictionary.features import TopActivations, feature_dashboards, top_activations

D_MODEL, D_SAE = 16, 13


def tiny_sae(tmp_path, kind="cosine_batchtopk", hook=HOOK, seqpos_slice=(None,)):
    """An SAE of 13 features for the session's tiny language model."""
    if kind == "saelens_topk":
        sae = TopKSAE(TopKSAEConfig(d_in=D_MODEL, d_sae=D_SAE, k=3))
        torch.nn.init.normal_(sae.W_enc, generator=torch.Generator().manual_seed(3))
        torch.nn.init.normal_(sae.W_dec, generator=torch.Generator().manual_seed(4))
        sae.save_model(tmp_path)
    else:
        make_sae(kind, d_in=D_MODEL, d_sae=D_SAE).save_inference_model(tmp_path)
    sae = SAE.load_from_disk(tmp_path)
    sae.cfg.metadata.hook_name, sae.cfg.metadata.seqpos_slice = hook, seqpos_slice
    return sae


def token_batches(sizes=(5, 3, 8)):
    rng = torch.Generator().manual_seed(0)
    batches = [torch.randint(1, len(VOCABULARY), (size, CONTEXT), generator=rng) for size in sizes]
    for tokens in batches:
        tokens[:, 0] = 0
    return batches


def by_loops(sae, model, batches, n_contexts, max_norm_multiple=None, positions=range(CONTEXT)):
    """density [d_sae] and, per feature, [(context number, codes of the context)] with the largest maximum first."""
    codes, evaluated, start = {}, 0, 0
    active = [0] * D_SAE
    for tokens in batches:
        x = model.run_with_cache(tokens, prepend_bos=False)[1][sae.cfg.metadata.hook_name].flatten(2)
        norms = x.double().norm(dim=-1)
        median = norms.flatten().sort().values[(norms.numel() - 1) // 2]
        dense = sae.encode(x)
        for c in range(len(tokens)):
            for p in range(CONTEXT):
                if p not in positions or (max_norm_multiple and norms[c, p] > max_norm_multiple * median):
                    dense[c, p] = 0
                    continue
                evaluated += 1
                for f in range(D_SAE):
                    active[f] += int(dense[c, p, f] != 0)
            codes[start + c] = dense[c]
        start += len(tokens)
    best = []
    for f in range(D_SAE):
        ranked = sorted(codes, key=lambda c, f=f: (-codes[c][:, f].max().item(), c))
        best.append([(c, codes[c][:, f]) for c in ranked if codes[c][:, f].max() > 0][:n_contexts])
    return torch.tensor(active) / evaluated, best


@torch.no_grad()
@pytest.mark.parametrize("kind", ["cosine_batchtopk", "per_feature_cosine_topk", "saelens_topk"])
@pytest.mark.parametrize("max_norm_multiple", [None, 1.3])
def test_best_contexts_and_densities_are_those_of_plain_loops(tmp_path, model, monkeypatch, kind, max_norm_multiple):
    monkeypatch.setattr(features, "most_at_once", lambda sae: 5)  # several chunks for the class without sparse codes
    monkeypatch.setattr(features, "MERGE_CODES", 100)  # two batches at a time
    sae, batches = tiny_sae(tmp_path, kind), token_batches()
    found = top_activations(sae, model, batches, n_contexts=4, max_norm_multiple=max_norm_multiple)
    density, best = by_loops(sae, model, batches, 4, max_norm_multiple)
    assert torch.equal(found.density, density)
    assert (found.high_norm_share_dropped > 0) == (max_norm_multiple is not None)
    all_tokens = torch.cat(batches)
    assert any(len(contexts) == 4 for contexts in best)
    for feature, expected in enumerate(best):
        contexts = found.contexts(feature)
        assert len(contexts) == len(expected)
        for (tokens, values), (number, codes) in zip(contexts, expected, strict=True):
            assert torch.equal(tokens, all_tokens[number])
            torch.testing.assert_close(values, codes, rtol=1e-5, atol=1e-6)
            assert torch.equal(values != 0, codes != 0)


@torch.no_grad()
def test_positions_that_the_sae_was_not_trained_on_are_left_out(tmp_path, model):
    sae, batches = tiny_sae(tmp_path, seqpos_slice=(2, -1)), token_batches()
    found = top_activations(sae, model, batches)
    density, best = by_loops(sae, model, batches, 20, positions=range(2, CONTEXT - 1))
    assert torch.equal(found.density, density)
    assert found.tokens_evaluated == 16 * 5
    assert [len(found.contexts(f)) for f in range(D_SAE)] == [len(contexts) for contexts in best]


def test_what_is_kept_by_hand():
    """Two features, two contexts each; contexts of three tokens. Negative codes count as active, and rank no context."""
    found = TopActivations(d_sae=2, n_contexts=2)
    found.tokens_evaluated = 12

    def add(tokens, *codes):  # codes: (row, feature, value)
        rows, of, values = zip(*codes, strict=True)
        found.add(torch.tensor(tokens), torch.tensor(rows), torch.tensor(of), torch.tensor(values))

    # context 0: feature 0 is 1 at position 0 and 3 at 2; context 1: feature 0 is 2 at 1, feature 1 is -5 at 1
    add([[10, 11, 12], [20, 21, 22]], (0, 0, 1.0), (2, 0, 3.0), (4, 0, 2.0), (4, 1, -5.0))
    # context 2: feature 0 is 2 at 0, a tie with context 1, which stays; context 3: feature 1 is 4 at 2, feature 0 is 9
    add([[30, 31, 32], [40, 41, 42]], (0, 0, 2.0), (5, 1, 4.0), (5, 0, 9.0))
    assert found.active.tolist() == [5, 2]
    assert found.density.tolist() == pytest.approx([5 / 12, 2 / 12])
    read = [[(tokens.tolist(), values.tolist()) for tokens, values in found.contexts(f)] for f in range(2)]
    assert read[0] == [([40, 41, 42], [0.0, 0.0, 9.0]), ([10, 11, 12], [1.0, 0.0, 3.0])]
    assert read[1] == [([40, 41, 42], [0.0, 0.0, 4.0])]


def test_memory_does_not_grow_with_the_corpus(monkeypatch):
    """One feature, one context: of a thousand contexts one row of tokens and its codes are held."""
    monkeypatch.setattr(features, "MERGE_CODES", 400)
    found = TopActivations(d_sae=1, n_contexts=1)
    for i in range(100):
        rows = torch.arange(40)
        found.add(torch.full((10, 4), i), rows, torch.zeros_like(rows), torch.full((40,), float(i + 1)))
    assert found.contexts_seen == 1000
    assert found._new == []
    assert len(found._tokens) == len(found._pairs.numbers) == 1
    assert len(found._codes.values) == 4
    ((tokens, values),) = found.contexts(0)
    assert (tokens.tolist(), values.tolist()) == ([99] * 4, [100.0] * 4)


def test_features_with_numbers_beyond_the_first_are_not_confused():
    found = TopActivations(d_sae=70_000, n_contexts=1)
    found.add(torch.tensor([[1, 2]]), torch.tensor([0, 1]), torch.tensor([69_999, 3]), torch.tensor([1.0, 2.0]))
    assert found.contexts(69_999)[0][1].tolist() == [1.0, 0.0]
    assert found.contexts(3)[0][1].tolist() == [0.0, 2.0]
    assert found.contexts(4) == []


@torch.no_grad()
def test_logits_are_the_decoder_row_times_the_unembedding(tmp_path, model):
    sae = tiny_sae(tmp_path)
    found = top_activations(sae, model, token_batches())
    shown = list(feature_dashboards(sae, model, found, n_logits=3, batch=5))
    assert [dashboard.index for dashboard in shown] == list(range(D_SAE))
    logits = (sae.W_dec.double() @ model.W_U.double()).tolist()
    for dashboard in shown:
        row = logits[dashboard.index]
        ranked = sorted(range(len(VOCABULARY)), key=lambda token: -row[token])
        assert [end.token for end in dashboard.top_logits] == [VOCABULARY[token] for token in ranked[:3]]
        assert [end.token for end in dashboard.bottom_logits] == [VOCABULARY[token] for token in ranked[::-1][:3]]
        assert dashboard.top_logits[0].value == pytest.approx(max(row), rel=1e-5)
        assert dashboard.bottom_logits[0].value == pytest.approx(min(row), rel=1e-5)
    best = shown[0].contexts[0]
    assert best.tokens[0] == "<s>"
    assert max(best.values) == pytest.approx(max(found.contexts(0)[0][1].tolist()))
    assert [d.index for d in feature_dashboards(sae, model, found, features=[7, 2])] == [7, 2]


@torch.no_grad()
def test_columns_that_only_pad_the_vocabulary_are_not_shown(tmp_path, model):
    sae = tiny_sae(tmp_path)
    padded = SimpleNamespace(W_U=torch.cat([model.W_U, 1e3 * model.W_U], dim=1), tokenizer=model.tokenizer)
    found = top_activations(sae, model, token_batches())
    assert [d.top_logits for d in feature_dashboards(sae, padded, found)] == [
        d.top_logits for d in feature_dashboards(sae, model, found)
    ]


@torch.no_grad()
def test_an_sae_inside_attention_has_contexts_and_no_logits(tmp_path, model):
    """At hook_z the heads together are as wide as the residual stream, and are not written to it."""
    sae = tiny_sae(tmp_path, hook="blocks.0.attn.hook_z")
    sae.turn_on_forward_pass_hook_z_reshaping()
    found = top_activations(sae, model, token_batches())
    assert sae.hook_z_reshaping_mode
    sae.turn_off_forward_pass_hook_z_reshaping()
    density, _ = by_loops(sae, model, token_batches(), 20)
    assert torch.equal(found.density, density)
    assert next(iter(feature_dashboards(sae, model, found))).top_logits == ()

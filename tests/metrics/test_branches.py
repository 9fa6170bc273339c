"""Edits of the token that is read, as branches of their context: the predictions of a pass of their own, for a token each."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from causal_models import FormulaModel, bundled_of_hugging_face, normal
from helpers import tiny_model
from sae_lens.load_model import HookedProxyLM
from transformers import GPTNeoConfig, GPTNeoForCausalLM

from saelens_cosine.bundled import load_bundled_bridge
from saelens_cosine.metrics.causal import forward
from saelens_cosine.metrics.causal.branches import Branches
from saelens_cosine.metrics.causal.forward import clean_run
from saelens_cosine.metrics.causal.resumed import ResumedModel

BRANCHING = [
    (load_bundled_bridge, "blocks.3.hook_resid_post"),
    (load_bundled_bridge, "blocks.3.attn.hook_z"),
    (bundled_of_hugging_face, "model.layers.3"),
]
TOKENS = torch.randint(0, 30, (3, 12), generator=torch.Generator().manual_seed(1))
READ = torch.tensor([11, 4, 0])
CONTEXTS = torch.tensor([1, 0, 2, 1, 0, 1, 2, 0])
FACTORS = torch.tensor([0.0, 0.5, 1.5, 2.0, 3.0, 1.0, 0.25, 4.0])  # of the token read; edit 5 changes nothing


def scaled(hidden, rows):
    hidden[torch.arange(len(rows)), READ[CONTEXTS[rows]]] *= FACTORS[rows].unsqueeze(-1)
    return hidden


def by_whole_passes(model, hook, edit=scaled):
    """KL of each edit in float64, from one whole pass for each."""

    def log_p(i, changed):
        def put(x, hook):
            return edit(x.flatten(2).clone(), torch.tensor([i])).view_as(x) if changed else x

        context = TOKENS[CONTEXTS[[i]]]
        with torch.no_grad():
            logits = model.run_with_hooks(context, fwd_hooks=[(hook, put)], prepend_bos=False)
        return logits[0, READ[CONTEXTS[i]]].double().log_softmax(-1)

    found = [(log_p(i, False), log_p(i, True)) for i in range(len(CONTEXTS))]
    return torch.stack([(p.exp() * (p - q)).sum() for p, q in found])


@pytest.fixture
def counted(monkeypatch):
    """Tokens that go through the model in resumed passes, where a pass costs nothing beside them."""
    monkeypatch.setattr(forward, "BRANCHED_PASS", 0)
    seen, run = [], ResumedModel.logits

    def logits(self, hidden, tokens):
        seen.append(tokens.numel())
        return run(self, hidden, tokens)

    monkeypatch.setattr(ResumedModel, "logits", logits)
    return seen


@pytest.mark.parametrize("load, hook", BRANCHING)
def test_branches_predict_what_whole_passes_do(load, hook, counted):
    model = load()
    run = clean_run(model, hook, TOKENS, READ)
    assert run.branches is not None
    counted.clear()
    kl = run.kl(CONTEXTS, scaled)
    torch.testing.assert_close(kl, by_whole_passes(model, hook), atol=2e-6, rtol=1e-3)
    assert kl[5] == 0
    # contexts to the token read, and a token for each edit that changes something: 12 + 3, 5 + 2; of one token, two copies
    assert sorted(counted) == [2, 7, 15]


@pytest.mark.parametrize("load, hook", BRANCHING[1:])
def test_edits_of_other_tokens_run_to_the_token_read(load, hook, counted, monkeypatch):
    monkeypatch.setattr(forward, "TOKENS_AT_ONCE", 24)

    def edit(hidden, rows):
        hidden = scaled(hidden, rows)
        first = rows % 2 == 1
        hidden[first, 0] *= 2
        return hidden

    model = load()
    run = clean_run(model, hook, TOKENS, READ)
    counted.clear()
    torch.testing.assert_close(run.kl(CONTEXTS, edit), by_whole_passes(model, hook, edit), atol=2e-6, rtol=1e-3)
    # one edit of each context at most is of the token read alone: all are whole passes, two at a time, as long as the longer
    assert sorted(counted) == [2 * 1, 2 * 5, 2 * 12, 2 * 12]


def test_a_context_is_run_once_for_all_positions_read(counted):
    run = clean_run(bundled_of_hugging_face(), "model.layers.3", TOKENS)
    counted.clear()
    positions = torch.tensor([3, 0, 7, 2])
    at = run.at(torch.tensor([1, 0, 1, 0]), positions)
    assert sorted(counted) == [3, 8]  # up to the last that is read
    whole = run.resumed.log_probs(run.hidden, run.tokens)
    torch.testing.assert_close(at.log_probs, whole[[1, 0, 1, 0], positions], atol=2e-4, rtol=0)


def test_models_that_take_no_branches(monkeypatch):
    hook = "blocks.1.hook_resid_pre"
    formula = FormulaModel(normal(30, 4), normal(4, 5, seed=1), "sum")
    half = bundled_of_hugging_face()
    half.model.bfloat16()
    for model, where in ((tiny_model(), hook), (formula, "hook"), (half, "model.layers.3")):
        assert clean_run(model, where, TOKENS[:, :8]).branches is None
    strange = bundled_of_hugging_face()
    monkeypatch.setattr(type(strange.model.config), "get_text_config", None)  # a config of some other kind
    assert clean_run(strange, "model.layers.3", TOKENS, READ).branches is None
    monkeypatch.undo()
    # one that heeds no mask, as recurrent ones
    monkeypatch.setattr(Branches, "_told", lambda *_: nullcontext())
    assert clean_run(bundled_of_hugging_face(), "model.layers.3", TOKENS, READ).branches is None


@pytest.mark.parametrize("name", ["sliding_window", "attention_chunk_size"])
def test_a_pass_is_no_longer_than_attention_reaches(name, counted):
    model = bundled_of_hugging_face()
    setattr(model.model.config, name, 14)
    run = clean_run(model, "model.layers.3", TOKENS, READ)
    assert [run.branches.room(n) for n in (10, 12, 15)] == [4, 2, 0]
    counted.clear()
    torch.testing.assert_close(run.kl(CONTEXTS, scaled), by_whole_passes(model, "model.layers.3"), atol=2e-6, rtol=1e-3)
    # of three edits of 12 tokens two are branches, 12 + 2; 5 + 2; the third is in a pass with the two of one token, as long as itself
    assert sorted(counted) == [7, 14, 36]
    setattr(model.model.config, name, 9)  # less than the trial's six and four
    assert clean_run(model, "model.layers.3", TOKENS, READ).branches is None


def test_local_attention_by_index_is_seen():
    # GPT-Neo's local layers count keys from the end of the sequence, where a branch stands
    config = GPTNeoConfig(
        vocab_size=40, hidden_size=16, num_layers=3, num_heads=2, attention_types=[[["global", "local", "global"], 1]], window_size=16, max_position_embeddings=64
    )  # fmt: skip
    torch.manual_seed(0)
    model = HookedProxyLM(GPTNeoForCausalLM(config).eval(), None)
    run = clean_run(model, "transformer.h.0", TOKENS, READ)
    assert run.branches.room(12) == 4
    contexts = torch.zeros(40, dtype=torch.int64)
    factors = torch.linspace(0, 3, 40)

    def edit(hidden, rows):
        hidden[:, 11] *= factors[rows].unsqueeze(-1)
        return hidden

    whole = replace(run, branches=None).kl(contexts, edit)
    torch.testing.assert_close(run.kl(contexts, edit), whole, atol=2e-6, rtol=1e-3)


def test_copies_of_a_context_share_a_pass(counted):
    run = clean_run(bundled_of_hugging_face(), "model.layers.3", TOKENS)
    copies = run.at(torch.tensor([1, 0, 1, 1]), torch.tensor([3, 7, 9, 5])).at(
        torch.arange(4), torch.tensor([3, 7, 9, 5])
    )
    factors = torch.tensor([2.0, 0.5, 3.0, 0.0, 1.5, 4.0, 0.25, 2.0])

    def edit(hidden, rows):
        hidden[torch.arange(len(rows)), copies.read[rows % 4]] *= factors[rows].unsqueeze(-1)
        return hidden

    rows = torch.arange(4).repeat(2)
    whole = replace(copies, branches=None).kl(rows, edit)
    counted.clear()
    torch.testing.assert_close(copies.kl(rows, edit), whole, atol=2e-6, rtol=1e-3)
    assert sorted(counted) == [8 + 2, 10 + 6]


def test_a_pass_of_its_own_is_worth_some_tokens(monkeypatch):
    run = clean_run(bundled_of_hugging_face(), "model.layers.3", TOKENS, READ)
    monkeypatch.setattr(Branches, "log_probs", lambda *_: pytest.fail("few tokens are not worth a pass"))
    run.kl(CONTEXTS, scaled)
    run.alone(run.hidden[:, 3]).kl(torch.tensor([0, 0, 1, 1]), lambda hidden, rows: 2 * hidden)

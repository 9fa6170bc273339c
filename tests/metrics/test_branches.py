"""Edits of the token that is read, as branches of their context: the predictions of a pass of their own, for a token each."""

from contextlib import nullcontext

import pytest
import torch
from causal_models import FormulaModel, bundled_of_hugging_face, normal
from helpers import tiny_model

from saelens_cosine.bundled import load_bundled_bridge
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
    """Tokens that go through the model in resumed passes."""
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
    # contexts to the token read, and a token for each edit that changes something: 12 + 3, 5 + 2, 1 + 2
    assert sorted(counted) == [3, 7, 15]


@pytest.mark.parametrize("load, hook", BRANCHING[1:])
def test_edits_of_other_tokens_run_to_the_token_read(load, hook, counted):
    def edit(hidden, rows):
        hidden = scaled(hidden, rows)
        first = rows % 2 == 1
        hidden[first, 0] *= 2
        return hidden

    model = load()
    run = clean_run(model, hook, TOKENS, READ)
    counted.clear()
    torch.testing.assert_close(run.kl(CONTEXTS, edit), by_whole_passes(model, hook, edit), atol=2e-6, rtol=1e-3)
    # context 2 has one token, its first: both edits are branches, 1 + 2; the others change one in two, of 5 and 12 tokens
    assert sum(counted) < 8 * 12


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
    # one that heeds no mask, as recurrent ones
    monkeypatch.setattr(Branches, "_told", lambda *_: nullcontext())
    assert clean_run(bundled_of_hugging_face(), "model.layers.3", TOKENS, READ).branches is None


def test_contexts_longer_than_a_sliding_window_are_not_branched(counted):
    model = bundled_of_hugging_face()
    model.model.config.sliding_window = 5
    run = clean_run(model, "model.layers.3", TOKENS, READ)
    assert [run.branches.reach(n) for n in (5, 6)] == [True, False]
    counted.clear()
    run.kl(CONTEXTS, scaled)
    # three edits of 12 tokens each; 5 + 2; 1 + 2
    assert sorted(counted) == [3, 7, 36]

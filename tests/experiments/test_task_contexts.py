"""Labelled texts as contexts of a model, in the form of an SAE's training."""

import pytest
import torch
from helpers import make_sae, save_inference
from tokenizers import Tokenizer

from saelens_cosine.activations.contexts import ContextForm
from saelens_cosine.activations.models import load_hooked_model
from saelens_cosine.bundled import model_folder
from saelens_cosine.experiments.evaluate.texts import contexts
from saelens_cosine.experiments.evaluate.texts.concepts import bundled_concepts, token_concepts
from saelens_cosine.experiments.evaluate.texts.contexts import concept_run, sample_tasks
from saelens_cosine.experiments.evaluate.texts.tasks import Task
from saelens_cosine.metrics.causal.ablation import ablation_precision

HOOK = "blocks.3.hook_resid_post"


@pytest.fixture(scope="module")
def model():
    return load_hooked_model("bundled", hook=HOOK).model


TEXTS = ("import os", "x = 1", "for name in names:\n    print(name)", "def f", "y = 2")

TASK = Task("five", TEXTS, (True, False, True, False, True))


def sample_task(model, hook, task, *settings, **more):
    return sample_tasks(model, hook, [task], *settings, **more).of(0)


def token_ids(text):
    return Tokenizer.from_file(str(model_folder() / "tokenizer.json")).encode(text, add_special_tokens=False).ids


def expected_contexts(room):
    """What a context of at most `room + 1` tokens is, by the tokenizer itself: 0 begins a document."""
    return [[0, *token_ids(text)[-room:]] for text in TEXTS]


@torch.no_grad()
def one_by_one(model, hook, contexts):
    activations = []
    for tokens in contexts:
        _, cache = model.run_with_cache(torch.tensor([tokens]), names_filter=[hook], prepend_bos=False)
        activations.append(cache[hook][0])
    return torch.cat(activations)


@pytest.mark.parametrize("max_tokens", [5, 128])
def test_texts_are_run_in_order_and_without_padding(model, max_tokens):
    contexts = expected_contexts(max_tokens - 1)
    lengths = [len(tokens) for tokens in contexts]
    assert max(lengths) == 5 if max_tokens == 5 else max(lengths) > 8
    assert len(set(lengths)) > 1
    assert lengths != sorted(lengths)
    sample = sample_task(model, HOOK, TASK, max_tokens, max_norm_multiple=1.2)
    assert sample.tokens.tolist() == [token for tokens in contexts for token in tokens]
    assert sample.contexts.tolist() == [i for i, n in enumerate(lengths) for _ in range(n)]
    assert sample.positions.tolist() == [position for n in lengths for position in range(n)]
    torch.testing.assert_close(sample.activations, one_by_one(model, HOOK, contexts), rtol=1e-4, atol=1e-3)
    norms = sample.activations.double().norm(dim=-1)
    assert sample.ordinary.tolist() == (norms <= 1.2 * norms.sort().values[(len(norms) - 1) // 2]).tolist()
    assert 0 < sample.high_norm_share < 1
    assert sample_task(model, HOOK, TASK, max_tokens, max_norm_multiple=None).ordinary.all()


def test_batches_are_bounded(model, monkeypatch):
    whole = sample_task(model, HOOK, TASK)
    monkeypatch.setattr(contexts, "TEXT_TOKENS_AT_ONCE", 4)  # one context of any length
    seen = []
    with model.hooks([(HOOK, lambda activations, hook: seen.append(activations.shape[:2].numel()))]):
        parts = sample_task(model, HOOK, TASK)
    lengths = sorted(map(len, expected_contexts(127)))
    assert len(set(lengths)) < len(lengths)
    assert sorted(seen) == lengths
    assert torch.equal(parts.tokens, whole.tokens)
    assert torch.equal(parts.contexts, whole.contexts)
    torch.testing.assert_close(parts.activations, whole.activations, rtol=1e-4, atol=1e-3)


def test_a_hugging_face_model_gets_the_same_contexts(model):
    hooked = load_hooked_model(str(model_folder()), layer=3)
    assert hooked.class_name == "AutoModelForCausalLM"
    hooked.model.float()  # saved in bfloat16
    ours, theirs = sample_task(model, HOOK, TASK, 6), sample_task(hooked.model, hooked.hook_name, TASK, 6)
    assert torch.equal(ours.tokens, theirs.tokens)
    assert torch.equal(ours.contexts, theirs.contexts)
    torch.testing.assert_close(theirs.activations, ours.activations, rtol=1e-3, atol=1e-3)
    run, same = (concept_run(m, h, TEXTS) for m, h in ((model, HOOK), (hooked.model, hooked.hook_name)))
    torch.testing.assert_close(run.log_probs, same.log_probs, rtol=1e-3, atol=1e-3)


def test_contexts_of_a_tokenizer_with_and_without_a_first_token(model, monkeypatch):
    plain = [token_ids(text) for text in TEXTS]
    monkeypatch.setattr(model, "to_tokens", lambda text, **how: torch.tensor([[0, *token_ids(text)]]))
    assert sample_task(model, HOOK, TASK, 4).tokens.tolist() == [t for ids in plain for t in [0, *ids[-3:]]]
    monkeypatch.undo()
    hooked = load_hooked_model(str(model_folder()), layer=3)
    hooked.model.tokenizer.bos_token = None
    without = sample_task(hooked.model, hooked.hook_name, TASK, 4)
    assert without.tokens.tolist() == [token for ids in plain for token in ids[-4:]]


def test_a_text_without_tokens_is_refused(model):
    with pytest.raises(ValueError, match="Text 1 of task 'empty' has no tokens: ''"):
        sample_task(model, HOOK, Task("empty", ("a", ""), (True, False)))
    with pytest.raises(ValueError, match="no texts in the concepts"):
        concept_run(model, HOOK, [])
    with pytest.raises(ValueError, match="max_tokens=1 leaves no room"):
        sample_task(model, HOOK, TASK, max_tokens=1)


def test_concepts_are_read_at_their_last_token(model):
    contexts = expected_contexts(4)
    run = concept_run(model, HOOK, TEXTS, max_tokens=5)
    assert run.read.tolist() == [len(tokens) - 1 for tokens in contexts]
    assert run.tokens.shape == (5, 5)
    assert run.sample().tokens.tolist() == [token for tokens in contexts for token in tokens]
    for i, tokens in enumerate(contexts):
        alone = model(torch.tensor([tokens]))[0, -1].log_softmax(dim=-1)
        torch.testing.assert_close(run.log_probs[i], alone, rtol=1e-3, atol=1e-4)


def test_concepts_can_be_ablated(model, tmp_path):
    torch.manual_seed(0)
    sae = save_inference(make_sae("cosine_topk", d_in=192), tmp_path)
    concepts = bundled_concepts(4)
    run = concept_run(model, HOOK, concepts.texts)
    result = ablation_precision(run, sae, run.sample(), torch.tensor(concepts.labels), (1,))
    assert [concept.texts for concept in result.concepts] == [2] * 8
    assert result.mean[0].intended_kl > 0


def test_token_concepts_are_the_tokens_last_read():
    tokens = torch.tensor([[9, 9, 5], [9, 9, 7], [9, 9, 5], [9, 9, 7], [9, 9, 5], [9, 9, 3]])
    found = token_concepts(tokens, per_token=2, first=2)  # the last position is the only one left
    assert found.tokens == [5, 7]
    assert found.contexts.tolist() == [0, 2, 1, 3]
    assert found.positions.tolist() == [2] * 4
    assert found.labels == [0, 0, 1, 1]
    with pytest.raises(ValueError, match="6 contexts are too few"):
        token_concepts(tokens, n_tokens=1, first=2)
    with pytest.raises(ValueError, match="end before position 3"):
        token_concepts(tokens, first=3)


def test_a_text_has_no_more_tokens_than_the_contexts_that_the_sae_was_trained_on(model):
    form = ContextForm(3)
    assert sample_task(model, HOOK, TASK, form=form).positions.max() == 2
    assert concept_run(model, HOOK, TEXTS, form=form).tokens.shape[1] == 3


def test_a_text_of_several_tasks_is_run_once(model):
    """A task's tokens, and which of them are ordinary, are those that it has alone."""
    long = Task("long", (TEXTS[2], TEXTS[4], "z = [1, 2, 3]"), (True, False, True))
    seen, told = [], []
    with model.hooks([(HOOK, lambda activations, hook: seen.append(activations.shape[:2].numel()))]):
        both = sample_tasks(
            model, HOOK, [TASK, long], max_norm_multiple=1.2, progress=lambda *progress: told.append(progress)
        )
    total = sum(len(token_ids(text)) + 1 for text in {*TASK.texts, *long.texts})
    assert sum(seen) == total == len(both.sample)
    assert told[0] == ("Labelled texts, tokens", 0, total)
    for i, task in enumerate((TASK, long)):
        alone, own = sample_task(model, HOOK, task, max_norm_multiple=1.2), both.of(i)
        for name in ("tokens", "contexts", "positions", "ordinary"):
            assert torch.equal(getattr(own, name), getattr(alone, name)), name
        torch.testing.assert_close(own.activations, alone.activations, rtol=1e-4, atol=1e-3)
        assert not own.ordinary.all()
        rows, contexts = both.tokens[i].treated("without_sinks")
        assert torch.equal(both.sample.tokens[rows], own.without_sinks().tokens)
        assert torch.equal(contexts, own.without_sinks().contexts)


def test_tokens_that_the_sae_does_not_see_are_left_out_of_tasks(model):
    form = ContextForm(8, seqpos_slice=(1, None))
    sample = sample_task(model, HOOK, TASK, form=form)
    assert sample.positions.min() == 1
    assert sample.tokens.tolist() == [token for text in TEXTS for token in token_ids(text)[-7:]]

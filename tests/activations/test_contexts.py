import pytest
import torch
from datasets import Dataset
from helpers import CONTEXT, HOOK, VOCABULARY, make_sae
from sae_lens.saes.sae import SAEMetadata

from saelens_cosine.activations.contexts import ContextForm, Contexts, sample_contexts
from saelens_cosine.activations.near_copies import HeldOutRuns, runs
from saelens_cosine.activations.sample import sample_tokens
from saelens_cosine.experiments.compare.settings import ComparisonSettings
from saelens_cosine.experiments.evaluate.settings import EvaluationSettings
from saelens_cosine.metrics.dictionary.features import top_activations
from saelens_cosine.metrics.reconstruction.clean_losses import clean_losses


def store_of(model, documents, **form):
    """Documents as words of the tiny model's vocabulary, by their ids."""
    texts = [" ".join(VOCABULARY[token] for token in tokens) for tokens in documents]
    dataset = Dataset.from_dict({"text": texts}).to_iterable_dataset()
    return ContextForm(**{"context_size": 4, **form}).store(model, dataset, HOOK, 16, "cpu")


def test_every_document_gives_its_share_of_contexts(model):
    # 4 documents of 40 tokens without BOS and separator: 10 contexts of 4 each; 8 of 40 contexts are the middles of fifths
    documents = [[i + 5] * 40 for i in range(4)]
    found = sample_contexts(store_of(model, documents, prepend_bos=False, sequence_separator_token=None), 30)
    assert found.documents.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]  # 30 tokens are 8 contexts
    assert found.tokens.tolist() == [[document + 5] * 4 for document in found.documents.tolist()]


def test_all_contexts_where_the_text_is_short_and_an_error_where_there_is_none(model):
    found = sample_contexts(store_of(model, [[5, 6, 7], [8, 9, 10, 11]], prepend_bos=False), 1000)
    # the beginning-of-sequence token, id 0, separates documents
    assert found.tokens.tolist() == [[5, 6, 7, 0], [8, 9, 10, 11]]
    assert found.documents.tolist() == [1, 1]  # a separator is the next document's
    with pytest.raises(ValueError, match="shorter than one context of 4"):
        sample_contexts(store_of(model, [[5, 6]], prepend_bos=False), 1000)
    with pytest.raises(ValueError, match=r"No document of the text has one context of 4 .* smaller context size"):
        sample_contexts(store_of(model, [[5, 6]] * 9, prepend_bos=False, disable_concat_sequences=True), 1000)


def test_even_steps_are_the_middles_of_equal_stretches():
    contexts = Contexts(torch.arange(10).unsqueeze(-1), torch.arange(10))
    assert contexts.at_even_steps(2).documents.tolist() == [2, 7]  # of [0, 5) and [5, 10), 2.5 and 7.5 down
    assert contexts.at_even_steps(3).documents.tolist() == [1, 5, 8]  # 1.67, 5, 8.33
    assert contexts.at_even_steps(10).documents.tolist() == list(range(10))
    assert contexts.at_even_steps(11).documents.tolist() == list(range(10))


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        ({}, [[0, 5, 6, 7], [0, 8, 9, 0]]),  # 0 begins each context and separates the documents
        ({"prepend_bos": False}, [[5, 6, 7, 8], [9, 0, 10, 11]]),
        ({"prepend_bos": False, "sequence_separator_token": None}, [[5, 6, 7, 8], [9, 10, 11, 12]]),
        ({"sequence_separator_token": 3}, [[0, 5, 6, 7], [0, 8, 9, 3]]),
        ({"disable_concat_sequences": True}, [[0, 5, 6, 7], [0, 10, 11, 12]]),
        ({"disable_concat_sequences": True, "prepend_bos": False, "context_size": 5}, [[5, 6, 7, 8, 9]]),
    ],
)
def test_contexts_have_the_form_that_the_sae_was_trained_on(model, form, expected):
    found = sample_contexts(store_of(model, [[5, 6, 7, 8, 9], [10, 11, 12]], **form), 1000)
    assert found.tokens.tolist()[: len(expected)] == expected


def test_metadata_name_the_form_and_saelens_defaults_fill_the_rest():
    assert ContextForm.of(SAEMetadata()) == ContextForm(128, True, "bos", False, (None,), False)
    metadata = SAEMetadata(
        context_size=64,
        prepend_bos=False,
        sequence_separator_token=None,
        disable_concat_sequences=True,
        seqpos_slice=[1, -1],
        exclude_special_tokens=[0, 7],
    )
    assert ContextForm.of(metadata) == ContextForm(64, False, None, True, (1, -1), (0, 7))
    assert ContextForm.of(metadata, context_size=32).context_size == 32
    assert ContextForm.of(metadata, longest=16).context_size == 16


def test_tokens_that_the_sae_never_saw_are_not_measured(model):
    tokens = torch.tensor([[0, 5, 6, 7], [0, 8, 0, 9]])
    seen = ContextForm(4, seqpos_slice=(0, 3), exclude_special_tokens=(5,)).seen(model, tokens)
    assert seen.tolist() == [[True, False, True, False], [True, True, True, False]]
    special = ContextForm(4, exclude_special_tokens=True).seen(model, tokens)
    assert special.tolist() == [[False, True, True, True], [False, True, False, True]]
    sample = sample_tokens(model, HOOK, [tokens], None, torch.tensor([4, 6]), seen)
    assert sample.tokens.tolist() == [0, 6, 0, 8, 0]
    assert sample.positions.tolist() == [0, 2, 0, 1, 2]
    assert sample.contexts.tolist() == [0, 0, 1, 1, 1]
    assert sample.documents.tolist() == [4, 4, 6, 6, 6]
    whole = sample_tokens(model, HOOK, [tokens], None)
    assert torch.equal(sample.activations, whole.activations[[0, 2, 4, 5, 6]])
    assert CONTEXT >= 4


def test_the_share_of_runs_is_counted_in_words():
    words = [f"w{i}" for i in range(64)]
    held_out = HeldOutRuns([{"text": " ".join(words)}])
    assert len(runs(" ".join(words))) == 33  # one for each start of 32 words
    # the first 48 words are 17 runs of the same, each of the 16 others lets one more run be new
    assert held_out.shared(" ".join(words[:48] + [f"x{i}" for i in range(16)])) == pytest.approx(17 / 33)
    assert held_out.shared(" ".join(words[::-1])) == 0
    assert held_out.shared("short and whole") == 0
    assert HeldOutRuns([{"text": "short and whole"}]).shared("short  and\nwhole") == 1
    tokenised = HeldOutRuns([{"tokens": list(range(40))}])  # runs from 0 to 8
    assert tokenised.shared(list(range(6, 46))) == pytest.approx(3 / 9)
    assert tokenised.leaves({"tokens": list(range(6, 46))})
    assert not tokenised.leaves({"tokens": list(range(5, 45))})


def test_contexts_without_room_for_text_are_refused():
    for settings in (EvaluationSettings, ComparisonSettings):
        assert settings(context_size=2).context_size == 2
        for size in (1, 0, -5):
            with pytest.raises(ValueError, match=f"context_size={size} must be 2 or more"):
                settings(context_size=size)


def test_an_sae_of_conversations_reads_them_as_it_was_trained(model, monkeypatch):
    said = " ".join(VOCABULARY[5:11])
    template = "{% for turn in messages %}" + VOCABULARY[20] + " {{ turn.content }}{% endfor %}"
    monkeypatch.setattr(model.tokenizer, "chat_template", template)
    rows = Dataset.from_dict({"messages": [[{"role": "user", "content": said}]] * 2}).to_iterable_dataset()
    trained = {"prepend_bos": False, "sequence_separator_token": None, "use_chat_formatting": True}
    form = ContextForm.of(SAEMetadata(context_size=4, **trained))
    found = sample_contexts(form.store(model, rows, HOOK, 16, "cpu"), 100)
    assert found.tokens.tolist() == [[20, 5, 6, 7], [8, 9, 10, 20], [5, 6, 7, 8]]


class Elsewhere(torch.nn.Module):
    """A model on another device than tokens that were sampled; says where those come that it is run on."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(1, device="meta"))
        self.hook_dict, self.unembed = {HOOK: None}, torch.nn.Identity()

    def run_with_cache(self, tokens, **_):
        raise RuntimeError(f"run on {tokens.device.type}")

    def forward(self, tokens, **_):
        self.run_with_cache(tokens)


def test_tokens_go_to_the_models_device():
    sae, batches = make_sae("cosine_topk"), [torch.zeros(2, 4, dtype=torch.int64)]
    sae.cfg.metadata.hook_name = HOOK
    for measure in (
        lambda: sample_tokens(Elsewhere(), HOOK, batches),
        lambda: clean_losses(Elsewhere(), HOOK, batches),
        lambda: top_activations(sae, Elsewhere(), batches),
    ):
        with pytest.raises(RuntimeError, match="run on meta"):
            measure()

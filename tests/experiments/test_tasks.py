import pandas as pd
import pytest
import torch
from helpers import make_sae, save_inference
from tokenizers import Tokenizer

from saelens_cosine.activations.contexts import ContextForm
from saelens_cosine.activations.models import load_hooked_model
from saelens_cosine.bundled import model_folder, stdlib_corpus
from saelens_cosine.experiments.evaluate.texts import code_concepts, contexts
from saelens_cosine.experiments.evaluate.texts.code_concepts import CONCEPTS, NEXT_TOKENS, windows
from saelens_cosine.experiments.evaluate.texts.concepts import bundled_concepts, token_concepts
from saelens_cosine.experiments.evaluate.texts.contexts import concept_run, sample_task
from saelens_cosine.experiments.evaluate.texts.tasks import Task, load_tasks
from saelens_cosine.metrics.causal.ablation import ablation_precision

HOOK = "blocks.3.hook_resid_post"


@pytest.fixture(scope="module")
def model():
    return load_hooked_model("bundled", hook=HOOK).model


def by_line(source):
    """Each line of code as a window of its own: what is asked of it, and what of that holds."""
    file = code_concepts._File(source)
    answers = {}
    for line in sorted(file.in_statement):
        window = file.window(line, line)
        asked = {name: concept.holds(window) for name, concept in CONCEPTS.items() if concept.among(window)}
        answers[line] = (set(asked), {name for name, holds in asked.items() if holds})
    return answers


# labels of code

SHELF = '''\
import os


class Shelf:
    """Books,
    by title."""

    def __len__(self):
        if self.books is None:
            return 0
        return len(
            self.books
        )


def total(shelves):
    for shelf in shelves:
        try:
            count = len(shelf)
        except TypeError:
            raise ValueError("no %s" % shelf)
    return count
'''


def test_labels_by_hand():
    answers = by_line(SHELF)
    assert {line: holds for line, (_, holds) in answers.items()} == {
        1: set(),
        4: set(),
        5: {"docstring"},
        6: {"docstring"},
        8: set(),  # the class's line, not the function's
        9: {"method", "special_method"},
        10: {"method", "special_method", "condition", "leaves_block"},
        11: {"method", "special_method", "unfinished"},
        12: {"method", "special_method", "unfinished"},
        13: {"method", "special_method", "leaves_block"},
        16: set(),
        17: set(),
        18: {"loop"},
        19: {"loop", "try"},
        20: {"loop", "raise_or_except"},
        21: {"loop", "try", "raise_or_except", "string_formatting", "leaves_block"},
        22: {"leaves_block"},
    }
    everything = set(CONCEPTS)
    assert answers[1][0] == answers[4][0] == answers[16][0] == set()  # nothing is asked at a module's level
    assert answers[5][0] == answers[8][0] == {"docstring"}
    assert answers[9][0] == everything
    assert answers[11][0] == everything - {"leaves_block"}  # its line is not the statement's last
    assert answers[17][0] == everything - {"special_method"}  # asked of methods only


NESTED = """\
def outer(x):
    if x:
        a = 1
    elif a:
        b = 2
    else:
        while x:
            x -= 1
    class Inner:
        field = 1
        @staticmethod
        def run():
            "{}"
            ...
            "{}".format(x); f"{x}"
    try:
        x = [
            1]
    finally:
        @outer
        def last():
            yield "%d" % x
"""


def test_labels_of_awkward_code_by_hand():
    answers = by_line(NESTED)
    assert {line: holds for line, (_, holds) in answers.items()} == {
        1: set(),
        2: set(),
        3: {"condition"},
        4: set(),  # an elif is on the level of its if
        5: {"condition"},
        6: set(),
        7: {"condition"},
        8: {"condition", "loop"},
        9: set(),
        10: set(),
        11: set(),
        12: set(),
        13: {"docstring"},
        14: {"method"},  # an ellipsis is no docstring
        15: {"method", "string_formatting"},
        16: set(),
        17: {"try", "unfinished"},
        18: {"try"},
        19: set(),
        20: {"try"},
        21: {"try"},
        22: {"try", "string_formatting"},
    }
    assert answers[10][0] == {"docstring"}  # a class's code, though within a function
    assert "special_method" not in answers[9][0]
    assert "special_method" in answers[14][0]


def test_an_expression_counts_where_it_ends():
    file = code_concepts._File('def f(x):\n    raise ValueError("no %s"\n        % x)')
    assert not CONCEPTS["string_formatting"].holds(file.window(2, 2))  # the % is below
    assert CONCEPTS["raise_or_except"].holds(file.window(2, 2))
    assert CONCEPTS["string_formatting"].holds(file.window(2, 3))
    assert not CONCEPTS["raise_or_except"].holds(file.window(3, 3))


def test_windows_are_whole_lines_that_do_not_overlap(monkeypatch):
    monkeypatch.setattr(code_concepts, "WINDOW_CHARACTERS", 12)
    monkeypatch.setattr(code_concepts, "SHORTEST_WINDOW", 4)
    # 1234567890123
    lines = [
        "",
        "alpha = 1",  # with the next 9 + 1 + 3 characters
        "b=2",
        "much_too_long = 1",
        "c=3",  # 3 + 1 + 3 + 1 + 4 = 12, and ends in code only after 7
        "d=4",
        "# e!",
        "",
        "f=5",  # under 4 by itself
    ]
    found = list(windows("\n".join(lines)))
    assert [window.text for window in found] == ["alpha = 1", "c=3\nd=4", "# e!\n\nf=5"]
    assert [window.statement.targets[0].id for window in found] == ["alpha", "d", "f"]
    monkeypatch.setattr(code_concepts, "WINDOW_CHARACTERS", 13)
    assert next(windows("\n".join(lines))).text == "alpha = 1\nb=2"


def test_where_something_is_due():
    source = """\
from a import b  # import
def f(self, x):
    "import return ("
    for y in self.rows[(x in y)]: pass
    if f(x): return
    return
    return (
        not f(
            x))
try: import c
except: pass
except_ = [y for y in c]
"""
    with pytest.raises(SyntaxError):
        list(windows(source + "try:"))
    file = code_concepts._File(source)
    window = file.window(1, 12)
    assert window.text == source.rstrip("\n")
    assert [(name, window.text[:end].split("\n")[-1]) for name, end in window.cuts] == [
        ("imported", "from a import"),
        ("function_name", "def"),
        ("iterable", "    for y in"),
        ("attribute", "    for y in self."),
        ("argument", "    for y in self.rows[("),
        ("tested", "    if"),
        ("argument", "    if f("),
        ("returned", "    return"),  # the one above returns nothing
        ("imported", "try: import"),
        ("caught", "except"),
    ]


# drawing


def test_tasks_of_the_bundled_corpus():
    everything = load_tasks(["bundled"], max_texts=400)
    assert [task.name for task in everything] == [f"bundled:{name}" for name in CONCEPTS]
    heldout = "\0".join(stdlib_corpus("heldout")["text"])
    for task in everything:
        assert len(task.texts) == len(task.labels) == len(set(task.texts)) > 300  # 400 on a full library
        assert sum(task.labels) == len(task.labels) / 2
        assert sum(task.labels[:100]) not in (0, 100)  # in mixed order
        assert all(80 <= len(text) <= 250 for text in task.texts)
        assert all(text in heldout for text in task.texts[:50])
    docstring = everything[2]
    assert load_tasks([docstring.name, docstring.name]) == (docstring,)
    (other,) = load_tasks([docstring.name], max_texts=31, seed=1)
    assert len(other.texts) == 30
    assert other.texts != load_tasks([docstring.name], max_texts=31)[0].texts


def test_bundled_labels_are_those_of_the_windows():
    found = {window.text: window for source in stdlib_corpus("heldout")["text"] for window in windows(source)}
    (task,) = load_tasks(["bundled:string_formatting"])
    formats = [found[text] for text, label in zip(task.texts, task.labels, strict=True) if label]
    assert all(any(sign in window.text for sign in ("%", "format", "f'", 'f"')) for window in formats)
    assert all(window.function for window in formats)


def test_concepts_of_the_bundled_corpus():
    texts, labels, names = bundled_concepts(10)
    assert names == list(NEXT_TOKENS)
    assert [labels.count(label) for label in range(len(names))] == [10] * 8
    assert labels != sorted(labels)
    assert len(set(texts)) == 80
    ends = {"imported": "import", "function_name": "def", "attribute": "self.", "returned": "return", "iterable": " in"}
    ends |= {"caught": "except", "tested": "if", "argument": "("}
    assert all(text.endswith(ends[names[label]]) and len(text) >= 80 for text, label in zip(texts, labels, strict=True))
    assert bundled_concepts(10, seed=1).texts != texts == bundled_concepts(10).texts
    many = bundled_concepts(100).labels
    assert [many.count(label) for label in range(len(names))] == [100] * 8
    source = stdlib_corpus("heldout")["text"]
    assert len({next(i for i, file in enumerate(source) if text in file) for text in texts}) > 15  # of 82 files


TABLE = pd.DataFrame(
    {
        "text": ["None", "NA", "3", "both", "both", "again", "again", "x", "y", "z"],
        "label": ["no", "yes", "yes", "no", "yes", "no", "no", "no", "no", "yes"],
    }
)


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_tasks_of_a_file(tmp_path, suffix):
    name = str(tmp_path / f"words{suffix}")
    write = {
        ".csv": lambda: TABLE.to_csv(name, index=False),
        ".jsonl": lambda: TABLE.to_json(name, orient="records", lines=True),
        ".parquet": lambda: TABLE.to_parquet(name),
    }
    write[suffix]()
    (task,) = load_tasks([name])
    assert task.name == name
    given = dict(zip(task.texts, task.labels, strict=True))
    assert {text for text, label in given.items() if label} == {"NA", "3", "z"}  # "yes" is the larger
    negative = {text for text, label in given.items() if not label}
    assert len(negative) == 3
    assert negative < {"None", "again", "x", "y"}  # "both" has both labels
    assert len(task.texts) == 6


def write_csv(path, **columns):
    pd.DataFrame(columns).to_csv(path, index=False)
    return str(path)


def test_what_is_no_task_is_refused_with_its_name(tmp_path):
    for name, error, message in [
        ("bundle", ValueError, "no task 'bundle'. There are 'bundled' and 'sae_probes'"),
        ("bundled:methods", ValueError, "no task 'methods'; it has method, special_method"),
        (str(tmp_path / "absent.csv"), FileNotFoundError, "absent.csv"),
        (write_csv(tmp_path / "a.csv", text=["a"], target=[1]), ValueError, "columns text, target"),
        (write_csv(tmp_path / "b.csv", text=list("abc"), label=[2, 10, 1]), ValueError, "3 values, 1, 2, 10"),
        (write_csv(tmp_path / "c.csv", text=list("ab"), label=[1, 1]), ValueError, "1 values, 1;"),
        (write_csv(tmp_path / "d.csv", text=list("abb"), label=[1, 0, 1]), ValueError, "1 positive and 0 negative"),
    ]:
        with pytest.raises(error, match=message):
            load_tasks([name])
    pd.DataFrame({"text": ["a", 3], "label": [0, 1]}).to_json(tmp_path / "e.jsonl", orient="records", lines=True)
    with pytest.raises(ValueError, match="3 for a text in row 1"):
        load_tasks([str(tmp_path / "e.jsonl")])
    pd.DataFrame({"text": ["a", "b"], "label": [0, None]}).to_parquet(tmp_path / "f.parquet")
    with pytest.raises(ValueError, match="1 rows without a label"):
        load_tasks([str(tmp_path / "f.parquet")])
    with pytest.raises(ValueError, match="max_texts=1 "):
        load_tasks(["bundled"], max_texts=1)


def test_numbers_are_ordered_as_numbers(tmp_path):
    (task,) = load_tasks([write_csv(tmp_path / "a.csv", text=list("ab"), label=[2, 10])])
    assert dict(zip(task.texts, task.labels, strict=True)) == {"a": False, "b": True}


def test_data_sets_of_sae_probes():
    data = pytest.importorskip("sae_probes.utils_data", reason="needs sae-probes")
    everything = load_tasks(["sae_probes:truthqa_tf", "sae_probes:41_truthqa_tf", "sae_probes:92_glue_sst2"], 100)
    assert [task.name for task in everything] == ["sae_probes:41_truthqa_tf", "sae_probes:92_glue_sst2"]
    for task, tag in zip(everything, ("41_truthqa_tf", "92_glue_sst2"), strict=True):
        theirs = dict(zip(data.read_numbered_dataset_df(tag)["prompt"], data.get_yvals(tag) == 1, strict=True))
        assert len(task.texts) == 100
        assert [theirs[text] for text in task.texts] == list(task.labels)
    with pytest.raises(ValueError, match="'glue_cole' among its 113; near it are glue_cola"):
        load_tasks(["sae_probes:glue_cole"])
    with pytest.raises(ValueError, match="among its 113: 5_hist_fig_ismale"):
        load_tasks(["sae_probes:!"])


# running

TEXTS = ("import os", "x = 1", "for name in names:\n    print(name)", "def f", "y = 2")
TASK = Task("five", TEXTS, (True, False, True, False, True))


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

"""Tasks by name: of the bundled corpus, of files, and of sae-probes."""

import sys

import pandas as pd
import pytest

from saelens_cosine.bundled import stdlib_corpus
from saelens_cosine.experiments.evaluate.texts import tasks
from saelens_cosine.experiments.evaluate.texts.code_concepts import CONCEPTS, NEXT_TOKENS, windows
from saelens_cosine.experiments.evaluate.texts.concepts import bundled_concepts
from saelens_cosine.experiments.evaluate.texts.tasks import check_tasks, load_tasks

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
        ("bundle", ValueError, "no task 'bundle'. There are 'bundled', .*'all' of sae-probes"),
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


def test_data_sets_of_sae_probes_that_were_trained_on_are_not_probed_for():
    pytest.importorskip("sae_probes.utils_data", reason="needs sae-probes")
    seen = {"41_truthqa_tf"}
    with pytest.raises(ValueError, match="trained on texts of 41_truthqa_tf.*'all' for all that it has not seen"):
        load_tasks(["sae_probes:truthqa_tf"], 100, trained_on=seen)
    (other,) = load_tasks(["sae_probes:92_glue_sst2"], 100, trained_on=seen)
    assert other == load_tasks(["sae_probes:92_glue_sst2"], 100)[0]
    for name in ("sae_probes", "all"):
        names = tasks._find(name, seen)
        assert (len(set(names)), ("sae_probes", "41_truthqa_tf") in names) == (112, False)


def test_data_sets_of_sae_probes_by_bare_name():
    pytest.importorskip("sae_probes.utils_data", reason="needs sae-probes")
    names = ["87_glue_cola", "bundled:loop", "glue_sst2", "sae_probes:glue_cola"]
    found = load_tasks(names, 20)
    assert [task.name for task in found] == ["sae_probes:87_glue_cola", "bundled:loop", "sae_probes:92_glue_sst2"]
    check_tasks(names)
    with pytest.raises(ValueError, match="no task 'glue_cole'.*near it are glue_cola"):
        check_tasks(["bundled", "glue_cole"])
    with pytest.raises(ValueError, match="no task 'bundled.loop'.*near it are bundled:loop"):
        check_tasks(["bundled.loop"])
    with pytest.raises(ValueError, match="trained on texts of 87_glue_cola"):
        load_tasks(["glue_cola"], trained_on={"87_glue_cola"})


def test_without_sae_probes_a_bare_name_is_no_task(monkeypatch):
    monkeypatch.setitem(sys.modules, "sae_probes.utils_data", None)
    with pytest.raises(ValueError, match="no task 'glue_cola'.*sae-probes is not installed"):
        check_tasks(["glue_cola"])
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'saelens-cosine\[probes\]'"):
        check_tasks(["all"])

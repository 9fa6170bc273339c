import json

import pytest
import torch
from datasets import Dataset, IterableDataset

from saelens_cosine.activations.models import load_hooked_model
from saelens_cosine.activations.sae_probes_text import sae_probes_rows, tasks_trained_on
from saelens_cosine.activations.text import load_text
from saelens_cosine.bundled import model_folder
from saelens_cosine.files.secrets import published


def write_jsonl(path, rows):
    path.write_text("".join(f'{{"text": "row {i}"}}\n' for i in range(rows)))
    return str(path)


def write_texts(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


@pytest.mark.parametrize("kind", ["jsonl", "txt", "saved"])
def test_a_local_dataset_gives_up_one_row_in_twenty(kind, tmp_path):
    if kind == "jsonl":
        name = write_jsonl(tmp_path / "text.jsonl", 40)
    elif kind == "txt":
        (tmp_path / "text.txt").write_text("\n\n".join(f"row {i}" for i in range(40)))
        name = str(tmp_path / "text.txt")
    else:
        name = str(tmp_path / "saved")
        Dataset.from_dict({"text": [f"row {i}" for i in range(40)]}).save_to_disk(name)
    train, heldout = ([row["text"] for row in split] for split in load_text(name, seed=3)[:2])
    assert (len(train), len(heldout)) == (38, 2)
    assert set(train) | set(heldout) == {f"row {i}" for i in range(40)}


def test_training_order_depends_on_the_seed_alone(tmp_path):
    name = write_jsonl(tmp_path / "text.jsonl", 40)
    orders = [[row["text"] for row in load_text(name, seed).train] for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]


def test_heldout_rows_are_the_same_for_every_seed(tmp_path):
    name = write_jsonl(tmp_path / "text.jsonl", 40)
    first, second = ({row["text"] for row in load_text(name, seed).heldout} for seed in (0, 1))
    assert first == second


def test_an_empty_dataset_is_refused_by_name(tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"empty\.jsonl.*empty"):
        load_text(str(tmp_path / "empty.jsonl"))
    with pytest.raises(ValueError, match="1 rows"):
        load_text(write_jsonl(tmp_path / "one.jsonl", 1))


def test_a_file_of_unknown_format_is_named(tmp_path):
    (tmp_path / "text.rtf").write_text("x")
    with pytest.raises(ValueError, match=r"text\.rtf.*\.jsonl"):
        load_text(str(tmp_path / "text.rtf"))


@pytest.fixture
def hub(monkeypatch):
    """A data set on the Hub: 1,200 documents of 40 words, numbered; number 1,100 is number 7 but for its last word."""
    rows = [" ".join(f"{i}w{j}" for j in range(40)) for i in range(1200)]
    rows[1100] = rows[7].rsplit(" ", 1)[0] + " otherwise"

    def load_dataset(name, split, streaming):
        assert (name, split) == ("owner/data", "train")
        dataset = Dataset.from_dict({"text": rows})
        return dataset.to_iterable_dataset() if streaming else dataset

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    return rows


@pytest.mark.parametrize("streaming", [True, False])
def test_the_first_thousand_documents_of_the_hub_are_held_out_however_it_is_read(hub, streaming):
    splits = load_text("owner/data", streaming=streaming)
    assert [row["text"] for row in splits.heldout] == hub[:1000]
    assert sorted(row["text"] for row in splits.train) == sorted(row for i, row in enumerate(hub[1000:]) if i != 100)
    assert splits.rule == load_text("owner/data", seed=5).rule == "first 1000 documents"


def test_near_copies_of_held_out_documents_are_not_trained_on(tmp_path):
    rows = [" ".join(f"{i}w{j}" for j in range(100)) for i in range(60)]
    names = [write_texts(tmp_path / "once.jsonl", rows[:60]), write_texts(tmp_path / "twice.jsonl", rows * 2)]
    train, heldout = ([row["text"] for row in split] for split in load_text(names[1])[:2])
    assert not set(train) & set(heldout)  # each is there twice, and most copies of held-out ones would be in training
    assert set(train) | set(heldout) == set(rows)
    assert len(list(load_text(names[0]).train)) == 57


def test_a_dataset_of_one_document_many_times_is_refused(tmp_path):
    name = write_texts(tmp_path / "same.jsonl", ["the same words"] * 40)
    with pytest.raises(ValueError, match=r"same\.jsonl.*nearly a copy"):
        load_text(name)


def test_the_rule_tells_contents_apart(tmp_path):
    rules = [load_text(write_texts(tmp_path / "a.jsonl", [f"{word} {i}" for i in range(40)])).rule for word in "xyx"]
    assert rules[0] == rules[2] != rules[1]


def test_a_folder_of_text_files_gives_a_document_each(tmp_path):
    for i in range(21):
        folder = tmp_path / "texts" / str(i % 3)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{i}{('.txt', '.md', '.py')[i % 3]}").write_text(f"line {i}\n\nanother {i}\n")
    (tmp_path / "texts" / "picture.png").write_bytes(b"\x89PNG")
    splits = load_text(str(tmp_path / "texts"))
    texts = [{row["text"] for row in split} for split in splits[:2]]
    assert [len(found) for found in texts] == [20, 1]
    assert texts[0] | texts[1] == {f"line {i}\n\nanother {i}" for i in range(21)}
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty.*\.jsonl.*\.txt"):
        load_text(str(tmp_path / "empty"))


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_a_column_of_a_file_is_named_after_it(suffix, tmp_path):
    data = Dataset.from_dict({"text": ["title"] * 40, "body": [f"row {i}" for i in range(40)], "n": list(range(40))})
    file = str(tmp_path / f"data{suffix}")
    {".jsonl": data.to_json, ".csv": data.to_csv, ".parquet": data.to_parquet}[suffix](file)
    splits = load_text(f"{file}:body")
    rows = [row for split in splits[:2] for row in split]
    assert sorted(rows, key=str) == sorted(({"text": f"row {i}"} for i in range(40)), key=str)
    data.select_columns(["body"]).rename_column("body", "text").to_json(str(tmp_path / "alone.jsonl"))
    alone = load_text(str(tmp_path / "alone.jsonl"))
    assert (splits.rule, splits.fingerprint) == (alone.rule, alone.fingerprint)
    with pytest.raises(ValueError, match="no column 'corpse'; it has text, body, n"):
        load_text(f"{file}:corpse")
    with pytest.raises(ValueError, match="0 for a text in its column 'n', row 0"):
        load_text(f"{file}:n")
    with pytest.raises(FileNotFoundError, match=r"no file '.*nowhere\.jsonl'"):
        load_text(str(tmp_path / "nowhere.jsonl:body"))


def test_a_file_whose_own_name_has_a_colon_is_that_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "a.jsonl", 40)
    write_jsonl(tmp_path / "b.jsonl:body.jsonl", 20)
    assert len(load_text("b.jsonl:body.jsonl").rows) == 19
    assert published({"dataset_path": "a.jsonl:text"}) == {"dataset_path": "a.jsonl:text"}
    (tmp_path / "data").mkdir()
    write_jsonl(tmp_path / "data" / "a.jsonl", 40)
    assert published({"dataset_path": "data/a.jsonl:text"}) == {"dataset_path": "a.jsonl:text"}


def test_a_folder_of_data_files_is_read_as_the_hub_would(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", 40)
    (tmp_path / "README.md").write_text("about")
    splits = load_text(str(tmp_path))
    assert len(list(splits.train)) + len(list(splits.heldout)) == 40


def test_the_bundled_heldout_text_is_mixed_and_hardly_trained_on():
    splits = load_text("bundled")
    paths = [row["path"] for row in splits.heldout]
    assert paths != sorted(paths)
    assert not any(path.startswith("encodings/") for path in paths)  # codec tables are near-copies of each other

    # runs of 32 words, counted in sets of tuples
    def runs(row):
        words = row["text"].split()
        return [tuple(words[i : i + 32]) for i in range(max(1, len(words) - 31))]

    trained = {hash(run) for row in splits.train for run in runs(row)}
    held = [hash(run) in trained for row in splits.heldout for run in runs(row)]
    assert sum(held) / len(held) < 0.01  # 0.0055 in CPython 3.11, 0.097 with the codec tables


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.jsonl"):
        load_text(str(tmp_path / "nowhere.jsonl"))


def test_bundled_model_by_default_in_the_middle():
    model = load_hooked_model("bundled")
    assert (model.hook_name, model.d_in, model.class_name) == ("blocks.3.hook_resid_post", 192, "HookedTransformer")


def test_any_local_folder_loads_through_transformers_with_the_same_activations():
    from_folder, hooked = load_hooked_model(str(model_folder()), layer=2), load_hooked_model("bundled", layer=2)
    assert (from_folder.class_name, from_folder.hook_name) == ("AutoModelForCausalLM", "model.layers.2")
    assert from_folder.d_in == 192
    tokens = torch.tensor([[0, 5, 9, 100, 7]])
    caches = [
        m.model.run_with_cache(tokens, names_filter=[m.hook_name], prepend_bos=False)[1][m.hook_name]
        for m in (from_folder, hooked)
    ]
    folder, bundled = (cache.float() for cache in caches)
    # transformers keeps the file's bfloat16: 2 to the -8 relative, a few roundings deep
    assert (folder - bundled).norm(dim=-1).max() < 0.02 * bundled.norm(dim=-1).min()


def test_heads_are_flattened_in_the_size():
    assert load_hooked_model("bundled", hook="blocks.2.attn.hook_z").d_in == 192
    assert load_hooked_model("bundled", hook="blocks.2.mlp.hook_post").d_in > 192


def test_errors_name_what_there_is():
    with pytest.raises(ValueError, match="layer=9.*has 6"):
        load_hooked_model("bundled", layer=9)
    with pytest.raises(ValueError, match=r"blocks\.2\.hook_nothing.*hook_resid_post"):
        load_hooked_model("bundled", hook="blocks.2.hook_nothing")
    with pytest.raises(ValueError, match="layer=1 and hook="):
        load_hooked_model("bundled", layer=1, hook="blocks.2.hook_resid_post")


def test_a_stream_is_not_read_far_before_it_is_used(monkeypatch):
    read: list[int] = []

    def rows():
        for i in range(30_000):
            read.append(i)
            yield {"text": f"{i} document"}

    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: IterableDataset.from_generator(rows))
    load_text("owner/data")
    assert max(read) <= 1000  # the held-out documents and the first one behind them
    first = [int(row["text"].split()[0]) for row in load_text("owner/data").train.take(50)]
    assert first != sorted(first)


def test_a_row_without_a_document_is_named(tmp_path):
    (tmp_path / "text.jsonl").write_text('{"text": "one"}\n{"text": null}\n{"text": "two"}\n')
    with pytest.raises(ValueError, match=r"nothing in its column 'text'"):
        list(load_text(str(tmp_path / "text.jsonl")).train)


def test_rows_of_tokens_that_are_read_as_tensors_leave_no_copy_in_training(tmp_path):
    rows = [[100 * i + j for j in range(64)] for i in range(40)]
    saved = Dataset.from_dict({"input_ids": rows * 2})
    saved.set_format(type="torch", columns=["input_ids"])  # as SAELens' PretokenizeRunner saves them
    saved.save_to_disk(tmp_path / "tokens")
    train, heldout = ([tuple(row["input_ids"]) for row in split] for split in load_text(str(tmp_path / "tokens"))[:2])
    assert set(train) | set(heldout) == set(map(tuple, rows))
    assert not set(train) & set(heldout)


def test_the_texts_of_sae_probes_are_distinct_fixed_and_none_of_a_task_that_is_left():
    pytest.importorskip("sae_probes", reason="sae-probes has the texts")
    import pandas as pd
    from sae_probes.constants import DATA_PATH
    from sae_probes.utils_data import get_numbered_binary_tags

    rows = sae_probes_rows()
    texts = set(rows["text"])
    assert len(texts) == len(rows) > 15_000
    assert 40e6 < sum(map(len, texts)) < 46e6
    splits = load_text("sae-probes", seed=1)
    heldout = [row["text"] for row in splits.heldout]
    assert len(heldout) == len(rows) // 20
    assert heldout == [row["text"] for row in load_text("sae-probes").heldout]
    assert (len(splits.rows), set(splits.rows["text"]) & set(heldout)) == (len(rows) - len(heldout), set())
    shared = {}
    for tag in get_numbered_binary_tags():
        file = DATA_PATH / "cleaned_data" / f"{tag}.csv.zst"
        read = pd.read_csv(file, usecols=["prompt"], keep_default_na=False, nrows=300)  # with all rows it takes 10 s
        shared[tag] = bool(texts & set(read["prompt"].astype(str).str.strip()))
    assert {tag for tag, found in shared.items() if found} == tasks_trained_on("sae-probes")
    assert tasks_trained_on("bundled") == set()


def test_sae_probes_that_is_not_there_is_named_with_its_command(monkeypatch):
    sae_probes_rows.cache_clear()
    monkeypatch.setattr("saelens_cosine.activations.sae_probes_text.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install --no-deps sae-probes"):
        load_text("sae-probes")

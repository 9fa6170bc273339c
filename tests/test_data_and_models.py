import pytest
import torch
from datasets import Dataset

from saelens_cosine.bundled import model_folder
from saelens_cosine.data import load_text
from saelens_cosine.models import load_hooked_model


def write_jsonl(path, rows):
    path.write_text("".join(f'{{"text": "row {i}"}}\n' for i in range(rows)))
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
    train, heldout = ([row["text"] for row in split] for split in load_text(name, seed=3))
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


def test_the_bundled_heldout_text_comes_in_mixed_order():
    paths = [row["path"] for row in load_text("bundled").heldout]
    assert paths != sorted(paths)
    assert sum(path.startswith("encodings/") for path in paths[:10]) < 8


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

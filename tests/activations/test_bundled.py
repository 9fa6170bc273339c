import json
import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from saelens_cosine.bundled import load_bundled_bridge, load_bundled_model, model_folder, stdlib_corpus
from saelens_cosine.bundled.corpus import is_heldout

TEXT = 'def area(radius):\n    """Area of a circle."""\n    return math.pi * radius ** 2\n'


@pytest.fixture(scope="module")
def hf_model():
    return AutoModelForCausalLM.from_pretrained(model_folder(), dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokens():
    tokenizer = AutoTokenizer.from_pretrained(model_folder())
    return torch.tensor([[tokenizer.bos_token_id, *tokenizer(TEXT)["input_ids"]]])


@pytest.mark.parametrize("load", [load_bundled_model, load_bundled_bridge])
def test_loaders_agree_with_transformers(load, hf_model, tokens):
    with torch.no_grad():
        expected = hf_model(tokens).logits
        logits = load()(tokens, prepend_bos=False) if load is load_bundled_model else load()(tokens)
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


def test_tokenizer_is_lossless_and_starts_contexts_with_its_only_special_token(tokens):
    tokenizer = AutoTokenizer.from_pretrained(model_folder())
    assert tokenizer.decode(tokens[0, 1:]) == TEXT
    assert tokenizer.bos_token_id == tokenizer.eos_token_id == 0
    model = load_bundled_model()
    assert model.to_tokens(TEXT).tolist() == tokens.tolist()


def test_it_predicts_heldout_code_as_its_readme_says(hf_model):
    provenance = json.loads((model_folder() / "provenance.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(model_folder())
    texts = stdlib_corpus("heldout")["text"][:]
    stream = [token for text in texts for token in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    n = len(stream) // 255
    rows = torch.tensor(stream[: n * 255]).view(n, 255)[:: max(1, n // 128)]
    rows = torch.cat([torch.zeros(len(rows), 1, dtype=torch.long), rows], dim=1)
    with torch.no_grad():
        logits = torch.cat([hf_model(chunk).logits for chunk in rows.split(16)])
    log_p = logits[:, :-1].log_softmax(-1).gather(-1, rows[:, 1:, None])
    # a sample of the held-out windows, and other Python versions have other files: within 0.15 nats
    assert -log_p.mean().item() == pytest.approx(provenance["heldout_nats_per_token"], abs=0.15)
    assert provenance["heldout_nats_per_token"] < 3.0


def test_it_is_small_and_safe():
    files = [path for path in model_folder().iterdir() if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 6_000_000
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".md"}


def test_splits_are_disjoint_and_together_everything(tmp_path):
    for i in range(200):
        (tmp_path / f"module{i}.py").write_text(f"x = {i}")
    train, heldout = (stdlib_corpus(split, root=tmp_path)["path"][:] for split in ("train", "heldout"))
    assert not set(train) & set(heldout)
    assert len(train) + len(heldout) == 200
    assert 8 <= len(heldout) <= 35  # 10 % of 200 by hash: mean 20, standard deviation 4.2


def test_the_split_depends_on_the_path_alone():
    # SHA-256 of the path, first 8 bytes as a fraction of 2^64: 0.0266 for zipfile.py, 0.7406 for os.py
    import hashlib

    for path in ("os.py", "json/decoder.py", "zipfile.py"):
        fraction = int(hashlib.sha256(path.encode()).hexdigest()[:16], 16) / 2**64
        assert is_heldout(path) == (fraction < 0.1)


def test_labels_are_top_level_packages_and_some_files_are_left_out(tmp_path):
    for name in (
        "os.py",
        "json/decoder.py",
        "test/test_os.py",
        "json/tests/test_json.py",
        "site-packages/a.py",
        "site-packages/b/c.py",
        "json/__pycache__/d.py",
        "_sysconfigdata_x.py",
        "empty.py",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("" if name == "empty.py" else "pass")
    rows = [
        row for split in ("train", "heldout") if _has(tmp_path, split) for row in stdlib_corpus(split, root=tmp_path)
    ]
    assert {(row["path"], row["package"]) for row in rows} == {("os.py", "os"), ("json/decoder.py", "json")}


def test_what_is_installed_beside_the_library_is_not_walked(tmp_path, monkeypatch):
    for name in ("os.py", "json/decoder.py", "site-packages/torch/nn/a.py", "json/__pycache__/b.py", "test/c.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("pass")
    scandir, walked = os.scandir, []
    monkeypatch.setattr(os, "scandir", lambda folder: walked.append(Path(folder)) or scandir(folder))
    stdlib_corpus(root=tmp_path)
    assert set(walked) <= {tmp_path, tmp_path / "json"}


def _has(root, split):
    try:
        return len(stdlib_corpus(split, root=root)) > 0
    except FileNotFoundError:
        return False


def test_the_running_pythons_library_is_enough_for_the_default_comparison():
    train = stdlib_corpus("train")
    assert sum(map(len, train["text"][:])) > 5_000_000
    assert "json" in set(stdlib_corpus("train")["package"]) | set(stdlib_corpus("heldout")["package"])


def test_errors_name_the_value_and_the_way_out(tmp_path):
    with pytest.raises(FileNotFoundError, match="pass root="):
        stdlib_corpus(root=tmp_path)
    with pytest.raises(ValueError, match="'test'.*'heldout'"):
        stdlib_corpus("test")

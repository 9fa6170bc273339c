"""A text that is shorter than the training is read again, with its sizes said; one that gives nothing is refused."""

import json
import re

import numpy as np
import pytest
from datasets import Array2D, Dataset, Features
from small_runs import HOOK, flags, stop_after

from saelens_cosine.cli import main

SAID = "The text has been read to its end"


def rows(path, words):
    """A file of 40 rows with so many random words each; at least one is held out."""
    rng = np.random.default_rng(0)
    drawn = rng.integers(0, 300, size=(40, words))
    path.write_text("".join(json.dumps({"text": " ".join(f"w{i}" for i in row)}) + "\n" for row in drawn))
    return path


@pytest.mark.parametrize("streaming", ["false", "true"])
def test_it_goes_on_with_a_warning_that_names_sizes(streaming, tmp_path):
    text = rows(tmp_path / "text.jsonl", 12)
    with pytest.warns(UserWarning, match=SAID) as said:
        assert main(["train", *flags(text, tmp_path / "sae", streaming=streaming, store_batch_size_prompts=1)]) == 0
    (message,) = [str(w.message) for w in said if SAID in str(w.message)]
    assert "4,096 tokens are to be trained on" in message
    assert re.search(r"\(\d\d rows, [\d,]+ tokens in whole batches\)", message)
    assert (tmp_path / "sae" / "sae_weights.safetensors").exists()


def test_so_does_compare_and_says_it_once(tmp_path, capsys):
    text = rows(tmp_path / "text.jsonl", 40)
    given = {"layer": 0, "tokens": "10k", "k": 4, "d-sae": 24, "context-size": 32, "eval-tokens": 64}
    options = [part for name, value in given.items() for part in (f"--{name}", str(value))]
    output = ["--output", str(tmp_path / "out"), "--arms", "cosine_topk", "inner_product_topk", "--quiet"]
    assert main(["compare", "--dataset", str(text), *options, *output]) == 0
    said = capsys.readouterr().err
    assert said.count(SAID) == 1
    assert "10,000 tokens are to be trained on" in said
    assert "exhausted" not in said


def test_a_run_that_goes_on_says_it_without_sizes_that_it_does_not_know(tmp_path, monkeypatch):
    arguments = ["train", *flags(rows(tmp_path / "text.jsonl", 20), tmp_path / "sae", n_batches_in_buffer=8)]
    with monkeypatch.context() as patched:
        stop_after(patched, 1)
        assert main(arguments) == 143
    with pytest.warns(UserWarning, match=f"{SAID} and begins again"):
        assert main([*arguments, "--resume"]) == 0


def test_shorter_than_one_context_is_refused(tmp_path, capsys):
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "a b"}\n{"text": "c"}\n')
    assert main(["train", *flags(text, tmp_path / "sae")]) == 2
    assert "The text has 1 rows and is shorter than one context of 32 tokens" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("contexts", "status", "said"), [(2, 2, "pass --store_batch_size_prompts 2 or less"), (3, 0, SAID)]
)
def test_cached_activations(contexts, status, said, tmp_path, capsys, recwarn):
    shape = (32, 192)
    values = np.random.default_rng(0).normal(size=(contexts, *shape)).astype(np.float32)
    features = Features({HOOK: Array2D(shape, "float32")})
    Dataset.from_dict({HOOK: list(values)}, features=features).save_to_disk(tmp_path / "cache")
    cached = {"use_cached_activations": "true", "cached_activations_path": str(tmp_path / "cache")}
    assert main(["train", *flags("bundled", tmp_path / "sae", **cached)]) == status
    told = capsys.readouterr().err + "".join(str(w.message) for w in recwarn)
    assert said in told
    assert status or "(3 rows, 96 tokens in whole batches)" in told

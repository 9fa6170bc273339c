"""A language model in a folder of its own, as Hugging Face and TransformerLens find it by name."""

import json
import shutil

import pytest
import torch
from gpt2_cases import HEADS, D
from helpers import VOCABULARY, tiny_tokenizer
from transformers import GPT2Config, GPT2LMHeadModel


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    sizes = {"n_layer": 3, "n_embd": D, "n_head": HEADS, "n_positions": 32, "n_ctx": 32}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(VOCABULARY), bos_token_id=0, eos_token_id=0, **sizes))
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data.normal_(0.2, 0.3)  # far from centred
    model.save_pretrained(folder / "gpt2")
    tiny_tokenizer().save_pretrained(folder / "gpt2")
    shutil.copytree(folder / "gpt2", folder / "copy")
    rng = torch.Generator().manual_seed(0)
    rows = [" ".join(f"w{int(i)}" for i in torch.randint(0, 31, (40,), generator=rng)) for _ in range(400)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return folder


@pytest.fixture
def in_the_place(place, monkeypatch):
    monkeypatch.chdir(place)

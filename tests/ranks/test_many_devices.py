"""The commands of tutorials/05_many_devices.md."""

import re
import shlex
from pathlib import Path

import pytest

from saelens_cosine.cli import main

PAGE = (Path(__file__).parents[2] / "tutorials" / "05_many_devices.md").read_text()
SHORTER = {
    "300k": "1024",
    "--seeds 4": "--seeds 2",
    "500_000": "2048",
    "--n_batches_in_buffer 64": "--n_batches_in_buffer 40 --train_batch_size_tokens 512",
    "4096": "64",
    "--d-sae 8192 --batch 1024": "--d-sae 256 --batch 64 --repeats 1",
}


def commands(start):
    """Command lines in the page's blocks that begin so, in words."""
    blocks = re.findall(r"^```bash\n(.*?)^```", PAGE, re.M | re.S)
    lines = [line for block in blocks for line in block.replace("\\\n", "").splitlines()]
    return [shlex.split(line) for line in lines if line.startswith(start)]


TWO_RANKS = commands("torchrun --nproc-per-node 2 ")


def test_they_are_there():
    assert [words[5] for words in TWO_RANKS] == ["compare", "train", "benchmark"]


@pytest.mark.parametrize("words", TWO_RANKS, ids=lambda words: words[5])
def test_two_rank_commands_run(words, ranks, tmp_path, monkeypatch):
    line = " ".join(words[5:]).replace("runs/", f"{tmp_path}/")
    for long, short in SHORTER.items():
        line = line.replace(long, short)
    if words[5] == "compare":
        line += " --d-sae 64 --k 4 --eval-tokens 256 --eval-prompts 2"
    found = ranks(*[line.split()] * 2)
    assert found["statuses"] == [0, 0], found["told"]
    for folder in re.findall(r"runs/(\w+)", " ".join(words)):
        assert list((tmp_path / folder).rglob("sae_weights.safetensors"))


def test_plans_run(capsys, monkeypatch):
    _, for_size = commands("saelens-cosine plan")
    assert main(for_size[1:]) == 0
    printed = capsys.readouterr().out
    assert "5.5" in printed  # hours on one H100, as the page says
    assert main([*for_size[1 : for_size.index("--gpus")], "--step", "dense"]) == 0
    assert "12.6" in capsys.readouterr().out

"""What the README and the pages of the documentation say is what happens."""

import json
import re
import shlex
import sys
import types
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from sae_lens.llm_sae_training_runner import _parse_cfg_args
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY
from sae_lens.saes.sae import TrainStepInput

import saelens_cosine
from saelens_cosine.cli import main
from saelens_cosine.experiments.evaluate.evals import EVALS
from saelens_cosine.loading import RELEASES

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
PAGES = {"README.md": README} | {path.name: path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))}


def blocks(language: str, page: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page, re.S)


def block(language: str, containing: str, page: str = README) -> str:
    (found,) = [text for text in blocks(language, page) if containing in text]
    return found


def commands() -> list[list[str]]:
    """Command lines of all pages, word by word."""
    text = "\n".join(text for page in PAGES.values() for text in blocks("bash", page)).replace("\\\n", " ")
    return [shlex.split(line, comments=True) for line in text.splitlines() if line.startswith("saelens-cosine ")]


def test_ci_runs_the_readmes_test_command():
    commands = block("bash", "pytest").strip().splitlines()
    assert commands[1:] == [
        'pip install ".[test]" torch==2.13.0',
        "pip install --no-deps sae-bench==0.6.0 sae-probes==0.4.2",
        "OMP_NUM_THREADS=1 python -m pytest -n 2 --dist loadfile",
    ]
    script = (ROOT / ".ci" / "run").read_text()
    for command in commands[1:]:
        assert command in script.replace("pip install --quiet", "pip install")


def test_the_first_command_is_the_default_comparison():
    assert block("bash", "saelens-cosine compare").strip().splitlines()[-1] == "saelens-cosine compare"


def test_the_tables_of_architectures_are_complete_and_right():
    section = PAGES["architectures.md"].split("## Architectures")[1].split("\n## ")[0]
    scores = re.findall(r"`(\w+)_<selector>`", section)
    suffixes: dict[str, str] = {}
    for first, last in re.findall(r"^\| (`[a-z_`, ]+) \| [^|]* \| (`\.\.\._[^|]*) \|$", section, re.M):
        selectors, saved = re.findall(r"`(\w+)`", first), re.findall(r"`\.\.\._(\w+)`", last)
        suffixes |= dict(zip(selectors, saved * (len(selectors) // len(saved)), strict=True))
    others = set(re.findall(r"`(magnitude_bypass_\w+|top_afa)`", section))
    named = {f"{score}_{selector}" for score in scores for selector in suffixes} | others
    assert named == set(saelens_cosine.TRAINING_ARCHITECTURES)
    for score in scores:
        for selector, suffix in suffixes.items():
            settings = {"matryoshka_widths": [8, 128]} if "matryoshka" in selector else {}
            config = SAE_TRAINING_CLASS_REGISTRY[f"{score}_{selector}"][1](d_in=4, d_sae=128, **settings)
            saved_as = suffix if score == "inner_product" else f"{score}_{suffix}"
            assert config.get_inference_config_class().architecture() == saved_as


def test_options_in_the_table_are_fields():
    section = PAGES["architectures.md"].split("Options of every arm")[1].split("\n\n### ")[0]
    rows = [row for row in section.splitlines() if row.startswith("|")]
    known = {field.name for field in fields(saelens_cosine.PerFeatureCosineBatchTopKTrainingSAEConfig)}
    named = {name for row in rows for name in re.findall(r"`(\w+)(?:=[^`]*)?`", row.split("|")[2])}
    assert len(named) > 12
    assert named <= known


def test_the_train_command_parses_in_saelens():
    (words,) = [words for words in commands() if words[1] == "train" and "..." not in words]
    config = _parse_cfg_args([word.replace("_000", "000") for word in words[2:]])
    assert config.sae.architecture() == "cosine_batchtopk"
    assert config.n_batches_in_buffer * config.context_size >= config.train_batch_size_tokens


def test_flags_of_compare_in_the_guide_exist(capsys):
    with pytest.raises(SystemExit):
        main(["compare", "--help"])
    text = capsys.readouterr().out
    reading = PAGES["guide.md"].split("\n## Compare")[1].split("\n## ")[0]
    flags = set(re.findall(r"--[a-z-]+", reading)) - {"--help"}
    assert {"--arms", "--seeds", "--max-norm-multiple", "--model"} <= flags
    assert [flag for flag in flags if flag not in text] == []


@pytest.mark.parametrize("command", ["compare", "evaluate", "ground-truth", "convert", "share", "benchmark"])
def test_flags_of_commands_on_the_pages_exist(command, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    text = capsys.readouterr().out
    flags = {word for words in commands() if words[1] == command for word in words if word.startswith("--")}
    assert len(flags) >= 2
    assert [flag for flag in flags if flag not in text] == []


def test_commands_with_overwrite_are_named(capsys):
    """Those that have it, and no other."""
    found = []
    for command in ("compare", "evaluate", "ground-truth", "convert", "share", "benchmark"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        if "--overwrite" in capsys.readouterr().out:
            found.append(command)
    said = re.findall(r"`(\S+)`", PAGES["guide.md"].split("have `--overwrite`")[0].rsplit("unasked:", 1)[1])
    assert said == ["train", *found]


def test_short_names_on_the_pages_exist():
    text = block("python", "cosine-scored-saes-qwen3-8b", PAGES["guide.md"])
    named = re.findall(r'from_pretrained\([^"]*"([\w./-]+)",\s*"([\w./-]+)"', text)
    assert len(named) == 2
    by_repository = {release.repo_id: release for release in RELEASES.values()}
    for source, sae_id in named:
        release = RELEASES.get(source) or by_repository[source]
        assert sae_id in release.saes or sae_id in {sae.folder for sae in release.saes.values()}


def pasted(page: str, monkeypatch) -> dict:
    """What the page's Python blocks leave when they are run from top to bottom, those that ask the Hub left out."""
    module = types.ModuleType(page.replace(".", "_"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    for text in blocks("python", PAGES[page]):
        if not text.startswith("# asks the Hub\n"):
            for size, smaller in (("400_000", "8_192"), ("buffer=512", "buffer=64"), ("tokens=20_000", "tokens=2_000")):
                text = text.replace(size, smaller)
            exec(compile(text, page, "exec"), vars(module))
    return vars(module)


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """A folder in which `saelens-cosine compare` has been run, at a small size."""
    folder = tmp_path_factory.mktemp("compared")
    sizes = ["--tokens", "8192", "--d-sae", "64", "--k", "4", "--eval-tokens", "2000"]
    assert main(["compare", *sizes, "--output", str(folder / "runs" / "compare"), "--quiet"]) == 0
    return folder


def test_pages_with_python_are_known():
    with_python = [name for name, page in PAGES.items() if blocks("python", page)]
    assert with_python == ["README.md", "architectures.md", "evals.md", "guide.md"]  # each has its test below


def test_the_readmes_lines_run_as_pasted(compared, monkeypatch):
    monkeypatch.chdir(compared)
    names = pasted("README.md", monkeypatch)
    assert names["codes"].shape[::2] == (1, 64)
    assert names["reconstruction"].shape == (*names["codes"].shape[:2], 192)


def test_the_guides_blocks_run_as_pasted(compared, monkeypatch):
    monkeypatch.chdir(compared)
    names = pasted("guide.md", monkeypatch)
    assert names["codes"].shape[2] == 64
    assert names["values"].shape == names["features"].shape
    assert names["trained"].cfg.architecture() == "per_feature_cosine_batchtopk"
    assert len(names["fve"]) == 2
    assert names["read_by_cosine"].cfg.architecture() == "cosine_jumprelu"
    for file in ("runs/compare/comparison.json", "runs/evaluate/evaluation.json"):
        document, section = json.loads(Path(file).read_text()), PAGES["formats.md"].split(f"\n## {Path(file).name}")[1]
        section = section.split("\n## ")[0]
        named = [*document, *(document["arms"][0] if "arms" in document else ())]
        assert [name for name in named if name != "schema" and f"`{name}`" not in section] == []
        assert f"`{document['schema']}`" in section


def test_an_eval_of_ones_own_registers_as_the_page_shows(monkeypatch):
    for name in EVALS:
        monkeypatch.setitem(EVALS, name, EVALS[name])
    try:
        pasted("evals.md", monkeypatch)
        assert EVALS["residual"].of == "sae"
    finally:
        EVALS.pop("residual", None)


def test_a_third_partys_score_trains_as_the_page_shows(monkeypatch):
    try:
        pasted("architectures.md", monkeypatch)
        sae_class, config_class = SAE_TRAINING_CLASS_REGISTRY["l1_topk"]
        sae = sae_class(config_class(d_in=6, d_sae=12, k=3))
        x = torch.randn(8, 6)
        output = sae.training_forward_pass(TrainStepInput(x, {}, None, 0, False))
        output.loss.backward()
        # b_dec and b_enc are 0 at the start
        nearer = x.abs().sum(dim=1, keepdim=True) - (x[:, :, None] - sae.W_enc[None]).abs().sum(dim=1)
        torch.testing.assert_close(sae.score(x), nearer)
        assert sae.W_enc.grad.abs().sum() > 0
    finally:
        SAE_TRAINING_CLASS_REGISTRY.pop("l1_topk", None)
        if "l1_topk" in saelens_cosine.TRAINING_ARCHITECTURES:
            saelens_cosine.TRAINING_ARCHITECTURES.remove("l1_topk")

"""The pages of the documentation: complete, and built without a warning and without the network."""

import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY

import saelens_cosine
from saelens_cosine.experiments.evaluate.evals import EVALS
from saelens_cosine.training.recipe import RECIPES

ROOT = Path(__file__).parents[2]
PAGES = {path.name: path.read_text() for path in (ROOT / "docs").glob("*.md")}


def test_every_eval_has_its_heading_and_its_line():
    parts = re.split(r"^### (\w+)$", PAGES["evals.md"], flags=re.M)[1:]
    said = dict(zip(parts[::2], parts[1::2], strict=True))
    assert set(said) == set(EVALS)
    for name, row in EVALS.items():
        assert said[name].lstrip().startswith(f"> {row.about}\n"), name


def test_every_public_name_is_on_a_page():
    shown = re.findall(r"^::: saelens_cosine\.(\w+)$", PAGES["api.md"] + PAGES["api_architectures.md"], re.M)
    assert sorted(shown) == sorted(saelens_cosine.__all__)


def test_every_field_of_an_architecture_is_explained():
    """By the docstring of a class that the page shows, or by a sentence below where it is SAELens'."""
    manual = PAGES["architectures.md"].split("manual of each field")[1]
    shown, sentences = re.findall(r"^::: (\S+)$", manual, re.M), re.findall(r"`(\w+)`", manual)
    for name in saelens_cosine.TRAINING_ARCHITECTURES:
        config = SAE_TRAINING_CLASS_REGISTRY[name][1]
        documented = [base for base in config.__mro__ if f"{base.__module__}.{base.__qualname__}" in shown]
        explained = {field for base in documented for field in re.findall(r"^ +(\w+) \(.*?\): ", base.__doc__, re.M)}
        assert {field.name for field in fields(config)} - explained - set(sentences) == set(), name


def test_every_setting_of_a_recipe_is_in_its_table():
    table = "\n".join(line for line in PAGES["recipes.md"].splitlines() if line.startswith("| `"))
    for make in RECIPES.values():
        recipe = make(1_000_000)
        runner = recipe.runner.keys() - {"train_batch_size_tokens"}  # stands above the table
        assert [name for name in (*recipe.sae, *runner) if f"`{name}`" not in table] == []


def test_schemas_on_the_page_are_those_of_the_code():
    schema = r"saelens-cosine[-/][a-z-]+/\d+"
    source = "\n".join(path.read_text() for path in (ROOT / "saelens_cosine").rglob("*.py"))
    named = re.findall(rf"`({schema})`", PAGES["formats.md"])
    assert len(named) == 10
    assert [name for name in named if f'"{name}"' not in source] == []


def test_the_pages_build_without_a_warning_and_ask_the_network_for_nothing(tmp_path):
    pytest.importorskip("mkdocs", reason="the extra `docs` is not installed")
    pytest.importorskip("mkdocstrings", reason="the extra `docs` is not installed")
    pytest.importorskip("material", reason="the extra `docs` is not installed")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    pages = list((tmp_path / "site").glob("*.html"))
    assert {path.stem for path in pages} >= {name.removesuffix(".md") for name in PAGES}
    for path in pages:
        text = path.read_text()
        fetched = re.findall(r"<(?:script|img|iframe)[^>]*\ssrc=\"?(https?:[^\s\">]+)", text)
        fetched += re.findall(
            r"<link[^>]*rel=\"?(?:stylesheet|preload|preconnect)[^>]*href=\"?(https?:[^\s\">]+)", text
        )
        assert fetched == [], path.name
    assert "high_norm_share" in (tmp_path / "site" / "evals.html").read_text()  # fields come from the docstrings


def test_files_that_are_named_exist():
    texts = [PAGES["runs.md"], *((ROOT / name).read_text() for name in ("README.md", "CONTRIBUTING.md"))]
    named = {name for text in texts for name in re.findall(r"`([\w/]+/\w+\.(?:py|ipynb))`", text)}
    assert len(named) > 10
    assert [name for name in named if not ((ROOT / name).exists() or (ROOT / "saelens_cosine" / name).exists())] == []

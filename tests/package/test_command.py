"""`saelens-cosine` says what it can do before anything is loaded."""

import os
import subprocess
import sys
from importlib.metadata import entry_points

import pytest

import saelens_cosine
from saelens_cosine.cli import main

ASKED = """
import sys
sys.argv = ["saelens-cosine", sys.argv[1]]
try:
    __import__("saelens_cosine_command").main()
finally:
    print("loaded:", *sorted({"torch", "sae_lens", "saelens_cosine", "numpy"} & set(sys.modules)))
"""


def ask(word):
    command = [sys.executable, "-c", ASKED, word]
    asked = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, "COLUMNS": "80"})
    said, loaded = asked.stdout.split("loaded:")
    return said, loaded.split()


@pytest.mark.parametrize("word", ["-h", "--help", "--version"])
def test_help_and_version_load_nothing(word, capsys, monkeypatch):
    said, loaded = ask(word)
    assert loaded == []
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit, match="0"):
        main([word])
    assert capsys.readouterr().out == said


def test_the_version_is_the_package_s():
    assert ask("--version")[0] == f"saelens-cosine {saelens_cosine.__version__}\n"


def test_every_command_is_in_the_help_with_its_line():
    said, _ = ask("--help")
    for name in ("train", "compare", "benchmark", "plan", "evaluate", "ground-truth", "convert", "share"):
        assert f"\n    {name} " in said
    assert "diagnostics of saved SAEs, with and without attention sinks" in " ".join(said.split())


def test_the_script_is_the_one_that_loads_late():
    (script,) = (e for e in entry_points(group="console_scripts") if e.name == "saelens-cosine")
    assert script.value == "saelens_cosine_command:main"


def test_a_command_gets_there(monkeypatch, capsys):
    import saelens_cosine_command

    monkeypatch.setattr(sys, "argv", ["saelens-cosine", "plan", "--d-sae", "x"])
    with pytest.raises(SystemExit, match="2"):
        saelens_cosine_command.main()
    assert "saelens-cosine plan: argument --d-sae" in capsys.readouterr().err

"""The versions of Python and of ruff are said in several files; they are the same there."""

import re
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
PYPROJECT = (ROOT / "pyproject.toml").read_text()


def test_the_oldest_and_the_newest_python_that_are_claimed_are_tested():
    claimed = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', PYPROJECT)
    assert re.search(r'requires-python = ">=(3\.\d+)"', PYPROJECT)[1] == claimed[0]
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]
    assert jobs["tests"]["strategy"]["matrix"]["python"] == [claimed[0], claimed[-1]]
    assert {"run": "bash .ci/run"} in jobs["tests"]["steps"]


def test_ruff_before_a_commit_is_one_that_developers_may_have():
    repository = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]
    least = re.search(r'"ruff>=([\d.]+)"', PYPROJECT)[1]
    assert [int(part) for part in repository["rev"][1:].split(".")] >= [int(part) for part in least.split(".")]
    assert {hook["id"] for hook in repository["hooks"]} == {"ruff-check", "ruff-format"}

"""Imports run down the rooms and never in a circle."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import saelens_cosine

FOLDER = Path(saelens_cosine.__file__).parent

ROOMS = [
    "__main__",
    "cli",
    "ranks",
    "sharing",
    "experiments",
    "saebench",
    "rescoring",
    "training",
    "report",
    "metrics",
    "loading",
    "saes",
    "activations",
    "kernels",
]
"""From above to below. What is not named here (`score`, `registry`, `console`, `files`, `bundled`, ...) is below all of them."""


def modules() -> dict[str, Path]:
    files = {path.relative_to(FOLDER.parent).with_suffix(""): path for path in FOLDER.rglob("*.py")}
    return {".".join(name.parts).removesuffix(".__init__"): path for name, path in files.items()}


def imports(path: Path, known: set[str]) -> set[str]:
    """Modules of the package that a file imports, in functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "saelens_cosine":
            for name in node.names:
                inner = f"{node.module}.{name.name}"
                found.add(inner if inner in known else node.module)
        elif isinstance(node, ast.Import):
            found |= {name.name for name in node.names if name.name.split(".")[0] == "saelens_cosine"}
    return found - {"saelens_cosine"}  # the package itself, for what it registers


def height(module: str) -> int:
    """Larger is higher."""
    room = module.split(".")[1]
    return len(ROOMS) - ROOMS.index(room) if room in ROOMS else 0


def upward(edges: dict[str, set[str]]) -> list[str]:
    return [f"{one} -> {other}" for one, others in edges.items() for other in others if height(other) > height(one)]


def edges() -> dict[str, set[str]]:
    found = modules()
    return {name: imports(path, set(found)) for name, path in found.items() if name.count(".")}


def test_no_import_runs_upwards():
    assert upward(edges()) == []


def test_no_imports_run_in_a_circle():
    TopologicalSorter({name: found - {name} for name, found in edges().items()}).prepare()


def test_an_import_upwards_or_in_a_circle_is_found():
    assert upward(
        {"saelens_cosine.kernels.a": {"saelens_cosine.saes.b"}, "saelens_cosine.score": {"saelens_cosine.cli"}}
    )
    with pytest.raises(CycleError):
        TopologicalSorter({"a": {"b"}, "b": {"a"}}).prepare()


TESTS = Path(__file__).parents[1]


def test_no_file_outgrows_its_idea_and_no_room_its_door():
    """350 lines in a file of the package, 400 in one of tests; 12 files beside each other, 18 where each selector has its own."""
    lengths = {path: len(path.read_text().splitlines()) for path in (*FOLDER.rglob("*.py"), *TESTS.rglob("*.py"))}
    assert {p.name: n for p, n in lengths.items() if n > (400 if TESTS in p.parents else 350)} == {}
    files = [path for path in FOLDER.rglob("*.py") if path.name != "__init__.py"]
    folders = {folder: sum(path.parent == folder for path in files) for folder in {path.parent for path in files}}
    full = {f.name: n for f, n in folders.items() if n > (18 if f.name == "saes" else 12)}
    assert full == {}, "find the idea that some of them share, and give it a folder"


def test_the_largest_room_is_no_house_of_its_own():
    lines: dict[str, int] = {}
    for path in FOLDER.rglob("*.py"):
        room = path.relative_to(FOLDER).parts[0]
        lines[room] = lines.get(room, 0) + len(path.read_text().splitlines())
    assert max(lines.values()) < 0.3 * sum(lines.values())


def test_only_tests_mock():
    named = [p.name for p in FOLDER.rglob("*.py") if "unittest" in p.read_text()]
    assert named == []

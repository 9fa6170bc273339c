"""Files are written in one way, that of `files.whole`, all over the package."""

import ast
from pathlib import Path

import pytest

import saelens_cosine

ROOT = Path(saelens_cosine.__file__).parent
WRITERS = {
    "write_text",
    "write_bytes",
    "savefig",
    "rename",
    "dump",
    "save",
    "savez",
    "save_file",
    "save_model",
    "save_inference_model",
    "to_json",
    "to_csv",
}
"""Calls that leave a file under its name before it is whole, or that move files themselves."""
OF_OURS = {
    "unfinished": "a name of `whole_file` or a folder of `whole_folder`",
    "target": "a place below the folder of `whole_folder`",
    "folder": "a temporary folder that is read once and goes",
    "written": "a folder that its caller puts in place",
    "workspace": "likewise",
    "super()": "SAELens' own method",
    "aside": "what was there, while `convert` replaces it",
    "Path('/proc/self/clear_refs')": "the kernel's",
}
"""What may be written to all the same."""


def written_by_hand(source):
    """Calls that write, other than to a path of `OF_OURS`."""
    found = []
    for call in (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)):
        name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
        texts = [ast.unparse(part) for part in [call.func, *call.args]]
        opened = name == "open" and any(
            isinstance(arg, ast.Constant) and isinstance(arg.value, str) and set(arg.value) & set("wx")
            for arg in [*call.args, *(keyword.value for keyword in call.keywords)]
        )
        beside = name == "TemporaryDirectory" and any(keyword.arg == "dir" for keyword in call.keywords)
        moves = texts[0].endswith(".replace") and len(call.args) == 1 and not call.keywords  # two arguments: text
        gives = name == "to_json" and not call.args  # a figure's, as text
        if ((name in WRITERS and not gives) or opened or beside or moves) and not any(
            ours in text for ours in OF_OURS for text in texts
        ):
            found.append(ast.unparse(call))
    return found


@pytest.mark.parametrize(
    "path", [p for p in sorted(ROOT.rglob("*.py")) if p.parent.name != "files"], ids=lambda p: str(p.relative_to(ROOT))
)
def test_no_module_writes_a_file_by_hand(path):
    assert written_by_hand(path.read_text()) == []


@pytest.mark.parametrize(
    "line",
    [
        'path.write_text("x")',
        "figure.savefig(path)",
        'open(path, "w")',
        "json.dump(x, f)",
        "TemporaryDirectory(dir=d)",
        "a.rename(b)",
        "a.replace(b)",
        'p.open("xb")',
    ],
)
def test_what_is_written_by_hand_is_found(line):
    assert written_by_hand(line) == [line.replace('"', "'")]

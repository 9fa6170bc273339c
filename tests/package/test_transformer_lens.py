"""TransformerLens 4 has no HookedTransformer: what it took away is imported in one module, and nothing of ours misses it."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import without_hooked_transformer
from helpers import make_sae

import saelens_cosine
from saelens_cosine.hooked_transformer import WAY_OUT

FOLDER = Path(saelens_cosine.__file__).parent

KEPT = {
    "transformer_lens.model_bridge.TransformerBridge",
    "transformer_lens.supported_models.MODEL_ALIASES",
    "transformer_lens.supported_models.OFFICIAL_MODEL_NAMES",
}
"""What TransformerLens 3.9 and 4.3 both have."""


def imported(tree: ast.AST) -> set[str]:
    """Names of `transformer_lens`, and sae_lens' class made of one of them, that code imports; not for type checking alone."""
    found = set()
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{name.name}" for name in node.names}
        elif isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        found |= imported(node)
    return {
        name for name in found if name.split(".")[0] == "transformer_lens" or name.endswith(".HookedSAETransformer")
    }


def test_one_module_imports_what_has_gone_and_only_when_it_is_asked():
    by_file = {path.relative_to(FOLDER).as_posix(): ast.parse(path.read_text()) for path in FOLDER.rglob("*.py")}
    gone = {file: imported(tree) - KEPT for file, tree in by_file.items()}
    assert [file for file, names in gone.items() if names] == ["hooked_transformer.py"]
    module = by_file["hooked_transformer.py"]
    at_once = [node for node in module.body if not isinstance(node, ast.FunctionDef)]
    assert imported(ast.Module(at_once, [])) == set()


def test_an_import_of_what_has_gone_is_found():
    code = "def f():\n    try:\n        from transformer_lens import HookedTransformer\n    except ImportError: pass"
    assert imported(ast.parse(code)) == {"transformer_lens.HookedTransformer"}
    assert imported(ast.parse("import transformer_lens.utils as u")) == {"transformer_lens.utils"}


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """What is measured on a HookedTransformer, and in an interpreter where there is none."""
    folder = tmp_path_factory.mktemp("models")
    without_hooked_transformer.write_code(folder / "text.jsonl")
    sae = make_sae("cosine_topk", d_in=192, d_sae=48, k=8)
    for key, value in {
        "model_name": "bundled",
        "model_class_name": "HookedTransformer",
        "hook_name": without_hooked_transformer.HOOK,
        "dataset_path": str(folder / "text.jsonl"),
        "context_size": 32,
        "prepend_bos": True,
    }.items():
        sae.cfg.metadata[key] = value
    sae.save_inference_model(folder / "sae")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(FOLDER.parent), str(Path(__file__).parents[1])])}
    script = [sys.executable, without_hooked_transformer.__file__, str(folder)]
    hidden = subprocess.Popen(script, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    here = without_hooked_transformer.measure(folder, folder / "here")
    said, _ = hidden.communicate(timeout=600)
    assert hidden.returncode == 0, said[-3000:]
    return here, json.loads((folder / "hidden.json").read_text())


def leaves(value, place=""):
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {k: v for key, inner in items for k, v in leaves(inner, f"{place}/{key}").items()}
    return {place: value}


@pytest.mark.parametrize("what", ["compare", "evaluate"])
def test_commands_give_the_same_numbers_through_a_bridge(both, what):
    here, hidden = (leaves(one[what]) for one in both)
    assert here.keys() == hidden.keys()
    numbers = [key for key, value in here.items() if isinstance(value, float) and "seconds" not in key]
    assert len(numbers) > 100
    for ratio in (False, True):  # precision divides a divergence by another, of 1e-5 nats
        some = [key for key in numbers if ("precision" in key) == ratio]
        expected = pytest.approx({key: here[key] for key in some}, rel=1e-3 if ratio else 1e-5, abs=1e-5)
        assert {key: hidden[key] for key in some} == expected


HOOKED = ["logits", "codes", "with error", "predictions", "replaced", "gain", "recovered"]


@pytest.mark.parametrize("what", HOOKED)
def test_hooks_and_edits_give_the_same_through_a_bridge(both, what):
    here, hidden = (torch.tensor(one[what]) for one in both)
    assert here.abs().max() > 0.1
    assert (hidden - here).norm() < 1e-5 * here.norm()


def test_a_bridge_stands_in_and_its_saes_say_so(both):
    here, hidden = both
    assert (here["model"], hidden["model"]) == ("HookedSAETransformer", "SAETransformerBridge")
    classes = ("HookedTransformer", "blocks.3.hook_resid_post"), ("TransformerBridge", "blocks.3.hook_out")
    for one, expected in zip(both, classes, strict=True):
        assert (one["trained"]["model_class_name"], one["trained"]["hook_name"]) == expected


def test_saebench_says_what_it_needs(both):
    pytest.importorskip("sae_bench")
    assert both[0]["saebench"] == []
    assert both[1]["saebench"] == [f"SAEBench runs HookedTransformers. {WAY_OUT}"]

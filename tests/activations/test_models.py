"""Which model an SAE is measured on: its class, how it was loaded, where it is hooked, and which head.

A GPT-2 of three random blocks lies in a folder `gpt2` of the working directory, where Hugging Face and TransformerLens find it
under that name; `copy` is the same under a name that only Hugging Face knows. Its own forward pass says what is right.
"""

import json
import shutil
import sys

import pytest
import torch
from helpers import VOCABULARY, make_sae, tiny_tokenizer
from sae_lens import SAE
from sae_lens.load_model import HookedProxyLM
from transformer_lens import HookedTransformer
from transformers import GPT2Config, GPT2LMHeadModel

from saelens_cosine import saebench
from saelens_cosine.activations.models import block_of, choose_model, load_hooked_model, size_at_hook
from saelens_cosine.cli import main
from saelens_cosine.experiments.compare.run import ComparisonSettings, compare
from saelens_cosine.experiments.evaluate.evals import EVALS, NotApplicable
from saelens_cosine.experiments.evaluate.settings import EvaluationSettings
from saelens_cosine.experiments.evaluate.sources import parse_sources
from saelens_cosine.experiments.evaluate.subject import Loader
from saelens_cosine.metrics.causal import clean_run
from saelens_cosine.saebench.runner import _how_loaded, _load

D, HEADS, CONTEXT = 16, 2, 16
TOKENS = torch.tensor([[0, 3, 4, 5, 6, 2], [0, 9, 9, 1, 30, 7]])
HF, LENS = "AutoModelForCausalLM", "HookedTransformer"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    sizes = {"n_layer": 3, "n_embd": D, "n_head": HEADS, "n_positions": 32, "n_ctx": 32}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(VOCABULARY), bos_token_id=0, eos_token_id=0, **sizes))
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data.normal_(0.2, 0.3)  # far from centred
    model.save_pretrained(folder / "gpt2")
    tiny_tokenizer().save_pretrained(folder / "gpt2")
    shutil.copytree(folder / "gpt2", folder / "copy")
    rng = torch.Generator().manual_seed(0)
    rows = [" ".join(f"w{int(i)}" for i in torch.randint(0, 31, (40,), generator=rng)) for _ in range(400)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return folder


@pytest.fixture(autouse=True)
def in_the_place(place, monkeypatch):
    monkeypatch.chdir(place)


def save(folder, d_in=D, seed=1, **metadata):
    """An SAE whose metadata are complete but for what is given: None takes an entry out."""
    sae = make_sae("cosine_topk", seed=seed, d_in=d_in, d_sae=24)
    known = {"model_name": "gpt2", "model_class_name": LENS, "hook_name": "blocks.1.hook_resid_post"}
    known |= {"dataset_path": "text.jsonl", "context_size": CONTEXT, "prepend_bos": True}
    for key, value in {**known, **metadata}.items():
        sae.cfg.metadata[key] = value
    sae.save_inference_model(folder)
    return str(folder)


def subjects(folder, *sources, **settings):
    loader = Loader(EvaluationSettings(tokens=500, **settings), folder)
    return [loader.subject(source) for source in parse_sources(sources)]


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


def fve(sae, x):
    """1 - Var(x - x_hat) / Var(x), each about its own mean and summed over dimensions, in float64."""
    with torch.no_grad():
        error = (x - sae.decode(sae.encode(x))).double()
    total, left = ((y - y.mean(dim=0)).square().sum().item() for y in (x.double(), error))
    return 1 - left / total


def cross_entropy(logits, tokens):
    logits = logits[:, :-1].double().flatten(0, 1)
    return torch.nn.functional.cross_entropy(logits, tokens[:, 1:].flatten()).item()


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
    model = _load("gpt2", _how_loaded(saes[0]), "cpu", "float32")  # the run's dtype
    _, cache = model.run_with_cache(TOKENS, names_filter=["blocks.1.hook_resid_post"])
    x, _ = by_hand(TOKENS)
    found = cache["blocks.1.hook_resid_post"].flatten(0, 1)
    torch.testing.assert_close(found, x - x.mean(dim=-1, keepdim=True), rtol=1e-4, atol=1e-3)
    with pytest.raises(ValueError, match="one language model.*center_writing_weights"):
        saebench.run(saes, ["core"], tmp_path)
    with pytest.raises(ValueError, match="TransformerLens knows no copy"):
        _load("copy", _how_loaded(saebench.prepare(saes[1].sae, model_name="copy")), "cpu", "float32")


# --- one attention head ---

HEAD_HOOK = "blocks.1.attn.hook_z"


@pytest.fixture
def head_sae(tmp_path):
    return save(tmp_path / "head", d_in=D // HEADS, hook_name=HEAD_HOOK, hook_head_index=1)


def heads_by_hand(tokens, replacement=None):
    """`[contexts, length, heads, d_head]` of a model of TransformerLens, and its logits with head 1 replaced."""
    model = HookedTransformer.from_pretrained_no_processing("gpt2")
    found = []

    def hook(z, hook):
        found.append(z.clone())
        if replacement is not None:
            z[:, :, 1] = replacement(z[:, :, 1])
        return z

    with torch.no_grad():
        logits = model.run_with_hooks(tokens, fwd_hooks=[(HEAD_HOOK, hook)], prepend_bos=False)
    return found[0], logits


def test_an_sae_of_one_head_is_evaluated_on_that_head(head_sae, tmp_path):
    evals = ["tokens", "reconstruction", "loss", "dictionary", "causal", "probing", "features"]
    (tmp_path / "task.jsonl").write_text(
        "".join(json.dumps({"text": f"w1 w{i % 9} w{3 + i % 2}", "label": i % 2}) + "\n" for i in range(40))
    )
    flags = ["--tasks", str(tmp_path / "task.jsonl"), "--causal-contexts", "4", "--causal-features", "4"]
    flags += ["--tokens", "500", "--sinks", "keep", "--quiet", "--output", str(tmp_path)]
    assert main(["evaluate", head_sae, "--evals", *evals, *flags]) == 0
    document = json.loads((tmp_path / "evaluation.json").read_text())
    (entry,) = document["saes"]
    assert document["texts"][0]["head"] == 1
    assert not [name for name, result in entry["results"].items() if "not_applicable" in result]
    (subject,) = subjects(tmp_path, head_sae)
    tokens, sae = subject.text.contexts.tokens, SAE.load_from_disk(head_sae)
    z, _ = heads_by_hand(tokens)
    x = z[:, :, 1].flatten(0, 1)
    found = entry["results"]["reconstruction"]["with_sinks"]["by_norm"]["all_norms"]["overall"]
    assert (found["tokens"], found["fve"]) == (len(x), pytest.approx(fve(sae, x), rel=1e-4))
    loss = entry["results"]["loss"]["with_sinks"]["by_norm"]["all_norms"]["overall"]
    for key, replacement in (
        ("ce_loss_without_sae", None),
        ("ce_loss_with_sae", lambda z: sae.decode(sae.encode(z))),
        ("ce_loss_with_ablation", torch.zeros_like),
    ):
        _, logits = heads_by_hand(tokens, replacement)
        assert loss[key] == pytest.approx(cross_entropy(logits, tokens), rel=1e-4)


def train(place, output, **changes):
    (place / "data").mkdir(exist_ok=True)
    shutil.copy(place / "text.jsonl", place / "data" / "train.jsonl")
    flags = {"architecture": "cosine_topk", "model_name": "gpt2", "dataset_path": "data", "hook_name": HEAD_HOOK}
    flags |= {"hook_head_index": 1, "d_in": 8, "d_sae": 24, "k": 4, "context_size": CONTEXT, "training_tokens": 2048}
    flags |= {"train_batch_size_tokens": 256, "log_to_wandb": "false", "output_path": output, **changes}
    return main(
        ["train", *(str(part) for flag, value in flags.items() if value is not None for part in (f"--{flag}", value))]
    )


def test_a_head_that_train_was_given_is_evaluated(place, tmp_path):
    assert train(place, tmp_path / "sae") == 0
    (subject,) = subjects(tmp_path, str(tmp_path / "sae"), dataset="text.jsonl")
    z, _ = heads_by_hand(subject.text.contexts.tokens)
    torch.testing.assert_close(subject.text.sample.activations, z[:, :, 1].flatten(0, 1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"d_in": 16}, "head 1, have size 8; pass --d_in 8"),
        ({"context_size": 64}, "context_size=64 is more than the 32 tokens that gpt2 takes; pass --context_size 32"),
        ({"hook_name": "blocks.5.attn.hook_z"}, "no hook point 'blocks.5.attn.hook_z'"),
        (
            {"model_from_pretrained_kwargs": '{"colour": "red"}'},
            "does not load with model_from_pretrained_kwargs of colour: ",
        ),
        (
            {
                "model_class_name": "AutoModelForCausalLM",
                "hook_name": "transformer.h.1",
                "hook_head_index": None,
                "model_from_pretrained_kwargs": '{"colour": "red", "token": "hf_abcdefghijkl"}',
            },
            "does not load with model_from_pretrained_kwargs of colour, token: ",
        ),
    ],
)
def test_train_says_what_does_not_fit_a_model_that_saelens_loads(changes, said, place, tmp_path, capsys):
    assert train(place, tmp_path / "sae", **changes) == 2
    assert said in capsys.readouterr().err


def test_edits_of_one_head_leave_the_others():
    model = load_hooked_model("gpt2", hook=HEAD_HOOK).model
    run = clean_run(model, HEAD_HOOK, TOKENS, head=1)
    z, logits = heads_by_hand(TOKENS)
    torch.testing.assert_close(run.hidden, z[:, :, 1])
    torch.testing.assert_close(run.log_probs, logits[:, -1].log_softmax(-1))
    _, logits = heads_by_hand(TOKENS, lambda z: 2 * z)
    found = run.resumed.log_probs(2 * run.hidden, TOKENS)
    torch.testing.assert_close(found, logits.log_softmax(-1), rtol=1e-4, atol=1e-4)


def test_no_contexts_have_no_predictions():
    run = clean_run(load_hooked_model("copy").model, "transformer.h.1", TOKENS)
    assert run.alone(run.hidden[0, :0]).log_probs.shape == (0, len(VOCABULARY))


def test_a_loss_that_would_replace_all_heads_is_left_out(tmp_path):
    folder = save(
        tmp_path / "k", d_in=48, model_name="bundled", hook_name="blocks.1.attn.hook_rot_k", hook_head_index=1
    )
    (subject,) = subjects(tmp_path, folder)
    with pytest.raises(NotApplicable, match="hook_z, not at blocks.1.attn.hook_rot_k"):
        EVALS["loss"].measure(subject)
    with pytest.raises(saebench.SAEBenchError, match="this SAE is of head 1"):
        saebench.run([saebench.prepare(subject.sae)], ["core"], tmp_path, model=subject.text.model)


def test_two_heads_are_two_texts_of_one_model(tmp_path):
    first = save(tmp_path / "0", d_in=8, hook_name=HEAD_HOOK, hook_head_index=0)
    second = save(tmp_path / "1", d_in=8, hook_name=HEAD_HOOK, hook_head_index=1)
    zero, one = subjects(tmp_path, first, second)
    assert zero.text.model is one.text.model
    z, _ = heads_by_hand(zero.text.contexts.tokens)
    for head, subject in enumerate((zero, one)):
        torch.testing.assert_close(subject.text.sample.activations, z[:, :, head].flatten(0, 1), rtol=1e-4, atol=1e-4)


def test_a_head_that_is_not_there_is_said(tmp_path, capsys):
    model = load_hooked_model("gpt2").model
    assert (size_at_hook(model, HEAD_HOOK), size_at_hook(model, HEAD_HOOK, 1)) == (16, 8)
    with pytest.raises(ValueError, match="hook_head_index=2.*has 2 heads"):
        size_at_hook(model, HEAD_HOOK, 2)
    folder = save(tmp_path / "stream", hook_head_index=1)
    assert main(["evaluate", folder, "--quiet", "--output", str(tmp_path / "out")]) == 2
    assert "blocks.1.hook_resid_post are not split by head" in capsys.readouterr().err
    folder = save(tmp_path / "wide", hook_name=HEAD_HOOK, hook_head_index=1)
    assert main(["evaluate", folder, "--quiet", "--output", str(tmp_path / "out")]) == 2
    assert "head 1, have size 8" in capsys.readouterr().err


def test_saebench_says_which_evals_read_all_heads(head_sae, tmp_path):
    prepared = saebench.prepare(SAE.load_from_disk(head_sae))
    model = _load("gpt2", _how_loaded(prepared), "cpu", "float32")
    with pytest.raises(saebench.SAEBenchError, match="reads all of blocks.1.attn.hook_z; this SAE is of head 1"):
        saebench.run([prepared], ["sparse_probing"], tmp_path, model=model)

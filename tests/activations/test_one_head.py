"""An SAE of one attention head is measured on that head, and edits leave the others alone."""

import json
import shutil

import pytest
import torch
from gpt2_cases import CONTEXT, HEADS, TOKENS, D, cross_entropy, fve, save, subjects
from sae_lens import SAE
from transformer_lens import HookedTransformer

from saelens_cosine import saebench
from saelens_cosine.activations.hook_points import size_at_hook
from saelens_cosine.activations.models import load_hooked_model
from saelens_cosine.cli import main
from saelens_cosine.experiments.evaluate.evals import EVALS
from saelens_cosine.metrics.causal.forward import clean_run
from saelens_cosine.saebench.model import how_loaded, load_for_saebench

pytestmark = pytest.mark.usefixtures("in_the_place")

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

    assert main(["evaluate", head_sae, "--evals", "loss", "--loss-tokens", "70", "--overwrite", *flags]) == 0
    (entry,) = json.loads((tmp_path / "evaluation.json").read_text())["saes"]
    loss = entry["results"]["loss"]["with_sinks"]["by_norm"]["all_norms"]["overall"]
    assert loss["tokens"] == 70 // CONTEXT * CONTEXT


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


def test_one_head_is_replaced_at_any_hook_that_has_heads(tmp_path):
    folder = save(
        tmp_path / "k", d_in=48, model_name="bundled", hook_name="blocks.1.attn.hook_rot_k", hook_head_index=1
    )
    (subject,) = subjects(tmp_path, folder)
    hook, tokens = "blocks.1.attn.hook_rot_k", subject.text.contexts.tokens

    def without_the_head(k, hook):
        k[:, :, 1] = 0
        return k

    with torch.no_grad():
        logits = subject.text.model.run_with_hooks(tokens, fwd_hooks=[(hook, without_the_head)], prepend_bos=False)
    found = EVALS["loss"].measure(subject).with_sinks.by_norm.all_norms.overall
    assert found.ce_loss_with_ablation == pytest.approx(cross_entropy(logits, tokens), rel=1e-4)
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
    model = load_for_saebench("gpt2", how_loaded(prepared), "cpu", "float32")
    with pytest.raises(saebench.SAEBenchError, match="reads all of blocks.1.attn.hook_z; this SAE is of head 1"):
        saebench.run([prepared], ["sparse_probing"], tmp_path, model=model)

"""A cache of activations: what is found there is what the model gives, of nothing else, and nothing is run twice."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from helpers import CONTEXT, HOOK, assert_close, tiny_model
from sae_lens.load_model import HookedProxyLM
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from saelens_cosine.activations.cache import cache as module
from saelens_cosine.activations.cache.cache import open_cache
from saelens_cosine.activations.cache.identity import CacheIdentity
from saelens_cosine.activations.cache.standing_in import fill, standing_in
from saelens_cosine.activations.contexts import ContextForm
from saelens_cosine.activations.models import HookedModel
from saelens_cosine.activations.planted_sinks import plant_sinks
from saelens_cosine.activations.sample import sample_tokens
from saelens_cosine.activations.text import TextSplits
from saelens_cosine.bundled import load_bundled_bridge, load_bundled_model, model_folder
from saelens_cosine.files.lock import OutputInUseError

TEXT = TextSplits(None, None, "first 1000 documents")
OTHER = "blocks.0.attn.hook_z"


def identity(model, hooks=(HOOK,), length=CONTEXT, **more):
    hooked = HookedModel(model, "tiny", "HookedTransformer", HOOK, 16, CONTEXT, {})
    return CacheIdentity.of(hooked, hooks, ContextForm(length), "someone/text", TEXT, **more)


def contexts(n, length=CONTEXT):
    """All unlike each other."""
    tokens = torch.randint(0, 30, (n, length), generator=torch.Generator().manual_seed(1))
    tokens[:, 0], tokens[:, 1] = torch.arange(n) // 30, torch.arange(n) % 30
    return tokens


def ask(model, tokens, hooks, stop=2):
    """As SAELens' store and `sample_tokens` ask."""
    with torch.no_grad():
        return model.run_with_cache(tokens, names_filter=hooks, stop_at_layer=stop, prepend_bos=False)[1]


@pytest.fixture
def counted(model):
    """The tiny model, and the contexts of each pass that has gone through its first block."""
    model, seen = tiny_model(), []
    model.blocks[0].register_forward_pre_hook(lambda _module, inputs: seen.append(len(inputs[0])))
    return model, seen


def proxy():
    return HookedProxyLM(
        AutoModelForCausalLM.from_pretrained(model_folder(), dtype=torch.float32),
        AutoTokenizer.from_pretrained(model_folder()),
    )


MODELS = [
    (tiny_model, ["blocks.0.hook_resid_pre", HOOK, OTHER], 2),
    (lambda: tiny_model().to(torch.bfloat16), [HOOK], 2),
    (lambda: tiny_model().to(torch.float64), [HOOK], 2),
    (load_bundled_model, ["blocks.3.hook_resid_post"], 4),
    (load_bundled_bridge, ["blocks.3.hook_out", "blocks.1.attn.o.hook_in"], 4),
    (proxy, ["model.layers.3"], 4),
    (proxy, ["model.norm"], None),
]


@pytest.mark.parametrize("load, hooks, stop", MODELS)
def test_found_or_run_anew_it_is_the_models_own_rounded(load, hooks, stop, tmp_path):
    model, tokens = load(), contexts(5)
    expected = ask(model, tokens, hooks, stop)
    with open_cache(tmp_path / "cache", identity(model, hooks)) as cache, standing_in(model, cache):
        anew = ask(model, tokens, hooks, stop)
    model_that_is_not_run = load()
    for block in model_that_is_not_run.modules():
        block.register_forward_pre_hook(lambda *_: pytest.fail("the model was run"))
    with (
        open_cache(tmp_path / "cache", cache.identity) as cache,
        standing_in(model_that_is_not_run, cache),
    ):
        found = ask(model_that_is_not_run, tokens, hooks, stop)
    for hook in hooks:
        assert torch.equal(anew[hook], expected[hook].bfloat16().to(expected[hook].dtype))
        assert torch.equal(found[hook], anew[hook])
        assert found[hook].dtype == expected[hook].dtype
    for one in (model, model_that_is_not_run):
        assert "run_with_cache" not in vars(one)


def test_a_context_is_run_once_wherever_it_stands(counted, tmp_path):
    model, seen = counted
    tokens = contexts(6)
    with open_cache(tmp_path, identity(model, [HOOK, OTHER])) as cache, standing_in(model, cache):
        seen.clear()
        ask(model, tokens[[0, 1, 0]], [HOOK])
        ask(model, tokens[[3, 1, 0, 3]], [OTHER])
        assert (seen, len(cache)) == ([2, 1], 3)
        found = ask(model, tokens[[1, 3]], [OTHER, HOOK])
        assert seen == [2, 1]
    expected = ask(model, tokens[[1, 3]], [OTHER, HOOK])
    for hook in (HOOK, OTHER):
        assert_close(found[hook], expected[hook], 2**-8)


def test_what_asks_for_more_than_a_cache_has_goes_to_the_model(counted, tmp_path):
    model, seen = counted
    tokens = contexts(2)
    with open_cache(tmp_path, identity(model)) as cache, standing_in(model, cache):
        with torch.no_grad():
            logits, _ = model.run_with_cache(tokens, names_filter=[HOOK], prepend_bos=False)
            assert logits.shape == (2, CONTEXT, 32)
            assert ask(model, tokens, [OTHER])[OTHER].shape == (2, CONTEXT, 2, 8)
            assert ask(model, tokens[:, :5], [HOOK])[HOOK].shape == (2, 5, 16)
            assert len(model.run_with_cache(tokens)[1]) > 20
            with torch.autocast("cpu", torch.bfloat16):
                ask(model, tokens, [HOOK])
        assert len(cache) == 0
    assert not any(tmp_path.iterdir())


def test_a_sample_comes_from_it(counted, tmp_path):
    model, seen = counted
    tokens = contexts(20)
    with open_cache(tmp_path, identity(model, [HOOK, OTHER])) as cache:
        fill(cache, model, tokens, lambda *_: None)
        seen.clear()
        with standing_in(model, cache):
            sample = sample_tokens(model, OTHER, tokens.split(16), head=1)
    assert seen == []
    assert_close(sample.activations, sample_tokens(model, OTHER, tokens.split(16), head=1).activations, 2**-8)


def test_filling_goes_on_where_it_was_and_ends_with_the_same_bits(counted, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "CONTEXTS", 40)  # 32 in a file: whole batches
    model, seen = counted
    tokens = contexts(100)

    def fill_in(place, n, stop=None):
        told = []

        def progress(what, done, total):
            told.append(done // CONTEXT)
            assert (what, total) == ("Activations", n * CONTEXT)
            if stop is not None and done >= stop * CONTEXT:
                raise KeyboardInterrupt

        seen.clear()
        with open_cache(place, identity(model)) as cache:
            seen.clear()
            fill(cache, model, tokens[:n], progress)
        return told

    assert fill_in(tmp_path / "whole", 100) == [0, 16, 32, 48, 64, 80, 96, 100]
    assert seen == [16] * 6 + [4]
    with pytest.raises(KeyboardInterrupt):
        fill_in(tmp_path / "stopped", 80, stop=48)
    assert fill_in(tmp_path / "stopped", 80) == [48, 64, 80]
    # a process that was killed has left its last file half-written, and a lock that no process holds
    (tmp_path / "stopped" / ".unfinished-0123456789abcdef-contexts-00002.safetensors").write_bytes(b"half")
    (tmp_path / "stopped" / "contexts-00002.safetensors").unlink()
    assert fill_in(tmp_path / "stopped", 80) == [48, 64, 80]
    assert fill_in(tmp_path / "stopped", 100) == [80, 96, 100]  # and grows
    assert fill_in(tmp_path / "stopped", 100) == [100]
    assert seen == []
    assert not list((tmp_path / "stopped").glob(".unf*"))
    with (
        open_cache(tmp_path / "whole", identity(model)) as one,
        open_cache(tmp_path / "stopped", identity(model)) as two,
    ):
        assert torch.equal(one.read(tokens)[HOOK], two.read(tokens)[HOOK])
    files = sorted((tmp_path / "whole").glob("*.safetensors"))
    assert [len(load_file(file)["tokens"]) for file in files] == [32, 32, 32, 4]


def test_a_file_has_whole_batches_and_a_bound_on_its_bytes():
    one = identity(tiny_model())
    assert one.bytes_per_context == 8 * (16 * 2 + 4)
    assert module._rows(one) == 256
    assert module._rows(replace(one, hooks={HOOK: (2048,)}, context_size=1024)) == 48  # 2^28 bytes hold 63.9
    assert module._rows(replace(one, hooks={HOOK: (65536,)}, context_size=1024)) == 16


CHANGES = {
    "model_sha256": ("0" * 64, r"'0+' \(tiny\)"),
    "planted_sinks": ((HOOK,), HOOK),
    "tokenizer_sha256": ("abc", "'abc'"),
    "text": ("9 rows, sha256 abc", r"'9 rows, sha256 abc' \(someone/text\)"),
    "heldout_rule": ("hash", "'hash'"),
    "context_size": (16, "8 there and 16 here"),
    "prepend_bos": (False, "True there and False here"),
    "sequence_separator_token": (None, "'bos' there and None here"),
    "disable_concat_sequences": (True, "False there and True here"),
    "hooks": ({HOOK: (16,), OTHER: (2, 8)}, r"\[16\] there and .*hook_z \[2, 8\] here"),
    "dtype": ("float32", "'bfloat16' there and 'float32' here"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_cache_of_something_else_is_refused(name, counted, tmp_path):
    model, _ = counted
    value, shown = CHANGES[name]
    one = identity(model)
    with open_cache(tmp_path, one) as cache:
        fill(cache, model, contexts(1), lambda *_: None)
    other, message = replace(one, **{name: value}), rf"{name} (is|are) .*{shown}.* Choose another folder"
    with pytest.raises(ValueError, match=message), open_cache(tmp_path, other):
        pass
    with open_cache(tmp_path, replace(one, model="another name", dataset="moved")) as cache:
        assert len(cache) == 1


def test_what_it_is_of_follows_the_model_and_the_text(tmp_path):
    model, changed = tiny_model(), tiny_model()
    changed.blocks[0].mlp.b_out.data += 1
    changed.tokenizer.add_tokens(["new"])
    differences = identity(model).differences(identity(changed, planted_sinks=[HOOK]))
    assert [line.split()[0] for line in differences] == ["model_sha256", "planted_sinks", "tokenizer_sha256"]
    seen = replace(ContextForm(CONTEXT), seqpos_slice=(1, None), exclude_special_tokens=True)
    hooked = HookedModel(model, "tiny", "HookedTransformer", HOOK, 16, CONTEXT, {})
    assert CacheIdentity.of(hooked, [HOOK], seen, "someone/text", TEXT) == identity(model)
    with pytest.raises(ValueError, match="hook_pattern have shape"):
        identity(model, ["blocks.0.attn.hook_pattern"])


def test_more_hooks_than_asked_for_serve(counted, tmp_path):
    model, _ = counted
    with open_cache(tmp_path, identity(model, [HOOK, OTHER])) as cache:
        fill(cache, model, contexts(2), lambda *_: None)
    with open_cache(tmp_path, identity(model)) as cache:
        fill(cache, model, contexts(3), lambda *_: None)  # at all hooks
        assert set(cache.read(contexts(3))) == {HOOK, OTHER}


def test_planted_sinks_are_in_it(tmp_path):
    model, tokens = tiny_model(), contexts(4)
    remove = plant_sinks(model, HOOK)
    with open_cache(tmp_path, identity(model, planted_sinks=[HOOK])) as cache:
        fill(cache, model, tokens, lambda *_: None)
        norms = cache.read(tokens)[HOOK].float().norm(dim=-1)
    remove()
    assert (norms[:, 0] > 20 * norms[:, 1:].amax(dim=1)).any()


def test_two_runs_cannot_use_one(counted, tmp_path):
    model, _ = counted
    first, second = (open_cache(tmp_path, identity(model)) for _ in range(2))
    with first, pytest.raises(OutputInUseError, match="is in use"), second:
        pass


def truncate(file):
    file.write_bytes(file.read_bytes()[:-5])


def other_shapes(file):
    save_file({**load_file(file), HOOK: torch.zeros(3, CONTEXT, 15, dtype=torch.bfloat16)}, file)


@pytest.mark.parametrize("damage", [truncate, other_shapes, lambda file: file.write_bytes(b"")])
def test_a_damaged_file_is_named_and_can_be_removed(damage, counted, tmp_path):
    model, seen = counted
    with open_cache(tmp_path, identity(model)) as cache:
        fill(cache, model, contexts(3), lambda *_: None)
    file = tmp_path / "contexts-00000.safetensors"
    damage(file)
    message = "contexts-00000.safetensors is damaged: .* Remove this file"
    with pytest.raises(ValueError, match=message), open_cache(tmp_path, identity(model)):
        pass
    file.unlink()
    with open_cache(tmp_path, identity(model)) as cache:
        fill(cache, model, contexts(3), lambda *_: None)
        assert cache.read(contexts(3))[HOOK].shape == (3, CONTEXT, 16)


@pytest.mark.parametrize("content, message", [
    ("{", "activations.json is damaged"),
    ("[]", "activations.json is damaged"),
    ('{"schema": "saelens-cosine/activations/1"}', "activations.json is damaged"),
    ('{"schema": "saelens-cosine/activations/9"}', "this version reads"),
])  # fmt: skip
def test_a_folder_of_something_else_is_left_alone(content, message, counted, tmp_path):
    model, _ = counted
    (tmp_path / "activations.json").write_text(content)
    with pytest.raises(ValueError, match=message), open_cache(tmp_path, identity(model)):
        pass
    (tmp_path / "activations.json").rename(tmp_path / "notes.json")
    with pytest.raises(FileExistsError, match="no activations.json"), open_cache(tmp_path, identity(model)):
        pass
    assert (tmp_path / "notes.json").read_text() == content


def test_a_disk_without_room_is_told_before_it_begins(counted, tmp_path, monkeypatch):
    model, seen = counted
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with open_cache(tmp_path, identity(model)) as cache:
        seen.clear()
        with pytest.raises(OSError, match="4 contexts .* take 1,152 bytes, .* has room for 1,000"):
            fill(cache, model, contexts(4), lambda *_: None)
        assert seen == []
        fill(cache, model, contexts(3), lambda *_: None)  # 864 bytes


def test_what_a_cache_is_of_can_be_read(counted, tmp_path):
    model, _ = counted
    with open_cache(tmp_path, identity(model, [HOOK, OTHER])) as cache:
        fill(cache, model, contexts(1), lambda *_: None)
    content = json.loads((tmp_path / "activations.json").read_text())
    assert content["schema"] == "saelens-cosine/activations/1"
    assert content["hooks"] == {HOOK: [16], OTHER: [2, 8]}
    assert (content["model"], content["dataset"], content["text"]) == ("tiny", "someone/text", "someone/text")

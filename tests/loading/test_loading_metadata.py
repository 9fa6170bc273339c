"""What is known of a foreign SAE beside its weights: model, hook, data."""

import json
from dataclasses import replace

import pytest
from foreign import D_IN, D_SAE, write
from sae_lens import SAE
from sae_lens.training.activations_store import ActivationsStore

from saelens_cosine.loading import (
    RELEASES,
    authors_huggingface_loader,
    from_pretrained,
)

# --- metadata ---


@pytest.mark.parametrize("arm", ["standard", "global-a", "perfeature"])
def test_metadata_of_the_authors_release(arm, hub):
    write(arm, hub / "Silen" / "cosine-scored-saes-qwen3-8b" / arm)
    for sae in (
        SAE.from_pretrained("Silen/cosine-scored-saes-qwen3-8b", arm, converter=authors_huggingface_loader),
        from_pretrained("cosine-scored-saes-qwen3-8b", arm),
        from_pretrained("Silen/cosine-scored-saes-qwen3-8b"),
    ):
        metadata = sae.cfg.metadata
        assert metadata.model_name == "Qwen/Qwen3-8B"
        assert metadata.hook_name == "blocks.18.hook_resid_post"
        assert metadata.context_size == 2048
        assert metadata.prepend_bos is False
        assert metadata.max_norm_multiple == 10.0
        assert metadata.sae_lens_training_version is None
        assert (metadata.requires is not None) == (arm != "standard")


def test_a_local_copy_of_the_release_is_known_by_its_sizes(tmp_path, monkeypatch):
    release = RELEASES["cosine-scored-saes-qwen3-8b"]
    saes = {name: replace(sae, d_sae=D_SAE) for name, sae in release.saes.items()}
    small = replace(release, d_in=D_IN, saes=saes)
    write("perfeature", tmp_path)
    assert from_pretrained(tmp_path).cfg.metadata.model_name is None  # 13 features on 7 dimensions are no Qwen3-8B
    monkeypatch.setitem(RELEASES, "cosine-scored-saes-qwen3-8b", small)
    assert from_pretrained(tmp_path).cfg.metadata.model_name == "Qwen/Qwen3-8B"
    write("base-delta", tmp_path)  # never published
    assert from_pretrained(tmp_path).cfg.metadata.model_name is None


def test_metadata_from_file_names_and_from_the_caller(tmp_path):
    write("base-delta", tmp_path)
    path = (tmp_path / "sae_final.pt").rename(tmp_path / "perfeature_bd_L27_final.pt")
    sae = from_pretrained(path, metadata={"model_name": "gpt2"})
    assert sae.cfg.metadata.hook_name == "blocks.27.hook_resid_post"
    assert sae.cfg.metadata.model_name == "gpt2"


def test_metadata_of_dictionary_learning(tmp_path, hub):
    metadata = from_pretrained(write("BatchTopKSAE", tmp_path)).cfg.metadata
    assert metadata.model_name == "Qwen/Qwen3-8B"
    assert metadata.hook_name == "blocks.18.hook_resid_post"
    assert metadata.context_size == 2048
    assert metadata.prepend_bos is True
    folder = "saes_Qwen_Qwen3-8B_batch_top_k/resid_post_layer_9/trainer_2"
    write("BatchTopKSAE", hub / "adamkarvonen" / "qwen3-8b-saes" / folder)
    metadata = from_pretrained("qwen3-8b-saes", "resid_post_layer_9/trainer_2").cfg.metadata
    assert metadata.prepend_bos is False
    assert metadata.hook_name == "blocks.9.hook_resid_post"


@pytest.mark.parametrize(
    ("module", "hook"),
    [
        (None, "blocks.18.hook_resid_post"),
        ("mlp_layer_18", "blocks.18.hook_mlp_out"),
        ("attention_layer18", "blocks.18.hook_attn_out"),
        ("something", None),
    ],
)
def test_hook_of_dictionary_learning_modules(module, hook, tmp_path):
    write("BatchTopKSAE", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["trainer"]["submodule_name"] = module
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert from_pretrained(tmp_path).cfg.metadata.hook_name == hook


@pytest.mark.parametrize(
    ("folder", "hook"),
    [
        ("layers.10", "blocks.10.hook_resid_post"),
        ("layers.3.mlp", "blocks.3.hook_mlp_out"),
        ("h.5.attn", "blocks.5.hook_attn_out"),
        ("embed_tokens", "hook_embed"),
        ("layers.3.router", None),
        ("other", None),
    ],
)
def test_metadata_of_sparsify(folder, hook, tmp_path):
    write("sparsify", tmp_path / folder)
    run = {"model": "meta-llama/Meta-Llama-3-8B", "dataset": "togethercomputer/RedPajama", "ctx_len": 2048}
    (tmp_path / "config.json").write_text(json.dumps(run))
    metadata = from_pretrained(tmp_path / folder).cfg.metadata
    assert metadata.hook_name == hook
    assert (metadata.model_name, metadata.dataset_path, metadata.context_size) == tuple(run.values())


def test_the_run_config_of_sparsify_is_fetched_too(hub):
    write("sparsify", hub / "owner" / "repo" / "layers.1")
    (hub / "owner" / "repo" / "config.json").write_text(json.dumps({"model": "gpt2"}))
    assert from_pretrained("owner/repo", "layers.1").cfg.metadata.model_name == "gpt2"


def test_metadata_feeds_saelens_activation_store(model, tmp_path):
    write("BatchTopKSAE", tmp_path)
    sae = from_pretrained(tmp_path, metadata={"model_name": "tiny", "hook_name": "blocks.1.hook_resid_pre"})
    from helpers import tiny_dataset

    store = ActivationsStore.from_sae(
        model, sae, dataset=tiny_dataset(), context_size=8, store_batch_size_prompts=2, n_batches_in_buffer=2
    )
    assert store.hook_name == "blocks.1.hook_resid_pre"
    assert store.prepend_bos is True

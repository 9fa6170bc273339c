"""A saved SAE of every architecture is the trained one; copies and checkpoints go on as it does."""

import copy
import json
import shutil

import pytest
import torch
from contract_cases import (
    ALL,
    TRAINABLE,
    _third_party,  # noqa: F401
    plain_selector,
    saved_as,
)
from helpers import (
    BATCHTOPK,
    COSINE,
    D_IN,
    D_SAE,
    EXPONENT,
    FREE_DECODER,
    ONE_PER_SCORE,
    TRAINING,
    assert_same_function,
    codes_and_output,
    make_activations,
    make_sae,
    make_trainer,
    planted_batches,
    read_config,
    run_python,
    save_inference,
    selector_of,
    train_step,
)
from huggingface_hub.errors import LocalEntryNotFoundError
from sae_lens import SAE, TrainingSAE
from sae_lens.registry import get_sae_class
from safetensors.torch import load_file

VARIANTS = [(name, {}) for name in ALL] + [(name, FREE_DECODER) for name in TRAINING]
VARIANT_IDS = [f"{name}-{'free' if options else 'default'}" for name, options in VARIANTS]


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub that is a folder: files of `owner/repo` lie in `tmp_path / "owner" / "repo"`."""

    def download(repo_id, filename, force_download=False):
        path = tmp_path / repo_id / filename
        if not path.exists():
            raise LocalEntryNotFoundError(f"no {filename} in {repo_id}")
        return str(path)

    monkeypatch.setattr("sae_lens.loading.pretrained_sae_loaders.hf_hub_download", download)
    return tmp_path / "owner" / "repo"


@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=VARIANT_IDS)
def test_saved_sae_is_the_trained_sae(name, options, tmp_path):
    sae = make_sae(name, **options)
    x = make_activations(200, D_IN)
    codes, _ = codes_and_output(sae, x)
    assert 0.5 < (codes != 0).sum(-1).float().mean() < D_SAE - 1
    assert_same_function(save_inference(sae, tmp_path), sae, x)


@pytest.mark.parametrize("name", ALL)
def test_saved_again_is_the_same_file(name, tmp_path):
    saved = save_inference(make_sae(name), tmp_path / "one")
    saved.save_model(tmp_path / "two")
    one, two = (load_file(tmp_path / part / "sae_weights.safetensors") for part in ("one", "two"))
    assert one.keys() == two.keys()
    for key, tensor in one.items():
        assert torch.equal(two[key], tensor), key
    assert read_config(tmp_path / "two")["architecture"] == saved_as(name)


@pytest.mark.parametrize("name", ALL)
def test_from_pretrained(name, hub):
    sae = make_sae(name)
    sae.save_inference_model(hub / "some" / "folder")
    assert_same_function(SAE.from_pretrained("owner/repo", "some/folder"), sae, make_activations(50, D_IN))


@pytest.mark.parametrize("name", EXPONENT)
def test_from_pretrained_through_the_inference_class(name, hub):
    sae = make_sae(name)
    sae.save_inference_model(hub / "folder")
    cls = get_sae_class(saved_as(name))[0]
    assert type(cls.from_pretrained("owner/repo", "folder")) is cls
    stock = get_sae_class(plain_selector(name))[0]
    assert isinstance(stock.load_from_disk(hub / "folder"), cls)


@pytest.mark.parametrize("name", ALL)
def test_leading_dimensions(name, tmp_path):
    sae = make_sae(name)
    x = make_activations(2, 3, D_IN)
    for each in (sae, save_inference(sae, tmp_path)):
        codes, output = codes_and_output(each, x.reshape(6, D_IN))
        for shape in ((2, 3), (6,), (1, 6)):
            torch.testing.assert_close(each.encode(x.reshape(*shape, D_IN)), codes.reshape(*shape, D_SAE))
            torch.testing.assert_close(each(x.reshape(*shape, D_IN)), output.reshape(*shape, D_IN))
        torch.testing.assert_close(each(x[0, 0]), output[0])


@pytest.mark.parametrize("name", ALL)
def test_activations_of_another_size_are_named(name, tmp_path):
    sae = make_sae(name)
    for each in (sae, save_inference(sae, tmp_path)) if "inner" not in name else (sae,):
        with pytest.raises(ValueError, match=rf"d_in={D_IN}\b.* size 5\b"):
            each.encode(torch.zeros(2, 5))


@pytest.mark.parametrize("name", ALL)
def test_error_term_makes_the_output_the_input(name, tmp_path):
    sae = save_inference(make_sae(name), tmp_path)
    with pytest.warns(DeprecationWarning, match="use_error_term"):
        sae.use_error_term = True
    x = make_activations(5, D_IN)
    torch.testing.assert_close(sae(x), x)


@pytest.mark.parametrize("name", ALL)
def test_hooks_see_what_saelens_hooks_see(name, tmp_path):
    sae = save_inference(make_sae(name), tmp_path)
    x = make_activations(4, D_IN)
    output, cache = sae.run_with_cache(x)
    names = {"hook_sae_input", "hook_sae_acts_pre", "hook_sae_acts_post", "hook_sae_recons", "hook_sae_output"}
    assert set(cache) == names
    assert torch.equal(cache["hook_sae_input"], x)
    assert torch.equal(cache["hook_sae_acts_post"], sae.encode(x))
    assert torch.equal(cache["hook_sae_output"], output)
    assert cache["hook_sae_acts_pre"].shape == (4, D_SAE)


@pytest.mark.parametrize("name", ALL)
def test_setting_a_feature_by_hook_changes_the_output_by_its_decoder_row(name, tmp_path):
    sae = save_inference(make_sae(name), tmp_path)
    x = make_activations(1, D_IN)

    def add_one(codes, hook):
        codes = codes.clone()
        codes[..., 2] += 1
        return codes

    steered = sae.run_with_hooks(x, fwd_hooks=[("hook_sae_acts_post", add_one)])
    torch.testing.assert_close(steered - sae(x), sae.W_dec[2:3], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=VARIANT_IDS)
def test_saving_leaves_live_weights_as_they_are(name, options, tmp_path):
    sae = make_sae(name, **options).train()
    sae.W_dec.data.mul_(1.01)  # as after an optimizer step: rows of a unit decoder are not quite 1 long
    before = {key: tensor.clone() for key, tensor in sae.state_dict().items()}
    config = sae.cfg.to_dict()
    sae.save_inference_model(tmp_path / "inference")
    sae.save_model(tmp_path / "checkpoint")
    assert sae.training
    after = sae.cfg.to_dict()
    for noted in (
        "dead_features_in_token_window",
        "dead_feature_window_tokens",
    ):  # of what was saved, by the arms that count
        after["metadata"].pop(noted, None)
    assert after == config
    for key, tensor in sae.state_dict().items():
        assert torch.equal(tensor, before[key]), key


@pytest.mark.parametrize("name", ALL)
def test_deepcopy(name):
    sae = make_sae(name)
    twin = copy.deepcopy(sae)
    x = make_activations(20, D_IN)
    assert_same_function(twin, sae, x, tolerance=0)
    before = sae(x)
    twin.W_dec.data.zero_()
    getattr(twin, "b_mag" if "gated" in name else "b_enc").data.add_(1)
    assert torch.equal(sae(x), before)


@pytest.mark.parametrize("name", TRAINING)
def test_a_copy_trains_like_the_original(name):
    # gradients of a unit decoder are tangent to the sphere, also in a copy made after the first step
    sae = make_sae(name, unit_decoder=True, rescale_acts_by_decoder_norm=False).train()
    x = make_activations(32, D_IN)
    train_step(sae, x).loss.backward()
    twin = copy.deepcopy(sae)
    for each in (sae, twin):
        each.zero_grad()
        train_step(each, x, step=1).loss.backward()
    assert torch.equal(twin.W_dec.grad, sae.W_dec.grad)
    assert twin.W_dec.grad.abs().max() > 0
    radial = (twin.W_dec.grad * twin.W_dec.detach()).sum(-1) / twin.W_dec.grad.norm(dim=-1).clamp_min(1e-8)
    assert radial.abs().max() < 1e-5


@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=VARIANT_IDS)
def test_checkpoint_round_trip(name, options, tmp_path):
    sae = make_sae(name, **options).train()
    if name != "l1_standard":
        sae.tokens_since_fired.copy_(torch.arange(D_SAE) + 10_000_001)
        sae.initialized_from_data.fill_(True)
    sae.save_model(tmp_path)
    again = TrainingSAE.load_from_disk(tmp_path)
    assert type(again) is type(sae)
    assert again.cfg.to_dict() == sae.cfg.to_dict()
    for key, tensor in sae.state_dict().items():
        assert torch.equal(again.state_dict()[key].to(tensor.dtype), tensor), key


@pytest.mark.parametrize("name", TRAINING)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_checkpoint_restores_the_dtypes_of_buffers(name, dtype, tmp_path):
    make_sae(name).save_model(tmp_path)
    again = TrainingSAE.load_from_disk(tmp_path, dtype=dtype)
    assert again.tokens_since_fired.dtype == torch.int64
    assert again.initialized_from_data.dtype == torch.bool
    if name in BATCHTOPK:
        assert again.topk_threshold.dtype == torch.double  # SAELens keeps this average in double
    if hasattr(again, "threshold_unit"):
        assert again.threshold_unit.dtype == torch.float32


@pytest.mark.parametrize("name", TRAINING)
def test_checkpoint_goes_on_training(name, tmp_path):
    sae = make_sae(name).train()
    sae.initialized_from_data.fill_(True)
    sae.save_model(tmp_path)
    again = TrainingSAE.load_from_disk(tmp_path).train()
    x = make_activations(32, D_IN)
    losses = [train_step(each, x) for each in (sae, again)]
    assert torch.equal(losses[0].loss, losses[1].loss)
    assert torch.equal(again.tokens_since_fired, sae.tokens_since_fired)
    losses[1].loss.backward()
    assert all((p.grad is not None) == p.requires_grad for p in again.parameters())
    assert [p.requires_grad for p in again.parameters()] == [p.requires_grad for p in sae.parameters()]


LOAD_PLAIN = """
import sys, torch
from sae_lens import SAE
for folder in sys.argv[1:]:
    sae = SAE.load_from_disk(folder)
    data = torch.load(f"{folder}/expected.pt")
    with torch.no_grad():
        codes = sae.encode(data["x"])
        assert torch.equal(codes != 0, data["codes"] != 0)
        torch.testing.assert_close(codes, data["codes"])
        torch.testing.assert_close(sae(data["x"]), data["output"])
    print(sae.cfg.architecture())
assert not any(name.startswith("saelens_cosine") for name in sys.modules)
"""


def test_inner_product_arms_load_without_this_package(tmp_path):
    x = make_activations(50, D_IN)
    names = [f"inner_product_{selector}" for selector in TRAINABLE]
    for name in names:
        sae = make_sae(name)
        sae.save_inference_model(tmp_path / name)
        codes, output = codes_and_output(sae, x)
        torch.save({"x": x, "codes": codes, "output": output}, tmp_path / name / "expected.pt")
    result = run_python(LOAD_PLAIN, *(tmp_path / name for name in names))
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["standard", "gated", "jumprelu", "topk", "abstopk", "jumprelu", "jumprelu"]


@pytest.mark.parametrize("name", EXPONENT)
def test_a_plain_class_refuses_a_cosine_file(name, tmp_path):
    make_sae(name).save_inference_model(tmp_path)
    config = {**read_config(tmp_path), "architecture": plain_selector(name)}
    (tmp_path / "cfg.json").write_text(json.dumps(config))
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"norm_exponent"'):
        SAE.load_from_disk(tmp_path)


@pytest.mark.parametrize("name", EXPONENT)
def test_a_cosine_class_refuses_a_plain_file(name, tmp_path):
    make_sae(f"inner_product_{selector_of(name)}").save_inference_model(tmp_path)
    (tmp_path / "cfg.json").write_text(json.dumps({**read_config(tmp_path), "architecture": saved_as(name)}))
    with pytest.raises(RuntimeError, match=r'Missing key.*"norm_exponent"'):
        SAE.load_from_disk(tmp_path)


@pytest.mark.parametrize("name", COSINE)
def test_exponent_one_saved_is_saelens_own_class_bit_for_bit(name, tmp_path):
    sae = make_sae(name)
    sae.norm_exponent.data.fill_(1.0)
    ours = save_inference(sae, tmp_path / "ours")
    shutil.copytree(tmp_path / "ours", tmp_path / "plain")
    tensors = load_file(tmp_path / "ours" / "sae_weights.safetensors")
    del tensors["norm_exponent"]
    stock = SAE.from_dict({**read_config(tmp_path / "ours"), "architecture": plain_selector(name)})
    stock.load_state_dict(tensors)
    x = make_activations(100, D_IN)
    # a gate multiplies its score by exp(r_mag), where SAELens multiplies the encoder
    assert_same_function(ours, stock, x, tolerance=1e-6 if plain_selector(name) == "gated" else 0)


@pytest.mark.parametrize("name", [*ONE_PER_SCORE, "cosine_matryoshka_batchtopk"])
@pytest.mark.parametrize("scale, lr", [(1.0, 1e-3), (10.0, 3e-4)])
def test_batchtopk_keeps_l0_after_saving(name, lr, scale, tmp_path):
    # scores still move after 300 steps, up at scale 10 and down at scale 1, and an average of past thresholds lags
    k = 4
    sae = make_sae(name, seed=None, d_in=16, d_sae=64, k=k)
    data = planted_batches(d_in=16, n_features=32, active=3, batch=1024, spread=0.5, scale=scale)
    make_trainer(sae, data, steps=300, batch=1024, lr=lr, lr_end=lr).fit()
    saved = save_inference(sae, tmp_path)
    with torch.no_grad():
        heldout = torch.cat([data.sample(100_000 + i) for i in range(20)])
        l0 = (saved.encode(heldout) != 0).sum(-1).float().mean().item()
    assert l0 / k == pytest.approx(1.0, abs=0.05)

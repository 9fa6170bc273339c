"""SAEs in SAEBench's units: the same function, whatever the architecture and however its scale was split."""

import pytest
import torch
from helpers import D_IN, D_SAE, FREE_DECODER, TRAINING, assert_close, make_activations, make_sae
from sae_lens.registry import get_sae_class
from sae_lens.saes.sae import SAEMetadata
from sae_lens.saes.standard_sae import StandardSAE, StandardSAEConfig

from saelens_cosine.bundled import load_bundled_model
from saelens_cosine.loading.formats.saelens import inference_copy
from saelens_cosine.saebench.prepare import lens_hook, prepare
from saelens_cosine.saebench.scopes import HighNormMask

HOOK = "blocks.2.hook_resid_post"
SAELENS = {
    "standard": {},
    "gated": {},
    "jumprelu": {},
    "topk": {"k": 3, "rescale_acts_by_decoder_norm": False},
    "topk that rescales": {"k": 3, "rescale_acts_by_decoder_norm": True},
    "abstopk": {"k": 3},
    "matching_pursuit": {"max_iterations": 3},
}


def named(sae, hook=HOOK, model="bundled"):
    sae.cfg.metadata.hook_name, sae.cfg.metadata.model_name = hook, model
    return sae


def saelens_sae(name: str, **settings):
    """An inference SAE of SAELens with random weights, decoder norms about 1.3, positive thresholds."""
    sae_class, config_class = get_sae_class(name.split()[0])
    settings = {"d_in": D_IN, "d_sae": D_SAE, **SAELENS.get(name, {}), **settings}
    sae = sae_class(config_class(metadata=SAEMetadata(model_name="bundled", hook_name=HOOK), **settings))
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=rng) * 0.5)
        if hasattr(sae, "threshold"):
            sae.threshold.abs_()
        if name == "matching_pursuit":
            sae.W_dec.div_(sae.W_dec.norm(dim=-1, keepdim=True))
    return sae.eval()


def one_feature(encoder: float, decoder: float, b_dec: float = 0.0) -> StandardSAE:
    """x in one dimension: code relu(encoder (x - b_dec)), reconstruction decoder code + b_dec."""
    metadata = SAEMetadata(model_name="bundled", hook_name=HOOK)
    sae = StandardSAE(StandardSAEConfig(d_in=1, d_sae=1, metadata=metadata))
    with torch.no_grad():
        for name, value in {"W_enc": encoder, "b_enc": 0.0, "W_dec": decoder, "b_dec": b_dec}.items():
            getattr(sae, name).fill_(value)
    return sae


def test_codes_are_lengths_along_unit_rows():
    prepared = prepare(one_feature(encoder=3.0, decoder=-2.0))
    # x = 5: code 15, reconstruction -30; along the unit row -1 that is 30
    assert prepared.W_dec.tolist() == [[-1.0]]
    assert prepared.encode(torch.tensor([5.0])).tolist() == [30.0]
    assert prepared.decode(torch.tensor([30.0])).tolist() == [-30.0]
    assert prepared.W_enc.tolist() == [[6.0]]


@pytest.mark.parametrize("name", [*TRAINING, *(f"SAELens {name}" for name in SAELENS)])
def test_is_the_same_function(name):
    if name.startswith("SAELens "):
        sae = own = saelens_sae(name.removeprefix("SAELens "))
    else:
        overrides = {} if name == "top_afa" else FREE_DECODER
        sae = named(make_sae(name, **overrides))
        own = inference_copy(sae)
    x = make_activations(2, 5, D_IN)
    with torch.no_grad():
        prepared = prepare(sae)
        codes, wanted = prepared.encode(x), own(x)
        assert (codes != 0).any()
        assert_close(codes.double() @ prepared.W_dec.double() + own.b_dec.double(), wanted.double(), 1e-5)
        assert_close(prepared.decode(codes), wanted, 1e-5)
        assert torch.equal(codes != 0, own.encode(x).to_dense() != 0)
        assert_close(prepared.W_dec.norm(dim=-1), torch.ones(D_SAE), 1e-6)
        # and again, in one batch and in pieces: nothing is remembered
        assert_close(torch.stack([prepared(row) for row in x]), wanted, 1e-5)


def test_the_split_of_scale_does_not_matter():
    small, large = one_feature(0.01, 100.0, b_dec=0.5), one_feature(10.0, 0.1, b_dec=0.5)
    x = torch.tensor([[2.5], [-1.0]])
    for prepared in (prepare(small), prepare(large)):
        assert_close(prepared.encode(x), torch.tensor([[2.0], [0.0]]), 1e-6)


def test_the_sae_passed_in_is_left_alone():
    sae = named(make_sae("per_feature_cosine_topk", **FREE_DECODER), hook="model.layers.2")
    before, metadata = {k: v.clone() for k, v in sae.state_dict().items()}, sae.cfg.metadata.to_dict()
    prepared = prepare(sae, hook_name="blocks.1.hook_mlp_out", model_name="gpt2")
    with torch.no_grad():
        prepared.encode(torch.ones(3, D_IN))[:] = 7
        for tensor in (*prepared.parameters(), *prepared.buffers()):
            tensor.zero_()
    prepared.to(dtype=torch.bfloat16)
    assert all(torch.equal(v, sae.state_dict()[k]) for k, v in before.items())
    assert sae.cfg.metadata.to_dict() == metadata
    assert sae.dtype == torch.float32
    assert prepared.cfg.metadata.hook_name == "blocks.1.hook_mlp_out"
    assert prepared.cfg.metadata.model_name == "gpt2"


def test_keeps_the_dtype_that_it_is_given():
    prepared = prepare(saelens_sae("standard")).to(device="cpu", dtype=torch.bfloat16)
    x = torch.ones(2, 3, D_IN)
    for dtype in (torch.bfloat16, torch.float32):
        codes = prepared.encode(x.to(dtype))
        assert codes.dtype == dtype
        assert prepared.decode(codes).dtype == dtype
    assert prepared.dtype == prepared.W_dec.dtype == torch.bfloat16
    assert prepared.cfg.dtype == "bfloat16"
    assert prepared.gain.dtype == torch.float32  # rounded, it would change the codes by 0.4 %


def test_a_decoder_row_of_zeros_gives_no_codes():
    sae = saelens_sae("standard")
    with torch.no_grad():
        sae.W_dec[4] = 0
    x = make_activations(50, D_IN)
    assert (sae.encode(x)[:, 4] > 0).any()
    prepared = prepare(sae)
    assert not prepared.encode(x)[:, 4].any()
    assert_close(prepared(x), sae(x), 1e-5)


def test_high_norm_tokens_are_masked_by_the_median_of_the_training_texts():
    # norms of the training tokens, padding left out: 1, 1, 2, 1, 9, 8, 8; the median is 2 and the bound 2 * 3
    train = {"a": [[0.0, 1.0, 1.0, 2.0]], "b": [[0.0, 0.0, 1.0, -9.0], [8.0, 8.0, 0.0, 0.0]]}
    test = {"a": [[0.0, 6.0, 7.0, 1.0]]}
    mask = HighNormMask(3.0)
    masked = mask(tuple({k: torch.tensor(v).unsqueeze(-1) for k, v in split.items()} for split in (train, test)))
    assert masked[0]["a"].squeeze(-1).tolist() == train["a"]
    # the second text has no other tokens, and keeps these: its mean would be 0 / 0
    assert masked[0]["b"].squeeze(-1).tolist() == [[0.0, 0.0, 1.0, 0.0], [8.0, 8.0, 0.0, 0.0]]
    assert masked[1]["a"].squeeze(-1).tolist() == [[0.0, 6.0, 0.0, 1.0]]
    assert (mask.tokens_seen, mask.tokens_dropped) == (10, 2)


def test_the_config_is_as_saebench_s_own_run_eval_makes_it():
    general = pytest.importorskip("sae_bench.sae_bench_utils.general_utils", reason="needs sae-bench")
    sae = named(make_sae("per_feature_cosine_topk"), hook="model.layers.2", model="gpt2")
    sae.cfg.metadata.context_size, sae.cfg.metadata.model_from_pretrained_kwargs = 64, {"center_unembed": True}
    prepared = prepare(sae)
    before = {key: value for key, value in vars(prepared.cfg).items() if key != "metadata"}
    assert (before["hook_name"], before["hook_layer"], before["model_name"]) == ("blocks.2.hook_resid_post", 2, "gpt2")
    general._standardize_sae_cfg(prepared.cfg)
    assert {key: value for key, value in vars(prepared.cfg).items() if key != "metadata"} == before
    assert "hook_layer" not in prepared.cfg.to_dict()


def test_a_function_of_saebench_can_be_called_by_itself():
    activation = pytest.importorskip(
        "sae_bench.evals.unlearning.utils.feature_activation", reason="needs sae-bench", exc_type=ImportError
    )
    model = load_bundled_model()
    prepared = prepare(named(make_sae("cosine_batchtopk", d_in=model.cfg.d_model)))
    tokens = torch.arange(64).view(2, 32) + 300
    forget, retain = activation.calculate_sparsity(model, prepared, tokens, tokens, batch_size=1)
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens, names_filter=HOOK)
        fires = (prepared.encode(cache[HOOK]) > 0).flatten(0, 1).float().mean(0)
    assert fires.any()
    for measured in (forget, retain):
        assert_close(torch.as_tensor(measured), fires, 1e-5)


def test_padding_can_be_silenced():
    x = torch.tensor([[0.0], [1.0]])
    # centred at -2, a zero input is 2 and fires
    assert prepare(one_feature(1.0, 1.0, b_dec=-2.0)).encode(x).tolist() == [[2.0], [3.0]]
    silent = prepare(one_feature(1.0, 1.0, b_dec=-2.0), silence_padding=True)
    assert silent.encode(x).tolist() == [[0.0], [3.0]]
    assert silent.name != prepare(one_feature(1.0, 1.0, b_dec=-2.0)).name


def test_names_follow_the_content():
    one, same = prepare(saelens_sae("standard")), prepare(saelens_sae("standard"))
    assert one.name == same.name
    changed = saelens_sae("standard")
    with torch.no_grad():
        changed.W_enc[3, 2] += 1e-6
    others = [
        prepare(changed),
        prepare(named(saelens_sae("standard"), hook="blocks.1.hook_resid_post")),
        prepare(named(saelens_sae("standard"), model="gpt2")),
        prepare(saelens_sae("topk")),
        prepare(saelens_sae("topk", k=4)),
    ]
    assert len({sae.name for sae in (one, *others)}) == 6
    assert prepare(saelens_sae("standard"), "org/mine").name == one.name.replace("standard", "org_mine")
    note = saelens_sae("standard")
    note.cfg.metadata.comment = "no part of the function"
    assert prepare(note).name == one.name


@pytest.mark.parametrize(
    ("path", "hook"),
    [
        ("model.layers.18", "blocks.18.hook_resid_post"),
        ("transformer.h.5", "blocks.5.hook_resid_post"),
        ("gpt_neox.layers.3", "blocks.3.hook_resid_post"),
        ("model.language_model.layers.7", "blocks.7.hook_resid_post"),
        ("blocks.3.hook_mlp_out", "blocks.3.hook_mlp_out"),
        ("blocks.3.hook_out", "blocks.3.hook_resid_post"),  # as bridges call them
        ("blocks.0.hook_in", "blocks.0.hook_resid_pre"),
    ],
)
def test_hooks_are_called_as_in_transformer_lens(path, hook):
    assert lens_hook(path) == hook


@pytest.mark.parametrize("hook", ["model.layers.3.mlp", "hook_embed", "", None])
def test_hooks_that_saebench_cannot_use_are_refused(hook):
    with pytest.raises(ValueError, match="hook_name="):
        lens_hook(hook)


@pytest.mark.parametrize("mode", ["layer_norm", "constant_norm_rescale"])
def test_what_decode_would_have_to_remember_is_refused(mode):
    with pytest.raises(ValueError, match="remembered from the last encode"):
        prepare(saelens_sae("standard", normalize_activations=mode))


def test_what_is_no_linear_autoencoder_is_refused():
    with pytest.raises(ValueError, match="another hook"):
        prepare(saelens_sae("transcoder", d_out=D_IN, apply_b_dec_to_input=False))

    class Bent(StandardSAE):
        def decode(self, feature_acts):
            return super().decode(feature_acts).tanh()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sae_lens.saes.sae.get_sae_class", lambda name: (Bent, StandardSAEConfig))
        with pytest.raises(ValueError, match="is not `codes @ W_dec \\+ b_dec`"):
            prepare(saelens_sae("standard"))


def test_nan_for_a_zero_input_is_refused():
    class Divides(StandardSAE):
        def encode(self, x):
            return super().encode(x / x.norm(dim=-1, keepdim=True))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sae_lens.saes.sae.get_sae_class", lambda name: (Divides, StandardSAEConfig))
        with pytest.raises(ValueError, match="not finite for a zero input"):
            prepare(saelens_sae("standard"))

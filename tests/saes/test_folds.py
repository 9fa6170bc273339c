"""Folds are exact or refuse with a reason. Exponents are far from 0, where SAELens' folds for inner products fail.

The algebra is exact, so these tests run in float64 and allow 1e-10.
"""

import copy

import pytest
import torch
from helpers import (
    BATCHTOPK,
    EXPONENT,
    FAST,
    FREE_DECODER,
    GLOBAL,
    OURS,
    PER_FEATURE,
    TRAINING,
    Batches,
    assert_close,
    codes_and_output,
    make_activations,
    make_config,
    make_sae,
    make_trainer,
    save_inference,
)
from sae_lens import SAE, TrainingSAE

EXACT = 1e-10
SCALES = [0.1, 0.3, 4.0]
DECODERS = [{}, FREE_DECODER]
FREE = {**FREE_DECODER, "dtype": "float64"}


def trained_on(s: float, x: torch.Tensor, sae: SAE) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes, and reconstruction in units of x, of an SAE that expects `s * x`."""
    codes, output = codes_and_output(sae, s * x)
    if getattr(sae.cfg, "rescale_acts_by_decoder_norm", False):
        codes = codes / s  # codes are in units of decoder norm, and the fold makes the rows 1/s as long
    return codes, output / s


@pytest.mark.parametrize("name", TRAINING)
@pytest.mark.parametrize("s", SCALES)
@pytest.mark.parametrize("decoder", DECODERS)
def test_input_scale_training_form(name, s, decoder):
    sae = make_sae(name, dtype="float64", **decoder)
    x = make_activations(50, 7, dtype=torch.float64) / s
    expected = trained_on(s, x, sae)
    sae.fold_activation_norm_scaling_factor(s)
    for one, other in zip(codes_and_output(sae, x), expected, strict=True):
        assert_close(one, other, EXACT)


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("s", SCALES)
@pytest.mark.parametrize("decoder", DECODERS)
def test_input_scale_inference_form(name, s, decoder, tmp_path):
    sae = save_inference(make_sae(name, dtype="float64", **decoder), tmp_path)
    x = make_activations(50, 7, dtype=torch.float64) / s
    expected = trained_on(s, x, sae)
    sae.fold_activation_norm_scaling_factor(s)
    for one, other in zip(codes_and_output(sae, x), expected, strict=True):
        assert_close(one, other, EXACT)


@pytest.mark.parametrize("name", TRAINING)
@pytest.mark.parametrize("decoder", DECODERS)
def test_input_scale_folded_before_saving_or_after(name, decoder, tmp_path):
    sae = make_sae(name, dtype="float64", **decoder)
    late = save_inference(sae, tmp_path / "late")
    late.fold_activation_norm_scaling_factor(0.3)
    sae.fold_activation_norm_scaling_factor(0.3)
    early = save_inference(sae, tmp_path / "early")
    x = make_activations(50, 7, dtype=torch.float64)
    assert_close(early(x), late(x), EXACT)


def test_input_scale_by_hand():
    # a = 2, b = 0, s = 3: b becomes 2 log 3. b_enc is in score units and stays; b_dec and W_dec are divided by 3.
    sae = make_sae("cosine_topk", norm_exponent_init=2.0, log_scale_init=0.0, seed=None)
    sae.b_enc.data.fill_(0.5)
    sae.b_dec.data.fill_(0.6)
    sae.fold_activation_norm_scaling_factor(3.0)
    assert sae.log_scale.item() == pytest.approx(2.1972246)
    assert sae.b_enc.unique().tolist() == [0.5]
    assert sae.b_dec.unique().item() == pytest.approx(0.2)
    assert sae.W_dec.norm(dim=-1).tolist() == pytest.approx([1 / 3] * 13)


@pytest.mark.parametrize("name", TRAINING)
def test_input_scale_of_saelens_trainer(name, monkeypatch):
    # activations of mean norm about 40, so that s = sqrt(7) / 40 = 0.07
    sae = make_sae(name, dtype="float64", normalize_activations="expected_average_only_in")
    seen = {}
    fold = type(sae).fold_activation_norm_scaling_factor

    def spy(self, scaling_factor):
        seen.update(sae=copy.deepcopy(self).eval(), s=scaling_factor)
        fold(self, scaling_factor)

    monkeypatch.setattr(type(sae), "fold_activation_norm_scaling_factor", spy)
    data = Batches(lambda i: make_activations(32, 7, seed=i, dtype=torch.float64) * 10)
    make_trainer(sae, data, steps=5, batch=32, lr=1e-2).fit()
    assert 0.01 < seen["s"] < 0.3
    assert sae.cfg.normalize_activations == "none"
    x = data.sample(99)
    for one, other in zip(codes_and_output(sae.eval(), x), trained_on(seen["s"], x, seen["sae"]), strict=True):
        assert_close(one, other, EXACT)


@pytest.mark.parametrize("name", EXPONENT)
def test_decoder_norms_inference_form(name, tmp_path):
    sae = save_inference(make_sae(name, dtype="float64"), tmp_path)
    r = torch.linspace(0.2, 3, 13, dtype=torch.float64)
    sae.W_dec.data.mul_(r.unsqueeze(-1))
    if hasattr(sae.cfg, "rescale_acts_by_decoder_norm"):
        sae.cfg.rescale_acts_by_decoder_norm = True  # SAELens folds a TopK only where norms already count
    x = make_activations(50, 7, dtype=torch.float64)
    codes, output = codes_and_output(sae, x)
    if not getattr(sae.cfg, "rescale_acts_by_decoder_norm", False):
        codes = codes * r
    sae.fold_W_dec_norm()
    assert_close(sae.W_dec.norm(dim=-1), torch.ones(13), EXACT)
    assert_close(sae.encode(x), codes, EXACT)
    assert_close(sae(x), output, EXACT)


@pytest.mark.parametrize("name", [*(name for name in OURS if name in FAST), "top_afa"])
def test_saving_folds_decoder_norms(name, tmp_path):
    sae = make_sae(name, **FREE)
    saved = save_inference(sae, tmp_path)
    assert sae.W_dec.norm(dim=-1).max() > 1.2
    assert_close(saved.W_dec.norm(dim=-1), torch.ones(13), EXACT)
    x = make_activations(50, 7, dtype=torch.float64)
    for one, other in zip(codes_and_output(saved, x), codes_and_output(sae, x), strict=True):
        assert_close(one, other, EXACT)


@pytest.mark.parametrize("name", PER_FEATURE)
def test_decoder_norms_training_form(name):
    sae = make_sae(name, **FREE)
    x = make_activations(50, 7, dtype=torch.float64)
    codes, output = codes_and_output(sae, x)
    if name not in FAST:  # TopK and its relatives count in decoder norms already
        codes = codes * sae.W_dec.norm(dim=-1)
    sae.fold_W_dec_norm()
    assert_close(sae.W_dec.norm(dim=-1), torch.ones(13), EXACT)
    for one, other in zip(codes_and_output(sae, x), (codes, output), strict=True):
        assert_close(one, other, EXACT)


def test_decoder_norms_training_form_by_hand():
    # r = 2 for every row: b grows by log 2 = 0.6931, b_enc = 0.5 doubles, the encoder is left as it is
    sae = make_sae("per_feature_cosine_topk", log_scale_init=0.0, decoder_init_norm=2.0, seed=None, **FREE_DECODER)
    sae.b_enc.data.fill_(0.5)
    W_enc = sae.W_enc.detach().clone()
    sae.fold_W_dec_norm()
    assert sae.log_scale.tolist() == pytest.approx([0.6931472] * 13)
    assert sae.b_enc.tolist() == pytest.approx([1.0] * 13)
    assert torch.equal(sae.W_enc, W_enc)


@pytest.mark.parametrize("name", GLOBAL)
def test_one_log_scale_cannot_hold_decoder_norms(name):
    sae = make_sae(name, **FREE_DECODER)
    before = {key: tensor.clone() for key, tensor in sae.state_dict().items()}
    with pytest.raises(NotImplementedError, match=f"'{name}' has one log_scale .*save_inference_model"):
        sae.fold_W_dec_norm()
    for key, tensor in sae.state_dict().items():
        assert torch.equal(tensor, before[key]), key


@pytest.mark.parametrize("name", [name for name in PER_FEATURE if name in FAST])
def test_decoder_norms_that_do_not_count_cannot_be_folded(name):
    # the selection would change; SAELens' own refusal has to be reached before anything is written
    sae = make_sae(name)
    before = {key: tensor.clone() for key, tensor in sae.state_dict().items()}
    with pytest.raises(NotImplementedError, match="rescale_acts_by_decoder_norm"):
        sae.fold_W_dec_norm()
    for key, tensor in sae.state_dict().items():
        assert torch.equal(tensor, before[key]), key


REASONS = {
    "covariance_whitening": "Mahalanobis",
    "constant_norm_rescale": "same norm",
    "layer_norm": "same norm",
}


REFUSED = [(name, mode) for name in EXPONENT for mode in REASONS] + [("top_afa", "covariance_whitening")]


@pytest.mark.parametrize("name, mode", REFUSED)
def test_normalisation_refused_in_training_config(name, mode):
    with pytest.raises(ValueError, match=f"normalize_activations='{mode}'.*architecture='{name}'.*{REASONS[mode]}"):
        make_config(name, normalize_activations=mode)


@pytest.mark.parametrize("name, mode", REFUSED)
def test_normalisation_refused_in_inference_config(name, mode, tmp_path):
    config = save_inference(make_sae(name), tmp_path).cfg
    values = {**config.to_dict(), "normalize_activations": mode}
    with pytest.raises(ValueError, match=f"normalize_activations='{mode}'.*{REASONS[mode]}"):
        type(config).from_dict(values)


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("decoder", DECODERS)
def test_whitening_refused_before_anything_changes(name, decoder, tmp_path):
    sae = make_sae(name, **decoder)
    for each in (sae, save_inference(sae, tmp_path)):
        before = {key: tensor.clone() for key, tensor in each.state_dict().items()}
        with pytest.raises(NotImplementedError, match="Mahalanobis"):
            each.fold_activation_whitening(torch.zeros(7), torch.eye(7), torch.eye(7))
        for key, tensor in each.state_dict().items():
            assert torch.equal(tensor, before[key]), key


def row_lengths(sae: SAE) -> list[float]:
    return sae.W_dec.detach().norm(dim=-1).tolist()


@pytest.mark.parametrize("name", TRAINING)
def test_unit_decoder_rows_are_one_over_s_after_the_fold(name, tmp_path):
    # s = 4: rows of 1/4, in the SAE, in both saved forms, and through everything that renormalises a unit decoder
    sae = make_sae(name, unit_decoder=True, rescale_acts_by_decoder_norm=False)
    sae.fold_activation_norm_scaling_factor(4.0)
    quarter = pytest.approx([0.25] * 13, rel=1e-5)
    assert row_lengths(sae) == quarter
    assert row_lengths(sae.train().eval()) == quarter
    assert row_lengths(save_inference(sae, tmp_path / "inference")) == quarter
    sae.save_model(tmp_path / "checkpoint")
    assert row_lengths(TrainingSAE.load_from_disk(tmp_path / "checkpoint").eval()) == quarter


@pytest.mark.parametrize("name", BATCHTOPK)
def test_threshold_follows_its_units_through_the_scale_fold(name):
    # the threshold is compared with score * ||W_dec row||: the fold divides rows by s = 4, so it divides the threshold
    free, unit = make_sae(name, **FREE_DECODER), make_sae(name)
    free.topk_threshold.fill_(2.0)
    unit.topk_threshold.fill_(2.0)
    free.fold_activation_norm_scaling_factor(4.0)
    unit.fold_activation_norm_scaling_factor(4.0)
    assert free.topk_threshold.item() == pytest.approx(0.5)
    assert unit.topk_threshold.item() == pytest.approx(2.0)

import dataclasses
import json
import math

import pytest
import torch
from sae_lens import StandardSAE, StandardSAEConfig, Transcoder, TranscoderConfig

from saelens_cosine.metrics.dictionary import geometry
from saelens_cosine.metrics.dictionary.geometry import decoder_geometry


def sae_with(W_dec, W_enc=None):
    F, d = W_dec.shape
    sae = StandardSAE(StandardSAEConfig(d_in=d, d_sae=F))
    sae.W_dec.data, sae.W_enc.data = W_dec, W_dec.T.clone() if W_enc is None else W_enc
    return sae


def test_four_rows_by_hand():
    # unit rows (1, 0), (0, 1), (3/5, 4/5), (-1, 0); cosines: 0, 0.6, -1; 0.8, 0; -0.6
    W_dec = torch.tensor([[2.0, 0.0], [0.0, 1.0], [3.0, 4.0], [-5.0, 0.0]])
    result = decoder_geometry(sae_with(W_dec), neighbour_cosines=(0.5, 0.7, 0.9))
    nearest = torch.tensor([0.6, 0.8, 0.8, 0.0])  # of each
    assert result.mean_max_cosine == pytest.approx(0.55)
    assert result.std_max_cosine == pytest.approx(nearest.double().std(correction=0).item())
    assert result.max_cosine_percentiles[2] == pytest.approx(0.7)
    assert [(n.pairs, n.features, n.per_feature) for n in result.neighbours] == [(2, 3, 1.0), (1, 2, 0.5), (0, 0, 0.0)]
    assert result.mean_pairwise_cosine == pytest.approx((0 + 0.6 - 1 + 0.8 + 0 - 0.6) / 6)
    # gram of the unit rows [[1 + 0.36 + 1, 0.48], [0.48, 1 + 0.64]]: trace 4, sum of squared entries 8.72
    assert result.effective_dimension == pytest.approx(16 / (2.36**2 + 1.64**2 + 2 * 0.48**2))
    split = math.sqrt(0.36**2 + 0.48**2)  # eigenvalues 2 +- 0.6
    p = torch.tensor([(2 + split) / 4, (2 - split) / 4], dtype=torch.float64)
    assert result.entropy_dimension == pytest.approx(math.exp(-(p * p.log()).sum().item()))
    assert result.encoder_decoder_cosine == pytest.approx(1.0)
    assert (result.features, result.zero_rows) == (4, 0)
    assert json.loads(json.dumps(dataclasses.asdict(result)))["neighbours"][0]["pairs"] == 2


def test_blocks_change_nothing(monkeypatch):
    monkeypatch.setattr(geometry, "BLOCK_ROWS", 7)
    W = torch.randn(61, 5, generator=torch.Generator().manual_seed(0))
    W[10], W[50] = 3 * W[40], W[40]  # three of one direction, in blocks of their own
    result = decoder_geometry(sae_with(W), neighbour_cosines=(0.7,))
    unit = torch.nn.functional.normalize(W.double(), dim=-1)
    cosines = unit @ unit.T
    pairwise = (cosines.sum() - cosines.trace()) / (61 * 60)
    cosines.fill_diagonal_(-2)
    nearest = cosines.amax(dim=1)
    assert (nearest[[10, 40, 50]] > 0.999).all()
    assert result.mean_max_cosine == pytest.approx(nearest.mean().item(), rel=1e-6)
    at = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95, 0.99], dtype=torch.float64)
    assert result.max_cosine_percentiles == pytest.approx(torch.quantile(nearest, at).tolist(), rel=1e-5)
    assert result.neighbours[0].pairs == int((cosines > 0.7).sum()) // 2
    assert result.neighbours[0].features == int((nearest > 0.7).sum())
    assert result.mean_pairwise_cosine == pytest.approx(pairwise.item(), rel=1e-5)
    s = torch.linalg.svdvals(unit)
    assert result.effective_dimension == pytest.approx((s.pow(2).sum() ** 2 / s.pow(4).sum()).item())
    assert sum(result.max_cosine_histogram) == 61
    assert result.max_cosine_histogram[-1] == int((nearest > 0.9).sum())


def test_an_orthogonal_decoder_spans_all_its_dimensions():
    result = decoder_geometry(sae_with(torch.linalg.qr(torch.randn(6, 6))[0]))
    assert result.effective_dimension == pytest.approx(6)
    assert result.entropy_dimension == pytest.approx(6)
    assert result.mean_max_cosine == pytest.approx(0, abs=1e-6)


def test_only_the_features_asked_for_and_only_those_with_a_direction():
    W_dec = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 0.0], [0.0, 1.0]])
    W_enc = torch.tensor([[1.0, 0.0, 5.0, 0.0], [0.0, 7.0, 5.0, -2.0]])  # columns: (1, 0), (0, 7), -, (0, -2)
    result = decoder_geometry(sae_with(W_dec, W_enc), features=(1, 2, 3))
    assert (result.features, result.zero_rows) == (2, 1)
    assert result.mean_max_cosine == 0  # feature 0's copy is not looked at
    assert result.encoder_decoder_cosine == pytest.approx((0 - 1) / 2)
    assert result.encoder_decoder_percentiles[2] == pytest.approx(-0.5)
    alone = decoder_geometry(sae_with(W_dec, W_enc), features=[3])
    assert math.isnan(alone.mean_max_cosine)
    assert math.isnan(alone.mean_pairwise_cosine)
    assert alone.effective_dimension == pytest.approx(1)
    assert sum(alone.max_cosine_histogram) == 0


def test_a_transcoder_between_sizes_has_no_alignment():
    result = decoder_geometry(Transcoder(TranscoderConfig(d_in=3, d_out=5, d_sae=8, apply_b_dec_to_input=False)))
    assert result.encoder_decoder_cosine is None
    assert result.features == 8

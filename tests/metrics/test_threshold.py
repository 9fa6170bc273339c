"""A threshold fitted to an L0."""

import pytest
import torch
from helpers import (
    D_IN,
    make_activations,
    make_sae,
    save_inference,
)
from rescore_cases import build, by_hand, trained

from saelens_cosine.metrics import threshold
from saelens_cosine.metrics.threshold import fit_threshold


def jumprelu_of(scores):
    """A JumpReLU SAE and inputs that give exactly these scores `[tokens, 4]`."""
    weights = {"b_enc": torch.zeros(4), "b_dec": torch.zeros(4), "threshold": torch.full((4,), 9.0)}
    return build("jumprelu", W_enc=torch.eye(4), W_dec=torch.eye(4), **weights), torch.tensor(scores)


@pytest.mark.parametrize(
    ("target", "active", "value"),
    # 6 5 5 5 2 1 are positive; the threshold is midway
    [(0.5, 1, 5.5), (1.0, 1, 5.5), (1.5, 4, 3.5), (2.0, 4, 3.5), (2.5, 5, 1.5), (3.0, 6, 0.5)],
)
def test_ties_go_to_the_nearer_side(target, active, value):
    sae, x = jumprelu_of([[5.0, 5.0, 1.0, 0.0], [5.0, 6.0, 2.0, -3.0]])
    found = fit_threshold(sae, x, target)
    assert (sae.encode(x) != 0).sum() == active
    assert found == (value, active / 2)
    assert sae.threshold.tolist() == [value] * 4


def test_scores_with_nothing_between_them():
    above = torch.nextafter(torch.tensor(1.0), torch.tensor(2.0)).item()
    sae, x = jumprelu_of([[1.0, above, 0.0, 0.0]])
    assert fit_threshold(sae, x, 1.0) == (1.0, 1.0)
    assert (sae.encode(x) != 0).tolist() == [[False, True, False, False]]


def test_ties_across_chunks(monkeypatch):
    monkeypatch.setattr(threshold, "tokens_at_once", lambda *_: 1)
    sae, x = jumprelu_of([[5.0, 2.0, 1.0, -1.0], [5.0, 1.0, 1.0, -1.0]])
    # one code of 2 tokens: both fives or neither
    assert fit_threshold(sae, x, 0.5).l0 == 0
    assert (sae.encode(x) != 0).sum() == 0
    assert fit_threshold(sae, x, 1.0) == (3.5, 1.0)  # the next below five is in another chunk


def test_too_few_positive_scores():
    sae, x = jumprelu_of([[5.0, 5.0, 1.0, 0.0], [5.0, 6.0, 2.0, -3.0]])
    with pytest.warns(UserWarning, match="Only 3 scores per token are positive"):
        found = fit_threshold(sae, x, 3.5)
    assert (found.value, found.l0) == (0.0, 3.0)
    assert (sae.encode(x) != 0).sum() == 6


@pytest.mark.parametrize("d_sae", [5, 13])
def test_chunks_do_not_matter(d_sae, monkeypatch):
    x = make_activations(300, 4, seed=2)
    weights = {"W_enc": make_activations(4, d_sae, seed=1), "W_dec": make_activations(d_sae, 4)}
    weights |= {"b_enc": torch.zeros(d_sae), "b_dec": torch.zeros(4), "threshold": torch.zeros(d_sae)}
    sae = build("jumprelu", **weights)
    whole = fit_threshold(sae, x, 1.25)
    scores = (x @ weights["W_enc"]).flatten().sort(descending=True).values
    assert scores[375] < whole.value < scores[374]  # 375 of 300 tokens
    monkeypatch.setattr(threshold, "tokens_at_once", lambda *_: 7)
    in_chunks = fit_threshold(sae, x, 1.25)
    assert in_chunks.l0 == whole.l0 == 1.25
    assert in_chunks.value == pytest.approx(whole.value, rel=1e-6)


def test_no_threshold_to_fit():
    for sae in (by_hand(), trained("cosine_batchtopk"), trained("jumprelu")):
        with pytest.raises(ValueError, match=f"{type(sae).__name__} is no inference form with thresholds"):
            fit_threshold(sae, torch.zeros(1, sae.cfg.d_in), 1.0)


@pytest.mark.parametrize("name", ["cosine_batchtopk", "per_feature_cosine_batchtopk", "magnitude_bypass_batchtopk"])
def test_our_saes_are_fitted_without_all_dense_scores(name, tmp_path, monkeypatch):
    sae = save_inference(make_sae(name, d_sae=200), tmp_path)
    x = make_activations(3000, D_IN, seed=4, spread=0.5)
    seen = []
    monkeypatch.setattr(threshold, "_scores", lambda sae, x, own=threshold._scores: seen.append(len(x)) or own(sae, x))
    found = fit_threshold(sae, x, 6.0)
    x_c = (x - sae.b_dec).double()
    a, w = sae.norm_exponent.double(), sae.W_enc.double()
    scores = x_c.norm(dim=-1, keepdim=True) ** (a - 1) * (x_c @ w) + sae.b_enc.double()
    above, below = scores.flatten().sort(descending=True).values[[17_999, 18_000]]
    assert below < found.value < above
    assert found.l0 == 6.0
    assert sum(seen) == 3000  # so few are read as they are
    seen.clear()
    for size, taken in ((300, 300), (700, 600)):  # one in ten; one in five, the first step that takes no more
        monkeypatch.setattr(threshold, "SAMPLE_TOKENS", size)
        assert fit_threshold(sae, x, 6.0).value == pytest.approx(found.value, rel=1e-5)
        assert sum(seen) == taken
        seen.clear()
    # a sample that says too high a floor
    monkeypatch.setattr(threshold, "SPARE", 0.5)
    assert fit_threshold(sae, x, 6.0).value == pytest.approx(found.value, rel=1e-5)

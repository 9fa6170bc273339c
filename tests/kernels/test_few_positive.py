"""Dead features that rarely score above zero revive by entries, as the paper defines it and as the dense formula does."""

import pytest
import torch
from fast_path_cases import (
    AUX,
    B,
    D,
    F,
    _reasons_not_logged_yet,  # noqa: F401
    dense,
    gradients,
    is_fast,
    make,
    twin,
)
from helpers import FAST, FREE_DECODER, assert_close, make_activations, train_step

from saelens_cosine.kernels.codes import ScoresOnDemand
from saelens_cosine.kernels.selection import FEW

N_DEAD, MOST = 200, D // 2
DEAD = torch.arange(F - N_DEAD, F)

SHARES = {"few tokens have any": 0.002, "some have more than d_in // 2": 0.06, "none": 0.0, "too many for it": 0.5}


@torch.no_grad()
def let_score(sae, x, share):
    """Shift the dead features' bias so that this share of their scores is positive."""
    scores = sae.rescale(sae.score(sae.process_sae_in(x)))[:, DEAD]
    cut = scores.quantile(1 - share) if share else scores.max() + 1
    norms = sae.W_dec[DEAD].norm(dim=-1) if getattr(sae.cfg, "rescale_acts_by_decoder_norm", False) else 1
    sae.b_enc[DEAD] -= cut / norms
    sae.tokens_since_fired[DEAD] = 10**9


@pytest.fixture
def by_entries(monkeypatch):
    """Whether each auxiliary loss so far was made of entries."""
    found = []
    few = ScoresOnDemand.few_positive

    def spied(*args):
        codes = few(*args)
        found.append(codes is not None)
        return codes

    monkeypatch.setattr(ScoresOnDemand, "few_positive", spied)
    return found


@pytest.mark.parametrize("decoder", [{}, FREE_DECODER], ids=["unit", "free"])
@pytest.mark.parametrize("share", SHARES.values(), ids=SHARES)
@pytest.mark.parametrize("name", FAST)
def test_few_positive_scores_revive_as_all_do(name, share, decoder, by_entries):
    options = {"dtype": "float64", "aux_loss_coefficient": 1.0, "dead_feature_window_tokens": 10**6}
    sae = make(name, "reference", **options, **decoder)
    x = make_activations(B, D, dtype=torch.float64)
    train_step(sae, x, step=0)  # starts from data
    let_score(sae, x, share)
    saes = [sae, twin(sae, "fast")]
    expected, output = (train_step(each, x, step=1) for each in saes)
    assert is_fast(output)
    dead = sae.dead_features
    assert torch.equal(dead, saes[1].dead_features)
    positive = (dense(expected.hidden_pre)[:, dead] > 0).sum(dim=1)
    if "matryoshka" not in name:
        assert by_entries == [bool(FEW * positive.sum() <= positive.numel() * dead.sum())]
    assert output.losses[AUX].item() == pytest.approx(expected.losses[AUX].item(), rel=1e-11)
    for each in (expected, output):
        each.losses[AUX].backward()
    for key, gradient in gradients(sae).items():
        if gradient is not None:
            found = gradients(saes[1])[key]
            if gradient.any():
                assert_close(found, gradient, 1e-11)
            else:
                assert found is None or not found.any()


@pytest.mark.parametrize("share", [0.0005, 0.06])
def test_the_papers_loss_of_few_positive_scores(share, by_entries):
    sae = make("cosine_topk", "fast", dtype="float64", dead_feature_window_tokens=10**6)
    x = make_activations(B, D, dtype=torch.float64)
    train_step(sae, x, step=0)
    let_score(sae, x, share)
    output = train_step(sae, x, step=1)
    assert by_entries == [True]
    positive = (dense(output.hidden_pre)[:, sae.dead_features] > 0).sum(dim=1)
    assert (positive < MOST).any()
    assert (positive > MOST).any() == (share == 0.06)
    # mean ||e - z W_dec||^2 / mean ||e - mean(e)||^2 / 32, z the largest d_in // 2 rectified scores of dead features
    e = (x - output.sae_out).detach()
    scores = (dense(output.hidden_pre).detach() * sae.dead_features).relu()
    z = torch.stack([torch.where(row >= row.topk(MOST).values[-1], row, 0) for row in scores])
    error = ((e - z @ sae.W_dec.detach()) ** 2).sum(1).mean()
    assert output.losses[AUX].item() == pytest.approx(
        (error / ((e - e.mean(0)) ** 2).sum(1).mean() / 32).item(), rel=1e-11
    )

import pytest
import torch
from sae_lens import StandardSAE, StandardSAEConfig

from saelens_cosine.evaluation.reconstruction import evaluate_reconstruction, explained_variance


class Fixed:
    """Stands in for an SAE: `codes` and `out` are functions of x."""

    def __init__(self, d_sae, codes, out):
        self.cfg, self.device = StandardSAEConfig(d_in=2, d_sae=d_sae), torch.device("cpu")
        self._codes, self._out, self._x = codes, out, None

    def encode(self, x):
        self._x = x
        return self._codes(x)

    def decode(self, _codes):
        return self._out(self._x)


def test_explained_variance_by_hand():
    x = torch.tensor([[0.0, 0.0], [2.0, 4.0]])
    x_hat = torch.tensor([[0.0, 1.0], [2.0, 3.0]])
    # Var(x) = 1 + 4 = 5; errors (0, -1), (0, 1): variance 0 + 1 = 1; FVE = 1 - 1/5
    assert explained_variance(x, x_hat) == pytest.approx(0.8)


def test_a_constant_error_is_free():
    x = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    assert explained_variance(x, x + 7) == pytest.approx(1.0)


def test_figures_and_quartiles_by_hand():
    # norms 1..8; the SAE returns x for the shorter four tokens and 0 for the longer four
    x = torch.tensor([[float(n), 0.0] for n in range(1, 9)])
    sae = Fixed(
        3,
        codes=lambda x: torch.stack([(x[:, 0] > 2).float(), torch.ones(len(x)), torch.zeros(len(x))], dim=1),
        out=lambda x: torch.where(x.norm(dim=-1, keepdim=True) <= 4, x, 0.0),
    )
    result = evaluate_reconstruction(sae, x, batch=3)
    # Var(x) = 5.25; the error is 0 four times and 5, 6, 7, 8: mean 3.25, mean square 174/8 = 21.75, variance 11.1875
    assert result.fve == pytest.approx(1 - 11.1875 / 5.25)
    assert result.l0 == pytest.approx((8 + 6) / 8)  # feature 1 always, feature 0 on six tokens
    assert result.dead_fraction == pytest.approx(1 / 3)
    assert [(b.low, b.tokens) for b in result.by_norm] == [(1.0, 2), (2.75, 2), (4.5, 2), (6.25, 2)]
    assert result.by_norm[-1].high == 8.0
    # in the upper quartiles the error is the token itself: about their mean it varies as much as they do
    assert [b.fve for b in result.by_norm] == pytest.approx([1, 1, 0, 0])


def test_an_sae_in_training_mode_is_refused():
    from saelens_cosine import CosineBatchTopKTrainingSAE, CosineBatchTopKTrainingSAEConfig

    sae = CosineBatchTopKTrainingSAE(CosineBatchTopKTrainingSAEConfig(d_in=5, d_sae=11, k=2))
    with pytest.raises(ValueError, match=r"sae\.eval\(\)"):
        evaluate_reconstruction(sae, torch.randn(20, 5))
    assert evaluate_reconstruction(sae.eval(), torch.randn(20, 5)).l0 == pytest.approx(2)


def test_agrees_with_a_float64_formula_on_a_real_sae():
    torch.manual_seed(0)
    sae = StandardSAE(StandardSAEConfig(d_in=5, d_sae=11))
    sae.b_enc.data.normal_()
    x = torch.randn(1003, 5) * torch.rand(1003, 1) * 9
    result = evaluate_reconstruction(sae, x, batch=100)
    xs, w = x.double(), {name: value.double() for name, value in sae.state_dict().items()}
    codes = ((xs - w["b_dec"]) @ w["W_enc"] + w["b_enc"]).relu()
    error = xs - (codes @ w["W_dec"] + w["b_dec"])
    assert result.fve == pytest.approx(1 - (error.var(0, False).sum() / xs.var(0, False).sum()).item(), rel=1e-5)
    assert result.l0 == pytest.approx((codes > 0).double().sum(1).mean().item(), abs=2e-3)
    assert sum(b.tokens for b in result.by_norm) == 1003

import dataclasses
import json

import pytest
import torch
from helpers import CONTEXT, D_IN, D_SAE, HOOK, make_activations, make_sae, tiny_model
from sae_lens import StandardSAE, StandardSAEConfig
from sae_lens.saes.transcoder import Transcoder, TranscoderConfig

from saelens_cosine.activations.sample import TokenSample
from saelens_cosine.metrics.reconstruction.by_norm import diagnose_reconstruction, evaluate_reconstruction
from saelens_cosine.metrics.reconstruction.clean_losses import clean_losses
from saelens_cosine.metrics.reconstruction.dead import dead_in_training
from saelens_cosine.metrics.reconstruction.fve import explained_variance
from saelens_cosine.metrics.reconstruction.loss_recovered import ce_loss_recovered, loss_recovered


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
    result = evaluate_reconstruction(sae, x)
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
    result = evaluate_reconstruction(sae, x)
    xs, w = x.double(), {name: value.double() for name, value in sae.state_dict().items()}
    codes = ((xs - w["b_dec"]) @ w["W_enc"] + w["b_enc"]).relu()
    error = xs - (codes @ w["W_dec"] + w["b_dec"])
    assert result.fve == pytest.approx(1 - (error.var(0, False).sum() / xs.var(0, False).sum()).item(), rel=1e-5)
    assert result.l0 == pytest.approx((codes > 0).double().sum(1).mean().item(), abs=2e-3)
    assert sum(b.tokens for b in result.by_norm) == 1003


def fixed(x, x_hat, codes=None):
    """A stand-in that reconstructs the rows of `x` as those of `x_hat`, one after another."""
    codes = torch.ones(len(x), 1) if codes is None else codes
    done = 0

    def next_codes(batch):
        nonlocal done
        done += len(batch)
        return codes[done - len(batch) : done]

    return Fixed(codes.shape[1], next_codes, lambda batch: x_hat[done - len(batch) : done])


def overall(x, x_hat, **settings):
    return diagnose_reconstruction(fixed(x, x_hat), x, **settings).by_norm.all_norms.overall


def test_three_definitions_of_fve_by_hand():
    # two batches of two tokens; variance about all: mean 6, squares 36 + 16 + 16 + 36 = 104, 104 / 4 = 26
    x = torch.tensor([[0.0, 0.0], [2.0, 0.0], [10.0, 0.0], [12.0, 0.0]])
    x_hat = x - torch.tensor([[1.0], [1.0], [3.0], [3.0]]) * torch.tensor([0.0, 1.0])
    fit = overall(x, x_hat, batch=2)
    assert fit.fve == pytest.approx(1 - 1 / 26)  # errors 1, 1, 3, 3: variance 1
    assert fit.fve_in_batches == pytest.approx(1)  # the error does not vary within a batch
    assert (
        fit.fve_squared_error == fit.explained_variance == pytest.approx(1 - 5 / 26)
    )  # mean square (1 + 1 + 9 + 9) / 4
    # half the deviation from the batch's mean is missed: variance 1 in a batch, of the error 1/4
    x_hat = torch.tensor([[0.5, 0.0], [1.5, 0.0], [10.5, 0.0], [11.5, 0.0]])
    assert overall(x, x_hat, batch=2).fve_in_batches == pytest.approx(3 / 4)
    assert overall(x, x_hat, batch=2).fve == pytest.approx(1 - 0.25 / 26)
    # a shorter batch counts by its tokens: (0, 2, 10) has variance 56/3, (12) has none, and its error is free
    x_hat = torch.tensor([[2.0, 0.0], [2.0, 0.0], [8.0, 0.0], [0.0, 0.0]])  # errors -2, 0, 2: variance 8/3
    assert overall(x, x_hat, batch=3).fve_in_batches == pytest.approx(1 - 8 / 56)


def test_cosine_and_norm_ratios_by_hand():
    x = torch.tensor([[3.0, 4.0], [0.0, 2.0], [1.0, 0.0], [0.0, 0.0]])
    x_hat = torch.tensor([[3.0, 4.0], [4.0, 0.0], [0.0, 0.0], [1.0, 0.0]])
    fit = overall(x, x_hat)
    assert fit.cosine == pytest.approx((1 + 0 + 0 + 0) / 4)  # nothing reconstructed and nothing there count as 0
    assert fit.norm_ratio == pytest.approx((1 + 2 + 0) / 3)  # a token that is 0 has no ratio
    assert fit.ratio_of_mean_norms == pytest.approx((5 + 4 + 0 + 1) / (5 + 2 + 1 + 0))


def test_saelens_own_is_called(monkeypatch):
    from sae_lens.evals import ExplainedVarianceCalculator

    x, x_hat = make_activations(300, 3, seed=1), make_activations(300, 3, seed=2)
    theirs = ExplainedVarianceCalculator()
    for part in range(0, 300, 100):
        theirs.add_batch(x_hat[part : part + 100], x[part : part + 100])
    assert overall(x, x_hat).explained_variance == pytest.approx(theirs.compute(), rel=1e-6)
    monkeypatch.setattr(ExplainedVarianceCalculator, "compute", lambda self: 0.125)
    assert overall(x, x_hat).explained_variance == 0.125


def test_four_definitions_of_dead_by_hand():
    # 2,000 tokens in batches of 500; features: always; 2 tokens, both in the first batch; 3 tokens; never
    codes = torch.zeros(2000, 4)
    codes[:, 0] = 1
    codes[[0, 1], 1] = -1  # AbsTopK's codes are negative as well
    codes[[0, 600, 601], 2] = 1
    x = make_activations(2000, 2)

    def dead(**settings):
        return diagnose_reconstruction(fixed(x, x, codes), x, **settings).dead

    measured = dead(batch=500)
    assert measured.never_fired == 1 / 4
    assert measured.rarely_fired == 2 / 4  # 2 in 2,000 is not above 0.1 %, 3 are
    assert measured.in_batch == pytest.approx((1 / 4 + 2 / 4 + 3 / 4 + 3 / 4) / 4)
    assert (measured.tokens, measured.batch_tokens) == (2000, 500)
    assert measured.in_training is None
    assert measured.training_window_tokens is None
    # the last 500 of 2,000 are no whole batch of 750
    assert dead(batch=750).in_batch == pytest.approx((1 / 4 + 3 / 4) / 2)
    assert dead(batch=5000).batch_tokens == 2000
    log = {"dead_features_in_token_window": 3.0, "dead_feature_window_tokens": 1e7}
    measured = dead(training_metrics=log)
    assert (measured.in_training, measured.training_window_tokens) == (0.75, 10_000_000)


def test_dead_in_training_from_the_sae_itself_or_its_metadata():
    sae = make_sae("cosine_batchtopk", dead_feature_window_tokens=1000)
    sae.tokens_since_fired[:5] = 1000
    assert dead_in_training(sae) == (5 / D_SAE, 1000)
    sae = StandardSAE(StandardSAEConfig(d_in=2, d_sae=8))
    assert dead_in_training(sae) is None
    sae.cfg.metadata.dead_features_in_token_window, sae.cfg.metadata.dead_feature_window_tokens = 2, 500
    assert dead_in_training(sae) == (0.25, 500)


def with_sinks():
    """400 tokens with norms 1 to 2, reconstructed exactly but for four sinks of norm 1,000 at 14 times their norm."""
    x = torch.nn.functional.normalize(make_activations(400, 3), dim=-1) * torch.linspace(1, 2, 400).unsqueeze(-1)
    sinks = torch.tensor([7, 107, 207, 307])
    x[sinks] = torch.tensor([1000.0, 0.0, 0.0])
    x_hat = x.clone()
    x_hat[sinks] *= 14
    return x, x_hat


def test_one_percent_of_sinks_decides_the_upper_quartile_and_can_be_left_out():
    x, x_hat = with_sinks()
    codes = torch.ones(400, 2)
    codes[:, 1] = (x[:, 0] == 1000).float()  # a feature of the sinks alone
    measured = diagnose_reconstruction(fixed(x, x_hat, codes), x).by_norm
    assert measured.top_tokens == 4
    assert 2 <= measured.top_norm < 1000
    every, rest = measured.all_norms, measured.without_top
    assert [r.measured.tokens for r in every.ranges] == [100, 100, 100, 100]
    assert [r.measured.tokens for r in rest.ranges] == [100, 100, 100, 96]
    assert (every.overall.tokens, rest.overall.tokens) == (400, 396)
    assert [r.low for r in every.ranges] == [r.low for r in rest.ranges]
    assert (every.ranges[-1].high, rest.ranges[-1].high) == (1000, measured.top_norm)
    # sinks of one direction: the error varies 13 times as much as they do, and they are nearly all of the variance
    assert every.ranges[-1].measured.fve == pytest.approx(1 - 13**2, rel=1e-3)
    assert every.overall.fve == pytest.approx(1 - 13**2, rel=1e-3)
    assert [r.measured.fve for r in every.ranges[:3]] == [1, 1, 1]
    assert [r.measured.fve for r in rest.ranges] == [1, 1, 1, 1]
    assert rest.overall.fve == rest.overall.fve_in_batches == rest.overall.explained_variance == 1
    assert every.ranges[-1].measured.norm_ratio == pytest.approx((96 + 4 * 14) / 100)
    assert every.ranges[-1].measured.ratio_of_mean_norms == pytest.approx(14, rel=0.05)
    assert [r.measured.l0 for r in every.ranges] == pytest.approx([1, 1, 1, 1.04])
    assert [r.measured.never_fired for r in every.ranges] == [0.5, 0.5, 0.5, 0]
    assert rest.overall.never_fired == 0.5


def test_a_sample_without_its_planted_sinks():
    x, x_hat = with_sinks()
    n = torch.arange(400)
    ordinary = x.norm(dim=-1) < 100
    sample = TokenSample(x, n, n, n, n, ordinary, 10.0)

    def measure(s):
        keep = torch.isin(n, s.tokens)
        return diagnose_reconstruction(fixed(x[keep], x_hat[keep]), s.activations).by_norm.all_norms

    assert sample.high_norm_share == pytest.approx(0.01)
    assert measure(sample).overall.fve == pytest.approx(1 - 13**2, rel=1e-3)
    without = measure(sample.without_sinks())
    assert without.overall.fve == 1
    assert sum(r.measured.tokens for r in without.ranges) == 396


def test_equal_norms_make_one_range():
    x = torch.nn.functional.normalize(make_activations(50, 3), dim=-1).sign() / 3**0.5
    measured = diagnose_reconstruction(fixed(x, x), x).by_norm
    assert measured.top_tokens == 0
    for by_norm in (measured.all_norms, measured.without_top):
        assert [r.measured.tokens for r in by_norm.ranges] == [50]
    assert len(evaluate_reconstruction(fixed(x, x), x).by_norm) == 1


def test_tokens_that_do_not_vary_explain_nothing():
    x = torch.full((30, 2), 0.1)
    fit = overall(x, x)
    assert (fit.fve, fit.fve_in_batches, fit.fve_squared_error) == (0, 0, 0)


def test_results_are_json():
    x, x_hat = with_sinks()
    asdict = dataclasses.asdict(diagnose_reconstruction(fixed(x, x_hat), x))
    assert (
        json.loads(json.dumps(asdict, allow_nan=False))["by_norm"]["all_norms"]["ranges"][3]["measured"]["tokens"]
        == 100
    )


def test_pieces_that_fit_in_memory_give_the_same(monkeypatch):
    sae = make_sae("per_feature_cosine_batchtopk")
    x = make_activations(301, D_IN)
    whole = diagnose_reconstruction(sae, x, batch=100)
    monkeypatch.setattr("saelens_cosine.metrics.reconstruction.by_norm.tokens_at_once", lambda *_: 17)
    pieces = diagnose_reconstruction(sae, x, batch=100)
    assert pieces.dead == whole.dead
    for name, value in dataclasses.asdict(pieces.by_norm.all_norms.overall).items():
        assert value == pytest.approx(getattr(whole.by_norm.all_norms.overall, name), rel=1e-5)


def test_refusals():
    x = make_activations(10, 3)
    with pytest.raises(ValueError, match="no tokens"):
        diagnose_reconstruction(fixed(x, x), x[:0])
    with pytest.raises(ValueError, match="bins=101"):
        diagnose_reconstruction(fixed(x, x), x, bins=101)
    transcoder = Transcoder(TranscoderConfig(d_in=3, d_sae=4, d_out=3, apply_b_dec_to_input=False))
    with pytest.raises(ValueError, match="does not reconstruct what it reads"):
        diagnose_reconstruction(transcoder, x)


def test_loss_replaces_only_tokens_that_the_sae_was_trained_to_see(model):
    sae = StandardSAE(StandardSAEConfig(d_in=16, d_sae=4))
    for parameter in sae.parameters():
        parameter.data.zero_()  # reconstructs zeros
    metadata = sae.cfg.metadata
    metadata.hook_name, metadata.seqpos_slice, metadata.exclude_special_tokens = HOOK, [2, None], [9]
    tokens = torch.tensor([[0, 5, 9, 7, 8, 11], [0, 9, 10, 9, 4, 3]])
    seen = torch.tensor([[0, 0, 0, 1, 1, 1], [0, 0, 1, 0, 1, 1]], dtype=torch.bool)

    def zero_seen(activations, hook):
        activations[seen] = 0
        return activations

    with torch.no_grad():
        logits = model.run_with_hooks(tokens, fwd_hooks=[(HOOK, zero_seen)], prepend_bos=False)
    log_p = logits.double().log_softmax(-1)[:, :-1].gather(-1, tokens[:, 1:, None])
    found = loss_recovered(sae, clean_losses(model, HOOK, [tokens], compute_kl=False), None)
    assert found.by_norm.all_norms.overall.ce_loss_with_sae == pytest.approx(-log_p.mean().item(), rel=1e-5)
    assert found.replaced_share == 6 / 12


def test_loss_recovered_against_softmaxes_by_hand():
    torch.manual_seed(0)
    model = tiny_model()
    sae = StandardSAE(StandardSAEConfig(d_in=16, d_sae=40))
    sae.cfg.metadata.hook_name = HOOK
    sae.W_enc.data.normal_(std=0.2)
    batches = [torch.randint(0, 32, (n, CONTEXT)) for n in (30, 20)]
    measured = loss_recovered(sae, clean_losses(model, HOOK, batches), 1.3, bins=2)

    norms, ce, kl, replaced = [], {}, {}, []
    for tokens in batches:
        x = model.run_with_cache(tokens)[1][HOOK]
        norm = x.norm(dim=-1)
        keep = norm <= 1.3 * norm.median()
        swaps = {
            "without": lambda x, hook: x,
            "sae": lambda x, hook, keep=keep: torch.where(keep[..., None], sae.decode(sae.encode(x)), x),
            "ablation": lambda x, hook: 0 * x,
        }
        logs = {
            name: model.run_with_hooks(tokens, fwd_hooks=[(HOOK, swap)]).double().log_softmax(-1)
            for name, swap in swaps.items()
        }
        norms.append(norm.flatten())
        replaced.append(keep.flatten())
        for name, log in logs.items():
            nats = -log[:, :-1].gather(-1, tokens[:, 1:, None]).squeeze(-1)
            nats = torch.cat([nats, torch.full((len(tokens), 1), torch.nan)], dim=1)
            ce.setdefault(name, []).append(nats.flatten())
            kl.setdefault(name, []).append((logs["without"].exp() * (logs["without"] - log)).sum(-1).flatten())
    norms, replaced = torch.cat(norms), torch.cat(replaced)
    ce, kl = ({name: torch.cat(parts) for name, parts in table.items()} for table in (ce, kl))
    assert 0.5 < measured.replaced_share < 1
    assert measured.replaced_share == pytest.approx(replaced.double().mean().item())
    median, top = norms.double().quantile(0.5), norms.double().quantile(0.99)
    everyone = torch.ones(400, dtype=torch.bool)
    by_norm = measured.by_norm
    for result, which in [
        (by_norm.all_norms.overall, everyone),
        (by_norm.all_norms.ranges[0].measured, norms < median),
        (by_norm.all_norms.ranges[1].measured, norms >= median),
        (by_norm.without_top.overall, norms <= top),
        (by_norm.without_top.ranges[1].measured, (norms >= median) & (norms <= top)),
    ]:
        nats = {name: values[which].nanmean().item() for name, values in ce.items()}
        divergence = {name: values[which].mean().item() for name, values in kl.items()}
        assert result.tokens == which.sum()
        assert result.ce_loss_without_sae == pytest.approx(nats["without"], rel=1e-4)
        assert result.ce_loss_with_sae == pytest.approx(nats["sae"], rel=1e-4)
        assert result.ce_loss_with_ablation == pytest.approx(nats["ablation"], rel=1e-4)
        score = (nats["ablation"] - nats["sae"]) / (nats["ablation"] - nats["without"])
        assert result.ce_loss_score == pytest.approx(score, rel=1e-3, abs=1e-4)
        assert result.kl_div_with_sae == pytest.approx(divergence["sae"], rel=1e-3)
        assert result.kl_div_with_ablation == pytest.approx(divergence["ablation"], rel=1e-3)
        assert result.kl_div_score == pytest.approx(1 - divergence["sae"] / divergence["ablation"], rel=1e-3, abs=1e-4)
    without_kl = clean_losses(model, HOOK, batches, compute_kl=False)
    assert ce_loss_recovered(sae, without_kl, 1.3) == pytest.approx(by_norm.all_norms.overall.ce_loss_score)
    without_kl = loss_recovered(sae, clean_losses(model, HOOK, batches, compute_kl=False), None)
    assert without_kl.by_norm.all_norms.overall.kl_div_score is None
    with pytest.raises(ValueError, match="no token batches"):
        clean_losses(model, HOOK, [])

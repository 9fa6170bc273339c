"""NaN and infinity are no figures: an SAE that gives them reads as broken, everywhere, and never as good."""

import json
import math
import re

import numpy as np
import pytest
import torch
from helpers import HOOK, make_activations, make_sae, save_inference
from rich.console import Console

from saelens_cosine.activations.sample import TokenSample
from saelens_cosine.experiments.compare.results import ArmResult, Comparison, HookResult
from saelens_cosine.experiments.compare.settings import ComparisonSettings
from saelens_cosine.experiments.compare.summary.page import comparison_page
from saelens_cosine.experiments.compare.summary.picture import draw
from saelens_cosine.experiments.compare.tables import as_json
from saelens_cosine.experiments.compare.tables import as_tables as comparison_tables
from saelens_cosine.experiments.evaluate.command import as_tables
from saelens_cosine.experiments.evaluate.evals import BySinks, NotMeasured
from saelens_cosine.experiments.evaluate.evals.of_sae.afa import AFA, AFAOfTokens
from saelens_cosine.experiments.evaluate.evals.of_sae.norm_response import Scaled
from saelens_cosine.experiments.evaluate.evals.of_sae.reconstruction import FVEByDocument, Reconstructed
from saelens_cosine.experiments.evaluate.page import evaluation_page
from saelens_cosine.experiments.evaluate.results.evaluation import Evaluation, MeasuredSAE, MeasuredText
from saelens_cosine.experiments.evaluate.settings import EvaluationSettings
from saelens_cosine.metrics.causal.forward import clean_run
from saelens_cosine.metrics.codes import sparse_codes
from saelens_cosine.metrics.dictionary.geometry import decoder_geometry
from saelens_cosine.metrics.intervals import DocumentErrors
from saelens_cosine.metrics.norm_ranges import group_by_norm
from saelens_cosine.metrics.norms.encoder_gradients import encoder_gradients
from saelens_cosine.metrics.norms.exponents import exponent_distribution
from saelens_cosine.metrics.norms.norm_noise import norm_noise
from saelens_cosine.metrics.norms.norm_response import norm_response
from saelens_cosine.metrics.not_finite import NotFiniteError
from saelens_cosine.metrics.probing.probing import probe_activations, probe_sae
from saelens_cosine.metrics.reconstruction.afa import measure_afa, summarize_afa
from saelens_cosine.metrics.reconstruction.by_norm import diagnose_reconstruction, evaluate_reconstruction
from saelens_cosine.metrics.reconstruction.clean_losses import clean_losses
from saelens_cosine.metrics.reconstruction.fve import explained_variance
from saelens_cosine.metrics.reconstruction.loss_recovered import loss_recovered
from saelens_cosine.metrics.reconstruction.zf_points import zf_points
from saelens_cosine.plain import plain
from saelens_cosine.report.page import render
from saelens_cosine.training.monitor import TrainingLogEntry
from saelens_cosine.training.recorded import trained

BAD = [math.nan, math.inf]
TOKENS = 200


def activations():
    """Tokens of which the three with the smallest norms are marked by their first entry."""
    x = make_activations(TOKENS, 7, spread=0.3)
    x[:, 0] = 0.5
    x[:3] *= 0.01
    x[:3, 0] = -1e-3
    return x


def broken(tmp_path, where, value, name="cosine_topk"):
    """A saved SAE that gives a value for a whole row, of codes or of reconstructions, on the marked tokens."""
    sae = save_inference(make_sae(name), tmp_path)
    method, seen = getattr(sae, where), {}

    def encode(x):
        seen["marked"] = x[:, 0] < 0
        codes = type(sae).encode(sae, x)
        return codes if where == "decode" else torch.where(seen["marked"].unsqueeze(-1), value, codes)

    def decode(codes):
        out = type(sae).decode(sae, codes)
        return torch.where(seen["marked"].unsqueeze(-1), value, out) if where == "decode" else out

    assert method is not None
    vars(sae).update(encode=encode, decode=decode)
    return sae


def sound(tmp_path, name="cosine_topk"):
    return save_inference(make_sae(name), tmp_path)


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("where", ["encode", "decode"])
def test_reconstruction_stays_not_finite_and_is_counted(tmp_path, where, value):
    x = activations()
    found = diagnose_reconstruction(broken(tmp_path, where, value), x, batch=50)
    wanted = diagnose_reconstruction(sound(tmp_path), x, batch=50)
    for part, other in zip(
        (found.by_norm.all_norms, found.by_norm.without_top), (wanted.by_norm.all_norms,) * 2, strict=True
    ):
        for fit in (part.overall, part.ranges[0].measured):
            assert fit.not_finite == 3
            for measure in ("fve", "fve_in_batches", "fve_squared_error", "explained_variance", "cosine", "norm_ratio"):
                assert not math.isfinite(getattr(fit, measure)), measure
            for measure in ("l0", "never_fired", "rarely_fired"):  # of codes that are there, if they are
                assert math.isfinite(getattr(fit, measure)) == (where == "decode"), measure
        for one, sane in zip(part.ranges[1:3], other.ranges[1:3], strict=True):
            # quartiles that hold none of them; up to the order of sums
            assert vars(one.measured) == pytest.approx(vars(sane.measured), rel=1e-5)
            assert one.measured.not_finite == 0
    assert math.isfinite(found.dead.in_batch) == (where == "decode")
    assert plain(found)["by_norm"]["all_norms"]["overall"]["fve"] is None
    short = evaluate_reconstruction(broken(tmp_path, where, value), x)
    assert short.not_finite == 3
    assert not math.isfinite(short.fve)
    assert not math.isfinite(short.by_norm[0].fve)
    assert math.isfinite(short.by_norm[2].fve)


@pytest.mark.parametrize("value", BAD)
def test_fve_of_one_batch(value):
    x = activations()
    x_hat = x + 0.1
    x_hat[5, 2] = value
    assert not math.isfinite(explained_variance(x, x_hat))
    same = torch.ones(4, 7)
    assert explained_variance(same, same + 0.1) == 0
    assert math.isnan(explained_variance(same, torch.full_like(same, value)))


def test_norms_that_are_not_finite_are_among_the_longest():
    # quartiles of 1 ... 8 are 2.75, 4.5 and 6.25, whatever the two others are
    norms = torch.tensor([math.nan, 1, 2, 3, 4, 5, 6, 7, 8, math.inf])
    groups = group_by_norm(norms)
    assert groups.edges.tolist() == [1, 2.75, 4.5, 6.25, 8]
    assert groups.group.tolist() == [4, 0, 0, 1, 1, 2, 2, 3, 4, 4]
    assert group_by_norm(torch.tensor([math.nan, math.nan])).group.tolist() == [4, 4]


@pytest.mark.parametrize("value", BAD)
def test_predictions_stay_not_finite_and_are_counted(model, tmp_path, value):
    sae = save_inference(make_sae("cosine_topk", d_in=16, d_sae=24), tmp_path)
    sae.cfg.metadata.hook_name = HOOK
    tokens = torch.randint(1, 32, (4, 8), generator=torch.Generator().manual_seed(0))
    clean = clean_losses(model, HOOK, [tokens])
    sane = loss_recovered(sae, clean, None).by_norm.all_norms.overall
    assert (sane.tokens, sane.not_finite) == (32, 0)
    assert math.isfinite(sane.ce_loss_score)
    original, calls = sae.decode, []

    def decode(codes):
        out = original(codes)
        calls.append(len(calls))
        out[2, 3] = value  # attention multiplies it by 0 even before it, so all 8 of the third context are lost
        return out

    vars(sae)["decode"] = decode
    found = loss_recovered(sae, clean, None).by_norm.all_norms.overall
    assert calls
    assert (found.tokens, found.not_finite) == (32, 8)
    for measure in ("ce_loss_with_sae", "ce_loss_score", "kl_div_with_sae", "kl_div_score"):
        assert not math.isfinite(getattr(found, measure)), measure
    assert found.ce_loss_without_sae == sane.ce_loss_without_sae
    # the mean over the tokens that have a next one, 7 of each context, and not over padding
    per_token = model(tokens, return_type="loss", loss_per_token=True)
    assert sane.ce_loss_without_sae == pytest.approx(per_token.double().mean().item(), rel=1e-6)


@pytest.mark.parametrize("value", BAD)
def test_norm_response_and_noise(tmp_path, value):
    sae, x = broken(tmp_path, "encode", value, "cosine_batchtopk"), activations()
    found = norm_response(sae, x)
    assert found.not_finite == 3
    for measured in found.at_scales:
        numbers = [v for name, v in vars(measured).items() if name != "scale"]
        assert all(math.isnan(v) for v in numbers)
    noise = norm_noise(sae, x)
    assert noise.clean.not_finite == noise.noisy.not_finite == 3
    assert math.isnan(noise.clean.fve)
    assert math.isnan(noise.drop)
    assert noise.drop_refitted is None


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("where", ["encode", "decode"])
def test_afa_and_its_points(tmp_path, where, value):
    sae, x = broken(tmp_path, where, value), activations()
    if where == "decode":  # hook_sae_recons is in the class's decode
        sae.hook_sae_recons.add_hook(lambda out, hook: torch.where((x[:, :1] < 0), value, out))
    tokens = measure_afa(sae, x)
    assert (~tokens.finite).nonzero().flatten().tolist() == [0, 1, 2]
    found = summarize_afa(tokens)
    assert found.not_finite == 3
    assert math.isnan(found.share_below)
    assert math.isnan(found.normalized_mse.median)
    assert math.isnan(found.scale_free.median)
    assert (found.normalized_mse.tokens, found.normalized_mse.undefined) == (0, TOKENS)
    assert len(zf_points(tokens, "cosine").afa) == TOKENS


@pytest.mark.parametrize("value", BAD)
def test_what_reads_codes_refuses_them_by_name(tmp_path, value):
    """Matching, co-firing, norm detectors, probing, decomposition, ablation and the win rate all start here."""
    sae, x = broken(tmp_path, "encode", value), activations()
    with pytest.raises(NotFiniteError, match="Codes of CosineTopKSAE are not finite: 3 of 200 tokens"):
        sparse_codes(sae, x)
    contexts = torch.arange(TOKENS) // 10
    ones = torch.ones(TOKENS, dtype=torch.bool)
    sample = TokenSample(x, torch.zeros(TOKENS).long(), contexts, contexts, torch.arange(TOKENS) % 10, ones, None)
    labels = (np.arange(20) % 2).astype(bool)
    with pytest.raises(NotFiniteError):
        probe_sae(sae, sample, labels)
    x[7, 3] = value
    with pytest.raises(NotFiniteError, match="Activations are not finite: 1 of 200 tokens"):
        probe_activations(sample, labels)


@pytest.mark.parametrize("value", BAD)
def test_weights_and_gradients(tmp_path, value):
    sae, x = sound(tmp_path, "per_feature_cosine_topk"), activations()
    sae.norm_exponent.data[2] = value
    with pytest.raises(NotFiniteError, match="Norm exponents are not finite: 1 of 13"):
        exponent_distribution(sae)
    sae.W_enc.data[0, 3] = value
    with pytest.raises(NotFiniteError, match="Encoder columns are not finite: 1 of 13 columns"):
        decoder_geometry(sae)
    sae.W_dec.data[3:5] = value
    with pytest.raises(NotFiniteError, match="Decoder rows are not finite: 2 of 13 rows"):
        decoder_geometry(sae)
    sae = sound(tmp_path)
    sae.W_dec.data[3:5] = value
    with pytest.raises(NotFiniteError, match="Encoder gradients are not finite: .* of 13 features"):
        encoder_gradients(sae, x)


@pytest.mark.parametrize("value", BAD)
def test_effects_on_predictions(model, value):
    run = clean_run(model, HOOK, torch.randint(1, 32, (6, 8), generator=torch.Generator().manual_seed(0)))
    assert run.kl(torch.arange(6), lambda hidden, rows: 2 * hidden).isfinite().all()
    with pytest.raises(NotFiniteError, match="Predictions after an edit are not finite: 2 of 6 edits"):
        run.kl(torch.arange(6), lambda hidden, rows: torch.where((rows < 2)[:, None, None], value, hidden))


# --- what is said ---


def evaluation(tmp_path, sae):
    """What `saelens-cosine evaluate` finds of one SAE, without a model."""
    x = activations()
    tokens, centred = measure_afa(sae, x), measure_afa(sae, x, bias="center")
    augmented, points = summarize_afa(tokens), zf_points(centred, "cos")
    afa = AFAOfTokens(augmented, augmented, summarize_afa(centred), summarize_afa(centred), points)
    errors = DocumentErrors((math.nan, 0.5), (1.0, 1.0))
    documents = FVEByDocument(text="t", documents=(0, 1), without_sinks=errors)
    results = {
        "reconstruction": Reconstructed(without_sinks=diagnose_reconstruction(sae, x), fve_by_document=documents),
        "afa": AFA(without_sinks=afa, zf_points=zf_points(tokens, "cos")),
        "dictionary": NotMeasured("Codes are not finite", 3),
        "norm_response": BySinks(without_sinks=Scaled(norm_response(sae, x), norm_noise(sae, x))),
    }
    entry = MeasuredSAE(
        results=results,
        seconds={},
        arm="cos",
        seed=0,
        architecture="cosine_topk",
        training={"training_tokens": [0, 100], "fve": [math.nan, 0.2], "l0": [3.0, math.inf]},
        place="cos",
        sha256="0" * 64,
        metadata={},
        held_out=True,
        trained=trained(sae),
    )
    text = MeasuredText(
        results={}, seconds={}, model="tiny", hook=HOOK, head=None, dataset="tiny", planted_sinks=False, form={}
    )
    found = Evaluation(EvaluationSettings(), "2026-01-01", None, {}, (text,), (entry,))
    json.dumps(found.document(), allow_nan=False)
    return found


def printed(tables):
    console = Console(record=True, width=200, force_terminal=True)
    with console.capture() as capture:
        for table in tables:
            console.print(table)
    return capture.get()


def test_evaluate_says_it_in_red_and_draws_the_rest(tmp_path):
    found = evaluation(tmp_path, broken(tmp_path, "encode", math.nan))
    text = printed(as_tables(found))
    assert "\x1b[31mnan\x1b[0m" in text  # FVE, L0 and never fired
    first = text.split("Held-out text")[0]
    assert "Not finite" in first
    assert "\x1b[31m" in first
    assert all(name in first for name in ("reconstruction", "afa", "dictionary", "norm_response"))
    page = render(evaluation_page(found))
    assert '<ul class="warning" role="alert"><li>Not finite: figures of these are missing.</li>' in page
    assert "<li>cos, seed 0, reconstruction: 3 not finite</li>" in page
    assert 'aria-label="cos, sinks out"' in page  # the ZF plot
    assert not re.search(r"[\[:,]NaN", page.split("<script>")[0])


def test_evaluate_says_nothing_of_a_sound_sae(tmp_path):
    found = evaluation(tmp_path, sound(tmp_path))
    del found.saes[0].results["dictionary"]
    assert "Not finite" not in printed(as_tables(found))
    assert 'class="warning"' not in render(evaluation_page(found))


def test_compare_says_it_in_red_and_draws_the_rest(tmp_path):
    x = activations()
    arms = []
    for seed in (0, 1):
        for arm, sae in (("cosine_topk", broken(tmp_path, "decode", math.nan)), ("topk", sound(tmp_path))):
            log = tuple(TrainingLogEntry(100 * i, math.nan if arm == "cosine_topk" else 0.5, 3.0, {}) for i in range(3))
            ce = math.nan if arm == "cosine_topk" else 0.9
            found = evaluate_reconstruction(sae, x)
            arms.append(ArmResult(arm, seed, f"{arm}/seed{seed}", found, ce, None, 1.0, log, hook_name=HOOK, k=32))
    settings = ComparisonSettings(arms=("topk", "cosine_topk"), seeds=2)
    comparison = Comparison(settings, (HookResult(HOOK, 7, 0.0, 0.0),), tuple(arms))
    found = json.loads(json.dumps(as_json(comparison), allow_nan=False))
    assert [arm["not_finite"] for arm in found["arms"]] == [3, 0, 3, 0]
    assert [arm["fve"] is None for arm in found["arms"]] == [True, False, True, False]
    assert found["arms"][0]["fve_by_norm_quartile"][0]["fve"] is None
    text = printed(comparison_tables(comparison))
    assert "Not finite" in text.split("held-out tokens")[0]
    assert "\x1b[31mnan\x1b[0m" in text
    draw(comparison, tmp_path / "comparison.png")
    assert (tmp_path / "comparison.png").stat().st_size > 1000
    page = render(comparison_page(comparison))
    assert f"<li>cosine_topk, seed 0: 3 of {len(x):,} tokens not finite, its figures are missing</li>" in page
    assert not re.search(r"[\[:,]NaN", page.split("<script>")[0])

import json
import math
from dataclasses import replace

import pytest
import torch
from sae_lens import JumpReLUSAE, JumpReLUSAEConfig
from sae_lens.saes.sae import TrainingSAE
from sae_lens.synthetic import (
    ActivationGenerator,
    ConstantFiringProbabilityConfig,
    FeatureDictionary,
    OrthogonalizationConfig,
    SyntheticModel,
    SyntheticModelConfig,
    SyntheticSAERunner,
    eval_sae_on_synthetic_data,
)
from sae_lens.synthetic.evals import ClassificationMetrics

from saelens_cosine.experiments.ground_truth import run as module
from saelens_cosine.experiments.ground_truth.planted import NormSpread, SinkDictionary, small_model
from saelens_cosine.experiments.ground_truth.recovery import Recovery, f1_one_to_one
from saelens_cosine.experiments.ground_truth.results import GroundTruth, GroundTruthRun
from saelens_cosine.experiments.ground_truth.run import ground_truth, load_model
from saelens_cosine.experiments.ground_truth.settings import SYNTH_SAE_BENCH_16K, GroundTruthSettings
from saelens_cosine.experiments.ground_truth.tables import as_json, as_tables, write_json

# 12 orthogonal features in 12 dimensions, two of them active
EASY = SyntheticModelConfig(
    num_features=12,
    hidden_dim=12,
    firing_probability=ConstantFiringProbabilityConfig(probability=1 / 6),
    orthogonalization=OrthogonalizationConfig(num_steps=100, lr=0.05),
    mean_firing_magnitudes=5.0,
    std_firing_magnitudes=0.5,
    seed=3,
)
TINY = GroundTruthSettings(
    arms=("inner_product_batchtopk", "cosine_batchtopk"),
    model=EASY,
    norm_spreads=(0.0,),
    seeds=1,
    samples=2_560,
    batch=128,
    eval_samples=500,
)


def test_norms_spread_by_one_log_normal_factor_per_token():
    before = torch.rand(40_000, 3) + 0.5
    after = NormSpread(0.5, None)(before, None)
    factors = after / before
    assert torch.allclose(factors[:, 0], factors[:, 2], rtol=1e-5)
    assert factors[:, 0].log().std().item() == pytest.approx(0.5, rel=0.02)
    assert factors[:, 0].pow(2).mean().item() == pytest.approx(1, rel=0.05)  # second moments stay
    assert torch.equal(NormSpread(0.0, None)(before, None), before)


def test_the_spread_comes_after_the_models_own_modifier():
    generator = ActivationGenerator(2, 1.0)
    out = NormSpread(1.0, lambda acts, g: acts * torch.tensor([1.0, 0.0]))(torch.ones(50, 2), generator)
    assert (out[:, 1] == 0).all()
    assert out[:, 0].std() > 0.1


def test_sinks_are_long_and_halfway_between_their_own_direction_and_a_shared_one():
    dictionary = FeatureDictionary(6, 20, bias=3.0, initializer=None, seed=0)
    acts = torch.rand(5000, 6) + 0.1
    with torch.no_grad():
        plain, planted = dictionary(acts), SinkDictionary(dictionary, 0.1, seed=1)(acts)
        other = SinkDictionary(dictionary, 0.1, seed=1)
    is_sink = (planted != plain).any(dim=-1)
    assert is_sink.double().mean().item() == pytest.approx(0.1, abs=0.015)
    own, sinks = plain - dictionary.bias, planted[is_sink] - dictionary.bias
    multiples = sinks.norm(dim=-1) / own.norm(dim=-1).median()
    assert 30 <= multiples.min() < 33
    assert 270 < multiples.max() <= 300.01
    assert multiples.log().mean().item() == pytest.approx(math.log(30 * 300) / 2, abs=0.1)
    cosine = torch.nn.functional.cosine_similarity
    assert torch.allclose(cosine(sinks, own[is_sink]), cosine(sinks, other.direction.expand_as(sinks)), atol=1e-4)
    assert SinkDictionary(dictionary, 0.1, seed=2).direction @ other.direction < 0.9


def test_known_features_are_recovered():
    (one, other) = ground_truth(replace(TINY, norm_spreads=(0.5,), samples=51_200)).runs
    for run in (one, other):  # now and then one of the 12 is not found, which costs about 0.1 of each
        assert run.without_sinks.mcc > 0.7  # a random decoder: 0.5
        assert run.without_sinks.classification.f1_score > 0.6
        assert run.without_sinks.explained_variance > 0.7
        assert run.without_sinks.sae_l0 == pytest.approx(2, abs=0.3)
        assert run.k == pytest.approx(2, abs=0.05)
        assert run.with_sinks is None
    assert one.norm_exponent is None
    assert other.norm_exponent[0] > 0


def test_the_saved_form_is_scored_on_the_same_samples_for_all_arms(monkeypatch):
    scored = []

    def record(sae, dictionary, generator, *args, **kwargs):
        scored.append((sae, dictionary(generator.sample(5))))
        return eval_sae_on_synthetic_data(sae, dictionary, generator, *args, **kwargs)

    monkeypatch.setattr(module, "eval_sae_on_synthetic_data", record)
    ground_truth(TINY)
    assert [sae.cfg.architecture() for sae, _ in scored] == ["jumprelu", "cosine_jumprelu"]
    assert not any(isinstance(sae, TrainingSAE) for sae, _ in scored)
    assert all((sae.threshold > 0).all() for sae, _ in scored)
    assert torch.equal(scored[0][1], scored[1][1])


def test_runs_repeat_and_leave_the_callers_random_state_alone():
    settings = replace(TINY, arms=("cosine_batchtopk",), sink_share=0.05)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    one = ground_truth(settings)
    assert torch.equal(torch.rand(3), expected)
    torch.manual_seed(6)
    two = ground_truth(settings)
    assert one.runs[0].without_sinks == two.runs[0].without_sinks
    assert one.runs[0].with_sinks == two.runs[0].with_sinks


def test_each_spread_is_planted_on_what_the_model_has(monkeypatch):
    planted = []

    def record(sae, dictionary, generator, *args, **kwargs):
        planted.append((generator.modify_activations.spread, generator.modify_activations.modifier))
        return eval_sae_on_synthetic_data(sae, dictionary, generator, *args, **kwargs)

    monkeypatch.setattr(module, "eval_sae_on_synthetic_data", record)
    ground_truth(replace(TINY, arms=("cosine_batchtopk",), model=small_model(), norm_spreads=(0.2, 0.7)))
    (low, hierarchy), (high, same_hierarchy) = planted
    assert (low, high) == (0.2, 0.7)
    assert hierarchy is same_hierarchy is not None  # not one spread on top of the other


def test_arms_train_on_the_same_samples_whatever_their_initialisation_draws(monkeypatch):
    states = []

    class Recorder(module.SyntheticSAERunner):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            torch.rand(1 + len(states))  # an arm that draws more than the one before

        def run(self):
            states.append(torch.get_rng_state())
            return super().run()

    monkeypatch.setattr(module, "SyntheticSAERunner", Recorder)
    ground_truth(TINY)
    assert torch.equal(*states)


def test_an_arm_does_not_depend_on_the_arms_before_it():
    settings = replace(TINY, sink_share=0.05, train_on_sinks=True)
    _, after_another = ground_truth(settings).runs
    (alone,) = ground_truth(replace(settings, arms=TINY.arms[1:])).runs
    assert after_another.without_sinks == alone.without_sinks
    assert after_another.with_sinks == alone.with_sinks


def test_sinks_are_scored_apart_and_trained_on_only_if_asked():
    settings = replace(TINY, arms=("inner_product_batchtopk",), sink_share=0.05)
    (left_out,) = ground_truth(settings).runs
    (trained_on,) = ground_truth(replace(settings, train_on_sinks=True)).runs
    (none_planted,) = ground_truth(replace(settings, sink_share=0.0)).runs
    assert left_out.without_sinks == none_planted.without_sinks
    assert left_out.with_sinks.mcc == left_out.without_sinks.mcc  # of the decoder
    assert left_out.with_sinks.sae_l0 > left_out.without_sinks.sae_l0
    assert trained_on.without_sinks.mcc != left_out.without_sinks.mcc


def test_seeds_make_models_and_a_folder_gives_one(tmp_path):
    one, two = (load_model(TINY, seed).feature_dict.feature_vectors for seed in (0, 1))
    assert torch.allclose(one.norm(dim=-1), torch.ones(12))
    assert (one @ two.T).abs().max() < 0.99
    by_saelens = SyntheticModel(EASY)
    assert torch.allclose(one, by_saelens.feature_dict.feature_vectors)
    by_saelens.save(tmp_path)
    from_disk = replace(TINY, model=str(tmp_path))
    assert all(torch.equal(load_model(from_disk, s).feature_dict.feature_vectors, one) for s in (0, 1))
    assert as_json(ground_truth(replace(from_disk, arms=("inner_product_topk",))))["settings"]["model"] == str(tmp_path)


@pytest.mark.parametrize("name", [SYNTH_SAE_BENCH_16K, "./nowhere"])
def test_a_model_that_is_not_there_says_what_was_tried(name):
    with pytest.raises(OSError, match=f"{name}.*as a folder or as a name on the Hub"):
        ground_truth(replace(TINY, model=name))


def result_of(mcc, dead=0):
    return Recovery(2.0, 2.1, dead, 1.0, 0.9, mcc, 1.0, ClassificationMetrics(0.5, 0.5, mcc / 2, 0.9), mcc / 3)


class Given:
    """Features' activations, in the order given."""

    def __init__(self, acts):
        self.acts, self.at = torch.tensor(acts), 0

    def sample(self, n):
        self.at += n
        return self.acts[self.at - n : self.at]


def test_f1_where_each_feature_may_be_claimed_once():
    # three orthogonal features; latents 0 and 1 both fire on the first, whose direction is nearest to both; 2 on the third
    acts = [[1.0, 0, 0], [2.0, 0, 0], [0, 1.0, 0], [0, 0, 1.0]]
    dictionary = FeatureDictionary(3, 3, initializer=None)
    dictionary.feature_vectors.data = torch.eye(3)
    sae = JumpReLUSAE(JumpReLUSAEConfig(d_in=3, d_sae=3))
    sae.W_dec.data = torch.tensor([[1.0, 0, 0], [0.9, 0.4, 0], [0, 0, 1]])
    sae.W_enc.data = torch.tensor([[1.0, 1, 0], [0, 0, 0], [0, 0, 1]])
    saelens = eval_sae_on_synthetic_data(sae, dictionary, Given(acts), 4, batch_size=4)
    assert saelens.classification.f1_score == 1  # of 1, 1, 1: the second feature is missed, and nothing says so
    # pairs 0-0, 1-1, 2-2: latent 1 never fires on its own feature
    assert f1_one_to_one(sae, dictionary, Given(acts), 4, batch=3) == pytest.approx(2 / 3)


def test_differences_json_and_table_by_hand(tmp_path):
    values = {"inner_product_batchtopk": (0.5, 0.6, 0.7), "cosine_batchtopk": (0.6, 0.7, 0.81)}
    runs = [
        GroundTruthRun(arm, 0.0, seed, 2.0, result_of(mcc), None, None, 1.0)
        for arm, by_seed in values.items()
        for seed, mcc in enumerate(by_seed)
    ]
    result = GroundTruth(replace(TINY, seeds=3), tuple(runs))
    difference = result.difference("mcc", "cosine_batchtopk", 0.0)
    # 0.1, 0.1, 0.11: sd 0.0057735, t 4.30265
    assert (difference.mean, difference.low) == pytest.approx((0.31 / 3, 0.31 / 3 - 4.30265 * 0.0057735 / 3**0.5))
    assert difference.seen
    write_json(result, tmp_path / "ground_truth.json")
    read = json.loads((tmp_path / "ground_truth.json").read_text())
    assert read["schema"] == "saelens-cosine/ground-truth/1"
    assert read["settings"]["model"]["firing_probability"]["generator_name"] == "constant"
    assert read["runs"][1]["without_sinks"]["classification"]["f1_score"] == pytest.approx(0.3)
    assert read["runs"][1]["without_sinks"]["f1_one_to_one"] == pytest.approx(0.2)
    assert {d["measure"] for d in read["differences"]} == {
        "mcc",
        "f1",
        "f1_one_to_one",
        "explained_variance",
        "dead",
        "l0",
    }
    means, differences = as_tables(result)
    assert list(means.columns[2].cells) == ["0.600±0.100", "0.703±0.105"]
    assert next(iter(differences.columns[3].cells)) == "+0.1033 (+0.0890 to +0.1177)"
    assert "no difference seen" in list(differences.columns[3].cells)[3]  # explained variance: 0.9 everywhere
    with pytest.raises(ValueError, match="sink_share=0"):
        result.values("mcc", "cosine_batchtopk", 0.0, sinks=True)


@pytest.mark.parametrize("bad", ["cosine_batchtopk", "batchtopk"])
def test_an_arm_whose_training_becomes_non_finite_is_named_and_the_others_go_on(bad, monkeypatch, tmp_path):
    whole = ground_truth(
        replace(TINY, arms=("inner_product_batchtopk", bad), norm_spreads=(0.0,), seeds=2, sink_share=0)
    )
    run = SyntheticSAERunner.run

    def poisoned(runner):
        result = run(runner)
        if result.sae.cfg.architecture() == bad:
            result.sae.W_enc.data[0, 0] = float("nan")
        return result

    monkeypatch.setattr(SyntheticSAERunner, "run", poisoned)
    result = ground_truth(whole.settings)
    assert [(run.architecture, run.seed) for run in result.failed] == [(bad, 0), (bad, 1)]
    assert "W_enc" in result.failed[0].reason
    first = [replace(run, seconds=0) for run in whole.runs if run.architecture != bad]
    assert [replace(run, seconds=0) for run in result.runs] == first
    write_json(result, tmp_path / "ground_truth.json")
    read = json.loads((tmp_path / "ground_truth.json").read_text())
    assert [run["architecture"] for run in read["failed"]] == [bad, bad]
    assert read["differences"] == []
    means, differences, stopped = as_tables(result)
    assert list(means.columns[2].cells)[1] == "none"
    assert set(differences.columns[3].cells) == {"none"}
    assert list(stopped.columns[1].cells) == [bad, bad]
    with pytest.raises(FloatingPointError, match=f"{bad}, seed 0: W_enc"):
        ground_truth(replace(whole.settings, arms=(bad,), seeds=1))


def test_a_difference_takes_the_seeds_that_both_arms_have():
    values = {"inner_product_batchtopk": {0: 0.5, 1: 0.6, 2: 0.7}, "cosine_batchtopk": {0: 0.6, 2: 0.8}}
    runs = [
        GroundTruthRun(arm, 0.0, seed, 2.0, result_of(mcc), None, None, 1.0)
        for arm, by_seed in values.items()
        for seed, mcc in by_seed.items()
    ]
    result = GroundTruth(replace(TINY, seeds=3), tuple(runs))
    assert result.difference("mcc", "cosine_batchtopk", 0.0).mean == pytest.approx(0.1)


def test_the_small_model_has_tokens_without_empty_ones_and_what_the_benchmark_has():
    model = load_model(GroundTruthSettings(model=small_model()), 0)
    torch.manual_seed(0)
    active = (model.activation_generator.sample(4000) > 0).sum(dim=-1).double()
    assert active.mean().item() == pytest.approx(6.5, abs=0.3)
    assert (active == 0).double().mean() < 0.05
    assert model.hierarchy is not None
    assert model.correlation_matrix is not None


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"arms": ("cosine",)}, "Unknown architecture 'cosine'"),
        ({"arms": ()}, "at least one architecture"),
        ({"norm_spreads": (0.5, -1.0)}, "none below 0"),
        ({"samples": 200}, "samples=200"),
        ({"sink_share": 0.7}, "sink_share=0.7"),
    ],
)
def test_settings_that_cannot_be_run_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        replace(TINY, **settings)

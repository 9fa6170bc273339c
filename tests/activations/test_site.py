import dataclasses
import json

import pytest
import torch

from saelens_cosine.activations.sample import TokenSample
from saelens_cosine.activations.site import Part, SinkTokens, Site, describe_site, site_lines


def sample_of(x, max_norm_multiple=10.0, sinks=(), length=4, tokens=None):
    """Contexts of `length` tokens, one after the other."""
    x = torch.as_tensor(x, dtype=torch.float32)
    n = torch.arange(len(x))
    ordinary = torch.ones(len(x), dtype=torch.bool)
    ordinary[list(sinks)] = False
    tokens = n if tokens is None else torch.tensor(tokens)
    return TokenSample(x, tokens, n // length, n // length, n % length, ordinary, max_norm_multiple)


# two contexts of four tokens; the first of each is a sink of norm 100, the others have norms 5, 5, 5, 4, 4, 3
X = [[100, 0], [3, 4], [3, -4], [5, 0], [0, 100], [4, 0], [0, -4], [3, 0]]


def test_a_site_by_hand():
    site = describe_site(sample_of(X, sinks=[0, 4], tokens=[7, 1, 1, 1, 7, 1, 1, 1]), "hook")
    # mean of all: (118, 96) / 8 = (14.75, 12), norm 19.0148; mean of squares: (10068 + 10048) / 8 = 2514.5
    # variance: 2514.5 - 14.75^2 - 12^2 = 2152.9375, its root 46.3998
    assert site.gamma == pytest.approx(19.0148 / 46.3998, rel=1e-5)
    # the six ordinary: mean (18, -4) / 6 = (3, -2/3), norm 3.07318; squares: 25 + 25 + 25 + 16 + 16 + 9 = 116
    # variance: 116 / 6 - 9 - 4/9 = 9.88889, its root 3.14466
    assert site.gamma_ordinary == pytest.approx(3.07318 / 3.14466, rel=1e-5)
    assert (site.hook_name, site.d_in, site.tokens, site.not_finite, site.contexts) == ("hook", 2, 8, 0, 2)
    # 3, 4, 4, 5, 5, 5, 100, 100: the lower median is the fourth; the 99th percentile is between two hundreds
    assert (site.median_norm, site.p99_norm, site.largest_ordinary_norm) == (5, 100, 5)
    sinks = SinkTokens(2, 0.25, 100, 100, (Part(0, 1),), (Part(7, 1),))
    assert site.sinks == sinks
    told = describe_site(sample_of(X, sinks=[0, 4], tokens=[7, 1, 1, 1, 7, 1, 1, 1]), "hook", {7: "<s>"}.__getitem__)
    assert told.sinks == dataclasses.replace(sinks, token_texts=("<s>",))


def test_without_a_bound_sinks_are_described_at_ten_times_the_median():
    with_bound = describe_site(sample_of(X, sinks=[0, 4]), "hook")
    assert describe_site(sample_of(X, max_norm_multiple=None), "hook") == with_bound
    assert with_bound.max_norm_multiple == 10


def test_a_bound_of_ones_own_is_kept():
    site = describe_site(sample_of(X, max_norm_multiple=30.0), "hook")  # no token is above 150
    assert (site.max_norm_multiple, site.sinks, site.largest_ordinary_norm) == (30, None, 100)
    assert site.gamma == site.gamma_ordinary


def test_gamma_is_the_mean_over_the_spread_whatever_the_rotation_and_the_scale():
    noise = torch.randn(1000, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noise -= noise.mean(dim=0)
    noise /= noise.square().sum(dim=-1).mean().sqrt()  # a spread of 1 around 0
    shift = torch.zeros(6, dtype=torch.float64)
    shift[2] = 3
    turn = torch.linalg.qr(noise[:6].T @ noise[:6])[0]
    for x in (noise + shift, (noise + shift) @ turn, 1000 * (noise + shift)):
        assert describe_site(sample_of(x), "hook").gamma == pytest.approx(3, rel=1e-5)


def test_a_small_spread_around_a_large_mean_is_not_lost():
    # 4096 and 4097 in turn: the spread is 1/2; squares in float32 would leave nothing of it
    x = torch.tensor([[4096.0], [4097.0]]).repeat(5000, 1)
    assert describe_site(sample_of(x), "hook").gamma == pytest.approx(4096.5 / 0.5)


def test_tokens_that_are_all_the_same_have_no_gamma():
    site = describe_site(sample_of([[3.0, 4.0]] * 4), "hook")
    assert (site.gamma, site.gamma_ordinary, site.median_norm) == (None, None, 5)
    assert "gamma (||mean|| / ||standard deviation||) undefined;" in site_lines(site)[0]


def test_at_most_five_positions_the_most_frequent_first():
    x = torch.ones(200, 3)
    sinks = [0, 20, 40, 1, 21, 2, 3, 4, 5, 6]  # in contexts of 20: position 0 three times, 1 twice, 2 to 6 once
    x[sinks] = 50
    site = describe_site(sample_of(x, sinks=sinks, length=20), "hook")
    assert site.sinks is not None
    assert site.sinks.positions == (Part(0, 0.3), Part(1, 0.2), Part(2, 0.1), Part(3, 0.1), Part(4, 0.1))
    assert [part.value for part in site.sinks.token_ids] == [0, 1, 2, 3, 4]


def test_tokens_that_are_not_finite_are_counted_and_left_out():
    bad = [*X, [float("nan"), 0], [float("inf"), 1]]
    site = describe_site(sample_of(bad, sinks=[0, 4]), "hook")
    whole = describe_site(sample_of(X, sinks=[0, 4]), "hook")
    assert site == dataclasses.replace(whole, not_finite=2)
    assert "2 tokens are not finite and left out" in site_lines(site)[0]


@pytest.mark.parametrize("x", [torch.zeros(0, 2), torch.zeros(3, 2), torch.full((3, 2), torch.nan)])
def test_nothing_to_describe(x):
    with pytest.raises(ValueError, match=rf"Of {len(x)} tokens at hook"):
        describe_site(sample_of(x), "hook")


def test_lines_for_a_terminal():
    tokens = (Part(11, 0.75), Part(5, 0.246), Part(3, 0.004))  # the last is too rare to be named
    sinks = SinkTokens(16, 1 / 128, 24991.6, 25100.2, (Part(0, 1.0),), tokens, ("The", "\n", "rare"))
    site = Site("model.layers.15", 576, 2048, 0, 16, 1.234, 0.5678, 151.4, 24900.0, 219.2, 10.0, sinks)
    assert site_lines(site) == [
        "model.layers.15: gamma (||mean|| / ||standard deviation||) 1.23 with sinks, 0.568 without; 2,048 tokens in 16 contexts, d_in 576.",
        "Norms: median 151, 99 % up to 24,900, the largest ordinary one 219.",
        "Sinks: 0.78% of the tokens are above 10 times the median norm, 24,992 in the median and 25,100 at most; at positions 0 (100%);"
        r" tokens 'The' (75%), '\n' (25%).",
    ]
    by_id = dataclasses.replace(site, sinks=dataclasses.replace(sinks, token_texts=None))
    assert "tokens 11 (75%), 5 (25%)." in site_lines(by_id)[-1]
    rare = dataclasses.replace(sinks, positions=(Part(3, 0.002), Part(5, 0.001)))
    assert rare.shown_positions == "3 (0%)"
    none = site_lines(dataclasses.replace(site, sinks=None, gamma=0.04))
    assert none[0].startswith("model.layers.15: gamma (||mean|| / ||standard deviation||) 0.0400; 2,048 tokens")
    assert none[-1] == "No sinks: no token is above 10 times the median norm."
    assert json.loads(json.dumps(dataclasses.asdict(site)))["sinks"]["positions"] == [{"value": 0, "share": 1.0}]

"""Sixty steps of SAELens' trainer against the paper's training loop, written down again in plain float64.

The loop below follows the released recipe B step by step, in its authors' layout (`W_enc` is `[F, d]`), and shares no
code with this package or with SAELens: own median, selection, auxiliary loss, projection, clipping, Adam and schedule.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.registry import get_sae_training_class
from sae_lens.training.sae_trainer import SAETrainer

import saelens_cosine  # noqa: F401  (registers the architectures)

D, F, K, B = 12, 64, 3, 32
STEPS, WARM_UP, DECAY, LR = 60, 7, 12, 3e-3  # decay over the last 20 %
THRESHOLD_LR, THRESHOLD_START = 0.01, 10
DEAD_TOKENS = 64  # two batches
ARMS = [f"{score}_{k}" for k in ("batchtopk", "topk") for score in ("inner_product", "cosine", "per_feature_cosine")]


def planted_batches() -> list[torch.Tensor]:
    """Tokens `offset + scale * (3 of 24 planted directions) + noise`: frequencies fall off, scales spread e-fold."""
    rng = torch.Generator().manual_seed(7)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=rng, dtype=torch.float64)

    directions = torch.nn.functional.normalize(normal(24, D), dim=-1)
    frequency = 1 / torch.arange(1, 25, dtype=torch.float64)
    offset = 2 * normal(D)
    batches = []
    for _ in range(STEPS):
        planted = torch.multinomial(frequency.expand(B, -1), 3, generator=rng)
        codes = torch.zeros(B, 24, dtype=torch.float64).scatter(1, planted, normal(B, 3).abs() + 1)
        batches.append(offset + normal(B, 1).exp() * (codes @ directions) + 0.1 * normal(B, D))
    return batches


def make_sae(arm: str, **settings):
    torch.manual_seed(0)
    sae_class, config_class = get_sae_training_class(arm)
    if arm.endswith("batchtopk"):
        settings = {"topk_threshold_lr": THRESHOLD_LR, "topk_threshold_start_step": THRESHOLD_START, **settings}
    return sae_class(
        config_class(d_in=D, d_sae=F, k=K, dtype="float64", dead_feature_window_tokens=DEAD_TOKENS, **settings)
    )


def train(sae, batches: list[torch.Tensor]):
    config = SAETrainerConfig(
        total_training_samples=STEPS * B,
        train_batch_size_samples=B,
        lr=LR,
        lr_end=LR / 10,  # what the runner fills in; a constant schedule ignores it and decays from lr to 0
        lr_warm_up_steps=WARM_UP,
        lr_decay_steps=DECAY,
        logger=LoggingConfig(log_to_wandb=False),
    )
    return SAETrainer(config, sae, iter(batches)).fit()


def authors_layout(sae) -> dict[str, torch.Tensor]:
    """The learned tensors, `W_enc` as `[F, d]`, with the paper's `a` and `b`."""
    names = {"W_enc": "W_enc", "b_enc": "b_enc", "W_dec": "W_dec", "b_dec": "b_dec"}
    if hasattr(sae, "norm_exponent"):
        names |= {"a": "norm_exponent", "b": "log_scale"}
    tensors = {short: getattr(sae, name).detach().clone() for short, name in names.items()}
    tensors["W_enc"] = tensors["W_enc"].T.clone()
    return tensors


class Reference(NamedTuple):
    tensors: dict[str, torch.Tensor]
    dead_counts: list[int]  # features that were dead at each step
    n_aux_steps: int  # steps whose auxiliary loss had a code above 0


def authors_loop(arm: str, start: dict[str, torch.Tensor], batches: list[torch.Tensor], change: str = "") -> Reference:
    """The paper's recipe, with the sections of its specification beside the steps; `change` breaks one of them."""
    p = {name: tensor.clone() for name, tensor in start.items()}
    m = {name: torch.zeros_like(tensor) for name, tensor in p.items()}
    v = {name: torch.zeros_like(tensor) for name, tensor in p.items()}
    since_fired = torch.zeros(F, dtype=torch.int64)
    threshold = None
    dead_counts, n_aux_steps = [], 0

    for s, x in enumerate(batches):
        if s == 0 and change != "b_dec stays 0":  # 5.1.2: geometric median, Weiszfeld from the mean
            centre = x.mean(0)
            for _ in range(100):
                weight = 1 / torch.linalg.vector_norm(x - centre, dim=1).clamp(min=1e-8)
                moved = (weight / weight.sum()) @ x
                step = torch.linalg.vector_norm(moved - centre)
                centre = moved
                if step < 1e-5:
                    break
            p["b_dec"] = centre
        q = {name: tensor.clone().requires_grad_() for name, tensor in p.items()}

        # 1.2 and 2.2: score, n from the centred input, encoder rows normalised here and nowhere else
        x_c = x - q["b_dec"]
        if arm.startswith("inner_product"):
            score = x_c @ q["W_enc"].T + q["b_enc"]
        else:
            n = ((x if change == "raw norm" else x_c) ** 2).sum(1, keepdim=True).sqrt()
            u = x_c / (x_c**2).sum(1, keepdim=True).sqrt()
            w = q["W_enc"] / (q["W_enc"] ** 2).sum(1, keepdim=True).sqrt()
            score = torch.exp(q["a"] * torch.log(n) + q["b"]) * (u @ w.T) + q["b_enc"]
        rectified = score.clamp(min=0)

        # 3.1 and 3.3: the K * B largest of the batch, or the K largest of each token
        if "batchtopk" in arm:
            chosen = torch.zeros(B * F, dtype=torch.bool)
            chosen[rectified.detach().flatten().argsort(descending=True)[: K * B]] = True
            chosen = chosen.reshape(B, F)
        else:
            chosen = rectified.detach().argsort(dim=1, descending=True).argsort(dim=1) < K
        z = rectified * chosen
        x_hat = z @ q["W_dec"] + q["b_dec"]
        loss = ((x - x_hat) ** 2).sum(1).mean()  # 4.1

        # 4.2: counters first, then the dead set, then the loss on what the live features leave
        fired = z.detach().sum(0) > 0
        before = since_fired
        since_fired = torch.where(fired, 0, since_fired + B)
        dead = (before if change == "dead set before counters" else since_fired) >= DEAD_TOKENS
        dead_counts.append(int(dead.sum()))
        k_aux = dead_counts[-1] if change == "all dead features" else min(D // 2, dead_counts[-1])
        if k_aux > 0 and change != "no aux":
            of_dead = (score if change == "raw aux scores" else rectified).masked_fill(~dead, -math.inf)
            z_aux = torch.zeros(B, F, dtype=torch.float64)
            for token in range(B):
                top = of_dead[token].detach().argsort(descending=True)[:k_aux]
                z_aux[token, top] = of_dead[token, top]
            e = (x - x_hat).detach()
            variance = 1.0 if change == "aux not normalised" else ((e - e.mean(0)) ** 2).sum(1).mean().clamp(min=1e-8)
            loss = loss + ((e - z_aux @ q["W_dec"]) ** 2).sum(1).mean() / variance / 32
            n_aux_steps += int((z_aux > 0).any())

        g = dict(zip(q, torch.autograd.grad(loss, list(q.values())), strict=True))

        # 5.1.4 and 5.1.5: decoder gradient tangent to the sphere, then one clip over all parameters
        if change != "no projection":
            g["W_dec"] = g["W_dec"] - (g["W_dec"] * p["W_dec"]).sum(1, keepdim=True) * p["W_dec"]
        total = math.sqrt(sum(float((gradient**2).sum()) for gradient in g.values()))
        clip = 1.0 if change == "no clip" else min(1.0, 1.0 / (total + 1e-6))

        # 5.2. One documented deviation: the authors' factor is s / W, so that their first step has learning rate 0 and
        # is wasted; SAELens' is (s + 1) / W. From there on both are 1, then fall linearly to 0 over the last 20 %.
        rate = LR * min(1.0, (s + 1) / WARM_UP, (STEPS - s) / DECAY)
        if change == "authors' warm-up":
            rate = LR * min(1.0, s / WARM_UP, (STEPS - s) / DECAY)
        for name in p:  # Adam, no weight decay
            m[name] = 0.9 * m[name] + 0.1 * clip * g[name]
            v[name] = 0.999 * v[name] + 0.001 * (clip * g[name]) ** 2
            m_hat, v_hat = m[name] / (1 - 0.9 ** (s + 1)), v[name] / (1 - 0.999 ** (s + 1))
            p[name] = p[name] - rate * m_hat / (v_hat.sqrt() + 1e-8)
        if change != "rows left free":  # 5.1.7. The package does it at the start of the next step and in eval mode
            p["W_dec"] = p["W_dec"] / (p["W_dec"] ** 2).sum(1, keepdim=True).sqrt().clamp(min=1e-8)

        if s >= (0 if change == "threshold from step 0" else THRESHOLD_START):  # 3.2
            smallest = min(value for value in z.detach().flatten().tolist() if value > 0)
            threshold = smallest if threshold is None else (1 - THRESHOLD_LR) * threshold + THRESHOLD_LR * smallest

    p["tokens_since_fired"] = since_fired
    if "batchtopk" in arm:
        p["topk_threshold"] = torch.tensor(threshold, dtype=torch.float64)
    return Reference(p, dead_counts, n_aux_steps)


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Largest difference, relative to the tensor's largest entry."""
    return float((ours - theirs).abs().max() / theirs.abs().max())


@pytest.mark.parametrize("arm", ARMS)
def test_start_is_the_papers(arm):
    start = authors_layout(make_sae(arm))
    torch.testing.assert_close(start["W_dec"].norm(dim=1), torch.ones(F, dtype=torch.float64))
    assert torch.equal(start["W_enc"], start["W_dec"])
    assert not start["b_enc"].any()
    assert not start["b_dec"].any()  # the geometric median comes with the first batch
    if not arm.startswith("inner_product"):
        shape = (F,) if arm.startswith("per_feature") else ()
        torch.testing.assert_close(start["a"], torch.zeros(shape, dtype=torch.float64))
        torch.testing.assert_close(start["b"], torch.full(shape, 0.5 * math.log(12), dtype=torch.float64))


@pytest.mark.parametrize("kernels", ["reference", "fast"])
@pytest.mark.parametrize("arm", ARMS)
def test_trainer_repeats_the_papers_loop(arm, kernels):
    sae, batches = make_sae(arm, kernels=kernels), planted_batches()
    start = authors_layout(sae)
    expected, dead_counts, n_aux_steps = authors_loop(arm, start, batches)
    ours = authors_layout(train(sae, batches).eval())

    # the run exercised what it is meant to compare: few and many dead features, the auxiliary loss, rows that
    # left the sphere, exponents that moved
    assert min(dead_counts) < D // 2 < max(dead_counts)
    assert n_aux_steps >= STEPS // 2
    assert dead_counts[-1] > 0
    assert ((expected["W_enc"].norm(dim=1) - 1).abs() > 0.01).sum() >= F // 8
    if "a" in expected:
        assert expected["a"].abs().max() > 0.02
        assert (expected["b"] - start["b"]).abs().max() > 0.02

    for name, tensor in ours.items():
        assert difference(tensor, expected[name]) < 1e-8, name
    assert torch.equal(sae.tokens_since_fired, expected["tokens_since_fired"])
    if "batchtopk" in arm:
        assert sae.topk_threshold.dtype == torch.float64
        assert difference(sae.topk_threshold, expected["topk_threshold"]) < 1e-8


@pytest.mark.parametrize(
    "change",
    [
        "b_dec stays 0",
        "raw norm",
        "dead set before counters",
        "no aux",
        "all dead features",
        "raw aux scores",
        "aux not normalised",
        "no projection",
        "no clip",
        "authors' warm-up",
        "rows left free",
        "threshold from step 0",
    ],
)
def test_the_comparison_notices_each_part(change):
    """Breaking one part of the loop moves the result by far more than the 1e-8 that the comparison allows."""
    arm, batches = "per_feature_cosine_batchtopk", planted_batches()
    start = authors_layout(make_sae(arm))
    expected, changed = (authors_loop(arm, start, batches, what).tensors for what in ("", change))
    assert max(difference(changed[name], expected[name]) for name in [*start, "topk_threshold"]) > 1e-5

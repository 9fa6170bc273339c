"""An SAE whose features are split over ranks against the same SAE in one piece."""

import copy

import pytest
import torch
from helpers import FAST, TRAINING, make_activations, make_sae, selector_of, train_step
from thread_world import over_ranks

from saelens_cosine.kernels.codes import EntryCodes
from saelens_cosine.kernels.whole import HERE
from saelens_cosine.ranks.split import edges_of, joined, split

D, F, K, B, STEPS = 12, 29, 2, 12, 6
SIZE = {"d_in": D, "d_sae": F, "dtype": "float64", "dead_feature_window_tokens": B}

PATHS = [(name, path) for name in TRAINING for path in ("reference", "fast") if path == "reference" or name in FAST]

OPTIONS = [
    ("per_feature_cosine_batchtopk", {"exponent_sharing": "groups", "n_exponent_groups": 4, "norm_exponent_l2": 0.3}),
    ("per_feature_cosine_topk", {"exponent_sharing": "groups", "n_exponent_groups": F}),
    (
        "per_feature_cosine_batchtopk",
        {"exponent_sharing": "base_delta", "norm_exponent_variance_penalty": 0.5, "norm_exponent_l2": 0.1},
    ),
    (
        "per_feature_cosine_topk",
        {"norm_exponent_dropout": 0.4, "relative_exponent_penalties": True, "norm_exponent_l2": 0.2},
    ),
    ("cosine_batchtopk", {"norm_exponent_l2": 0.3, "log_scale_from_data": True, "b_dec_init": "mean"}),
    ("cosine_batchtopk", {"unit_decoder": False, "decoder_init_norm": 0.1, "rescale_acts_by_decoder_norm": True}),
    ("inner_product_topk", {"unit_decoder": False, "rescale_acts_by_decoder_norm": True, "normalize_aux_loss": False}),
    ("cosine_abstopk", {"normalize_aux_loss": False}),
    ("cosine_jumprelu", {"jumprelu_sparsity_loss_mode": "tanh", "relative_l0_loss": False}),
    ("inner_product_jumprelu", {"jumprelu_sparsity_loss_mode": "step", "pre_act_loss_coefficient": 0.1}),
    ("cosine_standard", {"lp_norm": 1.5, "aux_loss_coefficient": 0.1, "normalize_aux_loss": False}),
    ("cosine_matryoshka_batchtopk", {"matryoshka_widths": [5, 14, 15, F], "use_matryoshka_aux_loss": True}),
    ("magnitude_bypass_batchtopk", {"unit_encoder": False, "topk_threshold_start_step": 2}),
    ("magnitude_bypass_topk", {"restore_output_norm": False}),
    ("top_afa", {"k_min": 2, "k_max": 5, "match": "first_exceed"}),
    (
        "top_afa",
        {
            "rescale_acts_by_decoder_norm": False,
            "unit_decoder": True,
            "normalize_activations": "layer_norm",
            "aux_loss_coefficient": 0.0,
        },
    ),
    ("cosine_topk", {"token_weighting": "inverse_norm", "cosine_loss_weight": 0.5}),
    ("per_feature_cosine_gated", {"apply_b_dec_to_input": False}),
]


def made(name, kernels, **options):
    if "k" not in options and selector_of(name) in ("topk", "abstopk", "batchtopk", "matryoshka_batchtopk"):
        options["k"] = K
    if name.endswith("jumprelu"):
        options.setdefault("target_l0", 4.0)
    sae = make_sae(name, kernels=kernels, **{**SIZE, **options}).train()
    sae.tokens_since_fired[::3] = B  # some are dead from the start
    for bias in (
        (getattr(sae, "b_enc", None), getattr(sae, "b_gate", None))
        if selector_of(name) in ("standard", "gated")
        else ()
    ):
        if bias is not None:
            bias.data[::3] -= 10  # and stay so
    return sae


@torch.no_grad()
def descend(sae):
    """A step of bounded size that amplifies no rounding, as Adam does where gradients are near zero."""
    for p in sae.parameters():
        if p.grad is not None:
            p -= 1e-2 * p.grad / (1 + p.grad.abs())
            p.grad = None


def trained(sae, steps=STEPS):
    """Losses, metrics and paths of some steps; the SAE is changed."""
    told = []
    for step in range(steps):
        x = make_activations(B if step != 3 else 5, D, seed=step, dtype=torch.float64)
        output = train_step(sae, x, step, logging=True)
        output.loss.backward()
        descend(sae)
        numbers = {**output.losses, **output.metrics, "loss": output.loss}
        told.append(
            ({key: float(value) for key, value in numbers.items()}, isinstance(output.feature_acts, EntryCodes))
        )
    return told


def check_ranks(name, kernels, size, **options):
    sae = made(name, kernels, **options)
    parts = [copy.deepcopy(sae) for _ in range(size)]

    def run(world):
        part = split(parts[world.rank], world)
        told = trained(part)
        return told, joined(part)

    expected, found = trained(sae), over_ranks(size, run)
    assert all(fast == (kernels == "fast") for _, fast in expected)
    assert (
        any(numbers.get("auxiliary_reconstruction_loss") for numbers, _ in expected) or not sae.cfg.aux_loss_coefficient
    )
    for told, whole in found:
        for (numbers, fast), (theirs, their_path) in zip(expected, told, strict=True):
            for key, number in numbers.items():  # SAELens keeps thresholds in float32
                exact = 1e-6 if key.startswith("threshold") else 1e-10
                assert theirs.pop(key) == pytest.approx(number, rel=exact, abs=1e-12), key
            assert not theirs
            assert their_path == fast
        assert whole.cfg.d_sae == F
        assert whole.whole is HERE
        state = whole.state_dict()
        assert state.keys() == sae.state_dict().keys()
        for key, tensor in sae.state_dict().items():
            exact = 1e-6 if tensor.dtype == torch.float32 else 1e-12
            torch.testing.assert_close(state[key], tensor, rtol=exact, atol=exact, msg=lambda m, key=key: f"{key}: {m}")
            assert state[key].stride() == tensor.stride(), key


@pytest.mark.parametrize(("name", "kernels"), PATHS)
def test_every_architecture_over_ranks(name, kernels):
    check_ranks(name, kernels, 3)


@pytest.mark.parametrize("name", ["per_feature_cosine_batchtopk", "inner_product_topk", "top_afa", "cosine_jumprelu"])
def test_blocks_may_be_shorter_or_empty(name):
    # ceil(29 / 12) = 3: nine blocks of 3, one of 2, two empty ones
    assert edges_of(F, 12)[-4:] == [27, 29, 29, 29]
    check_ranks(name, "fast" if name in FAST else "reference", 12)


@pytest.mark.parametrize(("name", "options"), OPTIONS)
def test_options_over_ranks(name, options):
    for kernels in ("reference", "fast") if name in FAST else ("reference",):
        check_ranks(name, kernels, 2, **options)

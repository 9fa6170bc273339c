"""Run on each rank: SAELens' trainer over all of them against the same trainer in one process, for every architecture.

The first rank writes, for each case, the largest difference of each tensor over the largest value of it.
"""

import copy
import json
from pathlib import Path

import torch
import torch.distributed as dist
from helpers import FAST, TRAINING, make_sae, make_trainer, planted_batches, selector_of

from saelens_cosine.ranks.team import Team

D, F, B = 12, 29, 24
STEPS = {"both": 20, "fastest": 8}
"""Of each training, by the paths that are taken: fewer where more ranks take turns on the same cores."""


def trainer_of(sae, steps):
    data = planted_batches(d_in=D, n_features=20, active=3, batch=B)
    return make_trainer(sae, data, steps=steps, batch=B)


def numbers(trainer):
    moments = {
        f"{name}.{key}": value
        for (name, parameter) in trainer.sae.named_parameters()
        for key, value in trainer.optimizer.state.get(parameter, {}).items()
    }
    counts = {name: getattr(trainer, name) for name in ("act_freq_scores", "n_forward_passes_since_fired")}
    return {**trainer.sae.state_dict(), **moments, **counts}


def difference(name, ours, theirs):
    """Over the largest value; of biases, some of which start at zero, over the size of activations and scores, which is one."""
    ours, theirs = ours.double(), theirs.double()
    least = 1.0 if name in ("b_dec", "b_enc", "b_gate", "b_mag", "r_mag") else 1e-300
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp_min(least)) if theirs.numel() else 0.0


def compared(name, kernels, dtype, steps, **options):
    k = {"k": 3} if selector_of(name) in ("topk", "abstopk", "batchtopk", "matryoshka_batchtopk") else {}
    sae = make_sae(
        name, kernels=kernels, d_in=D, d_sae=F, dtype=dtype, dead_feature_window_tokens=2 * B, **{**k, **options}
    )
    sae.tokens_since_fired[::3] = 2 * B
    many = trainer_of(copy.deepcopy(sae), steps)
    Team("cpu").split(many)
    held = many.sae.W_dec.shape[0]
    many.fit()
    assert many.sae.cfg.d_sae == F
    assert held < F
    if dist.get_rank() > 0:
        return {}
    one = trainer_of(sae, steps)
    one.fit()
    expected, found = numbers(one), numbers(many)
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    return {key: difference(key, found[key], value) for key, value in expected.items()}


def main(file, dtype, paths):
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    cases = {
        f"{name} {kernels}": compared(name, kernels, dtype, STEPS[paths])
        for name in TRAINING
        for kernels in ("reference", "fast")
        if (name in FAST) == (kernels == "fast") or (paths == "both" and kernels == "reference")
    }
    further = (
        ("cosine_topk", {"normalize_activations": "expected_average_only_in"}),
        ("per_feature_cosine_batchtopk", {"exponent_sharing": "groups", "n_exponent_groups": 4}),
        ("per_feature_cosine_batchtopk", {"exponent_sharing": "base_delta"}),
    )
    for name, options in further if paths == "both" else ():
        cases[f"{name} {options}"] = compared(name, "auto", dtype, STEPS[paths], **options)
    if dist.get_rank() == 0:
        Path(file).write_text(json.dumps(cases))
    dist.destroy_process_group()
    return 0

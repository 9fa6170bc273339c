"""Foreign SAEs against their publishers' formulas."""

import torch
from foreign import D_IN, D_SAE, formula
from helpers import codes_and_output, make_activations


def activations(n=400):
    return make_activations(n, D_IN, seed=5, spread=0.7) * 3


def assert_computes(sae, source, folder, x=None, tolerance=1e-5):
    """Same active features as the formula, codes and output within the tolerance of the largest."""
    x = (activations() if x is None else x).to(sae.dtype)
    expected = formula(source, folder, x)
    assert 0.3 < (expected[0] != 0).sum(-1).float().mean() < D_SAE - 1
    codes, output = codes_and_output(sae, x)
    assert torch.equal(codes != 0, expected[0] != 0)
    for ours, theirs in ((codes, expected[0]), (output, expected[1])):
        assert (ours.double() - theirs).abs().max() <= tolerance * theirs.abs().max()

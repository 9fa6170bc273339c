"""SAELens' trainer, unmodified, over processes that gloo joins."""

import json

import pytest
from helpers import FAST, TRAINING


@pytest.mark.parametrize(("size", "dtype", "paths"), [(2, "float64", "both"), (4, "float32", "fastest")])
def test_every_architecture_is_that_of_one_process(size, dtype, paths, ranks, tmp_path):
    file = tmp_path / "differences.json"
    found = ranks(*[["every-architecture", file, dtype, paths]] * size)
    assert found["statuses"] == [0] * size, found["told"][0][-3000:]
    cases = json.loads(file.read_text())
    assert len(cases) == {"both": len(TRAINING) + len(FAST) + 3, "fastest": len(TRAINING)}[paths]
    for case, differences in cases.items():
        # a trained JumpReLU's thresholds are float32 in SAELens whatever the rest is
        exact = 1e-6 if dtype == "float32" or "jumprelu" in case else 1e-12
        for name, difference in differences.items():
            # Adam turns a gradient near zero, such as that of a column's length, into a step of its own; the gradients of a top-AFA SAE's
            # b_dec, through the encoder and past it, all but cancel
            cancels = "top_afa" in case and dtype == "float64"
            room = 10_000 if cancels else 10 if "exp_avg" in name or "bypass" in case else 1
            assert difference <= room * exact, (case, name)

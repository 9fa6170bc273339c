import os
import subprocess
import sys
from pathlib import Path

import torch

DRAWS = """
import variation
variation.apply()
import torch
torch.manual_seed(0)
print(torch.get_num_threads(), torch.rand(()).item(), torch.rand((), generator=torch.Generator().manual_seed(3)).item())
"""


def draws(**variables: str) -> list[str]:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), **variables}
    run = subprocess.run([sys.executable, "-c", DRAWS], capture_output=True, text=True, check=True, env=environment)
    return run.stdout.split()


def test_another_seed_and_more_threads_reach_whatever_draws():
    expected = []
    for seed in (7, 10):  # 0 and 3, moved by 7
        state = torch.random.get_rng_state()
        torch.default_generator.manual_seed(seed)
        expected.append(str(torch.rand(()).item()))
        torch.random.set_rng_state(state)
    assert draws(TEST_SEED_OFFSET="7", TEST_THREADS="2") == ["2", *expected]

"""The tests with other seeds and more threads than their own, to see what hangs on the last bits of a training:

    TEST_SEED_OFFSET=3 TEST_THREADS=2 ATEN_CPU_CAPABILITY=default OMP_NUM_THREADS=2 python -m pytest

Every seed that torch is given, by a test, by the package or in a tutorial, is moved by the offset, so that weights, data and
training are all others. `ATEN_CPU_CAPABILITY` (`default`, `avx2`) is torch's own: other instructions, other last bits.
"""

import os

import torch

SEED_OFFSET = int(os.environ.get("TEST_SEED_OFFSET", "0"))
THREADS = int(os.environ.get("TEST_THREADS", "1"))


def apply() -> None:
    """To be called once in a process, before anything draws."""
    torch.set_num_threads(THREADS)
    if not SEED_OFFSET:
        return
    manual_seed = torch.manual_seed

    class Generator(torch.Generator):
        def manual_seed(self, seed):
            return super().manual_seed(seed + SEED_OFFSET)

    torch.Generator = Generator
    torch.manual_seed = torch.random.manual_seed = lambda seed: manual_seed(seed + SEED_OFFSET)

"""Diagnostics hold active codes only: a twentieth of 100,000 tokens x 65,536 features, where one dense matrix is 1.3 GB."""

import json
import sys

import pytest
from helpers import run_python

# only the first 8,192 features fire often: pairs of features cost time, not memory. The same for 1,000 tokens to encode, a quarter of a GiB if dense
PEAKS = """
import ctypes, gc, json
from pathlib import Path
import numpy as np
import torch
from scipy import sparse
from sae_lens import JumpReLUSAE, JumpReLUSAEConfig
from saelens_cosine.metrics import codes as blocks
from saelens_cosine.metrics.reconstruction.afa import measure_afa
from saelens_cosine.metrics.codes import sparse_codes
from saelens_cosine.metrics.dictionary.cofiring import cofiring
from saelens_cosine.metrics.probing.decomposition import decompose
from saelens_cosine.metrics.dictionary.geometry import decoder_geometry
from saelens_cosine.metrics.dictionary.matching import match_codes
from saelens_cosine.metrics.norms.norm_detectors import norm_detectors
from saelens_cosine.metrics.probing.probing import pool, probe
from saelens_cosine.metrics.reconstruction.by_norm import diagnose_reconstruction

blocks.FEWEST_TOKENS = 64  # at a time, a quarter of what it is
torch.set_num_threads(1)
torch.manual_seed(0)
rng = np.random.default_rng(0)
D_IN, D_SAE, OFTEN, TOKENS = 16, 65536, 8192, 5000
active = np.concatenate([rng.integers(OFTEN, size=(TOKENS, 64)), rng.integers(D_SAE, size=(TOKENS, 2))], axis=1)
row = np.repeat(np.arange(TOKENS, dtype=np.int32), 66)
codes = sparse.csr_array((rng.random(row.size, np.float32), (row, active.ravel().astype(np.int32))), shape=(TOKENS, D_SAE))
sae = JumpReLUSAE(JumpReLUSAEConfig(d_in=D_IN, d_sae=D_SAE)).eval()
W_dec = torch.nn.functional.normalize(torch.randn(D_SAE, D_IN), dim=-1)
sae.W_dec.data, sae.W_enc.data = W_dec, W_dec.T.contiguous()
sae.threshold.data.fill_(0.7)
x = torch.nn.functional.normalize(torch.randn(1000, D_IN), dim=-1)
contexts, labels, matched = torch.arange(TOKENS) // 100, np.arange(TOKENS // 100) % 2, range(OFTEN)

def memory(key):
    line = next(line for line in open("/proc/self/status") if line.startswith(key))
    return int(line.split()[1]) * 1024 / 2**30

def once(f, *arguments):
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    result = f(*arguments)
    peaks[f.__name__] = memory("VmHWM") - before
    return result

peaks = {}
pooled = once(pool, codes, contexts, TOKENS // 100)
once(probe, pooled, labels)
once(decompose, pooled, pooled, labels, matched, matched, (1,))
once(match_codes, codes, codes, W_dec, W_dec)
once(cofiring, codes)
once(norm_detectors, codes, torch.rand(TOKENS))
once(decoder_geometry, sae, range(12288))  # all pairs are 600 MB
encoded = once(sparse_codes, sae, x)
once(diagnose_reconstruction, sae, x)
once(measure_afa, sae, x)
print(json.dumps([encoded.nnz / len(x), encoded.data.nbytes + encoded.indices.nbytes, peaks]))
"""

DENSE_AT_ONCE = {"sparse_codes", "diagnose_reconstruction", "measure_afa"}
"""Those that encode: 16 MiB of dense codes at a time here, and what an SAE makes of them. The others hold blocks of pairs of features."""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
def test_nothing_makes_codes_dense(monkeypatch):
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", str(2**20))  # so that freed blocks go back to the system at once
    result = run_python(PEAKS)
    assert result.returncode == 0, result.stderr
    l0, size, peaks = json.loads(result.stdout.splitlines()[-1])
    assert 50 < l0 < 120
    assert size == pytest.approx(8 * l0 * 1000)  # float32 values, int32 indices
    for name, gib in peaks.items():
        assert gib < (0.2 if name in DENSE_AT_ONCE else 0.3), (name, peaks)

"""Loading costs the SAE and little more: a small file always, the published size where asked for."""

import json
import os
import shutil
import sys

import pytest
from foreign import write
from helpers import run_python

FULL_SIZE = "SAELENS_COSINE_FULL_SIZE"
SOURCES = ["standard", "perfeature", "bypass", "BatchTopKSAE", "sparsify"]

# clear_refs resets the peak, so that what an import needed does not hide what a load needs
PEAKS = """
import ctypes, gc, json, sys, time
from pathlib import Path
import torch
from saelens_cosine.loading import from_pretrained
torch.set_num_threads(1)

def memory(key):
    line = next(line for line in open("/proc/self/status") if line.startswith(key))
    return int(line.split()[1]) * 1024

found = {}
for folder in map(Path, sys.argv[1:]):
    size = max(file.stat().st_size for file in folder.iterdir())
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    start = time.perf_counter()
    sae = from_pretrained(folder)
    seconds = time.perf_counter() - start
    found[folder.name] = {"size": size, "peak": (memory("VmHWM") - before) / size, "seconds": seconds}
    del sae
print(json.dumps(found))
"""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")


def measure(sources, path, d_in, d_sae):
    warm = write("perfeature", path / "warm")  # what the first load allocates once
    folders = [write(source, path / source, d_in=d_in, d_sae=d_sae) for source in sources]
    result = run_python(PEAKS, warm, *folders)
    for folder in folders:
        shutil.rmtree(folder)  # pytest would keep the files of three runs
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    del found["warm"]
    return found


def test_peak_of_a_small_file(tmp_path, monkeypatch):
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", str(2**20))  # so that freed blocks go back to the system at once
    found = measure(SOURCES, tmp_path, d_in=256, d_sae=16384)
    for source in SOURCES:
        assert found[source]["size"] > 2 * 256 * 16384 * 4
        assert 0.9 < found[source]["peak"] < 1.3, (source, found)


@pytest.mark.skipif(FULL_SIZE not in os.environ, reason=f"writes and reads 2.1 GB per layout; set {FULL_SIZE}=1")
@pytest.mark.parametrize("source", SOURCES)
def test_peak_of_the_published_size(source, tmp_path):
    found = measure([source], tmp_path, d_in=4096, d_sae=65536)[source]
    print(f"{source}: {found['size'] / 1e9:.2f} GB, peak {found['peak']:.3f} of it, {found['seconds']:.1f} s")
    assert found["size"] > 2.1e9
    assert found["peak"] < 1.3

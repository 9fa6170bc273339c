"""`scripts/gpu_report.sh`: what is measured wherever a GPU is, and its report."""

import importlib.util
import json
import subprocess
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location("gpu_report", SCRIPTS / "gpu_report.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def row(arm, step, saelens, floor, **changes):
    size = {"d_in": 64, "d_sae": 512, "batch": 256, "k": 8}
    ratios = {"step_ms": step, "step_spread_ms": [step - 1, step + 1]}
    ratios |= {"ratio_to_saelens": saelens, "ratio_to_floor": floor}
    return {"arm": arm, **size, **ratios, "peak_bytes_over_state": 3_000_000, "encode_ms": 1.0, "encode_sparse_ms": 0.5} | changes  # fmt: skip


def test_a_fast_step_that_misses_a_goal_is_marked(script):
    rows = [
        row("saelens_topk", 12.0, 1.0, 6.0, encode_sparse_ms=None, peak_bytes_over_state=None),
        row("cosine_topk/fast", 4.2, 0.35, 2.1),
        row("cosine_batchtopk/fast", 3.0, 0.25, 1.5),
    ]
    told = script.table([{"floor_ms": 2.0, "rows": rows}]).splitlines()
    assert told[2:] == [
        "| 64, 512, 256, 8 | `saelens_topk` | 12.0 | 11.0 to 13.0 | 1.000 | 6.000 |  | 1.0 |",
        "| 64, 512, 256, 8 | `cosine_topk/fast` | 4.2 | 3.2 to 5.2 | 0.350 (> 0.33) | 2.100 (> 1.6) | 3 | 1.0, 0.5 |",
        "| 64, 512, 256, 8 | `cosine_batchtopk/fast` | 3.0 | 2.0 to 4.0 | 0.250 | 1.500 | 3 | 1.0, 0.5 |",
        "| 64, 512, 256, 8 | floor | 2.0 |  |  |  |  |  |",
    ]


def test_the_report_has_tests_sizes_in_order_and_a_profile(script, tmp_path):
    (tmp_path / "tests.txt").write_text("1\n2\n3\n4\n5\n6 skipped\n")
    for batch in (512, 256):
        found = {"floor_ms": 1.0, "rows": [row("saelens_topk", 12.0, 1.0, 6.0, batch=batch)]}
        (tmp_path / f"float32-64,512,{batch},8.json").write_text(json.dumps(found))
    (tmp_path / "failed.txt").write_text("bfloat16 1,2,3,4\n")
    told = script.report(tmp_path, "cpu", "16,64,32,4")
    assert "    2\n" in told
    assert "    1\n" not in told
    assert told.index("64, 512, 256, 8") < told.index("64, 512, 512, 8")
    assert "## Not measured\n\nbfloat16 1,2,3,4" in told
    assert "Self CPU" in told


def test_the_command_is_a_script_that_can_be_read():
    subprocess.run(["bash", "-n", SCRIPTS / "gpu_report.sh"], check=True)

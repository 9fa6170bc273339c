import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

TUTORIALS = Path(__file__).parent.parent / "tutorials"
TRAIN, STEER, WIN = "01_train_a_cosine_sae.ipynb", "02_load_and_steer.ipynb", "03_does_cosine_win.ipynb"
SHRINK = {
    TRAIN: {"TRAINING_TOKENS = 800_000": "TRAINING_TOKENS = 40_960", "d_sae=1024": "d_sae=128"},
    STEER: {
        "TRAINING_TOKENS = 500_000": "TRAINING_TOKENS = 40_960",
        "d_sae=1024": "d_sae=256",
        "files=80": "files=30",
        "per_file=8": "per_file=2",
    },
    WIN: {
        '    "per_feature_cosine_batchtopk",\n    "magnitude_bypass_batchtopk",\n    "top_afa",\n)': ")",
        "SEEDS = 3": "SEEDS = 1",
        "TRAINING_TOKENS = 300_000": "TRAINING_TOKENS = 8_192",
        "D_SAE, K = 1024, 16": "D_SAE, K = 64, 4",
        "EVAL_TOKENS, LOSS_TOKENS, TASK_TEXTS = 30_000, 8_000, 240": "EVAL_TOKENS, LOSS_TOKENS, TASK_TEXTS = 2_048, 256, 20",
        "CAUSAL_CONTEXTS, CAUSAL_FEATURES, CONCEPT_TEXTS = 100, 40, 40": "CAUSAL_CONTEXTS, CAUSAL_FEATURES, CONCEPT_TEXTS = 12, 2, 4",
        'TASKS = ("bundled",)': 'TASKS = ("bundled:loop",)',
        '    "sae_probes:158_code_C",\n    "sae_probes:57_wikidatais_alive",\n': "",
        '    "sae_probes:96_spam_is",\n    "sae_probes:105_click_bait",\n': "",
        "REAL[:3]": "REAL[:1]",
        '"n_eval_reconstruction_batches": 8, "n_eval_sparsity_variance_batches": 32': '"n_eval_reconstruction_batches": 1, "n_eval_sparsity_variance_batches": 1',
        "samples=60_000": "samples=2_048",
    },
}


def run_shrunk(name, folder):
    """What the notebook prints with fewer tokens and features."""
    notebook = nbformat.read(TUTORIALS / name, as_version=4)
    sources = "\n".join(cell.source for cell in notebook.cells)
    for old, new in SHRINK[name].items():
        assert sources.count(old) == 1, f"{old!r} stands {sources.count(old)} times in {name}"
        for cell in notebook.cells:
            cell.source = cell.source.replace(old, new)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(folder)}}).execute()
    return "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))


def number(printed, after):
    """The number that first follows a text."""
    return float(printed.split(after)[1].split()[0].strip(",;:"))


def test_training_tutorial_runs_shrunk(tmp_path):
    printed = run_shrunk(TRAIN, tmp_path)
    assert "PerFeatureCosineJumpReLUSAE" in printed
    assert 0.1 < number(printed, "FVE ") < 1
    losses = [float(word.strip(";")) for word in printed.split("loss ")[1].split() if word[0].isdigit()][:3]
    assert losses[1] == pytest.approx(losses[0], abs=2e-4)  # with the error term the model is its own
    assert losses[2] > losses[0]


def test_steering_tutorial_runs_shrunk(tmp_path):
    printed = run_shrunk(STEER, tmp_path)
    assert "PerFeatureCosineJumpReLUSAE" in printed
    assert number(printed, "with the error term: ") < 1e-3

    # active features switched off one at a time, the one that matters most first
    first, *others = printed.split("P(' None') is ")[1].split("\n")[:4]
    without = [float(line.split(": ")[1]) for line in others]
    assert without == sorted(without)
    assert without[0] < float(first.split(". ")[0])
    for batch in ("any text", "best contexts"):
        lines = printed.split(f"{batch}: KL ")[1].split("\n")[1:4]
        active, later, earlier = (float(line.split(" tokens,")[0].split()[-3]) for line in lines)
        assert active > later
        assert not earlier > 0  # nan where it is active from the first token on

    rows = {name: printed.split(f"\n{name} ")[1].split("\n")[0].split() for name in ("inner product", "cosine")}
    assert [row[0] for row in rows.values()] == ["jumprelu", "cosine_jumprelu"]
    for row in rows.values():  # the threshold was fitted on other text
        assert float(row[2]) == pytest.approx(number(printed.split("as trained  ")[1], " L0 "), rel=0.3)


def test_comparison_tutorial_runs_shrunk(tmp_path):
    pytest.importorskip("sae_bench")
    printed = run_shrunk(WIN, tmp_path)
    # one token of a context of 128 is a sink in every world
    dropped = dict(re.findall(r"(\w+): ([\d.]+)% of the training tokens dropped", printed))
    assert float(dropped["natural"]) == float(dropped["planted"]) == 0
    assert float(dropped["removed"]) == pytest.approx(100 / 128, abs=0.1)
    found = re.findall(r"^([a-z, ]+): ([\d.]+)% of the tokens are sinks, ([\d.]+) times", printed, re.M)
    assert [name for name, *_ in found] == ["natural", "removed", "removed, then planted", "planted"]
    assert all(float(share) == pytest.approx(100 / 128, abs=0.1) for _, share, _ in found)
    assert [float(multiple) > 30 for *_, multiple in found] == [False, False, True, True]
    assert "probing k=all, scale-free" in printed
    assert "Recovery of known features" in printed
    assert (tmp_path / "output/does_cosine_win/report.html").stat().st_size > 100_000


@pytest.mark.parametrize(("name", "pictures"), [(TRAIN, 3), (STEER, 4), (WIN, 3)])
def test_tutorial_is_committed_with_its_outputs(name, pictures):
    notebook = nbformat.read(TUTORIALS / name, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in code)
    outputs = [output for cell in code for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= pictures
    assert not [output for output in outputs if output.output_type == "error"]
    assert not [output for output in outputs if output.get("name") == "stderr"]

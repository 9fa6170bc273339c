from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

TUTORIALS = Path(__file__).parent.parent / "tutorials"
SHRINK = {"TRAINING_TOKENS = 800_000": "TRAINING_TOKENS = 40_960", "d_sae=1024": "d_sae=128"}


@pytest.mark.parametrize("name", ["01_train_a_cosine_sae.ipynb"])
def test_tutorial_runs_shrunk(name, tmp_path):
    notebook = nbformat.read(TUTORIALS / name, as_version=4)
    sources = "\n".join(cell.source for cell in notebook.cells)
    for old, new in SHRINK.items():
        assert sources.count(old) == 1, f"{old!r} stands {sources.count(old)} times in {name}"
        for cell in notebook.cells:
            cell.source = cell.source.replace(old, new)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    printed = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))
    assert "PerFeatureCosineJumpReLUSAE" in printed
    fve = float(printed.split("FVE ")[1].split(",")[0])
    assert 0.1 < fve < 1
    losses = [float(word.strip(";")) for word in printed.split("loss ")[1].split() if word[0].isdigit()][:3]
    assert losses[1] == pytest.approx(losses[0], abs=2e-4)  # with the error term the model is its own
    assert losses[2] > losses[0]


@pytest.mark.parametrize("name", ["01_train_a_cosine_sae.ipynb"])
def test_tutorial_is_committed_with_its_outputs(name):
    notebook = nbformat.read(TUTORIALS / name, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in code)
    outputs = [output for cell in code for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 3
    assert not [output for output in outputs if output.output_type == "error"]

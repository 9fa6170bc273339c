"""One evaluation for all tests of a module."""

import pytest
from saved_evaluations import SETTINGS, saved_sae

from saelens_cosine.experiments.evaluate.run import evaluate


@pytest.fixture(scope="module")
def run(tmp_path_factory, short_text):
    """Its folder, the SAEs `one` and `two`, and what was found."""
    folder = tmp_path_factory.mktemp("evaluate")
    sources = [saved_sae(folder / "one"), saved_sae(folder / "two", seed=2)]
    return folder, sources, evaluate(sources, SETTINGS, folder / "out")

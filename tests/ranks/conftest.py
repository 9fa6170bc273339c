"""Ranks for all tests of this room: one process that has imported everything, in each worker."""

import pytest
from forked_ranks import ForkedRanks
from small_runs import write_text


@pytest.fixture(scope="session")
def ranks():
    server = ForkedRanks()
    yield server
    server.close()


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "text.jsonl")

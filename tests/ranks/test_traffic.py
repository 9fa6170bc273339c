"""What ranks move between them, against its formula."""

import json

import pytest

from saelens_cosine.cli import main
from saelens_cosine.ranks.traffic import formula

ARMS = [
    f"{score}_{selector}/fast"
    for score in ("inner_product", "cosine", "per_feature_cosine")
    for selector in ("batchtopk", "topk")
]


def test_formula_by_hand():
    # 100 tokens of 8 floats, 3 active features, 6 parameters
    found = formula("cosine_batchtopk", tokens=100, d_in=8, k=3, parameters=6)
    cut = 4 * 2 * 256 * 8 + 3 * 8 + 4
    assert found["all_reduce"] == (1 + 1 + 2 + 4 + 3 + 1 + 1 + 1, 3200 + 32 + 8 + cut + 8 + 24)
    assert found["all_gather"] == (1, 24)
    # of a TopK the cut is the k best of each token, and counts of each
    found = formula("per_feature_cosine_topk", tokens=100, d_in=8, k=3, parameters=6)
    assert found["all_reduce"] == (1 + 1 + 1 + 1 + 1 + 1, 3200 + 32 + 800 + 4 + 8 + 24)
    assert found["all_gather"] == (1 + 1 + 1, 1200 + 1600 + 24)
    with pytest.raises(ValueError, match="no formula for 'cosine_gated'"):
        formula("cosine_gated", 100, 8, 3, 6)


@pytest.mark.parametrize("size", [2, 3])
def test_steps_move_what_the_formula_says(size, ranks, tmp_path):
    file = tmp_path / "ranks.json"
    sizes = ["--d-in", 24, "--d-sae", 301, "--batch", 64, "--k", 5, "--repeats", 3]
    found = ranks(*[["benchmark", "--distributed", "--arms", *ARMS, *sizes, "--json", file]] * size)
    assert found["statuses"] == [0] * size, found["told"]
    content = json.loads(file.read_text())
    assert (content["schema"], content["ranks"]) == ("saelens-cosine/benchmark-ranks/1", size)
    assert [row["arm"] for row in content["rows"]] == ARMS
    for row in content["rows"]:
        assert row["measured"] == row["formula"], row["arm"]
        assert row["equal"] is True
        assert 0 < row["waiting"] + row["moving"] < 1


def test_ranks_are_measured_under_torchrun(capsys):
    assert main(["benchmark", "--distributed"]) == 2
    assert "torchrun --nproc-per-node 2 -m saelens_cosine benchmark --distributed" in capsys.readouterr().err

"""Arms, seeds and names of the SAEs that are evaluated."""

import pytest

from saelens_cosine.evaluation.sources import Source, parse_sources


def arms(*texts):
    return [(source.arm, source.seed) for source in parse_sources(texts)]


def test_a_comparison_s_folders_are_seeds_of_their_arms():
    texts = [f"runs/compare/{arm}/seed{i}" for i in range(2) for arm in ("inner", "cosine")]
    assert arms(*texts) == [("inner", 0), ("inner", 1), ("cosine", 0), ("cosine", 1)]  # arm by arm
    assert parse_sources(texts)[1].place == "runs/compare/inner/seed1"


def test_names_are_as_short_as_they_can_be():
    assert arms("a/sae", "b/sae", "c/other/") == [("a/sae", 0), ("b/sae", 0), ("other", 0)]
    assert arms("x/one/seed0", "y/one/seed0") == [("x/one", 0), ("y/one", 0)]  # no seeds of one arm
    assert arms("repo/saes#layer_1", "repo/saes#layer_2") == [("layer_1", 0), ("layer_2", 0)]
    assert arms("repo/one#0", "repo/two#0") == [("one/0", 0), ("two/0", 0)]


def test_arms_by_name():
    found = parse_sources(["std=x/a", "y/b", "std=z#id"])
    assert found == (Source("std", 0, "x/a", None), Source("std", 1, "z", "id"), Source("b", 0, "y/b", None))
    assert found[1].name == "z#id"
    assert arms("folder=with/equals=sign") == [("folder", 0)]
    assert arms("some/folder=x") == [("folder=x", 0)]  # a path, not a name


@pytest.mark.parametrize(
    ("texts", "message"), [([], "at least one"), (["#id"], "names no SAE"), (["x/a", "arm=x/a"], "'?x/a'? is named")]
)
def test_refusals(texts, message):
    with pytest.raises(ValueError, match=message):
        parse_sources(texts)

"""Arms, seeds and names of the SAEs that are evaluated."""

import json

import pytest

from saelens_cosine.experiments.evaluate.sources import Source, pair_seeds, parse_sources


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
    ("texts", "message"),
    [
        ([], "at least one"),
        (["#id"], "names no SAE"),
        (["x/a", "arm=x/a"], "'?x/a'? is named"),
        (["arm=x/seed1", "arm=y/seed1"], "x/seed1 and y/seed1 are both seed 1 of 'arm'"),
    ],
)
def test_refusals(texts, message):
    with pytest.raises(ValueError, match=message):
        parse_sources(texts)


def test_seeds_have_their_own_numbers():
    assert arms("x/ip/seed2", "x/ip/seed0", "y/cos/seed12") == [("ip", 0), ("ip", 2), ("cos", 12)]
    assert arms("mine=x/seed3", "mine=y/other", "mine=z/another") == [("mine", 0), ("mine", 1), ("mine", 3)]
    assert arms("mine=y/a", "mine=x/seed0") == [("mine", 0), ("mine", 1)]  # 0 is taken
    assert parse_sources(["mine=y/a", "mine=x/seed0"])[0].place == "x/seed0"
    assert arms("repo/saes#ip/seed1", "repo/saes#ip/seed0") == [("ip", 0), ("ip", 1)]


def test_seeds_are_paired_by_their_numbers():
    assert pair_seeds([0, 2], [0, 1, 2]) == {0: 0, 2: 2}
    assert pair_seeds([0, 1], [1, 2]) == {1: 1}
    assert pair_seeds([3], [0, 1]) == {}
    assert pair_seeds([3], [0]) == {3: 0}  # nothing to mistake it for


def compared(folder, *order, seeds=2):
    """Files of a comparison with these arms, first the control; its folders as a shell's `*` lists them."""
    entries = [{"path": f"{arm}/seed{seed}"} for seed in range(seeds) for arm in order]
    folder.mkdir(exist_ok=True)
    (folder / "comparison.json").write_text(json.dumps({"arms": entries}))
    return [str(folder / arm / "seed0") for arm in sorted(order)]


def test_a_comparison_s_arms_are_in_its_order(tmp_path):
    folders = compared(tmp_path / "run", "top_afa", "inner_product_topk", "cosine_topk")
    found = [source.arm for source in parse_sources(folders)]
    assert found == ["top_afa", "inner_product_topk", "cosine_topk"]
    assert arms("x/mine", *folders)[0] == ("top_afa", 0)
    assert [arm for arm, _ in arms(*(f"{i}={folder}" for i, folder in enumerate(folders)))] == ["2", "1", "0"]
    assert arms("control=x/mine", *folders)[0] == ("control", 0)  # somebody means it


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"arms": 3}', '{"arms": {"a": 1}}', '{"arms": [{"path": 3}]}', "\x00"]
)
def test_a_broken_comparison_orders_nothing(text, tmp_path):
    (tmp_path / "comparison.json").write_text(text)
    with pytest.warns(UserWarning, match=r"comparison\.json is damaged"):
        assert [arm for arm, _ in arms(*(f"{tmp_path}/{arm}/seed0" for arm in "ba"))] == ["b", "a"]


def test_the_standard_score_is_the_control(tmp_path):
    assert [arm for arm, _ in arms("x/cosine_topk", "x/inner_product_topk")] == ["inner_product_topk", "cosine_topk"]
    trained = tmp_path / "one" / "seed0"
    trained.mkdir(parents=True)
    config = {"architecture": "jumprelu", "metadata": {"training_architecture": "inner_product_batchtopk"}}
    (trained / "cfg.json").write_text(json.dumps(config))
    assert [arm for arm, _ in arms("x/cosine_topk", str(trained), "x/other")] == ["one", "cosine_topk", "other"]
    assert [arm for arm, _ in arms("mine=x/cosine_topk", str(trained))] == ["mine", "one"]
    (trained / "cfg.json").write_text('{"metadata": 3}')
    assert [arm for arm, _ in arms("x/cosine_topk", str(trained))] == ["cosine_topk", "one"]


def test_the_baseline_can_be_chosen(tmp_path):
    folders = compared(tmp_path / "run", "inner_product_topk", "cosine_topk")
    assert [source.arm for source in parse_sources(folders, "cosine_topk")] == ["cosine_topk", "inner_product_topk"]
    with pytest.raises(ValueError, match="'magic'.*cosine_topk, inner_product_topk"):
        parse_sources(folders, "magic")

"""A comparison's folder as what is evaluated: its SAEs hook by hook, k by k and seed by seed, each against the control's."""

import io
import json
import re
from pathlib import Path

import pytest
from page_parts import charts, content
from rich.console import Console
from saved_comparison import ARMS, HOOKS, saved_comparison
from saved_evaluations import saved_sae, with_evals

from saelens_cosine.experiments.evaluate.command import as_tables
from saelens_cosine.experiments.evaluate.loader import Loader
from saelens_cosine.experiments.evaluate.page import evaluation_page
from saelens_cosine.experiments.evaluate.run import evaluate, in_turn
from saelens_cosine.experiments.evaluate.sources import parse_sources
from saelens_cosine.experiments.evaluate.subject import Text

pytestmark = pytest.mark.usefixtures("short_text")


@pytest.fixture(scope="module")
def grid(tmp_path_factory):
    """Two hooks, two ks and two seeds of two arms."""
    folder = tmp_path_factory.mktemp("grid") / "compare"
    return folder, saved_comparison(folder, hooks=HOOKS, ks=(4, 8))


@pytest.fixture(scope="module")
def found(grid, short_text):
    settings = with_evals("tokens", "reconstruction", "matching")
    return evaluate([str(grid[0])], settings, grid[0].parent / "out")


CONDITIONS = ["layer1 k4", "layer1 k8", "layer3 k4", "layer3 k8"]


def test_a_comparison_stands_for_its_saes(tmp_path):
    paths = saved_comparison(tmp_path / "run", schema=1)
    sources = parse_sources([f"{tmp_path}/run/"])
    assert [(s.arm, s.seed, s.condition, s.k) for s in sources] == [
        ("inner_product_topk", 0, "", 4),
        ("inner_product_topk", 1, "", 4),
        ("cosine_topk", 0, "", 4),
        ("cosine_topk", 1, "", 4),
    ]
    assert sources == parse_sources([f"{tmp_path}/run/{path}" for path in sorted(paths)])
    assert parse_sources([str(tmp_path / "run")], "cosine_topk")[0].arm == "cosine_topk"


def test_conditions_are_told_apart_however_they_are_named(grid):
    folder, paths = grid
    sources = parse_sources([str(folder)])
    assert [(s.arm, s.condition, s.seed) for s in sources] == [
        (arm, condition, seed) for arm in ARMS for condition in CONDITIONS for seed in (0, 1)
    ]
    by_glob = parse_sources(sorted(f"{folder}/{path}" for path in paths))
    assert by_glob == sources
    assert {s.hook for s in sources} == set(HOOKS.values())
    chosen = [f"{folder}/{path}" for path in paths if "layer3" in path]
    assert {s.condition for s in parse_sources(chosen)} == {"k4", "k8"}
    (one,) = {s.condition for s in parse_sources([place for place in chosen if "k8" in place])}
    assert one == ""
    named = parse_sources([f"mine={place}" for place in chosen if "cosine" in place and "seed0" in place])
    assert [(s.arm, s.condition, s.seed) for s in named] == [("mine", "k4", 0), ("mine", "k8", 0)]


def test_hooks_without_a_layer_of_their_own_go_by_their_names(tmp_path):
    hooks = {name: name for name in ("blocks.3.hook_resid_pre", "blocks.3.hook_resid_post")}
    saved_comparison(tmp_path, hooks=hooks, seeds=1)
    assert {s.condition for s in parse_sources([str(tmp_path)])} == set(hooks)


def test_saes_are_measured_hook_by_hook_and_seed_by_seed(grid):
    order = in_turn(parse_sources([str(grid[0])]))
    assert [f"{s.place}".removeprefix(f"{grid[0]}/") for s in order] == grid[1]


def test_arms_are_compared_within_a_condition(found, grid):
    document = found.document()
    where = {sae["place"]: sae for sae in document["saes"]}
    for path in grid[1]:
        sae = where[f"{grid[0]}/{path}"]
        arm, hook, k, seed = path.split("/")
        assert (sae["arm"], sae["condition"], sae["k"]) == (arm, f"{hook} {k}", int(k[1:]))
        assert document["texts"][sae["text"]]["hook"] == HOOKS[hook]
        against = f"{grid[0]}/{ARMS[0]}/{hook}/{k}/seed{0 if arm == ARMS[0] else seed[4:]}"
        assert sae["baseline"] == (None if against == sae["place"] else against)
    assert [text["hook"] for text in document["texts"]] == list(HOOKS.values())
    l0 = [item for item in document["differences"] if item["measure"] == "FVE, sinks out"]
    assert [(item["arm"], item["condition"], item["over"]) for item in l0] == [
        ("cosine_topk", condition, ["seeds"]) for condition in CONDITIONS
    ]
    values = {sae["place"]: sae["figures"]["reconstruction"]["FVE, sinks out"] for sae in document["saes"]}
    for item in l0:
        hook, k = item["condition"].split()
        theirs, ours = ([values[f"{grid[0]}/{arm}/{hook}/{k}/seed{i}"] for i in (0, 1)] for arm in ARMS)
        assert item["difference"]["mean"] == pytest.approx(sum(ours) / 2 - sum(theirs) / 2)
    assert document["unpaired"] == document["on_other_tokens"] == []
    assert all(
        sae["training"] == {"training_tokens": [100, 200], "fve": [0.5] * 2, "l0": [sae["k"]] * 2}
        for sae in where.values()
    )


def test_tables_have_a_row_for_each_condition(found):
    console = Console(width=200, file=io.StringIO())
    for table in as_tables(found):
        console.print(table)
    text = console.file.getvalue()
    assert len(re.findall(r"layer1 k4 +cosine_topk +2 +sinks out", text)) == 1
    assert [f"Other figures, mean over seeds, {condition}" in text for condition in CONDITIONS] == [True] * 4
    assert re.search(r"layer3 k8 +cosine_topk +FVE, sinks in +2 seeds", text)


def test_the_page_shows_each_condition(found):
    page = evaluation_page(found)
    tables = {section: [item.label for item in content(page, section)] for section in ("comparison", "figures")}
    assert tables["comparison"] == [f"Comparison of the arms, {condition}" for condition in CONDITIONS]
    assert len(tables["figures"]) >= 5
    assert list(charts(page, "curves")) == [f"{name}, {c}" for c in CONDITIONS for name in ("FVE", "L0")]
    drawn = list(charts(page, "reconstruction"))
    assert len(drawn) % 4 == 0
    assert [title for title in drawn if title.endswith(CONDITIONS[0])] == drawn[: len(drawn) // 4]
    assert page.arms.names == ARMS
    assert page.facts["conditions"] == "; ".join(CONDITIONS)


def test_each_text_is_made_once_and_freed_before_the_next(grid, monkeypatch, tmp_path):
    made, freed = [], []
    forget = Text.forget
    monkeypatch.setattr(Text, "forget", lambda text: (freed.append((text.hook, len(made))), forget(text)))
    subject = Loader.subject

    def loaded(loader, source, baseline=None):
        found = subject(loader, source, baseline)
        made.append((source.place, found.text))
        return found

    monkeypatch.setattr(Loader, "subject", loaded)
    evaluate([str(grid[0])], with_evals("reconstruction"), tmp_path / "out")
    assert len(made) == len({place for place, _ in made}) == 16  # no SAE is loaded twice to be a partner
    assert len({id(text) for _, text in made}) == 2
    assert len({id(text.model) for _, text in made}) == 1
    assert freed == [(HOOKS["layer1"], 8), (HOOKS["layer3"], 16)]


def test_a_single_sae_stands_in_the_condition_that_its_config_tells(grid, tmp_path):
    alone = saved_sae(tmp_path / "alone", seed=99)
    sources = parse_sources([str(grid[0]), alone])
    mine = sources[-1]
    assert (mine.arm, mine.condition) == ("alone", f"layer3 k{mine.k}")
    other = saved_comparison(tmp_path / "second", arms=("top_afa",), ks=(8,), seeds=1)
    sources = parse_sources([str(grid[0]), str(tmp_path / "second")])
    assert [(s.arm, s.condition) for s in sources if s.place.endswith(other[0])] == [("top_afa", "layer3 k8")]


def test_a_baseline_without_a_condition_is_that_of_all(grid, tmp_path):
    alone = saved_sae(tmp_path / "alone", seed=99, name="cosine_batchtopk")
    config = json.loads((Path(alone) / "cfg.json").read_text())
    config["metadata"].pop("training_architecture_details", None)  # the only one to tell its k
    (Path(alone) / "cfg.json").write_text(json.dumps(config))
    at_3 = [f"{grid[0]}/{path}" for path in grid[1] if "layer3" in path]
    sources = parse_sources([*at_3, alone], "alone")
    assert (sources[0].condition, sources[0].k) == ("", None)
    found = evaluate([*at_3, alone], with_evals("reconstruction"), tmp_path / "out", baseline="alone")
    document = found.document()
    assert {sae["baseline"] for sae in document["saes"]} == {None, alone}
    both = {(item["arm"], item["condition"]) for item in document["differences"] + document["unpaired"]}
    assert {arm for arm, _ in both} <= {*ARMS, "alone"}
    assert {condition for _, condition in both} == {"k4", "k8"}
    assert [list(part.arms) for part in found.by_condition.values()] == [["alone", *ARMS]] * 2


def test_a_condition_that_the_control_lacks_is_said(grid, tmp_path):
    places = [f"{grid[0]}/{path}" for path in grid[1] if "layer3" in path and path != f"{ARMS[0]}/layer3/k8/seed1"]
    partly = evaluate(places, with_evals("reconstruction"), tmp_path / "out").document()
    assert partly["unpaired"] == [{"arm": "cosine_topk", "condition": "k8", "seed": 1, "without": ARMS[0]}]
    without = [place for place in places if f"{ARMS[0]}/layer3/k8" not in place]
    found = evaluate(without, with_evals("reconstruction"), tmp_path / "out")
    assert {item.condition for item in found.differences} == {"k4"}
    assert [(item["condition"], item["seed"]) for item in found.unpaired] == [("k8", 0), ("k8", 1)]
    evaluation_page(found)
    as_tables(found)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"schema": "saelens-cosine/comparison/3"}, ValueError, r"has schema 'saelens-cosine/comparison/3'.*Update"),
        ({"arms": []}, ValueError, "lists no SAE"),
        ({"arms": 3}, ValueError, r"comparison\.json is damaged"),
        ({"arms": [{"path": "../elsewhere/seed0"}]}, ValueError, r"damaged .*relative path"),
        ({"arms": [{"path": "a/seed0"}, {"path": "b/seed0"}]}, FileNotFoundError, "not there: a/seed0, b/seed0"),
    ],
)
def test_a_comparison_that_gives_no_saes(change, error, message, tmp_path):
    (tmp_path / "comparison.json").write_text(
        json.dumps({"schema": "saelens-cosine/comparison/2", "arms": []} | change)
    )
    with pytest.raises(error, match=message):
        parse_sources([str(tmp_path)])


def test_a_comparison_has_no_arm_s_name(grid):
    with pytest.raises(ValueError, match=rf"mine=.*as in mine={grid[0]}/inner_product_topk/layer1/k4/seed0"):
        parse_sources([f"mine={grid[0]}"])
    with pytest.raises(ValueError, match="seed0 is named 2 times"):
        parse_sources([str(grid[0]), f"{grid[0]}/{grid[1][0]}"])

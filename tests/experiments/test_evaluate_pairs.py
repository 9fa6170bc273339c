"""Seeds of arms, and what an SAE is compared with."""

import pytest
from page_parts import table
from sae_lens import SAE
from saved_evaluations import HOOK, TASKS, saved_sae, with_evals

from saelens_cosine.experiments.evaluate.evals import EVALS, Eval
from saelens_cosine.experiments.evaluate.page import evaluation_page
from saelens_cosine.experiments.evaluate.run import evaluate

pytestmark = pytest.mark.usefixtures("short_text")


def test_seeds_of_an_arm_are_averaged_and_paired(run, tmp_path):
    sources = [saved_sae(tmp_path / arm / f"seed{i}", seed=10 * j + i) for j, arm in enumerate("ab") for i in range(2)]
    found = evaluate(sources, with_evals("reconstruction", "matching"), tmp_path / "out")
    document = found.document()
    assert [(entry["arm"], entry["seed"]) for entry in document["saes"]] == [("a", 0), ("a", 1), ("b", 0), ("b", 1)]
    assert [entry["baseline"] for entry in document["saes"]] == [None, *(sources[i] for i in (0, 0, 1))]
    a, b = ([found.saes[i].compared["L0, sinks out"].number for i in pair] for pair in ((0, 1), (2, 3)))
    (difference,) = (item for item in document["differences"] if item["measure"] == "L0, sinks out")
    assert (difference["arm"], difference["baseline"], difference["over"]) == ("b", "a", ["seeds"])
    d = [b[0] - a[0], b[1] - a[1]]
    mean, half = sum(d) / 2, 12.7062 * abs(d[0] - d[1]) / 2  # Student's t at one degree of freedom
    assert difference["difference"]["mean"] == pytest.approx(mean)
    assert difference["difference"]["high"] - mean == pytest.approx(half, rel=1e-4)
    assert table(evaluation_page(found), "comparison")["L0, sinks out"]["a"].value == pytest.approx(sum(a) / 2)


def test_seeds_without_a_partner_are_compared_with_none(run, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setitem(EVALS, "once", Eval("once", "arm", "", lambda subject: seen.append(subject.source.name) or {}))
    partner = Eval("partner", "pair", "", lambda subject: {"with": subject.baseline.source.name})
    monkeypatch.setitem(EVALS, "partner", partner)
    names = [("cosine_topk", 1), ("inner_product_topk", 0), ("cosine_topk", 2), ("inner_product_topk", 2)]
    sources = [saved_sae(tmp_path / arm / f"seed{seed}", seed=seed) for arm, seed in names]
    found = evaluate(sources, with_evals("once", "partner"), tmp_path / "out")
    document = found.document()
    found = [(entry["arm"], entry["seed"], entry["baseline"]) for entry in document["saes"]]
    assert found == [
        ("inner_product_topk", 0, None),
        ("inner_product_topk", 2, sources[1]),
        ("cosine_topk", 1, None),
        ("cosine_topk", 2, sources[3]),
    ]
    assert [entry["results"].get("partner") for entry in document["saes"]] == [
        None,
        {"with": sources[1]},
        None,
        {"with": sources[3]},
    ]
    assert seen == [sources[1], sources[0]]  # the first of each arm
    assert [(item["arm"], item["seed"]) for item in document["unpaired"]] == [
        ("cosine_topk", 1),
        ("inner_product_topk", 0),
    ]
    chosen = evaluate(sources, with_evals("once"), tmp_path / "out", baseline="cosine_topk")
    assert (chosen.baseline, chosen.saes[0].arm) == ("cosine_topk", "cosine_topk")


def test_a_gap_in_one_task_is_divided_over_its_splits(run, tmp_path):
    twin = SAE.load_from_disk(run[1][0])
    twin.b_enc.data[0] -= 0.1
    twin.save_model(tmp_path / "twin")
    settings = with_evals("decomposition", tasks=TASKS[:1], task_texts=20)
    found = evaluate([run[1][0], str(tmp_path / "twin")], settings, tmp_path / "out")
    document = found.document()
    parts = document["saes"][1]["results"]["decomposition"]["with_sinks"]
    assert {tuple(part["gap"]["shape"]) for part in parts} == {(5,)}


def test_features_are_not_matched_across_activations(run, tmp_path):
    other = SAE.load_from_disk(run[1][1])
    other.cfg.metadata.hook_name = "blocks.2.hook_resid_post"
    other.save_model(tmp_path / "elsewhere")
    found = evaluate([run[1][0], str(tmp_path / "elsewhere")], with_evals("tokens", "matching"), tmp_path / "out")
    document = found.document()
    assert [text["hook"] for text in document["texts"]] == [HOOK, "blocks.2.hook_resid_post"]
    assert "not measured on the same activations" in document["saes"][1]["results"]["matching"]["not_applicable"]

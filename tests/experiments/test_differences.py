"""Differences between arms: of the printed figures, paired by seed and by document."""

import numpy as np
import pytest
import torch

from saelens_cosine.activations.sample import TokenSample
from saelens_cosine.experiments.evaluate.command import as_tables
from saelens_cosine.experiments.evaluate.evals.of_sae.probing import ProbingByTask
from saelens_cosine.experiments.evaluate.evals.of_sae.reconstruction import FVEByDocument, Reconstructed
from saelens_cosine.experiments.evaluate.results.evaluation import Evaluation, MeasuredSAE
from saelens_cosine.experiments.evaluate.results.listing import about_differences, summary
from saelens_cosine.experiments.evaluate.run import _baseline
from saelens_cosine.experiments.evaluate.settings import EvaluationSettings
from saelens_cosine.experiments.evaluate.sources import parse_sources
from saelens_cosine.metrics.intervals import DocumentErrors
from saelens_cosine.metrics.norm_ranges import ByNorm, WithAndWithoutTop
from saelens_cosine.metrics.probing.probing import KProbe
from saelens_cosine.metrics.reconstruction.by_norm import ReconstructionDiagnostics
from saelens_cosine.metrics.reconstruction.dead import DeadShares
from saelens_cosine.metrics.reconstruction.documents import fve_by_document
from saelens_cosine.metrics.reconstruction.fve import Fit

TOTAL = [1.0, 2, 3, 4, 5, 6, 7, 8, 9, 55]  # 100 in sum


def entry(arm, seed, fve, text="text", total=TOTAL, tasks=None):
    """An SAE with these fractions of variance explained in each document."""
    total = np.asarray(total)
    residual = (1 - np.broadcast_to(fve, total.shape)) * total
    fit = Fit(1000, 0, 1 - residual.sum() / total.sum(), 0.8, 0.8, 0.8, 0.9, 1.0, 1.0, 8.0 + seed, 0.0, 0.0)
    diagnostics = ReconstructionDiagnostics(
        WithAndWithoutTop(ByNorm(fit, ()), ByNorm(fit, ()), 1.0, 0), DeadShares(1000, 0.0, 0.0, 0.0, 100, None, None)
    )
    errors = DocumentErrors(tuple(residual.tolist()), tuple(total.tolist()))
    documents = FVEByDocument(text=text, documents=tuple(range(len(total))), with_sinks=errors)
    results = {"reconstruction": Reconstructed(with_sinks=diagnostics, fve_by_document=documents)}
    if tasks is not None:
        probes = tuple((KProbe(1, 0.0, 0.0, tuple(accuracies), (), ()),) for accuracies in tasks.values())
        by_units = {"canonical": probes}
        results["probing"] = ProbingByTask(tasks=tuple(tasks), texts=(9,) * len(tasks), with_sinks=by_units)
    return MeasuredSAE(results=results, seconds={}, arm=arm, seed=seed, metadata={}, trained={}, held_out=True)


def found_in(saes):
    settings = EvaluationSettings(evals=("reconstruction", "probing"))
    return Evaluation(settings, "", None, {}, (), tuple(saes))


def of(saes, measure="FVE, sinks in"):
    return [item for item in found_in(saes).differences if item.measure == measure]


def test_a_difference_is_that_of_the_printed_figures():
    # nine short documents: .9 and .8; the long one: .7 and .75
    a, b = [0.9] * 9 + [0.7], [0.8] * 9 + [0.75]
    printed = (45 * 0.9 + 55 * 0.7) / 100 - (45 * 0.8 + 55 * 0.75) / 100  # +.0175; the mean over documents is +.085
    saes = [entry("inner", 0, b), entry("cosine", 0, a)]
    (one,) = of(saes)
    assert (one.arm, one.baseline, one.over, one.difference.shape) == ("cosine", "inner", ("documents",), (10,))
    assert one.difference.mean == pytest.approx(printed, abs=1e-12)
    assert one.difference.mean == (summary(saes[1:])["FVE, sinks in"].value - summary(saes[:1])["FVE, sinks in"].value)
    (two,) = of([*saes[:1], entry("inner", 1, b), *saes[1:], entry("cosine", 1, 0.9)])
    other = 0.9 - (45 * 0.8 + 55 * 0.75) / 100
    assert (two.over, two.difference.shape) == (("seeds",), (2,))
    assert two.difference.mean == pytest.approx((printed + other) / 2, abs=1e-12)


def test_seeds_are_paired_by_number_and_those_without_a_partner_named():
    inner = [entry("ip", seed, fve) for seed, fve in ((0, 0.80), (1, 0.60), (2, 0.70))]
    cosine = [entry("cos", seed, fve) for seed, fve in ((0, 0.81), (2, 0.71), (3, 0.99))]
    (found,) = of([*inner, *cosine])
    assert found.difference.mean == pytest.approx(0.01)  # by order, 2 would be paired with 1: +.06
    assert found.difference.shape == (2,)
    (l0,) = of([*inner, *cosine], "L0, sinks in")
    assert l0.difference.mean == 0
    both = found_in([*inner, *cosine])
    assert both.unpaired == [
        {"arm": "cos", "condition": "", "seed": 3, "without": "ip"},
        {"arm": "ip", "condition": "", "seed": 1, "without": "cos"},
    ]
    assert "seed 3 of cos (ip has none), seed 1 of ip (cos has none)" in about_differences(both)[-1]


def test_no_seed_in_common_is_no_difference():
    saes = [entry("ip", 0, 0.8), entry("ip", 1, 0.8), entry("cos", 2, 0.9)]
    assert found_in(saes).differences == ()
    assert [item["seed"] for item in found_in(saes).unpaired] == [2, 0, 1]


def test_other_tokens_and_few_documents_have_no_interval():
    (elsewhere,) = of([entry("ip", 0, 0.8), entry("cos", 0, 0.9, text="other")])
    (few,) = of([entry("ip", 0, 0.8, total=TOTAL[:9]), entry("cos", 0, 0.9, total=TOTAL[:9])])
    for found, reason in ((elsewhere, "not measured on the same tokens"), (few, "it takes 10")):
        assert found.difference.mean == pytest.approx(0.1)
        assert (found.difference.low, found.difference.no_interval) == (None, reason)


def test_probing_is_a_difference_of_its_mean_over_tasks_and_splits():
    ours, theirs = {"loop": [0.9, 0.8], "class": [0.7, 0.6]}, {"loop": [0.5, 0.6], "class": [0.7, 0.8]}
    for saes, over in (
        ([entry("ip", 0, 0.8, tasks=theirs), entry("cos", 0, 0.8, tasks=ours)], ("tasks", "splits")),
        (
            [entry(arm, i, 0.8, tasks=tasks) for arm, tasks in (("ip", theirs), ("cos", ours)) for i in (0, 1)],
            ("seeds", "tasks", "splits"),
        ),
    ):
        (found,) = of(saes, "probing k=1, canonical, sinks in")
        assert found.over == over
        assert found.difference.mean == pytest.approx(0.75 - 0.65)
    renamed = dict(zip(("other", "tasks"), ours.values(), strict=True))
    saes = [entry("ip", 0, 0.8, tasks=theirs), entry("cos", 0, 0.8, tasks=renamed)]
    assert not of(saes, "probing k=1, canonical, sinks in")  # no pairs


def test_the_json_says_what_intervals_are_over_and_how_many_mean_nothing():
    two = found_in([entry(arm, seed, 0.8 + seed / 100) for arm in ("ip", "cos") for seed in (0, 1)]).document()
    assert (two["baseline"], two["unpaired"]) == ("ip", [])
    intervals = two["intervals"]
    # FVE twice, cosine, norm ratio, L0, never and rarely fired, dead in a batch; one in twenty leaves out zero by chance
    assert (intervals["looked_at"], intervals["exclude_zero"], intervals["expected_by_chance"]) == (8, 0, 0.4)
    assert list(intervals["assumptions"]) == ["seeds"]
    assert "88 % at three seeds" in intervals["assumptions"]["seeds"]
    one = found_in([entry("ip", 0, 0.8), entry("cos", 0, 0.9)]).document()
    assert list(one["intervals"]["assumptions"]) == ["documents"]
    alone = found_in([entry("ip", 0, 0.8)])
    assert (alone.differences, alone.chance.looked_at) == ((), 0)
    assert about_differences(alone) == []


def test_a_seed_without_a_partner_is_matched_with_none():
    sources = parse_sources([f"x/{arm}/seed{seed}" for arm, seeds in (("ip", "012"), ("cos", "024")) for seed in seeds])
    found = [(source.arm, source.seed, (against := _baseline(sources, source)) and against.seed) for source in sources]
    assert found == [("ip", 0, None), ("ip", 1, 0), ("ip", 2, 0), ("cos", 0, 0), ("cos", 2, 2), ("cos", 4, None)]


def test_sums_by_document_are_those_of_the_formula():
    torch.manual_seed(0)
    x, error = torch.randn(2, 5000, 3) + 2  # more than are taken at once
    document = torch.randint(40, 47, (5000,))
    ordinary = (torch.rand(5000) > 0.1) & (document != 43)  # without sinks, a document is empty
    numbers = torch.arange(5000)
    sample = TokenSample(x, numbers, numbers, document, numbers, ordinary, 10.0)
    errors = dict(zip(map(tuple, x.tolist()), error, strict=True))

    def reconstruct(part):
        return part - torch.stack([errors[tuple(row)] for row in part.tolist()])

    found = fve_by_document(reconstruct, sample, ("with_sinks", "without_sinks"))
    assert found.documents == tuple(range(40, 47))
    for treatment, keep in (("with_sinks", torch.ones_like(ordinary)), ("without_sinks", ordinary)):
        for part, values in (("residual", error), ("total", x)):
            about = values.double() - values[keep].double().mean(dim=0)
            expected = [about[keep & (document == i)].square().sum().item() for i in range(40, 47)]
            assert getattr(found.by_treatment[treatment], part) == pytest.approx(expected, rel=1e-5, abs=1e-6)
    other = TokenSample(x, numbers + 1, numbers, document, numbers, ordinary, 10.0)
    assert fve_by_document(reconstruct, other, ()).text != found.text


def test_the_table_shows_means_intervals_and_what_they_are_worth():
    saes = [entry("ip", 0, 0.8), entry("cos", 0, 0.9), entry("short", 0, 0.7, text="other")]
    table = next(table for table in as_tables(found_in(saes)) if table.title.startswith("Difference"))
    assert table.title.startswith("Difference to ip")
    assert [list(column.cells) for column in table.columns][3] == [
        "+0.1000 (+0.1000 to +0.1000)",
        "-0.1000 (no interval: not measured on the same tokens)",
    ]
    assert "1 of 1 intervals leave out zero; without any true difference, about 0.1 would by chance." in table.caption

"""Reports for the tests of `report.html`: small, hostile, and as large as they come."""

import json
from dataclasses import replace

import torch

from saelens_cosine.metrics.dictionary.features import Context, TokenValue
from saelens_cosine.report.html import ReportData
from saelens_cosine.report.html.data import (
    Arm,
    Curve,
    Difference,
    Estimate,
    Feature,
    LeftOut,
    Listed,
    MatchedFeatures,
    MatchedPair,
    NormQuartiles,
    PrecisionCurve,
    Probing,
    ScaleResponse,
    ZFPoints,
)

SECTIONS = {
    "comparison": {"arms": (Arm("one", metrics={"FVE": Estimate(0.9, 0.8, 0.95)}),)},
    "differences": {"differences": (Difference("two", "one", "FVE", Estimate(0.1, -0.1, 0.3)),)},
    "curves": {"arms": (Arm("one", curves={"FVE": (Curve((0.0, 10.0), (0.1, 0.5)),)}),)},
    "exponents": {"arms": (Arm("one", exponents=(-0.1, 0.2, 0.7)),)},
    "norms": {"quartiles": (NormQuartiles("one", "in", (Estimate(0.5), Estimate(0.6)), (1.0, 2.0, 4.0), (5, 5)),)},
    "zf": {"zf": (ZFPoints("one", (1.0, 2.0), (0.5, 2.5), "in", 2, 0.875, 0.5),)},
    "scaling": {"scaling": (ScaleResponse("one", "b_dec", (0.5, 2.0), (Estimate(0.9), Estimate(0.8)), 0.7),)},
    "probing": {"probing": (Probing("task", "one", "1", Estimate(0.8, 0.7, 0.9)),)},
    "precision": {
        "precision": (PrecisionCurve("one", (1, 10), (Estimate(3.0), Estimate(2.0)), (0.1, 0.2), (0.01, 0.03)),)
    },
    "matches": {"matches": (MatchedFeatures("two", "one", (MatchedPair(3, 5, 0.9, 0.8, 0.25),), 4, 2, 1),)},
    "saes": {"saes": ({"arm": "one", "learning rate": "0.005"}, {"arm": "two", "place": "runs/two"})},
    "figures": {
        "listed": (Listed("loss", "KL, nats", {"one": 0.25, "two": 0.5}),),
        "left_out": (LeftOut("decomposition", "two", "No feature has a match."),),
    },
    "features": {
        "features": (Feature("one", 4, 0.01, 0.3, (Context((" a", "b"), (0.0, 2.0)),), (TokenValue("x", 1.5),)),)
    },
}
"""The smallest data of every section, by the section's id."""


def everything() -> ReportData:
    """All sections in one report, two arms and a third that only has differences."""
    fields = {name: value for section in SECTIONS.values() for name, value in section.items()}
    arms = (
        Arm(
            "one",
            "saelens_name",
            {"FVE": Estimate(0.9, 0.8, 0.95), "L0": Estimate(31.5)},
            {"FVE": (Curve((0.0, 10.0), (0.1, 0.5)),)},
            (-0.1, 0.2, 0.7),
        ),
        Arm("two", metrics={"FVE": Estimate(0.8, 0.7, 0.85)}, exponents=(0.1,)),
    )
    return ReportData("Title", {"model": "bundled"}, **{**fields, "arms": arms})


EVIL = '</script><script>window.hacked=1</script><img src=x onerror="window.hacked=1">\'"&amp;<!--'


def evil_report() -> ReportData:
    """Every text of a report tries to leave its place."""
    context = Context((EVIL, "\n", "\ud800", "\0", "é\u2028"), (1.0, 0.5, 0.25, -0.5, 2.0))
    plain = everything().to_dict()
    data = ReportData.from_dict(
        json.loads(json.dumps(plain).replace('"one"', json.dumps(EVIL)).replace('"two"', '"<i>"'))
    )
    feature = Feature(EVIL, 7, 0.1, None, (context,), (TokenValue(EVIL, 1.0),), (TokenValue("\t", -1.0),))
    return replace(
        data, title=EVIL, facts={EVIL: EVIL}, probing=(Probing(EVIL, EVIL, EVIL, Estimate(0.5)),), features=(feature,)
    )


def many_features(n: int = 2000) -> ReportData:
    """A full report: `everything` with n features of 8 contexts of 29 tokens, 20,000 different tokens."""
    rng = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 20_000, (n, 8, 29), generator=rng).tolist()
    strengths = (torch.rand(n, 8, 29, generator=rng) ** 12 * 50).tolist()
    features = []
    for i in range(n):
        contexts = []
        for tokens, values in zip(ids[i], strengths[i], strict=True):
            words, codes = [f" token{t}" for t in tokens], [v if v > 5 else 0.0 for v in values]
            words[20], codes[20] = (" needle" if i % 500 == 7 else " common"), 50 + (i % 500) / 10
            if i in (3, 5, 9):  # not active, active on both words but not between them, active on both in one run
                words[:3] = {
                    3: (" straw", "berry", " of"),
                    5: (" straw", " of", "berry"),
                    9: (" straw", "berry", " of"),
                }[i]
                codes[:3] = {3: (0.0, 0.0, 0.0), 5: (2.0, 0.0, -2.0), 9: (2.0, 2.0, 0.0)}[i]
            contexts.append(Context(tuple(words), tuple(codes)))
        density = 10 ** (-1 - i % 4)
        features.append(Feature(("one", "two")[i % 2], i, density, i / n if i % 2 else None, tuple(contexts)))
    dots = torch.rand(5, 2000, generator=rng).tolist()
    pairs = tuple(MatchedPair(i, i, *(dots[j][i] for j in range(3))) for i in range(2000))
    return replace(
        everything(),
        features=tuple(features),
        matches=(MatchedFeatures("one", "two", pairs, 2500, 2000, 500),),
        zf=(ZFPoints("one", tuple(dots[3]), tuple(dots[4]), "out", 2000, 1.0, 0.5),),
    )
